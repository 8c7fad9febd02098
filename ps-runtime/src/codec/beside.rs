//! Bytes and values that travel beside the header of a message.
//!
//! A header is read as a whole before its message is admitted, so it is limited to
//! [`MAX_HEADER`](super::MAX_HEADER) bytes. What may be longer, such as the names of all parameters of a
//! model, travels like bulk numbers: in a buffer of its own, shared with the sender's value and not copied,
//! and counted and limited with the numbers of the message (`NetConfig::max_numbers`). A buffer holds `f32`
//! numbers, so four bytes travel as one number. On the way, numbers are only copied as memory, which keeps
//! all bits.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Bulk, CLAIM, CodecError, Encoded, MAX_HEADER, put_beside, read, take_beside, write};
use crate::schema::is_tracing;

/// The longest value that a [`BulkValue`] carries, in bytes, without the numbers in it.
pub const MAX_VALUE: usize = 64 * MAX_HEADER;

/// The lengths up to which a shorter value may claim less memory than a longer one.
const SHORT: usize = MAX_HEADER;
const MEDIUM: usize = 8 * MAX_HEADER;

/// Bytes in a message that travel beside its header. A clone shares them.
///
/// Use it for bytes that may be too many for a header, or that are sent many times: the header holds only
/// their number.
///
/// ```
/// use ps_runtime::codec::{BulkBytes, encode};
///
/// let bytes = BulkBytes::from(vec![7_u8; 5_000_000]);
/// let encoded = encode(&("a file", bytes.clone()))?;
/// assert!(encoded.header.len() < 20);
/// assert_eq!(bytes[4_999_999], 7);
/// # Ok::<(), ps_runtime::codec::CodecError>(())
/// ```
#[derive(Clone)]
pub struct BulkBytes {
    words: Bulk,
    len: usize,
}

impl BulkBytes {
    /// Whether both are the same bytes in memory.
    #[must_use]
    pub fn ptr_eq(&self, other: &Self) -> bool {
        std::ptr::eq::<[u8]>(&**self, &**other)
    }
}

/// Returns how many numbers take the place of this many bytes.
fn num_words(num_bytes: usize) -> usize {
    num_bytes.div_ceil(size_of::<f32>())
}

impl From<&[u8]> for BulkBytes {
    /// Copies the bytes, once.
    fn from(bytes: &[u8]) -> Self {
        let mut words = vec![0.0; num_words(bytes.len())];
        bytemuck::cast_slice_mut(&mut words)[..bytes.len()].copy_from_slice(bytes);
        Self {
            words: Bulk::from(words),
            len: bytes.len(),
        }
    }
}

impl From<Vec<u8>> for BulkBytes {
    /// Copies the bytes, once.
    fn from(bytes: Vec<u8>) -> Self {
        Self::from(&bytes[..])
    }
}

impl Deref for BulkBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

impl PartialEq for BulkBytes {
    fn eq(&self, other: &Self) -> bool {
        self.ptr_eq(other) || **self == **other
    }
}

impl Eq for BulkBytes {}

/// Shows the length only, because payloads do not belong in logs.
impl fmt::Debug for BulkBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkBytes").field("len", &self.len).finish()
    }
}

/// Writes the number of bytes into the header and hands the bytes out beside it.
impl Serialize for BulkBytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        put_beside(self.words.clone())?;
        self.len.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for BulkBytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let len = usize::deserialize(deserializer)?;
        if is_tracing() {
            return Ok(Self::from(Vec::new()));
        }
        let words = take_beside(num_words(len))?;
        Ok(Self { words, len })
    }
}

/// An encoded value in a message, which travels beside the header. A clone shares the bytes.
///
/// Use it for a value that may be too large for a header, such as a saved state, or for a value whose reader
/// decides later whether to read it. It is encoded when it is made and decoded by [`read`](Self::read), so
/// it can be sent several times without being encoded again. Numbers in it ([`Bulk`]) are shared, as in any
/// message.
///
/// ```
/// use std::collections::BTreeMap;
///
/// use actix::Message;
/// use ps_runtime::codec::{BulkValue, encode};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Serialize, Deserialize)]
/// struct Saved {
///     outcomes: BTreeMap<u64, String>,
/// }
///
/// #[derive(Message, Serialize, Deserialize)]
/// #[rtype(result = "()")]
/// struct Restore {
///     step: u64,
///     saved: BulkValue<Saved>,
/// }
///
/// let outcomes = (0..100_000).map(|step| (step, format!("step {step} was applied")));
/// let saved = BulkValue::new(&Saved { outcomes: outcomes.collect() })?;
/// let message = Restore { step: 100_000, saved };
/// assert!(encode(&message)?.header.len() < 20);
///
/// let Saved { outcomes } = message.saved.read()?;
/// assert_eq!(outcomes[&7], "step 7 was applied");
/// # Ok::<(), ps_runtime::codec::CodecError>(())
/// ```
#[derive(Serialize)]
#[serde(bound = "")]
pub struct BulkValue<T> {
    bytes: BulkBytes,
    bulk: Vec<Bulk>,
    #[serde(skip)]
    value: PhantomData<fn() -> T>,
}

