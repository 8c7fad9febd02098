//! Max-pooling for the models of this crate: burn's own, and on the backend `flex` a faster one.
//!
//! Windows follow one another without overlap or padding; what does not fill one is left out. The
//! numbers are burn's; among equal ones in a window the first gets the gradient, as in PyTorch, and NaN
//! stays NaN.

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

#[cfg(feature = "flex")]
mod flex {
    use std::sync::Arc;

    use burn::backend::autodiff::checkpoint::base::Checkpointer;
    use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
    use burn::backend::autodiff::grads::Gradients;
    use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
    use burn::backend::flex::FlexTensor;
    use burn::backend::{Autodiff, Flex};
    use burn::tensor::{DType, Tensor};
    use pulp::Arch;

    use crate::conv::flex::{numbers, tensor};

    /// Pools on `flex`, with or without autodiff; `None` where this module does not apply.
    pub(super) fn max_pool2d(x: &Tensor<4>, size: usize) -> Option<Tensor<4>> {
        type Recorded = Autodiff<Flex>;
        let [batch, channels, height, width] = x.dims();
        // A place in a window is a byte.
        if x.dtype() != DType::F32 || !(1..=16).contains(&size) || size > height.min(width) {
            return None;
        }
        let windows = Windows {
            planes: batch * channels,
            height,
            width,
            size,
        };
        let shape = [batch, channels, height / size, width / size];
        let pool = |x: FlexTensor| {
            let (largest, places) = windows.largest(numbers(&x.to_contiguous()));
            (tensor(largest, shape), places)
        };
        if let Ok(x) = x.clone().try_into_primitive::<Flex>() {
            return Some(Tensor::from_primitive::<Flex>(pool(x).0));
        }
        let (x, node) = x
            .clone()
            .try_into_primitive::<Recorded>()
            .ok()?
            .into_parts();
        let (output, places) = pool(x);
        let prepared = MaxPool.prepare::<NoCheckpointing>([node]);
        let output = match prepared.compute_bound().stateful() {
            OpsKind::Tracked(step) => step.finish((windows, batch, Arc::new(places)), output),
            OpsKind::UnTracked(step) => step.finish(output),
        };
        Some(Tensor::from_primitive::<Recorded>(output))
    }

    /// The backward pass.
    #[derive(Debug)]
    struct MaxPool;

    impl Backward<Flex, 1> for MaxPool {
        /// The windows, the batch size, and where in each window the largest number was.
        type State = (Windows, usize, Arc<Vec<u8>>);

        fn backward(
            self,
            ops: Ops<Self::State, 1>,
            gradients: &mut Gradients,
            _checkpointer: &mut Checkpointer,
        ) {
            let dy = gradients.consume::<Flex>(&ops.node).to_contiguous();
            let (windows, batch, places) = ops.state;
            let [Some(node)] = ops.parents else { return };
            let dx = windows.spread(numbers(&dy), &places);
            let channels = windows.planes / batch.max(1);
            let shape = [batch, channels, windows.height, windows.width];
            gradients.register::<Flex>(node.id, tensor(dx, shape));
        }
    }

    /// Planes cut into windows.
    #[derive(Clone, Copy, Debug)]
    struct Windows {
        planes: usize,
        height: usize,
        width: usize,
        size: usize,
    }

    impl Windows {
        /// The largest number of each window, and its place there: row by row, from 0.
        fn largest(&self, x: &[f32]) -> (Vec<f32>, Vec<u8>) {
            let Self {
                planes,
                height,
                width,
                size,
            } = *self;
            let count = planes * (height / size) * (width / size);
            let (mut largest, mut places) = (Vec::with_capacity(count), Vec::with_capacity(count));
            // Of each column of a row of windows.
            let (mut best, mut rows) = (vec![0.0_f32; width], vec![0_u32; width]);
            Arch::new().dispatch(|| {
                for plane in x.chunks_exact(height * width) {
                    for band in plane.chunks_exact(size * width) {
                        best.copy_from_slice(&band[..width]);
                        rows.fill(0);
                        for (row, numbers) in (1..).zip(band[width..].chunks_exact(width)) {
                            for ((x, best), place) in numbers.iter().zip(&mut best).zip(&mut rows) {
                                let is_larger = is_larger(*x, *best);
                                *best = if is_larger { *x } else { *best };
                                *place = if is_larger { row } else { *place };
                            }
                        }
                        for (best, rows) in best.chunks_exact(size).zip(rows.chunks_exact(size)) {
                            let mut column = 0;
                            for other in 1..size {
                                // Of equal ones, the one in the higher row comes first.
                                let is_first =
                                    best[other] == best[column] && rows[other] < rows[column];
                                if is_larger(best[other], best[column]) || is_first {
                                    column = other;
                                }
                            }
                            largest.push(best[column]);
                            places.push((rows[column] as usize * size + column) as u8);
                        }
                    }
                }
            });
            (largest, places)
        }

        /// Puts each number where the largest one of its window was, and zeros elsewhere.
        fn spread(&self, dy: &[f32], places: &[u8]) -> Vec<f32> {
            let Self {
                planes,
                height,
                width,
                size,
            } = *self;
            let mut dx = vec![0.0; planes * height * width];
            let columns = width / size;
            let per_plane = (height / size) * columns;
            let planes = dx.chunks_exact_mut(height * width);
            let gradients = dy
                .chunks_exact(per_plane)
                .zip(places.chunks_exact(per_plane));
            for (plane, (dy, places)) in planes.zip(gradients) {
                let bands = plane.chunks_exact_mut(size * width);
                let rows = dy.chunks_exact(columns).zip(places.chunks_exact(columns));
                for (band, (dy, places)) in bands.zip(rows) {
                    for (column, (dy, place)) in dy.iter().zip(places).enumerate() {
                        let (row, offset) =
                            (usize::from(*place) / size, usize::from(*place) % size);
                        band[row * width + column * size + offset] = *dy;
                    }
                }
            }
            dx
        }
    }

    /// NaN is larger than all.
    #[inline(always)]
    fn is_larger(x: f32, best: f32) -> bool {
        x > best || (x.is_nan() && !best.is_nan())
    }
}
