//! Snapshots of the weights, and gradients, as flat `f32` vectors.
//!
//! Both are shared and not copied: cloning [`Weights`] or slicing a [`Gradient`] only increments a
//! reference count (PS-8). A snapshot never changes (PS-5). While anybody still reads a snapshot, the
//! server writes the next version into another buffer.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use ps_runtime::buffer::Buffer;
use ps_runtime::codec::Bulk;
use ps_runtime::parallel::norm_squared;
use serde::{Deserialize, Serialize};

use crate::ids::{GradientId, Version};

pub use self::layout::{Layout, LayoutError, MAX_LAYOUT, Parameter};
use self::packed::PackedOnce;
pub use self::packed::Precision;

mod layout;
mod packed;
mod wire;

/// A contiguous part of the weights, which one server holds.
#[derive(Clone, Debug)]
pub struct Segment {
    pub(crate) start: usize,
    pub(crate) data: Arc<Buffer>,
    packed: PackedOnce,
}

impl Segment {
    pub(crate) fn new(start: usize, data: Arc<Buffer>) -> Self {
        Self {
            start,
            data,
            packed: PackedOnce::default(),
        }
    }

    /// Returns the range of this part in the whole vector.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.data.len()
    }

    /// Returns the numbers of this part.
    #[must_use]
    pub fn data(&self) -> &[f32] {
        &self.data
    }
}

/// An immutable snapshot of the weights at one version.
///
/// It has one segment per server, in order. A snapshot of the whole model covers `0..layout.num_weights()`.
/// A snapshot from one server of several covers the range of that server.
///
/// ```
/// use ps_actors::ids::Version;
/// use ps_actors::weights::{Layout, Weights};
///
/// let weights = Weights::initial(Layout::flat(4), vec![0.0, 1.0, 2.0, 3.0]);
/// assert_eq!(weights.version(), Version(0));
/// assert_eq!(weights.read(1..3), [1.0, 2.0].as_slice());
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "wire::Weights", into = "wire::Weights")]
pub struct Weights {
    version: Version,
    layout: Arc<Layout>,
    pub(crate) segments: Arc<[Segment]>,
    /// How the numbers travel. Those in this process are exact.
    precision: Precision,
}

impl Weights {
    pub(crate) fn new(version: Version, layout: Arc<Layout>, segments: Arc<[Segment]>) -> Self {
        Self {
            version,
            layout,
            segments,
            precision: Precision::F32,
        }
    }

    /// Makes the initial weights of a whole model. They are version 0, in one segment.
    ///
    /// # Panics
    /// If `values` does not have `layout.num_weights()` numbers.
    #[must_use]
    pub fn initial(layout: Layout, values: Vec<f32>) -> Self {
        assert_eq!(
            values.len(),
            layout.num_weights(),
            "one number per weight of the layout"
        );
        let segment = Segment::new(0, Arc::new(Buffer::from(values)));
        Self::new(Version(0), Arc::new(layout), Arc::new([segment]))
    }

