//! Max-pooling for the models of this crate: burn's own, and on the backend `flex` a faster one.
//!
//! The windows follow one another without overlap or padding. Numbers that do not fill a window are left
//! out. The results are burn's. If several numbers of a window are equal, the first one gets the gradient,
//! as in PyTorch. NaN stays NaN.

#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod kernel;

use burn::tensor::Tensor;
use burn::tensor::module;
use burn::tensor::ops::MaxPoolOptions;

/// Returns the largest number of each window of `[size, size]`.
///
/// `x: [batch, channels, height, width]`; result: `[batch, channels, height / size, width / size]`, rounded
/// down.
///
/// ```
/// use ps_model::burn::tensor::Tensor;
/// use ps_model::{default_device_name, max_pool2d, select_device};
///
/// let device = select_device(default_device_name())?;
/// let x = Tensor::<4>::from_data([[[[1.0, 2.0], [4.0, 3.0]]]], &device);
/// let largest: f32 = max_pool2d(x, 2).into_scalar();
/// assert_eq!(largest, 4.0);
/// # Ok::<(), ps_model::DeviceError>(())
/// ```
///
/// # Panics
///
/// Like burn's operation: if `size` is 0, or larger than the height or the width.
#[must_use]
pub fn max_pool2d(x: Tensor<4>, size: usize) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(output) = flex::max_pool2d(&x, size) {
        return output;
    }
    module::max_pool2d(x, MaxPoolOptions::new([size, size]))
}
