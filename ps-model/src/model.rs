//! The trait of models that can be trained: a burn module with a loss.

use std::iter::Sum;
use std::ops::{Add, AddAssign};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use serde::{Deserialize, Serialize};

use crate::local::ModelError;
use crate::loss::{nll_loss, num_correct};
use crate::step::Step;

/// A burn module with a loss. Implement it for a model of your own.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::Linear;
/// use burn::tensor::{Tensor, TensorData};
/// use ps_model::{Model, Step, burn};
///
/// /// A line through points (x, y).
/// #[derive(Module, Debug)]
/// struct Line {
///     linear: Linear,
/// }
///
/// impl Model for Line {
///     type Batch = Vec<(f32, f32)>;
///
///     fn loss(&self, points: &Self::Batch, step: &mut Step) -> Tensor<1> {
///         let (x, y): (Vec<f32>, Vec<f32>) = points.iter().copied().unzip();
///         let shape = [points.len(), 1];
///         let x = Tensor::<2>::from_data(TensorData::new(x, shape), step.device());
///         let y = Tensor::<2>::from_data(TensorData::new(y, shape), step.device());
///         (self.linear.forward(x) - y).square().mean()
///     }
///
///     fn num_examples(points: &Self::Batch) -> usize {
///         points.len()
///     }
/// }
/// ```
pub trait Model: Module + 'static {
    /// The data of one batch, in host memory.
    type Batch: Send + 'static;

    /// Returns the mean loss over the examples of the batch: a tensor of shape `[1]`.
    ///
    /// Take random choices, such as dropout, from `step`. Make the tensors of the batch on `step.device()`:
    /// if a tensor comes from a device without autodiff, burn's layers take it for the input of an
    /// inference, and a `Dropout` does nothing to it.
    ///
    /// It is called for training. The default [`evaluate`](Self::evaluate) calls it too, with a step that
    /// is not [training](Step::is_training).
    fn loss(&self, batch: &Self::Batch, step: &mut Step) -> Tensor<1>;

    /// Counts the examples of a batch.
    fn num_examples(batch: &Self::Batch) -> usize;

    /// Evaluates the model without training it: the sum of the losses and, for a classifier, the number of
    /// right answers.
    ///
    /// The default computes the sum from the mean that [`loss`](Self::loss) returns, and counts no right
    /// answers. It is called on the module in validation mode ([`Module::valid`]), on a device without
    /// autodiff.
    ///
    /// # Panics
    ///
    /// If the loss is not a single number.
    fn evaluate(&self, batch: &Self::Batch, device: &Device) -> Evaluation {
        let loss = self.loss(batch, &mut Step::evaluation(device));
        let got = loss.dims().to_vec();
        assert!(got == [1], "{}", ModelError::LossShape { got });
        Evaluation::from_mean_loss(loss.into_scalar(), Self::num_examples(batch))
    }
}

/// The result of evaluating a model on some examples. The results on disjoint sets of examples can be
/// added.
///
/// ```
/// use ps_model::Evaluation;
///
/// let classified = |num_correct| Evaluation {
///     num_examples: 4,
///     num_correct: Some(num_correct),
///     loss_sum: 2.0,
/// };
/// let both = classified(1) + classified(3);
/// assert_eq!((both.num_examples, both.accuracy()), (8, Some(0.5)));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// The number of examples.
    pub num_examples: usize,
    /// How many examples were classified correctly. `None` for a model that does not classify.
    pub num_correct: Option<usize>,
    /// The sum of the losses of the examples.
    pub loss_sum: f64,
}

impl Evaluation {
    /// Makes the result of a model that does not classify, from the mean loss of `num_examples` examples.
    #[must_use]
    pub fn from_mean_loss(mean_loss: f32, num_examples: usize) -> Self {
        Self {
            num_examples,
            num_correct: None,
            loss_sum: f64::from(mean_loss) * num_examples as f64,
        }
    }

    /// Makes the result of a classifier, by [`nll_loss`] and [`num_correct`].
    ///
    /// `log_probabilities: [batch, classes]`, `targets: [batch]`.
    ///
    /// # Panics
    ///
    /// If the batch sizes differ.
    #[must_use]
    pub fn of_classifier(log_probabilities: Tensor<2>, targets: Tensor<1, Int>) -> Self {
        let [num_examples, _classes] = log_probabilities.dims();
        let mean_loss = nll_loss(log_probabilities.clone(), targets.clone()).into_scalar::<f32>();
        Self {
            num_correct: Some(num_correct(log_probabilities, targets)),
            ..Self::from_mean_loss(mean_loss, num_examples)
        }
    }

    /// Returns the fraction of right answers, in `0.0..=1.0`. `None` if nothing was classified.
    #[must_use]
    pub fn accuracy(&self) -> Option<f64> {
        match self.num_correct {
            Some(num_correct) if self.num_examples > 0 => {
                Some(num_correct as f64 / self.num_examples as f64)
            }
            _ => None,
        }
    }

    /// Returns the mean loss. NaN if there are no examples.
    #[must_use]
    pub fn mean_loss(&self) -> f64 {
        self.loss_sum / self.num_examples as f64
    }
}

impl AddAssign for Evaluation {
    /// Adds the result on other examples. Adding the default value changes nothing. If only one of two
    /// results is of a classifier, their sum has no accuracy.
    fn add_assign(&mut self, other: Self) {
        self.num_correct = match (*self, other) {
            (
                _,
                Self {
                    num_examples: 0, ..
                },
            ) => self.num_correct,
            (
                Self {
                    num_examples: 0, ..
                },
                _,
            ) => other.num_correct,
            _ => Option::zip(self.num_correct, other.num_correct).map(|(a, b)| a + b),
        };
        self.num_examples += other.num_examples;
        self.loss_sum += other.loss_sum;
    }
}

impl Add for Evaluation {
    type Output = Self;

    fn add(mut self, other: Self) -> Self {
        self += other;
        self
    }
}

impl Sum for Evaluation {
    fn sum<I: Iterator<Item = Self>>(parts: I) -> Self {
        parts.fold(Self::default(), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn classified(num_examples: usize, num_correct: usize, loss_sum: f64) -> Evaluation {
        Evaluation {
            num_examples,
            num_correct: Some(num_correct),
            loss_sum,
        }
    }

    #[test]
    fn evaluations_add_up() {
        let sum: Evaluation = [classified(3, 1, 1.5), classified(1, 1, 0.5)]
            .into_iter()
            .sum();
        assert_eq!(sum, classified(4, 2, 2.0));
        assert_eq!(sum.accuracy(), Some(0.5));
        assert_eq!(sum.mean_loss(), 0.5);
        assert_eq!(sum + Evaluation::default(), sum);
    }

    #[test]
    fn accuracy_is_only_known_where_everything_was_classified() {
        let mixed = classified(3, 1, 1.5) + Evaluation::from_mean_loss(0.25, 2);
        assert_eq!(mixed.num_examples, 5);
        assert_eq!(mixed.loss_sum, 2.0);
        assert_eq!(mixed.accuracy(), None);
        assert_eq!(Evaluation::default().accuracy(), None);
        assert!(Evaluation::default().mean_loss().is_nan());
    }
}
