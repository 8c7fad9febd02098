//! How snapshots and gradients travel. They are checked when they arrive, because any process may have sent
//! them (PS-6).

use super::packed::Packed;
use super::{Arc, Deserialize, Layout, Segment, Serialize, Version, layout, trained_norm_squared};

#[derive(Serialize, Deserialize)]
pub(super) struct Weights {
    version: Version,
    #[serde(with = "layout::shared")]
    layout: Arc<Layout>,
    segments: Vec<(usize, Packed)>,
}

impl From<super::Weights> for Weights {
    fn from(weights: super::Weights) -> Self {
        Self {
            version: weights.version,
            layout: weights.layout,
            segments: weights
                .segments
                .iter()
                .map(|segment| {
                    let numbers = Arc::clone(&segment.data).into();
                    let packed = segment.packed.rounded(numbers, weights.precision);
                    (segment.start, packed)
                })
                .collect(),
        }
    }
}

impl TryFrom<Weights> for super::Weights {
    type Error = String;

    fn try_from(wire: Weights) -> Result<Self, String> {
        let mut next = wire.segments.first().map_or(0, |(start, _)| *start);
        let mut segments = Vec::with_capacity(wire.segments.len());
        for (start, packed) in wire.segments {
            if start != next {
                return Err("the parts of the weights do not follow one another".to_owned());
            }
            let numbers = packed.unpack()?;
            let end = start.checked_add(numbers.len());
            next = end
                .filter(|&end| end <= wire.layout.num_weights())
                .ok_or("there are more weights than the layout has")?;
            segments.push(Segment::new(start, numbers.into_shared()));
        }
        Ok(Self::new(wire.version, wire.layout, segments.into()))
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct Gradient {
    start: usize,
    values: Packed,
    num_trainable: usize,
    norm_squared: f64,
}

impl From<super::Gradient> for Gradient {
    fn from(gradient: super::Gradient) -> Self {
        let super::Gradient {
            start,
            values,
            num_trainable,
            norm_squared,
        } = gradient;
        Self {
            start,
            values: Packed::exactly(values),
            num_trainable,
            norm_squared,
        }
    }
}

impl TryFrom<Gradient> for super::Gradient {
    type Error = String;

    fn try_from(wire: Gradient) -> Result<Self, String> {
        let Gradient {
            start,
            values,
            num_trainable,
            norm_squared: claimed,
        } = wire;
        let values = values.unpack()?;
        start
            .checked_add(values.len())
            .ok_or("the gradient is of no possible weights")?;
        // The norm may be that of a gradient that this is a part of, but not be less than the
        // part's own, up to the order of summation.
        let trained = num_trainable.saturating_sub(start).min(values.len());
        let own = trained_norm_squared(&values, trained);
        let fits = own <= claimed * (1.0 + 1e-9) || !(own.is_finite() || claimed.is_finite());
        if !fits {
            return Err("the gradient's norm is not that of its numbers".to_owned());
        }
        Ok(Self {
            start,
            values,
            num_trainable,
            norm_squared: claimed,
        })
    }
}