    /// Returns the same weights. If they are sent to another process, they arrive rounded to this type.
    pub(crate) fn travelling_as(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Returns these weights as those of another version.
    pub(crate) fn at(self, version: Version) -> Self {
        Self { version, ..self }
    }

    /// Joins the parts of one version that several servers hold to all weights of the model.
    ///
    /// # Errors
    /// If they are not such parts. This can happen because they may come from any process.
    pub(crate) fn join(parts: &[Self]) -> Result<Self, BadPart> {
        let bad = |index, reason| BadPart { index, reason };
        let first = parts.first();
        let first = first.ok_or_else(|| bad(0, "there is none".to_owned()))?;
        let num_weights = first.layout.num_weights();
        let mut next = 0;
        for (index, part) in parts.iter().enumerate() {
            let (version, range) = (part.version, part.range());
            if version != first.version {
                let expected = first.version;
                return Err(bad(index, format!("they are of {version}, not {expected}")));
            }
            if !Arc::ptr_eq(&part.layout, &first.layout) && part.layout != first.layout {
                return Err(bad(index, "they are of another model".to_owned()));
            }
            if !part.segments.is_empty() {
                if range.start != next {
                    let reason = format!("they are weights {range:?}, but {next} is the next");
                    return Err(bad(index, reason));
                }
                next = range.end;
            }
        }
        if next != num_weights {
            let reason = format!("weights {next}..{num_weights} of the model are missing");
            return Err(bad(parts.len() - 1, reason));
        }
        let segments = parts.iter().flat_map(|part| part.segments.iter().cloned());
        let (version, layout) = (first.version, Arc::clone(&first.layout));
        Ok(Self::new(version, layout, segments.collect()))
    }

    /// Copies the weights of `range`, for another server.
    ///
    /// # Panics
    /// If `range` is not within [`Weights::range`].
    pub(crate) fn part(&self, range: Range<usize>) -> Self {
        let (start, values) = (range.start, self.read(range).into_owned());
        let data = Arc::new(Buffer::from(values));
        let segment = Segment::new(start, data);
        Self::new(self.version, Arc::clone(&self.layout), Arc::new([segment]))
    }

    /// Returns the number of updates that led to these weights.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the names and shapes of the whole model's parameters.
    #[must_use]
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// Returns the parts of the snapshot, one per server.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Returns the range of weights that this snapshot covers.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        match (self.segments.first(), self.segments.last()) {
            (Some(first), Some(last)) => first.start..last.range().end,
            _ => 0..0,
        }
    }

    /// Returns how many numbers the snapshot holds.
    #[must_use]
    pub fn len(&self) -> usize {
        self.range().len()
    }

    /// Whether the snapshot holds no number.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the weights of `range`. It copies them only if they are in more than one segment.
    ///
    /// # Panics
    /// If `range` is not within [`Weights::range`].
    #[must_use]
    pub fn read(&self, range: Range<usize>) -> Cow<'_, [f32]> {
        self.check(&range);
        let mut joined = Vec::new();
        for segment in &*self.segments {
            let from = range.start.max(segment.start);
            let until = range.end.min(segment.range().end);
            if from >= until {
                continue;
            }
            let part = &segment.data[from - segment.start..until - segment.start];
            if part.len() == range.len() {
                return Cow::Borrowed(part);
            }
            joined.extend_from_slice(part);
        }
        Cow::Owned(joined)
    }

    /// Returns the weights of `range` as memory that is shared with this snapshot and never changes, in the byte order of
    /// this machine. The snapshot's memory lives as long as the result does. `None` if they are in more than one segment.
    ///
    /// ```
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let weights = Weights::initial(Layout::flat(3), vec![0.0, 1.0, 2.0]);
    /// let shared = weights.share(1..3).expect("there is one segment");
    /// drop(weights);
    /// assert_eq!(shared[..4], 1.0_f32.to_ne_bytes());
    /// ```
    ///
    /// # Panics
    /// If `range` is not within [`Weights::range`].
    #[must_use]
    pub fn share(&self, range: Range<usize>) -> Option<bytes::Bytes> {
        self.check(&range);
        let holds = |segment: &&Segment| {
            let own = segment.range();
            own.start <= range.start && range.end <= own.end
        };
        let segment = self.segments.iter().find(holds)?;
        Some(bytes::Bytes::from_owner(Part {
            data: Arc::clone(&segment.data),
            range: range.start - segment.start..range.end - segment.start,
        }))
    }

    fn check(&self, range: &Range<usize>) {
        let own = self.range();
        assert!(
            range.start >= own.start && range.end <= own.end && range.start <= range.end,
            "weights {range:?} are not within {own:?}"
        );
    }

    /// Copies all numbers into one new vector.
    #[must_use]
    pub fn to_vec(&self) -> Vec<f32> {
        self.segments
            .iter()
            .flat_map(|segment| segment.data.iter().copied())
            .collect()
    }
}

/// Some numbers of a segment, as shared bytes.
struct Part {
    data: Arc<Buffer>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.data[self.range.clone()])
    }
}

/// A part of the weights that does not fit the other parts.
#[derive(Debug)]
pub(crate) struct BadPart {
    /// The index of the part, in the order of the servers.
    pub(crate) index: usize,
    pub(crate) reason: String,
}

/// The gradient of a loss with respect to all weights.
///
/// Its Euclidean norm is computed once, when the gradient is made, because the numbers are then still in
/// the cache of that core. The server checks the norm against NaN, infinity and exploding gradients. This
/// needs no second pass over the numbers, and no gradient can avoid the check.
///
/// If the model has buffers, the last numbers are not slopes but what the step has made of each buffer (S-20). The
/// norm leaves them out.
///
/// ```
/// use ps_actors::weights::Gradient;
///
/// let gradient = Gradient::new(vec![3.0, 0.0, 4.0]);
/// assert_eq!(gradient.norm(), 5.0);
///
/// let part = gradient.slice(1..3);
/// assert_eq!(part.values(), [0.0, 4.0]);
/// assert_eq!(part.norm(), 5.0); // A part has the norm of the whole gradient.
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "wire::Gradient", into = "wire::Gradient")]
pub struct Gradient {
    /// The index of the weight that belongs to `values[0]`.
    start: usize,
    values: Bulk,
    /// The index of the first weight of the model that is not trained but belongs to a buffer.
    num_trainable: usize,
    norm_squared: f64,
}

