//! Makes one gradient of those of an update.

use std::ops::Range;

use ps_runtime::buffer::{Buffer, BufferPool};
use ps_runtime::parallel::{PART_LEN, for_each, norm_squared, vectorized};

use crate::ids::Version;
use crate::server::consistency::Reduction;
use crate::server::protocol::{Clip, Update};
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
    let gradients: Vec<&[f32]> = gradients.iter().map(Gradient::values).collect();
    let mut sum = pool.take(gradients.first().map_or(0, |first| first.len()));
    let num_bytes = size_of_val(&sum[..]);
    let parts = (0..).step_by(PART_LEN).zip(sum.chunks_mut(PART_LEN));
    for_each(num_bytes, parts, |(start, sum)| {
        let part = start..start + sum.len();
        reduce_part(&gradients, part, weights, reduction, sum);
    });
    sum
}

/// Returns what `update` subtracts from the buffers, which are the last of the server's `current` numbers. `weights`
/// are those of [`reduce`]; a sum of gradients has none, so each batch has the same weight.
///
/// Each gradient has at its end what its worker made of the buffers that it loaded. If those were s updates old, it
/// counts one part in 1 + s, and the servers' buffers of now count the others. So whatever the workers' speeds are,
/// the new buffers lie between the present ones and those that the workers made (S-20). A step by a difference that
/// is old could leap over its aim, again and again.
pub(super) fn moves_of_buffers(
    gradients: &[Gradient],
    update: &Update,
    weights: Option<&[f32]>,
    current: &[f32],
) -> Vec<f32> {
    let num_trained = gradients.first().map(|first| first.trained().len());
    let Some(num_trained) = num_trained.filter(|&trained| trained < current.len()) else {
        return Vec::new();
    };
    let present = &current[num_trained..];
    let before = Version(update.version.0.saturating_sub(1));
    let moves = gradients.iter().zip(&update.gradients);
    let moves = moves.map(|(gradient, one)| {
        let share = 1.0 / one.staleness(before).saturating_add(1) as f32;
        let made = &gradient.values()[num_trained..];
        let moves = present.iter().zip(made).map(|(now, made)| now - made);
        moves.map(|moved| moved * share).collect()
    });
    let moves: Vec<Vec<f32>> = moves.collect();
    let moves: Vec<&[f32]> = moves.iter().map(Vec::as_slice).collect();
    let mut mean = vec![0.0; present.len()];
    reduce_part(
        &moves,
        0..present.len(),
        weights,
        Reduction::Mean,
        &mut mean,
    );
    mean
}

/// Does the same for the numbers of one part of the gradients.
fn reduce_part(
    gradients: &[&[f32]],
    part: Range<usize>,
    weights: Option<&[f32]>,
    reduction: Reduction,
    sum: &mut [f32],
) {
    let (first, rest) = gradients.split_first().expect("an update has gradients");
    let scale = match reduction {
        Reduction::Mean => 1.0 / gradients.len() as f32,
        Reduction::Sum => 1.0,
    };
    vectorized(
        #[inline(always)]
        || {
            let first = &first[part.clone()];
            if let Some(weights) = weights {
                for (sum, value) in sum.iter_mut().zip(first) {
                    *sum = value * weights[0];
                }
                for (gradient, weight) in rest.iter().zip(&weights[1..]) {
                    for (sum, value) in sum.iter_mut().zip(&gradient[part.clone()]) {
                        *sum += value * weight;
                    }
                }
                return;
            }
            sum.copy_from_slice(first);
            for gradient in rest {
                for (sum, value) in sum.iter_mut().zip(&gradient[part.clone()]) {
                    *sum += value;
                }
            }
            for sum in sum.iter_mut() {
                *sum *= scale;
            }
        },
    );
}

