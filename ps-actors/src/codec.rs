//! Turns a message into bytes: a small header, and the bulk numbers beside it.
//!
//! Weights and gradients are not serialized number by number. [`encode`] writes a message into a
//! header in which each run of numbers is only its length, and hands the numbers out beside it,
//! shared and in order, for a transport to write as they are; [`decode`] puts them back. (The idea of
//! pickle's protocol 5, PEP 574.) Inside one process nothing is encoded at all.
//!
//! Only this module knows bincode, so that replacing it touches one file.

use std::cell::RefCell;
use std::ops::{Deref, Range};
use std::sync::Arc;
use std::thread::LocalKey;

use serde::de::{DeserializeOwned, Error as _};
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::buffer::Buffer;
use crate::schema::is_tracing;
use crate::spread::norm_squared;

/// The longest header, in bytes. Far more than a message needs: its bulk is not in it.
pub const MAX_HEADER: usize = 1 << 20;

/// How much a header may claim when it is read. bincode counts numbers as they are in memory, up to
/// sixteen bytes for each one that was written: with less, headers could be written but not read.
const MAX_CLAIM: usize = 16 * MAX_HEADER;

const CONFIG: bincode::config::Configuration<
    bincode::config::LittleEndian,
    bincode::config::Varint,
    bincode::config::Limit<MAX_CLAIM>,
> = bincode::config::standard().with_limit::<MAX_CLAIM>();

/// Why a message could not be turned into bytes or back.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The message cannot be written.
    #[error("cannot encode a {message}")]
    Encode {
        /// The message's type.
        message: &'static str,
        /// Why.
        #[source]
        source: bincode::error::EncodeError,
    },
    /// The bytes are no such message.
    #[error("cannot decode a {message} of a header of {len} bytes")]
    Decode {
        /// The message's type.
        message: &'static str,
        /// The header's length.
        len: usize,
        /// Why.
        #[source]
        source: bincode::error::DecodeError,
    },
    /// There is more than the message.
    #[error(
        "{num_bytes} bytes of header and {num_buffers} buffers are left over after a {message}"
    )]
    LeftOver {
        /// The message's type.
        message: &'static str,
        /// Bytes behind the message.
        num_bytes: usize,
        /// Buffers that it did not use.
        num_buffers: usize,
    },
    /// The header is longer than allowed.
    #[error(
        "everything but its bulk numbers takes {len} bytes, and {MAX_HEADER} is the most: split the message"
    )]
    TooLong {
        /// The header's length.
        len: usize,
    },
}

/// A run of numbers, shared.
#[derive(Clone, Debug)]
pub struct Bulk {
    pub(crate) data: Arc<Buffer>,
    pub(crate) range: Range<usize>,
}

impl Bulk {
    /// Returns the sum of the squares of the numbers.
    pub(crate) fn norm_squared(&self) -> f64 {
        match self.range == (0..self.data.len()) {
            true => self.data.norm_squared(),
            false => norm_squared(self),
        }
    }

    /// Takes the numbers out, copying them if somebody else has them, too.
    pub(crate) fn into_buffer(self) -> Buffer {
        let Self { data, range } = self;
        if range != (0..data.len()) {
            return Buffer::from(data[range].to_vec());
        }
        Arc::try_unwrap(data).unwrap_or_else(|shared| Buffer::from(shared.to_vec()))
    }
}

impl From<Bulk> for Vec<f32> {
    /// Takes the numbers out, copying them if somebody else has them, too.
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

impl From<Buffer> for Bulk {
    fn from(data: Buffer) -> Self {
        let range = 0..data.len();
        Self {
            data: Arc::new(data),
            range,
        }
    }
}

impl From<Vec<f32>> for Bulk {
    fn from(values: Vec<f32>) -> Self {
        let range = 0..values.len();
        Self {
            data: Arc::new(Buffer::from(values)),
            range,
        }
    }
}

/// A message as bytes.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// Everything but the bulk numbers.
    pub header: Vec<u8>,
    /// The bulk numbers, in the order in which [`decode`] wants them.
    pub bulk: Vec<Bulk>,
}

/// Something encoded inside a message; what it is, the two ends know.
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
    /// Turns it back into what it was.
    pub(crate) fn read<T: DeserializeOwned>(self) -> Result<T, CodecError> {
        let bulk = self.bulk.into_iter().map(Bulk::into_buffer).collect();
        decode(&self.header, bulk)
    }
}

thread_local! {
    /// The runs of numbers of the message that this thread encodes.
    static OUTGOING: RefCell<Option<Vec<Bulk>>> = const { RefCell::new(None) };
    /// Those of the message that it decodes, the next one last.
    static INCOMING: RefCell<Option<Vec<Buffer>>> = const { RefCell::new(None) };
}

/// Lends a message's runs of numbers to this thread, and puts back what was there before, also when
/// the message panics.
struct Lent<T: 'static> {
    place: &'static LocalKey<RefCell<Option<Vec<T>>>>,
    outer: Option<Vec<T>>,
}