impl<T: Serialize> BulkValue<T> {
    /// Encodes a value.
    ///
    /// # Errors
    /// When the value cannot be written, or when it takes more than [`MAX_VALUE`] bytes.
    pub fn new(value: &T) -> Result<Self, CodecError> {
        let Encoded { header, bulk } = write(value)?;
        check_len::<T>(header.len())?;
        Ok(Self {
            bytes: BulkBytes::from(header),
            bulk,
            value: PhantomData,
        })
    }
}

impl<T: DeserializeOwned> BulkValue<T> {
    /// Decodes the value.
    ///
    /// # Errors
    /// When the bytes are not such a value, or are too many: from a peer they can be anything.
    pub fn read(self) -> Result<T, CodecError> {
        let Self { bytes, bulk, .. } = self;
        check_len::<T>(bytes.len())?;
        let bulk = bulk.into_iter().map(Bulk::into_buffer).collect();
        // bincode takes its limit as a constant.
        match bytes.len() {
            len if len <= SHORT => read::<T, { CLAIM * SHORT }>(&bytes, bulk),
            len if len <= MEDIUM => read::<T, { CLAIM * MEDIUM }>(&bytes, bulk),
            _ => read::<T, { CLAIM * MAX_VALUE }>(&bytes, bulk),
        }
    }
}

/// Takes over an encoded value, for example from a file. Whether it is one shows when it is read.
impl<T> From<BulkBytes> for BulkValue<T> {
    fn from(bytes: BulkBytes) -> Self {
        Self {
            bytes,
            bulk: Vec::new(),
            value: PhantomData,
        }
    }
}

impl<T> BulkValue<T> {
    /// Returns the encoded value, without the numbers in it.
    #[must_use]
    pub fn bytes(&self) -> &BulkBytes {
        &self.bytes
    }
}

fn check_len<T>(len: usize) -> Result<(), CodecError> {
    let value = std::any::type_name::<T>();
    match len {
        0..=MAX_VALUE => Ok(()),
        len => Err(CodecError::ValueTooLong { value, len }),
    }
}

impl<T> Clone for BulkValue<T> {
    fn clone(&self) -> Self {
        Self {
            bytes: self.bytes.clone(),
            bulk: self.bulk.clone(),
            value: PhantomData,
        }
    }
}

impl<T> fmt::Debug for BulkValue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BulkValue")
            .field("type", &std::any::type_name::<T>())
            .field("len", &self.bytes.len)
            .finish()
    }
}

impl<'de, T: Serialize + DeserializeOwned> Deserialize<'de> for BulkValue<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if is_tracing() {
            return traced(deserializer);
        }
        #[derive(Deserialize)]
        struct Wire {
            bytes: BulkBytes,
            bulk: Vec<Bulk>,
        }
        let Wire { bytes, bulk } = Wire::deserialize(deserializer)?;
        Ok(Self {
            bytes,
            bulk,
            value: PhantomData,
        })
    }
}