impl Gradient {
    /// Makes the gradient of the weights `0..values.len()`.
    #[must_use]
    pub fn new(values: impl Into<Buffer>) -> Self {
        let values: Buffer = values.into();
        let num_trainable = values.len();
        Self::with_buffers(values, num_trainable)
    }

    /// Makes the gradient of the weights `0..values.len()`, of which only the first `num_trainable` are trained. The
    /// others are what the step has made of the buffers that were loaded (S-20).
    ///
    /// # Panics
    /// If there are fewer than `num_trainable` numbers.
    ///
    /// ```
    /// use ps_actors::weights::Gradient;
    ///
    /// let gradient = Gradient::with_buffers(vec![3.0, 4.0, 100.0], 2);
    /// assert_eq!(gradient.norm(), 5.0);
    /// ```
    #[must_use]
    pub fn with_buffers(values: impl Into<Buffer>, num_trainable: usize) -> Self {
        let values = Bulk::from(values.into());
        assert!(
            num_trainable <= values.len(),
            "{num_trainable} of {} numbers cannot be of trained weights",
            values.len()
        );
        let norm_squared = trained_norm_squared(&values, num_trainable);
        Self {
            start: 0,
            values,
            num_trainable,
            norm_squared,
        }
    }

    /// Returns the part for the weights of `range`, which shares the numbers with this gradient. The
    /// [`norm`](Self::norm) of the part is that of the whole gradient.
    ///
    /// # Panics
    /// If this gradient does not cover `range`.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> Self {
        let own = self.range();
        assert!(
            range.start >= own.start && range.end <= own.end,
            "gradient {range:?} is not within {own:?}"
        );
        let first = range.start - self.start;
        Self {
            start: range.start,
            values: self.values.slice(first..first + range.len()),
            num_trainable: self.num_trainable,
            norm_squared: self.norm_squared,
        }
    }

    /// Returns the range of its numbers that belong to trained weights. Those of buffers stand behind it.
    #[must_use]
    pub fn trained(&self) -> Range<usize> {
        let Range { start, end } = self.range();
        start..self.num_trainable.clamp(start, end)
    }

    /// Returns the range of the weights that this is the gradient of.
    #[must_use]
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.values.len()
    }

    /// Returns the numbers of the gradient, one for each weight of [`Gradient::range`].
    #[must_use]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Returns the Euclidean norm of the whole gradient, without the numbers of buffers. It is not finite if any
    /// number is not finite, whether of a buffer or not.
    #[must_use]
    pub fn norm(&self) -> f64 {
        self.norm_squared.sqrt()
    }
}

/// Returns the sum of the squares of the first `num_trainable` numbers, or infinity if another number is not
/// finite.
fn trained_norm_squared(values: &Bulk, num_trainable: usize) -> f64 {
    // It may be known since the numbers arrived.
    if num_trainable == values.len() {
        return values.norm_squared();
    }
    let (trained, buffers) = values.split_at(num_trainable);
    match norm_squared(buffers).is_finite() {
        true => norm_squared(trained),
        false => f64::INFINITY,
    }
}

/// One worker's gradient of one step, with its id.
///
/// For an example, see [`Push`](crate::server::Push). A worker makes one for each
/// [`ComputeGradients`](crate::worker::ComputeGradients).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GradientUpdate {
    /// The id of the gradient: the worker, its incarnation, and the step.
    pub id: GradientId,
    /// The version of the weights that it was computed on.
    pub computed_on: Version,
    /// The mean loss of the batch, at the weights before the update.
    pub loss: f32,
    /// How many examples the batch had. This is the gradient's weight in a mean, see
    /// [`Reduction::Mean`](crate::server::Reduction::Mean). 0 if the number is not known.
    pub num_examples: usize,
    /// The numbers of the gradient.
    pub gradient: Gradient,
}

#[cfg(test)]
mod tests {
    use ps_runtime::test_util::transport;

    use super::*;

    fn weights_in(segments: &[&[f32]]) -> Weights {
        let mut start = 0;
        let mut parts = Vec::new();
        let len = segments.iter().map(|s| s.len()).sum();
        let layout = Arc::new(Layout::flat(len));
        for values in segments {
            let segment = Segment::new(start, Arc::new(Buffer::from(values.to_vec())));
            parts.push(Weights::new(
                Version(3),
                Arc::clone(&layout),
                Arc::new([segment]),
            ));
            start += values.len();
        }
        Weights::join(&parts).unwrap()
    }

