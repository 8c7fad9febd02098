//! Convolutions: burn's own, and on the backend `flex` a faster one with the same results up to rounding.
//!
//! `flex` copies the patches of an image beside each other, multiplies matrices, and copies again. For its
//! gradient of the weights, the matrices have nine columns. `kernel` makes no copies. The layer is still
//! burn's [`Conv2d`], so records and flat views need no change.

#[cfg(feature = "flex")]
pub(crate) mod flex;
#[cfg(feature = "flex")]
mod kernel;
#[cfg(all(test, feature = "flex"))]
pub(crate) use kernel::tests::architectures;

use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;

/// Computes the same as `layer.forward(images)`, up to rounding, and faster on the backend `flex`.
///
/// It is faster for `f32`, stride and dilation 1, one group, a bias and no padding, as in the layers of
/// [`seeded::conv2d`](crate::seeded::conv2d), and without gradient checkpointing. Everything else is
/// computed by burn.
///
/// `images: [batch, channels, height, width]`; result: `[batch, outputs, height - kernel height + 1, width
/// - kernel width + 1]` for a layer without padding and with stride and dilation 1.
///
/// ```
/// use ps_model::burn::tensor::Tensor;
/// use ps_model::{Rng, conv2d, default_device_name, seeded, select_device};
///
/// let device = select_device(default_device_name())?;
/// let layer = seeded::conv2d(&mut Rng::new(1), [1, 3], 3, &device);
/// let images = Tensor::<4>::ones([2, 1, 28, 28], &device);
/// assert_eq!(conv2d(&layer, images).dims(), [2, 3, 26, 26]);
/// # Ok::<(), ps_model::DeviceError>(())
/// ```
///
/// # Panics
///
/// Like `layer.forward`: if the images have another number of channels than the layer.
#[must_use]
pub fn conv2d(layer: &Conv2d, images: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(output) = flex::conv2d(layer, &images) {
        return output;
    }
    layer.forward(images)
}
