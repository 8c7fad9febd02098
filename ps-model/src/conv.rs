//! Convolutions: burn's, and on the backend `flex` a faster one with the same results up to rounding.
//!
//! `flex` copies the patches of an image beside each other, multiplies matrices, and copies again; its
//! gradient of the weights has matrices of nine columns. `kernel` does without copies. The layer stays
//! burn's [`Conv2d`], so that records and flat views know nothing of it.

#[cfg(feature = "flex")]
pub(crate) mod flex;
#[cfg(feature = "flex")]
mod kernel;
#[cfg(all(test, feature = "flex"))]
pub(crate) use kernel::tests::architectures;

use burn::nn::conv::Conv2d;
use burn::tensor::Tensor;

/// Computes what `layer.forward(images)` does, and on the backend `flex` faster.
///
/// That is so for `f32`, stride and dilation 1, one group, a bias and no padding, as in the layers of
/// [`seeded::conv2d`](crate::seeded::conv2d), and without gradient checkpointing. Everything else is
/// left to burn.
///
/// `images: [batch, channels, height, width]`; result: `[batch, outputs, ..]` with height and width
/// less by the kernel's size minus 1.
///
/// # Panics
///
/// As `layer.forward` does: if the images have another number of channels.
#[must_use]
pub fn conv2d(layer: &Conv2d, images: Tensor<4>) -> Tensor<4> {
    #[cfg(feature = "flex")]
    if let Some(output) = flex::conv2d(layer, &images) {
        return output;
    }
    layer.forward(images)
}