    /// PS-6: no server panics its clients.
    #[test]
    fn parts_that_do_not_fit_are_an_error_that_names_the_part() {
        let layout = Arc::new(Layout::flat(4));
        let other = Arc::new(Layout::flat(5));
        let part = |layout: &Arc<Layout>, version, start, len| {
            let data = Arc::new(Buffer::from(vec![0.0; len]));
            let segments = Arc::new([Segment::new(start, data)]);
            Weights::new(Version(version), Arc::clone(layout), segments)
        };
        let good = [part(&layout, 3, 0, 2), part(&layout, 3, 2, 2)];
        assert_eq!(Weights::join(&good).unwrap().range(), 0..4);
        let nothing = Weights::new(Version(3), Arc::clone(&layout), Arc::new([]));
        for (bad, index, reason) in [
            (part(&layout, 2, 2, 2), 1, "version 2, not version 3"),
            (part(&other, 3, 2, 2), 1, "another model"),
            (part(&layout, 3, 1, 3), 1, "1..4, but 2 is the next"),
            (part(&layout, 3, 3, 1), 1, "3..4, but 2 is the next"),
            (part(&layout, 3, 2, 1), 1, "3..4 of the model are missing"),
            (nothing, 1, "2..4 of the model are missing"),
        ] {
            let error = Weights::join(&[good[0].clone(), bad]).unwrap_err();
            assert_eq!(error.index, index);
            assert!(error.reason.contains(reason), "{}", error.reason);
        }
        assert!(Weights::join(&[]).is_err());
        assert!(Weights::join(&good[..1]).is_err());
    }

    #[test]
    fn reading_within_a_segment_borrows_and_across_segments_joins() {
        let weights = weights_in(&[&[0.0, 1.0, 2.0], &[], &[3.0], &[4.0, 5.0]]);
        assert_eq!(weights.range(), 0..6);
        assert!(matches!(weights.read(1..3), Cow::Borrowed([1.0, 2.0])));
        assert!(matches!(weights.read(4..6), Cow::Borrowed([4.0, 5.0])));
        assert_eq!(weights.read(1..6), &[1.0, 2.0, 3.0, 4.0, 5.0][..]);
        assert!(weights.read(6..6).is_empty());
        assert_eq!(weights.to_vec(), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    #[should_panic(expected = "weights 3..7 are not within 0..6")]
    fn reading_outside_is_a_callers_mistake() {
        let _ = weights_in(&[&[0.0; 6]]).read(3..7);
    }

    #[test]
    fn the_norm_is_finite_exactly_when_every_number_is() {
        assert_eq!(Gradient::new(vec![3.0, 0.0, 4.0]).norm(), 5.0);
        assert!(Gradient::new(vec![f32::MAX; 1000]).norm().is_finite());
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 7, 8, 16] {
                let mut values = vec![1.0; 17];
                values[place] = bad;
                assert!(
                    !Gradient::new(values).norm().is_finite(),
                    "{bad} at {place}"
                );
            }
        }
    }

    /// S-20.
    #[test]
    fn the_norm_leaves_buffers_out_but_not_what_is_wrong_with_them() {
        let gradient = Gradient::with_buffers(vec![3.0, 4.0, 1e30, -7.0], 2);
        assert_eq!((gradient.norm(), gradient.trained()), (5.0, 0..2));
        let parts = [0..1, 1..3, 3..4].map(|range| gradient.slice(range));
        assert_eq!(parts.each_ref().map(Gradient::trained), [0..1, 1..2, 3..3]);
        for sent in parts.iter().chain([&gradient]) {
            let got = transport(sent).unwrap();
            assert_eq!((got.norm(), got.trained()), (5.0, sent.trained()));
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let gradient = Gradient::with_buffers(vec![3.0, 4.0, bad, 1.0], 2);
            assert!(!gradient.norm().is_finite(), "{bad}");
            assert!(!transport(&gradient).unwrap().norm().is_finite(), "{bad}");
            // It cannot be hidden by a norm that is claimed.
            let mut claims = gradient.clone();
            claims.norm_squared = 25.0;
            assert!(transport(&claims).is_err(), "{bad}");
        }
        assert_eq!(Gradient::new(vec![3.0, 4.0]).trained(), 0..2);
    }

    #[test]
    fn a_slice_shares_the_numbers() {
        let gradient = Gradient::new(vec![1.0, 2.0, 3.0, 4.0]);
        let slice = gradient.slice(1..3).slice(2..3);
        assert_eq!(slice.values(), [3.0]);
        assert!(std::ptr::eq(&slice.values()[0], &gradient.values()[2]));
    }
}
