//! What a model's loss may depend on besides the weights and the batch: the device, whether it trains, and
//! the random numbers of the step.

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::rng::Rng;

/// Identifies the random numbers of one training step.
///
/// Equal seeds give the same dropout masks in any process and on any backend. Another worker or another
/// clock gets other masks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StepSeed {
    /// The seed of the whole run.
    pub seed: u64,
    /// The worker that computes the step.
    pub worker: u64,
    /// The number of the step in that worker, counted over restarts.
    pub clock: u64,
}

/// The context in which a loss is computed once.
///
/// For an example, see [`dropout`](Self::dropout).
#[derive(Debug)]
pub struct Step {
    device: Device,
    training: bool,
    rng: Rng,
}

impl Step {
    /// Sets up a training step. `device` should have autodiff on.
    #[must_use]
    pub fn training(device: &Device, seed: StepSeed) -> Self {
        Self {
            device: device.clone(),
            training: true,
            rng: Rng::from_parts(&[seed.seed, seed.worker, seed.clock]),
        }
    }

    /// Sets up an evaluation: dropout does nothing.
    #[must_use]
    pub fn evaluation(device: &Device) -> Self {
        Self {
            device: device.clone(),
            training: false,
            rng: Rng::new(0),
        }
    }

    /// Returns the device on which to create the tensors of the batch.
    #[must_use]
    pub const fn device(&self) -> &Device {
        &self.device
    }

    /// Whether this is a training step and not an evaluation.
    #[must_use]
    pub const fn is_training(&self) -> bool {
        self.training
    }

    /// Returns the random numbers of this step, for models that need more than dropout.
    pub const fn rng(&mut self) -> &mut Rng {
        &mut self.rng
    }

    /// Sets each element of `x` to zero with `probability`, and scales the others so that the mean stays
    /// the same. Does nothing in an evaluation.
    ///
    /// ```
    /// use ps_model::burn::tensor::Tensor;
    /// use ps_model::{Step, StepSeed, default_device_name, select_device};
    ///
    /// let device = select_device(default_device_name())?;
    /// let x = Tensor::<1>::ones([64], &device);
    /// let drop = |clock| {
    ///     let seed = StepSeed { seed: 1, worker: 0, clock };
    ///     Step::training(&device, seed).dropout(x.clone(), 0.5).into_data()
    /// };
    /// assert_eq!(drop(0), drop(0)); // The mask follows from the seed of the step.
    /// assert_ne!(drop(0), drop(1));
    /// # Ok::<(), ps_model::DeviceError>(())
    /// ```
    ///
    /// The mask is drawn on the host from the random numbers of this step, with 16 bits for each element.
    /// So the probability is rounded to a multiple of 2⁻¹⁶ (0.25 and 0.5 are exact). The scale is `1 / (1 -
    /// probability)`, with the rounded probability. If the probability rounds to 0, and in an evaluation,
    /// `x` is returned as it is, and no number is drawn. (Srivastava et al., "Dropout", JMLR 15, 2014;
    /// scaled in training as in <https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html>.)
    ///
    /// burn's own `Dropout` layer works too, but it draws from a stream that all threads share. The same
    /// seed gives the same bits only if one worker at a time computes in the process.
    ///
    /// # Panics
    ///
    /// If `probability` is not in `0.0..=1.0`.
    pub fn dropout<const D: usize>(&mut self, x: Tensor<D>, probability: f64) -> Tensor<D> {
        let shape = x.dims();
        self.drop_blocks(x, shape, probability)
    }

    /// Sets whole channels of `x: [batch, channels, height, width]` to zero with `probability`.
    ///
    /// Otherwise like [`dropout`](Self::dropout), with one draw for each channel of each example
    /// (<https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout2d.html>).
    ///
    /// # Panics
    ///
    /// If `probability` is not in `0.0..=1.0`.
    pub fn dropout_channels(&mut self, x: Tensor<4>, probability: f64) -> Tensor<4> {
        let [batch, channels, _height, _width] = x.dims();
        self.drop_blocks(x, [batch, channels, 1, 1], probability)
    }

    /// Multiplies `x` by a mask of the given shape, which is broadcast to that of `x`.
    fn drop_blocks<const D: usize>(
        &mut self,
        x: Tensor<D>,
        mask_shape: [usize; D],
        probability: f64,
    ) -> Tensor<D> {
        assert!(
            (0.0..=1.0).contains(&probability),
            "a dropout probability lies in 0..=1, not {probability}"
        );
        let threshold = (probability * f64::from(DROPOUT_STEPS)).round() as u32;
        if !self.training || threshold == 0 {
            return x;
        }
        let mask = dropout_mask(&mut self.rng, threshold, mask_shape.iter().product());
        // On the device of `x`, which need not be that of the step.
        let options = (&x.device(), x.dtype());
        let mask = Tensor::from_data(TensorData::new(mask, mask_shape), options);
        x * mask
    }
}

/// The number of different dropout probabilities, apart from 1.
const DROPOUT_STEPS: u32 = 1 << 16;

/// Draws `count` factors: zero with probability `threshold / DROPOUT_STEPS`, else the scale.
fn dropout_mask(rng: &mut Rng, threshold: u32, count: usize) -> Vec<f32> {
    let kept = DROPOUT_STEPS - threshold;
    let scale = if kept == 0 {
        0.0
    } else {
        (f64::from(DROPOUT_STEPS) / f64::from(kept)) as f32
    };
    let mut mask = Vec::with_capacity(count.next_multiple_of(4));
    while mask.len() < count {
        let bits = rng.next_u64();
        mask.extend([0, 16, 32, 48].map(|shift| {
            if (bits >> shift) as u16 as u32 >= threshold {
                scale
            } else {
                0.0
            }
        }));
    }
    mask.truncate(count);
    mask
}
