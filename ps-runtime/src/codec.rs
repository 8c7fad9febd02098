//! Turns a message into bytes: a small header, and the bulk numbers beside it.
//!
//! Weights and gradients are not serialized number by number. [`encode`] writes a message into a
//! header that contains only the length of each run of numbers. It returns the numbers beside the
//! header, shared and in order, so that a transport can write them without a copy. [`decode`] joins
//! header and numbers again. (Pickle's protocol 5, PEP 574, has the same idea.) Messages inside one
//! process are not encoded at all.
//!
//! Whatever else is large goes beside the header too: bytes as [`BulkBytes`], and a value of any type as a
//! [`BulkValue`].
//!
//! Only this module knows bincode, so that replacing it touches nothing else.

use std::cell::RefCell;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::thread::LocalKey;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::buffer::Buffer;
use crate::parallel::norm_squared;
use crate::schema::is_tracing;

pub use self::beside::{BulkBytes, BulkValue, MAX_VALUE};

mod beside;

/// The longest header, in bytes. Usual messages need far less, because their bulk numbers are not in it.
pub const MAX_HEADER: usize = 1 << 20;

/// How many bytes may be claimed for each byte that is read. bincode counts numbers by their size in
/// memory, which is up to 16 bytes for each byte that was written. With a lower limit, some values could be
/// written but not read.
const CLAIM: usize = 16;

/// How many bytes a header may claim when it is read.
const MAX_CLAIM: usize = CLAIM * MAX_HEADER;

/// An error of the serialization library.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why a message could not be turned into bytes or back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The message cannot be written.
    #[error("cannot encode a {message}")]
    Encode {
        /// The message's type.
        message: &'static str,
        /// Why it cannot be written.
        #[source]
        source: Cause,
    },
    /// The bytes cannot be read as such a message.
    #[error("cannot decode a {message} from {len} bytes")]
    Decode {
        /// The message's type.
        message: &'static str,
        /// The length in bytes of the header, or of the value beside it.
        len: usize,
        /// Why it cannot be read.
        #[source]
        source: Cause,
    },
    /// Bytes or buffers are left over after the message.
    #[error(
        "{num_bytes} bytes of header and {num_buffers} buffers are left over after a {message}"
    )]
    LeftOver {
        /// The message's type.
        message: &'static str,
        /// How many bytes of the header are left over.
        num_bytes: usize,
        /// How many buffers are left over.
        num_buffers: usize,
    },
    /// The header is longer than allowed.
    #[error(
        "everything but its bulk numbers takes {len} bytes, and {MAX_HEADER} is the most: split the message"
    )]
    TooLong {
        /// The header's length in bytes.
        len: usize,
    },
    /// A value beside the header is longer than allowed.
    #[error("a {value} takes {len} bytes beside the header, and {MAX_VALUE} is the most: split it")]
    ValueTooLong {
        /// The value's type.
        value: &'static str,
        /// The value's length in bytes.
        len: usize,
    },
}

/// A run of `f32` numbers in a message. A clone shares the numbers.
///
/// Use it in a message for weights, gradients and other large vectors. They are then sent without being
/// copied or converted.
///
/// ```
/// use actix::Message;
/// use ps_runtime::codec::{Bulk, encode};
/// use serde::{Deserialize, Serialize};
///
/// #[derive(Message, Serialize, Deserialize)]
/// #[rtype(result = "()")]
/// struct Push {
///     step: u64,
///     gradient: Bulk,
/// }
///
/// let gradient = Bulk::from(vec![0.5_f32; 1000]);
/// assert_eq!(gradient.slice(10..20).len(), 10);
/// let encoded = encode(&Push { step: 7, gradient })?;
/// assert!(encoded.header.len() < 20);
/// assert_eq!(encoded.bulk[0].len(), 1000);
/// # Ok::<(), ps_runtime::codec::CodecError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Bulk {
    pub(crate) data: Arc<Buffer>,
    range: Range<usize>,
}

impl Bulk {
    /// Returns the sum of the squares of the numbers.
    #[must_use]
    pub fn norm_squared(&self) -> f64 {
        match self.range == (0..self.data.len()) {
            true => self.data.norm_squared(),
            false => norm_squared(self),
        }
    }

