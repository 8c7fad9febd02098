//! The names and shapes of all parameters of a model, and how they travel.
//!
//! Each snapshot says which layout it has, but a layout does not change during a run. So it is encoded once,
//! and its bytes are sent beside the header, shared and not copied. The receiver compares these bytes with
//! those of the layouts that this process has met lately. If they are equal, the snapshot shares the known
//! layout, and nothing is decoded. Other bytes are decoded and checked, because any process may have sent
//! them (PS-6).

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use ps_runtime::actor::error_chain;
use ps_runtime::codec::BulkValue;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most bytes that the names and shapes of all parameters of a model may take when they are sent. It is
/// enough for about 200,000 parameters.
pub const MAX_LAYOUT: usize = 16 << 20;

/// The place of one parameter in the flat vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parameter {
    /// The path of the parameter in its model, such as `conv1.weight`.
    pub name: String,
    /// The length of each axis. A scalar has no axis.
    pub shape: Vec<usize>,
    /// The place of its numbers in the flat vector, in row-major order.
    pub range: Range<usize>,
}

/// The names and shapes of all parameters of a model, in the order in which they are stored.
///
/// The last ones may be *buffers*: statistics of the model's layers, which no gradient trains (S-20).
///
/// ```
/// use ps_actors::weights::{Layout, Parameter};
///
/// let weight = Parameter { name: "linear.weight".into(), shape: vec![4, 3], range: 0..12 };
/// let bias = Parameter { name: "linear.bias".into(), shape: vec![3], range: 12..15 };
/// let layout = Layout::new(vec![weight.clone(), bias])?;
/// assert_eq!(layout.num_weights(), 15);
///
/// let too_long = Parameter { range: 0..13, ..weight };
/// assert!(Layout::new(vec![too_long]).is_err());
/// # Ok::<(), ps_actors::weights::LayoutError>(())
/// ```
#[derive(Clone)]
pub struct Layout {
    parameters: Vec<Parameter>,
    num_buffers: usize,
    /// The parameters as they travel, or why they cannot travel. They are encoded once.
    encoded: OnceLock<Result<Encoded, String>>,
}

/// The parameters of a layout as they travel, and how many of them are buffers.
type Encoded = BulkValue<(Vec<Parameter>, usize)>;

/// Why parameters do not form a layout.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LayoutError {
    /// A parameter does not follow the one before it, or its shape does not match its range.
    #[error(
        "parameter `{name}` must take the {expected} numbers from {start} on (shape {shape:?}), \
         but claims {range:?}"
    )]
    WrongRange {
        /// The path of the parameter.
        name: String,
        /// The length of each axis.
        shape: Vec<usize>,
        /// Where the parameter before it ends.
        start: usize,
        /// The product of the axes.
        expected: usize,
        /// The range that it claims.
        range: Range<usize>,
    },
    /// The stated number of buffers is larger than the number of parameters.
    #[error("{num_buffers} of {num_parameters} parameters cannot be buffers")]
    TooManyBuffers {
        /// The stated number of buffers.
        num_buffers: usize,
        /// How many parameters there are.
        num_parameters: usize,
    },
}

impl Layout {
    /// Makes a layout of parameters that follow one another, from 0 and without a gap.
    ///
    /// # Errors
    /// If a range does not start where the one before it ends, or if its length is not the product of the
    /// axes of its shape.
    pub fn new(parameters: Vec<Parameter>) -> Result<Self, LayoutError> {
        Self::with_buffers(parameters, 0)
    }

    /// Makes a layout whose last `num_buffers` parameters are buffers.
    ///
    /// # Errors
    /// As [`new`](Self::new), or if there are fewer parameters.
    pub fn with_buffers(
        parameters: Vec<Parameter>,
        num_buffers: usize,
    ) -> Result<Self, LayoutError> {
        let num_parameters = parameters.len();
        if num_buffers > num_parameters {
            return Err(LayoutError::TooManyBuffers {
                num_buffers,
                num_parameters,
            });
        }
        let mut start = 0;
        for Parameter { name, shape, range } in &parameters {
            // Shapes may come from a file or a peer. A product that overflows matches no range.
            let expected = shape
                .iter()
                .try_fold(1usize, |n, &axis| n.checked_mul(axis));
            let expected = expected.unwrap_or(usize::MAX);
            if range.start != start || range.end.checked_sub(start) != Some(expected) {
                let (name, shape, range) = (name.clone(), shape.clone(), range.clone());
                return Err(LayoutError::WrongRange {
                    name,
                    shape,
                    start,
                    expected,
                    range,
                });
            }
            start = range.end;
        }
        Ok(Self {
            parameters,
            num_buffers,
            encoded: OnceLock::new(),
        })
    }

