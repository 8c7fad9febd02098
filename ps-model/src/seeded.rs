//! Layers whose initial weights come from a given [`Rng`].
//!
//! burn draws initial weights from a stream that the whole process shares, and only when a parameter is
//! first used. These layers draw at once from the given [`Rng`], in the order of their parameters. So the
//! same seed gives the same bits in every process and on every backend.
//!
//! The rule is PyTorch's default: weight and bias uniform in ±1/√fan_in
//! (<https://docs.pytorch.org/docs/stable/generated/torch.nn.Conv2d.html> and
//! <https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html>, "Variables").

use burn::module::Param;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor, TensorData};

use crate::rng::Rng;

/// Makes a fully connected layer with a bias. Weight: `[inputs, outputs]`.
///
/// (PyTorch stores the transposed matrix, `[outputs, inputs]`.)
///
/// ```
/// use ps_model::burn::tensor::Tensor;
/// use ps_model::{Rng, default_device_name, seeded, select_device};
///
/// let device = select_device(default_device_name())?;
/// let layer = seeded::linear(&mut Rng::new(7), [3, 2], &device);
/// let output = layer.forward(Tensor::<2>::ones([5, 3], &device));
/// assert_eq!(output.dims(), [5, 2]);
///
/// let same = seeded::linear(&mut Rng::new(7), [3, 2], &device);
/// assert_eq!(same.weight.val().into_data(), layer.weight.val().into_data());
/// # Ok::<(), ps_model::DeviceError>(())
/// ```
#[must_use]
pub fn linear(rng: &mut Rng, [inputs, outputs]: [usize; 2], device: &Device) -> Linear {
    // `init` is lazy: it draws no number from burn's stream.
    let mut linear = LinearConfig::new(inputs, outputs).init(device);
    linear.weight = parameter(rng, inputs, [inputs, outputs], device);
    linear.bias = Some(parameter(rng, inputs, [outputs], device));
    linear
}

/// Makes a convolution with stride 1, a bias and no padding. Weight: `[outputs, inputs, size, size]`.
#[must_use]
pub fn conv2d(
    rng: &mut Rng,
    [inputs, outputs]: [usize; 2],
    size: usize,
    device: &Device,
) -> Conv2d {
    let fan_in = inputs * size * size;
    let mut conv = Conv2dConfig::new([inputs, outputs], [size, size]).init(device);
    conv.weight = parameter(rng, fan_in, [outputs, inputs, size, size], device);
    conv.bias = Some(parameter(rng, fan_in, [outputs], device));
    conv
}

fn parameter<const D: usize>(
    rng: &mut Rng,
    fan_in: usize,
    shape: [usize; D],
    device: &Device,
) -> Param<Tensor<D>> {
    let bound = 1.0 / (fan_in as f32).sqrt();
    let values = rng.uniform_within(bound, shape.iter().product());
    Param::from_data(TensorData::new(values, shape), device)
}