    /// Returns a part of the run. The part shares the numbers.
    ///
    /// # Panics
    /// When the range is not within the run.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let len = self.len();
        assert!(
            range.start <= range.end && range.end <= len,
            "{range:?} of {len} numbers"
        );
        let first = self.range.start;
        Self {
            data: Arc::clone(&self.data),
            range: first + range.start..first + range.end,
        }
    }

    /// Returns the shared buffer. If this run is only a part of the buffer, the numbers are copied.
    #[must_use]
    pub fn into_shared(self) -> Arc<Buffer> {
        match self.range == (0..self.data.len()) {
            true => self.data,
            false => Arc::new(Buffer::from(self.to_vec())),
        }
    }

    /// Takes the numbers out. They are copied if they are shared, or if this run is only a part of a buffer.
    #[must_use]
    pub fn into_buffer(self) -> Buffer {
        let Self { data, range } = self;
        if range != (0..data.len()) {
            return Buffer::from(data[range].to_vec());
        }
        Arc::try_unwrap(data).unwrap_or_else(|shared| Buffer::from(shared.to_vec()))
    }
}

impl From<Bulk> for Vec<f32> {
    /// Takes the numbers out. They are copied if they are shared, or if this run is only a part of a buffer.
    fn from(bulk: Bulk) -> Self {
        bulk.into_buffer().into_vec()
    }
}

impl Deref for Bulk {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data[self.range.clone()]
    }
}

impl From<Arc<Buffer>> for Bulk {
    fn from(data: Arc<Buffer>) -> Self {
        let range = 0..data.len();
        Self { data, range }
    }
}

impl From<Buffer> for Bulk {
    fn from(numbers: Buffer) -> Self {
        Self::from(Arc::new(numbers))
    }
}

impl From<Vec<f32>> for Bulk {
    fn from(numbers: Vec<f32>) -> Self {
        Self::from(Buffer::from(numbers))
    }
}

/// A message as bytes.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// Everything but the bulk numbers.
    pub header: Vec<u8>,
    /// The bulk numbers, in the order in which [`decode`] needs them.
    pub bulk: Vec<Bulk>,
}

/// An encoded value inside a message. Both ends know its type.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Blob {
    header: Vec<u8>,
    bulk: Vec<Bulk>,
}

impl From<Encoded> for Blob {
    fn from(encoded: Encoded) -> Self {
        let Encoded { header, bulk } = encoded;
        Self { header, bulk }
    }
}

impl Blob {
    /// Decodes the value.
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<T, CodecError> {
        let bulk = self.bulk.into_iter().map(Bulk::into_buffer).collect();
        decode(&self.header, bulk)
    }
}

thread_local! {
    /// The runs of numbers of the message that this thread encodes.
    static OUTGOING: RefCell<Option<Vec<Bulk>>> = const { RefCell::new(None) };
    /// The runs of numbers of the message that this thread decodes. The next one is last.
    static INCOMING: RefCell<Option<Vec<Buffer>>> = const { RefCell::new(None) };
}

/// Makes the runs of numbers of a message available to this thread. Afterwards it restores the runs that
/// were there before, even if the message panics.
struct Lent<T: 'static> {
    place: &'static LocalKey<RefCell<Option<Vec<T>>>>,
    outer: Option<Vec<T>>,
}

impl<T> Lent<T> {
    fn new(place: &'static LocalKey<RefCell<Option<Vec<T>>>>, runs: Vec<T>) -> Self {
        let outer = place.replace(Some(runs));
        Self { place, outer }
    }

    /// Returns the runs that are there now.
    fn take(self) -> Vec<T> {
        self.place.take().unwrap_or_default()
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        let unused = self.place.replace(self.outer.take());
        drop(unused);
    }
}

/// Turns a message into bytes without copying its bulk.
///
/// # Errors
/// When the message contains a value that bincode cannot write, or when its header is too long.
pub fn encode<T: Serialize>(message: &T) -> Result<Encoded, CodecError> {
    let encoded = write(message)?;
    match encoded.header.len() {
        0..=MAX_HEADER => Ok(encoded),
        len => Err(CodecError::TooLong { len }),
    }
}

/// Turns bytes back into a message, which takes over the buffers.
///
/// # Errors
/// When the bytes are not such a message: from a peer they can be anything.
pub fn decode<T: DeserializeOwned>(header: &[u8], bulk: Vec<Buffer>) -> Result<T, CodecError> {
    match header.len() {
        0..=MAX_HEADER => read::<T, MAX_CLAIM>(header, bulk),
        len => Err(CodecError::TooLong { len }),
    }
}