    /// Makes the layout of one parameter of shape `[len]` with the name `weights`.
    #[must_use]
    pub fn flat(len: usize) -> Self {
        let parameter = Parameter {
            name: "weights".to_owned(),
            shape: vec![len],
            range: 0..len,
        };
        Self {
            parameters: vec![parameter],
            num_buffers: 0,
            encoded: OnceLock::new(),
        }
    }

    /// Returns the parameters in order, the buffers last.
    #[must_use]
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Returns how many numbers all parameters have together.
    #[must_use]
    pub fn num_weights(&self) -> usize {
        self.parameters.last().map_or(0, |last| last.range.end)
    }

    /// Returns how many of the parameters are buffers. They are the last ones.
    #[must_use]
    pub fn num_buffers(&self) -> usize {
        self.num_buffers
    }

    /// Returns how many numbers are trained by gradients. The numbers of the buffers stand behind them.
    #[must_use]
    pub fn num_trainable(&self) -> usize {
        let trainable = &self.parameters[..self.parameters.len() - self.num_buffers];
        trainable.last().map_or(0, |last| last.range.end)
    }

    /// Returns the parameters as they travel. Only the first call encodes them.
    fn encoded(&self) -> Result<&Encoded, &String> {
        let encode = || {
            let encoded = BulkValue::new(&(self.parameters.clone(), self.num_buffers));
            let encoded = encoded.map_err(|error| error.to_string())?;
            check_len(encoded.bytes().len())?;
            Ok(encoded)
        };
        self.encoded.get_or_init(encode).as_ref()
    }

    /// Returns the encoded parameters, or nothing if they cannot travel.
    fn bytes(&self) -> &[u8] {
        self.encoded().map_or(&[], |encoded| encoded.bytes())
    }

    /// Returns about how many bytes of memory the layout takes.
    fn num_bytes(&self) -> usize {
        // Names and shapes are allocated one by one, so each takes a little more.
        let of = |parameter: &Parameter| {
            let Parameter { name, shape, .. } = parameter;
            size_of::<Parameter>() + name.capacity() + size_of_val(&shape[..]) + 32
        };
        self.bytes().len() + self.parameters.iter().map(of).sum::<usize>()
    }
}

/// Checks how many bytes a layout takes.
fn check_len(len: usize) -> Result<(), String> {
    match len {
        0..=MAX_LAYOUT => Ok(()),
        _ => Err(format!(
            "the names and shapes of all parameters take {len} bytes, and {MAX_LAYOUT} is the most"
        )),
    }
}

/// Layouts with the same parameters and buffers are equal.
impl PartialEq for Layout {
    fn eq(&self, other: &Self) -> bool {
        let is_equal =
            || self.num_buffers == other.num_buffers && self.parameters == other.parameters;
        std::ptr::eq(self, other) || is_equal()
    }
}

impl Eq for Layout {}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layout")
            .field("parameters", &self.parameters)
            .field("num_buffers", &self.num_buffers)
            .finish()
    }
}

impl From<Layout> for Vec<Parameter> {
    fn from(layout: Layout) -> Self {
        layout.parameters
    }
}

impl Serialize for Layout {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let encoded = self.encoded().map_err(serde::ser::Error::custom)?;
        encoded.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Layout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        shared::deserialize(deserializer).map(Arc::unwrap_or_clone)
    }
}

/// How a layout travels that is shared where it arrives.
pub(super) mod shared {
    use super::{Arc, Deserialize, Deserializer, Encoded, KNOWN, Layout, Serialize, Serializer};

