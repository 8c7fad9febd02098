//! Makes one gradient of those of an update.

use ps_runtime::buffer::{Buffer, BufferPool};
use ps_runtime::parallel::{PART_LEN, for_each, vectorized};

use crate::server::consistency::Reduction;
use crate::server::protocol::Update;
use crate::weights::Gradient;

/// Returns the weight of each gradient in a mean of batches of different sizes. Returns `None` if all have
/// the same weight.
pub(super) fn shares(update: &Update) -> Option<Vec<f32>> {
    let sizes = update.gradients.iter().map(|one| one.num_examples);
    let smallest = sizes.clone().min().unwrap_or(0);
    if update.reduction == Reduction::Sum || smallest == 0 || sizes.clone().all(|n| n == smallest) {
        return None;
    }
    // This sum is exact, because each number is at most `MAX_EXAMPLES`.
    let all: f64 = sizes.clone().map(|n| n as f64).sum();
    Some(sizes.map(|n| (n as f64 / all) as f32).collect())
}

/// Adds gradients element by element, in their order. Each is multiplied by its weight, if there are
/// weights. Otherwise the sum is divided by the number of gradients for a mean.
pub(super) fn reduce(
    gradients: &[Gradient],
    weights: Option<&[f32]>,
    reduction: Reduction,
    pool: &BufferPool,
) -> Buffer {
    let (first, rest) = gradients.split_first().expect("an update has gradients");
    let scale = match reduction {
        Reduction::Mean => 1.0 / gradients.len() as f32,
        Reduction::Sum => 1.0,
    };
    let mut sum = pool.take(first.values().len());
    let num_bytes = size_of_val(&sum[..]);
    let parts = (0..).step_by(PART_LEN).zip(sum.chunks_mut(PART_LEN));
    for_each(num_bytes, parts, |(start, sum)| {
        let part = start..start + sum.len();
        vectorized(
            #[inline(always)]
            || {
                let first = &first.values()[part.clone()];
                if let Some(weights) = weights {
                    for (sum, value) in sum.iter_mut().zip(first) {
                        *sum = value * weights[0];
                    }
                    for (gradient, weight) in rest.iter().zip(&weights[1..]) {
                        for (sum, value) in sum.iter_mut().zip(&gradient.values()[part.clone()]) {
                            *sum += value * weight;
                        }
                    }
                    return;
                }
                sum.copy_from_slice(first);
                for gradient in rest {
                    for (sum, value) in sum.iter_mut().zip(&gradient.values()[part.clone()]) {
                        *sum += value;
                    }
                }
                for sum in sum.iter_mut() {
                    *sum *= scale;
                }
            },
        );
    });
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_are_added_up_as_short_ones() {
        let gradients: Vec<Gradient> = (1..4)
            .map(|k| {
                Gradient::new(
                    (0..3_000_001)
                        .map(|i| (i % 1013 * k) as f32)
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        for (reduction, scale) in [(Reduction::Sum, 1.0), (Reduction::Mean, 1.0f32 / 3.0)] {
            let got = reduce(&gradients, None, reduction, &BufferPool::new(0));
            let [a, b, c] = [0, 1, 2].map(|k| gradients[k].values());
            let is_right = |i: usize| got[i] == (a[i] + b[i] + c[i]) * scale;
            assert!((0..got.len()).all(is_right), "{reduction}");
        }
        let weights = [0.5, 0.125, 0.375];
        let got = reduce(
            &gradients,
            Some(&weights),
            Reduction::Mean,
            &BufferPool::new(0),
        );
        let [a, b, c] = [0, 1, 2].map(|k| gradients[k].values());
        let is_right = |i: usize| got[i] == a[i] * 0.5 + b[i] * 0.125 + c[i] * 0.375;
        assert!((0..got.len()).all(is_right));
    }
}