/// Writes a value of any length.
fn write<T: Serialize>(value: &T) -> Result<Encoded, CodecError> {
    // A value may encode another value while it is written, so the outer runs are put aside.
    let lent = Lent::new(&OUTGOING, Vec::new());
    let header = bincode::serde::encode_to_vec(value, bincode::config::standard());
    let bulk = lent.take();
    let header = header.map_err(|source| CodecError::Encode {
        message: std::any::type_name::<T>(),
        source: source.into(),
    })?;
    Ok(Encoded { header, bulk })
}

/// Reads a value that may claim `MAX_CLAIM` bytes.
fn read<T: DeserializeOwned, const MAX_CLAIM: usize>(
    bytes: &[u8],
    bulk: Vec<Buffer>,
) -> Result<T, CodecError> {
    let (message, len) = (std::any::type_name::<T>(), bytes.len());
    let lent = Lent::new(&INCOMING, bulk.into_iter().rev().collect());
    let config = bincode::config::standard().with_limit::<MAX_CLAIM>();
    let decoded = bincode::serde::decode_from_slice(bytes, config);
    let left = lent.take();
    let (value, used) = decoded.map_err(|source| CodecError::Decode {
        message,
        len,
        source: source.into(),
    })?;
    let (num_bytes, num_buffers) = (len - used, left.len());
    match (num_bytes, num_buffers) {
        (0, 0) => Ok(value),
        _ => Err(CodecError::LeftOver {
            message,
            num_bytes,
            num_buffers,
        }),
    }
}

/// Hands out a run of numbers beside the header that is being written.
fn put_beside<E: serde::ser::Error>(run: Bulk) -> Result<(), E> {
    OUTGOING.with_borrow_mut(|outgoing| match outgoing {
        Some(bulk) => {
            bulk.push(run);
            Ok(())
        }
        None => Err(E::custom(
            "what is beside a header is encoded by `codec` only",
        )),
    })
}

/// Takes the next run of numbers beside the header that is being read. It must have `len` numbers.
fn take_beside<E: serde::de::Error>(len: usize) -> Result<Bulk, E> {
    let next = INCOMING.with_borrow_mut(|incoming| incoming.as_mut().and_then(Vec::pop));
    let data = next.ok_or_else(|| E::custom("a buffer is missing"))?;
    match data.len() == len {
        true => Ok(Bulk::from(data)),
        false => {
            let got = data.len();
            Err(E::custom(format!("a buffer has {got} numbers, not {len}")))
        }
    }
}

/// Writes the length into the header and hands the numbers out beside it.
impl Serialize for Bulk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        put_beside(self.clone())?;
        self.len().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Bulk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let len = usize::deserialize(deserializer)?;
        match is_tracing() {
            true => Ok(Self::from(Vec::new())),
            false => take_beside(len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::transport;

    /// Whatever can be written can be read, however its bytes are counted.
    #[test]
    fn a_header_of_the_greatest_length_comes_back() {
        let small = vec![1u64; MAX_HEADER - 5];
        assert_eq!(transport(&small).unwrap(), small);
        let long = vec![1u64; MAX_HEADER];
        let Err(CodecError::TooLong { len }) = encode(&long) else {
            panic!("it is too long");
        };
        assert_eq!(len, MAX_HEADER + 5);
    }

    /// Its user may catch the panic and go on.
    #[test]
    fn a_panic_while_a_message_is_written_or_read_leaves_nothing_behind() {
        struct Panics;
        impl Serialize for Panics {
            fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
                panic!("a test");
            }
        }
        impl<'de> Deserialize<'de> for Panics {
            fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
                panic!("a test");
            }
        }
        let bulk = Bulk::from(vec![1.0; 3]);
        let caught = std::panic::catch_unwind(|| encode(&(bulk.clone(), Panics)).map(drop));
        assert!(caught.is_err());
        assert!(OUTGOING.with_borrow(Option::is_none));
        assert_eq!(Arc::strong_count(&bulk.data), 1);
        let buffers = || vec![Buffer::from(vec![1.0; 3])];
        let caught = std::panic::catch_unwind(|| decode::<Panics>(&[3], buffers()).map(drop));
        assert!(caught.is_err());
        assert!(INCOMING.with_borrow(Option::is_none));
    }
}
