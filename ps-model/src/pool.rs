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
    use pulp::{Arch, Simd, WithSimd};

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
            let windows = *self;
            Arch::new().dispatch(Largest { windows, x })
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

    /// See [`Windows::largest`]. Without branches on numbers, which nobody can predict.
    struct Largest<'a> {
        windows: Windows,
        x: &'a [f32],
    }

    impl WithSimd for Largest<'_> {
        type Output = (Vec<f32>, Vec<u8>);

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> Self::Output {
            let Windows {
                planes,
                height,
                width,
                size,
            } = self.windows;
            let columns = width / size;
            let count = planes * (height / size) * columns;
            let (mut largest, mut places) = (Vec::with_capacity(count), Vec::with_capacity(count));
            // Of each column of a row of windows, and then of each window.
            let (mut column_best, mut column_place) = (vec![0.0; width], vec![0; width]);
            let (mut best, mut place) = (vec![0.0; columns], vec![0; columns]);
            for plane in self.x.chunks_exact(height * width) {
                for band in plane.chunks_exact(size * width) {
                    column_best.copy_from_slice(&band[..width]);
                    column_place.fill(0);
                    for (row, numbers) in (1..).zip(band[width..].chunks_exact(width)) {
                        let so_far = column_best.iter_mut().zip(&mut column_place);
                        for (x, (best, place)) in numbers.iter().zip(so_far) {
                            let is_larger = is_larger(*x, *best);
                            *best = if is_larger { *x } else { *best };
                            *place = if is_larger { row * size as u32 } else { *place };
                        }
                    }
                    best.fill(f32::NEG_INFINITY);
                    place.fill(u32::MAX);
                    for column in 0..size {
                        let numbers = column_best[column..].iter().step_by(size);
                        let rows = column_place[column..].iter().step_by(size);
                        let so_far = best.iter_mut().zip(&mut place);
                        for ((x, row), (best, place)) in numbers.zip(rows).zip(so_far) {
                            let at = row + column as u32;
                            // Of equal ones, the one in the higher row comes first.
                            let is_first = (*x == *best) & (at < *place);
                            let is_better = is_larger(*x, *best) | is_first;
                            *best = if is_better { *x } else { *best };
                            *place = if is_better { at } else { *place };
                        }
                    }
                    largest.extend_from_slice(&best);
                    places.extend(place.iter().map(|place| *place as u8));
                }
            }
            (largest, places)
        }
    }

    /// NaN is larger than all numbers, and the first one stays.
    #[inline(always)]
    fn is_larger(x: f32, best: f32) -> bool {
        #[allow(clippy::neg_cmp_op_on_partial_ord, reason = "it is true of NaN, too")]
        let is_not_smaller = !(x <= best);
        is_not_smaller & !best.is_nan()
    }
}