/// Returns the Euclidean norm of the combined gradient of `update`, if it is above `limit`. The gradients are
/// those of the update, over all weights of the model. Buffers are left out.
pub(super) fn norm_above(gradients: &[&Gradient], update: &Update, limit: f64) -> Option<f64> {
    if let [single] = gradients {
        return Some(single.norm()).filter(|&norm| norm > limit);
    }
    let weights = shares(update);
    if bound(gradients, weights.as_deref(), update.reduction) <= limit {
        // Most updates of a run that goes well need no further look at the numbers.
        return None;
    }
    let trained = |gradient: &&Gradient| gradient.trained().len();
    let len = gradients.first().map_or(0, trained);
    let values: Vec<&[f32]> = gradients.iter().map(|gradient| gradient.values()).collect();
    let starts = (0..len).step_by(PART_LEN);
    let mut squares = vec![0.0; starts.len()];
    let parts = starts.zip(&mut squares);
    for_each(len * size_of::<f32>(), parts, |(start, square)| {
        let part = start..len.min(start + PART_LEN);
        let mut sum = vec![0.0; part.len()];
        reduce_part(
            &values,
            part,
            weights.as_deref(),
            update.reduction,
            &mut sum,
        );
        *square = norm_squared(&sum);
    });
    // The order of this sum is fixed, so its bits are.
    let norm = squares.iter().sum::<f64>().sqrt();
    Some(norm).filter(|&norm| norm > limit)
}

/// Returns a number that the norm of the combined gradient is not above: that of gradients that all have the
/// same direction.
fn bound(gradients: &[&Gradient], weights: Option<&[f32]>, reduction: Reduction) -> f64 {
    let norms = gradients.iter().map(|gradient| gradient.norm());
    match (weights, reduction) {
        (Some(weights), _) => norms.zip(weights).map(|(n, &w)| n * f64::from(w)).sum(),
        (None, Reduction::Sum) => norms.sum(),
        (None, Reduction::Mean) => norms.sum::<f64>() / gradients.len() as f64,
    }
}

