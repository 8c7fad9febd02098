//! What the workers compute: gradients that depend on worker, clock and weights alone.

use super::dice::Dice;
use super::settings::{Problem, Settings};
use crate::ids::{Clock, WorkerId};
use crate::rule::Sgd;
use crate::weights::{Gradient, Layout, Weights};

/// How many weights count the same gradient. There are at most as many servers, so each of them has at least
/// one.
const COPIES: usize = 4;

impl Settings {
    fn num_pairs(&self) -> usize {
        self.num_workers as usize * self.num_steps as usize
    }

    pub(super) fn initial(&self) -> Weights {
        let len = match self.problem {
            // Ranges of servers begin at multiples of 16.
            Problem::Counting => COPIES * self.num_pairs().next_multiple_of(16),
            Problem::Quadratic { num_weights, .. } => num_weights,
        };
        Weights::initial(Layout::flat(len), vec![0.0; len])
    }

    pub(super) fn rule(&self) -> Sgd {
        Sgd::with_momentum(self.momentum)
    }

    pub(super) fn learning_rate(&self) -> f64 {
        match self.problem {
            Problem::Counting => 1.0,
            Problem::Quadratic { learning_rate, .. } => learning_rate,
        }
    }

    /// Returns the gradient of one step.
    pub(super) fn gradient(&self, worker: WorkerId, clock: Clock, weights: &Weights) -> Gradient {
        match self.problem {
            Problem::Counting => {
                let pair = self.pair(worker, clock);
                let mut numbers = vec![0.0; weights.len()];
                let period = numbers.len() / COPIES;
                for copy in 0..COPIES {
                    numbers[copy * period + pair] = -unit(pair);
                }
                Gradient::new(numbers)
            }
            Problem::Quadratic { .. } => {
                let seed = u64::from(worker.0) << 32 | clock.0;
                let mut dice = Dice::new(self.seed ^ seed.wrapping_mul(0x9e37_79b9));
                let weights = weights.to_vec();
                let numbers = weights.iter().enumerate().map(|(index, weight)| {
                    let noise = dice.fraction() as f32 - 0.5;
                    curvature(index) * (weight - 1.0 + noise)
                });
                Gradient::new(numbers.collect::<Vec<f32>>())
            }
        }
    }

    fn pair(&self, worker: WorkerId, clock: Clock) -> usize {
        worker.0 as usize * self.num_steps as usize + clock.0 as usize
    }

    /// Returns how often the gradient of a step is in the weights. Works without momentum only.
    ///
    /// # Errors
    /// If the copies of this number differ, or it is not a whole number.
    pub(super) fn count(
        &self,
        worker: WorkerId,
        clock: Clock,
        weights: &[f32],
    ) -> Result<u64, String> {
        let pair = self.pair(worker, clock);
        let period = weights.len() / COPIES;
        let counts: Vec<f32> = (0..COPIES)
            .map(|copy| weights[copy * period + pair] / unit(pair))
            .collect();
        let count = counts[0];
        let is_count = count >= 0.0 && count.fract() == 0.0;
        match is_count && counts.iter().all(|&other| other == count) {
            true => Ok(count as u64),
            false => Err(format!(
                "{worker}, {clock} is in the weights {counts:?} times"
            )),
        }
    }

    /// Returns the loss of [`Problem::Quadratic`], without its noise, per weight.
    pub(super) fn loss(weights: &Weights) -> f64 {
        let numbers = weights.to_vec();
        let losses = numbers.iter().enumerate().map(|(index, weight)| {
            let error = f64::from(weight - 1.0);
            f64::from(curvature(index)) * error * error / 2.0
        });
        losses.sum::<f64>() / weights.len() as f64
    }
}

fn curvature(index: usize) -> f32 {
    0.25 + 0.75 * (index % 16) as f32 / 15.0
}

/// What a gradient adds to its weights. Gradients differ, so that their norms do.
fn unit(pair: usize) -> f32 {
    1.0 + (pair % 5) as f32
}