/// Reads a made-up value, as if it were in the header: two builds compare the type of the value too.
fn traced<'de, T, D>(deserializer: D) -> Result<BulkValue<T>, D::Error>
where
    T: Serialize + DeserializeOwned,
    D: Deserializer<'de>,
{
    #[derive(Deserialize)]
    #[serde(rename = "BulkValue", bound = "T: DeserializeOwned")]
    struct Traced<T> {
        value: T,
    }
    let Traced { value } = Traced::<T>::deserialize(deserializer)?;
    let traced = BulkValue::new(&value).map_err(D::Error::custom)?;
    // Made-up runs of numbers are nowhere, so none is taken when the value is read.
    Ok(BulkValue {
        bulk: Vec::new(),
        ..traced
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::Buffer;
    use crate::codec::{decode, encode};
    use crate::test_util::transport;

    #[test]
    fn bytes_of_every_length_come_back_bit_for_bit() {
        // Among them are the bits of numbers that are not numbers.
        for len in (0..20).chain([1000, 4097]) {
            let sent: Vec<u8> = (0..len).map(|i| (255 - i % 256) as u8).collect();
            let got = transport(&BulkBytes::from(sent.clone())).unwrap();
            assert_eq!(*got, sent[..]);
        }
        let long = BulkBytes::from(vec![0xff; 10 * MAX_HEADER]);
        assert_eq!(transport(&long).unwrap(), long);
    }

    #[test]
    fn bytes_are_sent_without_a_copy() {
        let bytes = BulkBytes::from(vec![1; 1000]);
        let encoded = encode(&bytes).unwrap();
        assert_eq!(encoded.header.len(), 3, "the number of bytes");
        assert_eq!(encoded.bulk[0].as_ptr().cast(), bytes.as_ptr());
        assert!(bytes.ptr_eq(&bytes.clone()));
    }

    /// PS-6: a peer may claim any number of bytes.
    #[test]
    fn bytes_that_are_not_there_are_an_error() {
        for claimed in [0, 4, 9, usize::MAX - 1, usize::MAX] {
            let Encoded { header, .. } = encode(&claimed).unwrap();
            let buffer = vec![Buffer::from(vec![0.0; 2])];
            let error = decode::<BulkBytes>(&header, buffer).unwrap_err();
            assert!(matches!(error, CodecError::Decode { .. }), "{error}");
            assert!(decode::<BulkBytes>(&header, vec![]).is_err());
        }
    }

    #[test]
    fn a_value_that_no_header_can_hold_travels_with_its_numbers() {
        let names: Vec<String> = (0..200_000).map(|i| format!("number {i}")).collect();
        assert!(encode(&names).is_err());
        let numbers = Bulk::from(vec![0.5; 10]);
        let sent = BulkValue::new(&(names.clone(), numbers.clone())).unwrap();
        let encoded = encode(&sent).unwrap();
        assert!(encoded.header.len() < 10);
        assert_eq!(encoded.bulk[1].as_ptr(), numbers.as_ptr());
        let (got, half) = transport(&sent).unwrap().read().unwrap();
        assert!(got == names && half[..] == numbers[..]);
    }

    /// Whatever can be written can be read, however its bytes are counted.
    #[test]
    fn a_value_of_each_class_of_lengths_comes_back() {
        for len in [SHORT - 5, SHORT + 1, MEDIUM - 5, MEDIUM + 1] {
            let sent = vec![1u64; len];
            assert!(BulkValue::new(&sent).unwrap().read().unwrap() == sent);
        }
    }

    #[test]
    fn a_value_that_is_too_long_is_refused_by_writer_and_reader() {
        let long = vec![true; MAX_VALUE];
        let error = BulkValue::new(&long).unwrap_err();
        assert!(matches!(error, CodecError::ValueTooLong { len, .. } if len > MAX_VALUE));
        assert!(
            error.to_string().contains(&MAX_VALUE.to_string()),
            "{error}"
        );
        let sent = BulkValue::<Vec<bool>> {
            bytes: BulkBytes::from(vec![0; MAX_VALUE + 1]),
            bulk: Vec::new(),
            value: PhantomData,
        };
        let error = transport(&sent).unwrap().read().unwrap_err();
        assert!(matches!(error, CodecError::ValueTooLong { .. }), "{error}");
    }

    /// PS-6: a few bytes get no memory for a terabyte, and no bytes or buffers are left over.
    #[test]
    fn bytes_that_are_not_the_value_are_an_error() {
        let value = |bytes: &[u8], bulk: &[Bulk]| BulkValue::<String> {
            bytes: BulkBytes::from(bytes),
            bulk: bulk.to_vec(),
            value: PhantomData,
        };
        let mut terabyte = vec![253];
        terabyte.extend((1u64 << 40).to_le_bytes());
        let number = [Bulk::from(vec![0.0])];
        for (bytes, bulk) in [
            (&[][..], &[][..]),
            (&terabyte, &[]),
            (&[2, b'a'], &[]),
            (&[1, 0xff], &[]),
            (&[1, b'a', 0], &[]),
            (&[1, b'a'], &number),
        ] {
            let got = transport(&value(bytes, bulk)).unwrap().read();
            assert!(got.is_err(), "{bytes:?} are {got:?}");
        }
        let got = transport(&value(&[1, b'a'], &[])).unwrap().read();
        assert_eq!(got.unwrap(), "a");
    }
}