/// Clips a part of a combined gradient.
pub(super) fn clip(gradient: &mut [f32], clip: Clip) {
    let num_bytes = size_of_val(gradient);
    let parts = gradient.chunks_mut(PART_LEN);
    match clip {
        Clip::None => {}
        Clip::Scale(factor) => for_each(num_bytes, parts, |part| {
            vectorized(
                #[inline(always)]
                || part.iter_mut().for_each(|value| *value *= factor),
            );
        }),
        Clip::Value(limit) => for_each(num_bytes, parts, |part| {
            vectorized(
                #[inline(always)]
                || {
                    part.iter_mut()
                        .for_each(|value| *value = value.clamp(-limit, limit))
                },
            );
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Clock, GradientId, Incarnation, WorkerId};
    use crate::server::protocol::Summand;

    fn update(gradients: &[Gradient], sizes: &[u64], reduction: Reduction) -> Update {
        let summands = (0..).zip(gradients.iter().zip(sizes));
        let gradients = summands.map(|(worker, (gradient, &num_examples))| Summand {
            id: GradientId {
                worker: WorkerId(worker),
                incarnation: Incarnation(1),
                clock: Clock(0),
            },
            computed_on: Version(0),
            norm: gradient.norm(),
            num_examples,
        });
        Update {
            version: Version(1),
            gradients: gradients.collect(),
            reduction,
            clip: Clip::None,
        }
    }

    /// The norm is that of the numbers which the update rule would get.
    #[test]
    fn the_norm_of_the_combined_gradient_is_that_of_its_numbers() {
        let of = |k: i64| {
            let numbers = (0..700_001_i64).map(|i| ((i * k) % 1013 - 506) as f32 * 1e-4);
            Gradient::new(numbers.collect::<Vec<_>>())
        };
        let gradients = [of(1), of(3), of(7)];
        let all: Vec<&Gradient> = gradients.iter().collect();
        for (sizes, reduction) in [
            ([1, 1, 1], Reduction::Mean),
            ([5, 1, 2], Reduction::Mean),
            ([1, 1, 1], Reduction::Sum),
        ] {
            let update = update(&gradients, &sizes, reduction);
            let weights = shares(&update);
            let sum = reduce(
                &gradients,
                weights.as_deref(),
                reduction,
                &BufferPool::new(0),
            );
            let expected = norm_squared(&sum).sqrt();
            let norm = norm_above(&all, &update, 0.0).unwrap();
            assert_eq!(norm.to_bits(), expected.to_bits(), "{reduction} {sizes:?}");
            assert!(
                norm <= bound(&all, weights.as_deref(), reduction),
                "{reduction}"
            );
            assert_eq!(norm_above(&all, &update, norm), None);
            assert_eq!(norm_above(&all, &update, norm * 0.999), Some(norm));
        }
        // S-20: the norm of the trained weights is the same, whatever stands behind them.
        let with_buffers = gradients.each_ref().map(|gradient| {
            let numbers = [gradient.values(), &[1e9; 5]].concat();
            Gradient::with_buffers(numbers, gradient.values().len())
        });
        let plain = update(&gradients, &[5, 1, 2], Reduction::Mean);
        let both = [&gradients, &with_buffers].map(|gradients| {
            let gradients: Vec<&Gradient> = gradients.iter().collect();
            norm_above(&gradients, &plain, 0.0).map(f64::to_bits)
        });
        assert_eq!(both[0], both[1]);
        let single = update(&gradients[..1], &[1], Reduction::Mean);
        let norm = gradients[0].norm();
        assert_eq!(norm_above(&all[..1], &single, norm), None);
        assert_eq!(norm_above(&all[..1], &single, norm / 2.0), Some(norm));
    }

    /// S-20.
    #[test]
    fn buffers_become_the_mean_even_if_gradients_are_added_up() {
        let gradients = [[1.0, 2.0, 4.0], [3.0, 6.0, 8.0]];
        let gradients = gradients.map(|numbers| Gradient::with_buffers(numbers.to_vec(), 1));
        let update = |sizes: [u64; 2], reduction| update(&gradients, &sizes, reduction);
        let after = |gradients: &[Gradient], update: &Update, current: &[f32]| {
            let moves = moves_of_buffers(gradients, update, shares(update).as_deref(), current);
            let buffers = &current[current.len() - moves.len()..];
            let buffers = buffers.iter().zip(&moves).map(|(now, moved)| now - moved);
            buffers.collect::<Vec<_>>()
        };
        let current = [100.0, 1.0, -3.0];
        let sum = update([3, 1], Reduction::Sum);
        assert_eq!(after(&gradients, &sum, &current), [4.0, 6.0]);
        let mean = update([3, 1], Reduction::Mean);
        assert_eq!(after(&gradients, &mean, &current), [3.0, 5.0]);
        let parts = gradients.each_ref().map(|gradient| gradient.slice(2..3));
        assert_eq!(after(&parts, &sum, &[-3.0]), [6.0]);
        let plain = gradients.each_ref().map(|gradient| gradient.slice(0..1));
        assert!(after(&plain, &sum, &[100.0]).is_empty());

        // The second one is three updates old: it counts a quarter of what it counted.
        let mut uneven = update([1, 1], Reduction::Mean);
        uneven.version = Version(4);
        uneven.gradients[0].computed_on = Version(3);
        let expected = [
            1.0 + (1.0 + 5.0 / 4.0) / 2.0,
            -3.0 + (7.0 + 11.0 / 4.0) / 2.0,
        ];
        assert_eq!(after(&gradients, &uneven, &current), expected);
    }

    #[test]
    fn clipping_scales_or_limits_each_number() {
        let numbers: Vec<f32> = (-3..4).map(|i| i as f32).collect();
        let clipped = |how| {
            let mut numbers = numbers.clone();
            clip(&mut numbers, how);
            numbers
        };
        assert_eq!(clipped(Clip::None), numbers);
        assert_eq!(
            clipped(Clip::Scale(0.5)),
            [-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
        );
        assert_eq!(
            clipped(Clip::Value(1.5)),
            [-1.5, -1.5, -1.0, 0.0, 1.0, 1.5, 1.5]
        );
    }

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