impl<T> Lent<T> {
    fn new(place: &'static LocalKey<RefCell<Option<Vec<T>>>>, runs: Vec<T>) -> Self {
        let outer = place.replace(Some(runs));
        Self { place, outer }
    }

    /// What is there now.
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
/// When the message has something that bincode cannot write, or its header gets too long.
pub fn encode<T: Serialize>(message: &T) -> Result<Encoded, CodecError> {
    let name = std::any::type_name::<T>();
    // A value may encode another one on its way, so the outer one's runs are put aside.
    let lent = Lent::new(&OUTGOING, Vec::new());
    let header = bincode::serde::encode_to_vec(message, CONFIG);
    let bulk = lent.take();
    let header = header.map_err(|source| CodecError::Encode {
        message: name,
        source,
    })?;
    match header.len() {
        0..=MAX_HEADER => Ok(Encoded { header, bulk }),
        len => Err(CodecError::TooLong { len }),
    }
}

/// Turns bytes back into a message, which takes over the buffers.
///
/// # Errors
/// When the bytes are not such a message: from a peer they can be anything.
pub fn decode<T: DeserializeOwned>(header: &[u8], bulk: Vec<Buffer>) -> Result<T, CodecError> {
    let (message, len) = (std::any::type_name::<T>(), header.len());
    if len > MAX_HEADER {
        return Err(CodecError::TooLong { len });
    }
    let lent = Lent::new(&INCOMING, bulk.into_iter().rev().collect());
    let decoded = bincode::serde::decode_from_slice(header, CONFIG);
    let left = lent.take();
    let (value, used) = decoded.map_err(|source| CodecError::Decode {
        message,
        len,
        source,
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

/// Writes the length into the header and hands the numbers out beside it.
impl Serialize for Bulk {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        OUTGOING.with_borrow_mut(|outgoing| match outgoing {
            Some(bulk) => {
                bulk.push(self.clone());
                Ok(())
            }
            None => Err(S::Error::custom(
                "weights and gradients are encoded by `codec` only",
            )),
        })?;
        self.len().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Bulk {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let len = usize::deserialize(deserializer)?;
        if is_tracing() {
            return Ok(Self::from(Vec::new()));
        }
        let next = INCOMING.with_borrow_mut(|incoming| incoming.as_mut().and_then(Vec::pop));
        let data = next.ok_or_else(|| D::Error::custom("a buffer is missing"))?;
        if data.len() != len {
            let got = data.len();
            return Err(D::Error::custom(format!(
                "a buffer has {got} numbers, not {len}"
            )));
        }
        Ok(Self {
            data: Arc::new(data),
            range: 0..len,
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::error::Error;

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
    use crate::server::{ApplyGradients, GroupError, Join, Pushed, Reduction, ServerError, Stage};
    use crate::weights::{Gradient, Gradients, Layout, Weights};
    use crate::worker::{RunReport, WorkerError};

    /// Returns what arrives of an error, having checked that it says what was sent, and so do
    /// all its sources.
    pub(crate) fn check_error_crosses<E>(sent: &E) -> E
    where
        E: Error + Serialize + DeserializeOwned + 'static,
    {
        let got = transport(sent).expect("an error can cross");
        assert_eq!(chain(&got), chain(sent));
        got
    }

    fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
        std::iter::successors(Some(error), |&error| error.source())
            .map(ToString::to_string)
            .collect()
    }

    pub(crate) fn transport<T: Serialize + DeserializeOwned>(message: &T) -> Result<T, CodecError> {
        let Encoded { header, bulk } = encode(message)?;
        decode(
            &header,
            bulk.iter()
                .map(|bulk| Buffer::from(bulk.to_vec()))
                .collect(),
        )
    }

    fn gradients(values: Vec<f32>) -> Gradients {
        let (worker, incarnation) = (WorkerId(3), Incarnation(u64::MAX));
        Gradients {
            id: GradientId {
                worker,
                incarnation,
                clock: Clock(7),
            },
            computed_on: Version(6),
            loss: 0.25,
            num_examples: 32,
            gradient: Gradient::new(values),
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_comes_back_bit_for_bit(
            first in proptest::collection::vec(any::<f32>(), 0..100),
            second in proptest::collection::vec(any::<f32>(), 0..100),
        ) {
            let sent = ApplyGradients {
                gradients: vec![gradients(first.clone()), gradients(second.clone())],
                reduction: Reduction::Sum,
            };
            let got = transport(&sent).unwrap();
            prop_assert_eq!(got.reduction, sent.reduction);
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            for (got, sent) in got.gradients.iter().zip(&sent.gradients) {
                prop_assert_eq!(bits(got.gradient.values()), bits(sent.gradient.values()));
                prop_assert_eq!(got.gradient.norm().to_bits(), sent.gradient.norm().to_bits());
                prop_assert_eq!((got.id, got.computed_on), (sent.id, sent.computed_on));
            }
        }

        /// PS-6: whatever a peer sends is a message or an error.
        #[test]
        fn arbitrary_bytes_do_no_harm(
            header in proptest::collection::vec(any::<u8>(), 0..200),
            lengths in proptest::collection::vec(0usize..20, 0..4),
        ) {
            let bulk = || lengths.iter().map(|&len| Buffer::from(vec![0.5; len])).collect();
            let _ = decode::<ApplyGradients>(&header, bulk());
            let _ = decode::<Weights>(&header, bulk());
            let _ = decode::<Stage>(&header, bulk());
            let _ = decode::<Result<Pushed, ServerError>>(&header, bulk());
            let _ = decode::<Result<RunReport, WorkerError>>(&header, bulk());
            let _ = decode::<GroupError>(&header, bulk());
        }

        /// A message that was damaged on the way, in header or buffers.
        #[test]
        fn damaged_messages_do_no_harm(place: prop::sample::Index, byte: u8, len in 0usize..20) {
            let Encoded { mut header, .. } = encode(&gradients(vec![1.0; 10])).unwrap();
            *place.get_mut(&mut header) = byte;
            let _ = decode::<Gradients>(&header, vec![Buffer::from(vec![1.0; len])]);
        }
    }

    /// PS-6: a peer that claims a text of a terabyte gets no memory for it.
    #[test]
    fn a_claimed_length_is_refused_before_there_is_room_for_it() {
        let sent: Result<RunReport, WorkerError> = Err(WorkerError::Source {
            worker: WorkerId(3),
            clock: Clock(7),
            source: "".into(),
        });
        let Encoded { mut header, .. } = encode(&sent).unwrap();
        assert_eq!(header.pop(), Some(0), "the length of the empty text");
        // 253 says that the eight bytes of a number follow.
        header.push(253);
        header.extend((1u64 << 40).to_le_bytes());
        let got = decode::<Result<RunReport, WorkerError>>(&header, vec![]);
        let Err(CodecError::Decode { source, .. }) = got else {
            panic!("{got:?}");
        };
        let refused = bincode::error::DecodeError::LimitExceeded;
        assert_eq!(source.to_string(), refused.to_string());
    }

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

    #[test]
    fn the_bulk_is_shared_and_the_header_small() {
        let message = gradients(vec![1.5; 100_000]);
        let encoded = encode(&message).unwrap();
        assert!(encoded.header.len() < 64, "{} bytes", encoded.header.len());
        assert!(std::ptr::eq(
            encoded.bulk[0].as_ptr(),
            message.gradient.values().as_ptr()
        ));
    }

    #[test]
    fn a_part_of_a_gradient_travels_alone() {
        let whole = Gradient::new((0..10).map(|i| i as f32).collect::<Vec<_>>());
        let sent = Stage {
            id: gradients(vec![]).id,
            gradient: whole.slice(4..7),
        };
        let got = transport(&sent).unwrap().gradient;
        assert_eq!((got.range(), got.values()), (4..7, &[4.0, 5.0, 6.0][..]));
        assert_eq!(got.norm(), whole.norm());
        assert_eq!(got.slice(5..6).values(), [5.0]);
    }

    #[test]
    fn a_snapshot_travels_with_its_version_and_layout() {
        let sent = Weights::initial(Layout::flat(5), vec![1.0, 2.0, 3.0, 4.0, 5.0]);
        let got = transport(&sent).unwrap();
        assert_eq!(
            (got.version(), got.layout()),
            (sent.version(), sent.layout())
        );
        assert_eq!(got.to_vec(), sent.to_vec());
    }

    /// A peer cannot slip a gradient past the guard by claiming a harmless norm.
    #[test]
    fn a_norm_that_does_not_fit_the_numbers_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, 1e6] {
            let Encoded { header, .. } = encode(&gradients(vec![1.0; 3])).unwrap();
            let error = decode::<Gradients>(&header, vec![Buffer::from(vec![1.0, bad, 1.0])]);
            assert!(
                matches!(error, Err(CodecError::Decode { .. })),
                "{bad}: {error:?}"
            );
        }
    }

    #[test]
    fn too_much_and_too_little_are_refused() {
        let join = Join {
            worker: WorkerId(1),
            request: JoinRequest(2),
        };
        let Encoded { mut header, .. } = encode(&join).unwrap();
        let extra = decode::<Join>(&header, vec![Buffer::from(vec![0.0])]).unwrap_err();
        assert!(
            extra.to_string().contains("1 buffers are left over"),
            "{extra}"
        );
        header.push(0);
        assert!(matches!(
            decode::<Join>(&header, vec![]),
            Err(CodecError::LeftOver { .. })
        ));
        let long = vec![0; MAX_HEADER + 1];
        assert!(matches!(
            decode::<Join>(&long, vec![]),
            Err(CodecError::TooLong { .. })
        ));
        let Encoded { header, .. } = encode(&gradients(vec![1.0; 3])).unwrap();
        let missing = decode::<Gradients>(&header, vec![]);
        assert!(
            matches!(missing, Err(CodecError::Decode { .. })),
            "{missing:?}"
        );
        assert!(decode::<Pushed>(&[], vec![]).is_err());
    }
}
