//! Max-pooling for the models of this crate: burn's own, and on the backend `flex` a faster one.
//!
//! Windows follow one another without overlap or padding; what does not fill one is left out. The
//! numbers are burn's; among equal ones in a window the first gets the gradient, as in PyTorch, and NaN
//! stays NaN.

#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod kernel;

use burn::tensor::Tensor;
use burn::tensor::module;
use burn::tensor::ops::MaxPoolOptions;

/// Takes the largest number of each window of `[size, size]`.
///
/// `x: [batch, channels, height, width]`; result: `[batch, channels, height / size, width / size]`.
///
/// # Panics
///
/// As burn's: if `size` is 0, or larger than the height or the width.
#[must_use]
pub fn max_pool2d(x: Tensor<4>, size: usize) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(output) = flex::max_pool2d(&x, size) {
        return output;
    }
    module::max_pool2d(x, MaxPoolOptions::new([size, size]))
}