    pub(crate) fn serialize<S: Serializer>(
        layout: &Arc<Layout>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        if layout.encoded.get().is_none() {
            // If it comes back to this process, it is this one.
            KNOWN.remember(layout);
        }
        layout.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Arc<Layout>, D::Error> {
        let encoded = Encoded::deserialize(deserializer)?;
        let found = KNOWN.find_or_read(encoded);
        found.map_err(serde::de::Error::custom)
    }
}

/// How many layouts are known at most. A process needs one for each model that it trains at the same time.
const MAX_KNOWN: usize = 8;

/// How many bytes the known layouts take at most, with their encoded forms.
const MAX_KNOWN_BYTES: usize = 64 << 20;

/// The layouts that this process has sent or received lately.
static KNOWN: Known = Known {
    layouts: Mutex::new(Vec::new()),
};

/// Some layouts. Peers decide which, so their number and their size are bounded.
struct Known {
    /// The one that was used last is last.
    layouts: Mutex<Vec<Arc<Layout>>>,
}

impl Known {
    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Layout>>> {
        // The list is valid after every single operation, so a poisoned lock is still good.
        self.layouts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the layout with these bytes. It is decoded only if it is not known.
    fn find_or_read(&self, encoded: Encoded) -> Result<Arc<Layout>, String> {
        check_len(encoded.bytes().len())?;
        if let Some(known) = self.find(encoded.bytes()) {
            return Ok(known);
        }
        let (parameters, num_buffers) = encoded.read().map_err(|error| error_chain(&error))?;
        let layout = Layout::with_buffers(parameters, num_buffers);
        let layout = layout.map_err(|error| error.to_string())?;
        Ok(self.remember(&Arc::new(layout)))
    }

    fn find(&self, bytes: &[u8]) -> Option<Arc<Layout>> {
        let as_long = |layout: &&Arc<Layout>| layout.bytes().len() == bytes.len();
        let as_long: Vec<_> = self.lock().iter().filter(as_long).cloned().collect();
        // Comparing takes a while, so others do not wait for it.
        let found = as_long.into_iter().find(|layout| layout.bytes() == bytes)?;
        let mut layouts = self.lock();
        let place = layouts.iter().position(|known| Arc::ptr_eq(known, &found));
        // Another thread may have dropped it.
        if let Some(place) = place {
            layouts[place..].rotate_left(1);
        }
        Some(found)
    }

    /// Adds a layout, unless it is too large. If an equal one is known, this one is returned.
    fn remember(&self, layout: &Arc<Layout>) -> Arc<Layout> {
        let size = layout.num_bytes();
        // They are freed after the lock is released.
        let mut unused = Vec::new();
        let mut layouts = self.lock();
        // Two threads may have read the same layout.
        let mut known = layouts.iter();
        if let Some(equal) = known.find(|known| known.bytes() == layout.bytes()) {
            return Arc::clone(equal);
        }
        // One without bytes cannot travel, so it will not be asked for.
        if layout.bytes().is_empty() || size > MAX_KNOWN_BYTES {
            return Arc::clone(layout);
        }
        let mut total: usize = layouts.iter().map(|known| known.num_bytes()).sum();
        while layouts.len() >= MAX_KNOWN || total > MAX_KNOWN_BYTES - size {
            let oldest = layouts.remove(0);
            total -= oldest.num_bytes();
            unused.push(oldest);
        }
        layouts.push(Arc::clone(layout));
        Arc::clone(layout)
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use crate::weights::packed::Packed;
    use ps_runtime::buffer::Buffer;
    use ps_runtime::codec::{Bulk, BulkBytes, CodecError, decode, encode};
    use ps_runtime::test_util::transport;

    use super::*;
    use crate::ids::Version;
    use crate::weights::Weights;

    fn named(name: &str, range: Range<usize>) -> Parameter {
        Parameter {
            name: name.to_owned(),
            shape: vec![range.len()],
            range,
        }
    }

    /// A layout of two parameters. The second name differs from model to model.
    fn model(name: &str) -> Layout {
        Layout::new(vec![named("first", 0..2), named(name, 2..3)]).unwrap()
    }

    fn snapshot(layout: Layout) -> Weights {
        let values = vec![0.5; layout.num_weights()];
        Weights::initial(layout, values)
    }

    /// Receives a snapshot of three weights with these bytes in place of the layout.
    fn receive(bytes: &[u8]) -> Result<Weights, CodecError> {
        let layout = (BulkBytes::from(bytes), Vec::<Bulk>::new());
        let segments = vec![(0_usize, Packed::F32(Bulk::from(vec![0.5; 3])))];
        let sent = encode(&(Version(1), layout, segments)).unwrap();
        let buffers = sent.bulk.into_iter().map(Bulk::into_buffer);
        decode(&sent.header, buffers.collect())
    }

    fn bytes_of(parameters: Vec<Parameter>) -> Vec<u8> {
        BulkValue::new(&(parameters, 0)).unwrap().bytes().to_vec()
    }

    fn text(error: &CodecError) -> String {
        error.source().expect("it has a cause").to_string()
    }

    #[test]
    fn two_snapshots_of_one_model_share_the_layout() {
        let sent = snapshot(model("shared"));
        let one = transport(&sent).unwrap();
        let two = transport(&snapshot(model("shared"))).unwrap();
        assert!(Arc::ptr_eq(one.layout(), two.layout()));
        assert_eq!(one.layout(), sent.layout());
        let other = transport(&snapshot(model("other"))).unwrap();
        assert_ne!(one.layout(), other.layout());
    }

    /// A process that has the weights, and gets a part of them from another process.
    #[test]
    fn a_layout_that_comes_back_is_the_one_that_was_sent() {
        let sent = snapshot(model("comes back"));
        let got = transport(&sent).unwrap();
        assert!(Arc::ptr_eq(got.layout(), sent.layout()));
    }

    #[test]
    fn a_layout_is_encoded_once_and_is_not_in_the_header() {
        let names = (0..20_000).map(|index| named(&format!("p{index}"), index..index + 1));
        let sent = snapshot(Layout::new(names.collect()).unwrap());
        let [one, two] = [(); 2].map(|()| encode(&sent).unwrap());
        assert!(one.header.len() < 32, "{} bytes", one.header.len());
        assert_eq!(one.bulk[0].as_ptr(), two.bulk[0].as_ptr());
    }

    /// PS-6.
    #[test]
    fn bytes_that_are_no_layout_are_refused() {
        let good = bytes_of(vec![named("a", 0..3)]);
        assert_eq!(receive(&good).unwrap().to_vec(), [0.5; 3]);
        let mut bad_text = good.clone();
        bad_text[2] = 0xff;
        let gigantic = |mut before: Vec<u8>| {
            before.push(253);
            before.extend((1u64 << 40).to_le_bytes());
            before
        };
        let overlapping = vec![named("a", 0..2), named("b", 1..3)];
        for (what, bytes) in [
            ("no bytes", vec![]),
            ("bad text", bad_text),
            ("truncated", good[..good.len() - 1].to_vec()),
            ("left over", [&good[..], &[0]].concat()),
            ("a number of parameters", gigantic(vec![])),
            ("a length of a name", gigantic(vec![1])),
            ("a number of axes", gigantic(vec![1, 1, b'a'])),
            ("overlapping", bytes_of(overlapping.clone())),
            ("a gap", bytes_of(vec![named("a", 0..1), named("b", 2..4)])),
            ("fewer weights", bytes_of(vec![named("a", 0..2)])),
            (
                "more buffers than parameters",
                [&good[..good.len() - 1], &[2]].concat(),
            ),
        ] {
            let got = receive(&bytes);
            assert!(got.is_err(), "{what}: {got:?}");
        }
        let error = receive(&bytes_of(overlapping.clone())).unwrap_err();
        assert!(text(&error).contains("`b` must take"), "{}", text(&error));
    }

    #[test]
    fn a_layout_that_is_too_long_is_refused_by_sender_and_receiver() {
        let long = vec![named(&"n".repeat(MAX_LAYOUT), 0..3)];
        let bytes = bytes_of(long.clone());
        let sent = encode(&snapshot(Layout::new(long).unwrap())).unwrap_err();
        let received = receive(&bytes).unwrap_err();
        for error in [sent, received] {
            let text = text(&error);
            assert!(text.contains("16777216 is the most"), "{text}");
        }
    }

    fn known() -> Known {
        Known {
            layouts: Mutex::default(),
        }
    }

    fn encoded(layout: &Layout) -> Encoded {
        layout.encoded().unwrap().clone()
    }

    #[test]
    fn the_layouts_that_were_used_last_are_known() {
        let known = known();
        let first = known.find_or_read(encoded(&model("0"))).unwrap();
        for other in 1..3 * MAX_KNOWN {
            let name = other.to_string();
            known.find_or_read(encoded(&model(&name))).unwrap();
            assert!(known.lock().len() <= MAX_KNOWN);
            // It is in use all the time, so it stays.
            let again = known.find_or_read(encoded(&first)).unwrap();
            assert!(Arc::ptr_eq(&first, &again));
        }
        assert!(known.find(model("1").bytes()).is_none());
        assert!(
            known
                .find(model(&(3 * MAX_KNOWN - 1).to_string()).bytes())
                .is_some()
        );
    }

    /// PS-6: a peer may send any number of layouts of any size.
    #[test]
    fn known_layouts_take_a_bounded_amount_of_memory() {
        let known = known();
        let total = || -> usize { known.lock().iter().map(|known| known.num_bytes()).sum() };
        for other in 0..MAX_KNOWN {
            let long = "n".repeat(MAX_LAYOUT / 2 + other);
            let layout = Layout::new(vec![named(&long, 0..3)]).unwrap();
            known.find_or_read(encoded(&layout)).unwrap();
            assert!(total() <= MAX_KNOWN_BYTES, "{}", total());
        }
        assert_eq!(
            known.lock().len(),
            3,
            "each takes a little more than 16 MiB"
        );
        // A parameter can be much longer in memory than on the wire.
        let short = (0..1 << 20).map(|_| named("", 0..0));
        let layout = Layout::new(short.collect()).unwrap();
        assert!(layout.bytes().len() < MAX_LAYOUT && layout.num_bytes() > MAX_KNOWN_BYTES);
        let got = known.find_or_read(encoded(&layout)).unwrap();
        assert_eq!(*got, layout);
        assert_eq!(known.lock().len(), 3);
    }

    /// It may differ from ours, because a peer may write a small number in more bytes than needed.
    #[test]
    fn a_layout_is_known_by_the_bytes_that_this_process_sends() {
        let mut longer = bytes_of(vec![named("longer", 0..3)]);
        assert_eq!(longer[0], 1, "the number of parameters");
        longer.splice(0..1, [251, 1, 0]);
        let first = receive(&longer).unwrap();
        let again = receive(&longer).unwrap();
        assert!(Arc::ptr_eq(first.layout(), again.layout()));
        let sent = encode(&again).unwrap();
        let buffer = Buffer::from(sent.bulk[0].to_vec());
        assert_eq!(
            buffer.len(),
            bytes_of(vec![named("longer", 0..3)]).len().div_ceil(4)
        );
    }

    /// S-20.
    #[test]
    fn which_parameters_are_buffers_travels_with_the_layout() {
        let parameters = vec![
            named("weight", 0..4),
            named("mean", 4..6),
            named("var", 6..8),
        ];
        let layout = Layout::with_buffers(parameters.clone(), 2).unwrap();
        assert_eq!((layout.num_weights(), layout.num_trainable()), (8, 4));
        let got = transport(&snapshot(layout.clone())).unwrap();
        assert_eq!(**got.layout(), layout);
        let plain = Layout::new(parameters.clone()).unwrap();
        assert_ne!(plain, layout);
        assert_eq!(plain.num_trainable(), 8);
        let all = Layout::with_buffers(parameters.clone(), 3).unwrap();
        assert_eq!(all.num_trainable(), 0);
        let error = Layout::with_buffers(parameters, 4).unwrap_err();
        assert_eq!(error.to_string(), "4 of 3 parameters cannot be buffers");
    }

    #[test]
    fn a_layout_must_be_without_gaps_and_fit_its_shapes() {
        let parameter = |shape: &[usize], range: Range<usize>| Parameter {
            name: "p".to_owned(),
            shape: shape.to_vec(),
            range,
        };
        let good = Layout::new(vec![parameter(&[2, 3], 0..6), parameter(&[], 6..7)]).unwrap();
        assert_eq!(good.num_weights(), 7);
        for bad in [
            vec![parameter(&[2], 1..3)],
            vec![parameter(&[2], 0..2), parameter(&[2], 3..5)],
            vec![parameter(&[2, 3], 0..5)],
            vec![parameter(&[usize::MAX, usize::MAX], 0..1)],
        ] {
            assert!(Layout::new(bad.clone()).is_err(), "{bad:?}");
        }
    }
}
