//! Update rules, which change the weights by a gradient.
//!
//! An [`UpdateRule`] works on one server's contiguous range and keeps the state of that range. A rule must
//! be *elementwise*: what happens to one weight may depend only on that weight, its gradient and its state.
//! Then any number of servers gives the same bits as one server (PS-3). A rule that uses a whole parameter at once needs
//! servers that have whole ones: [`Cut::BetweenParameters`](crate::server::Cut).
//!
//! [`Groups`] has other rules and rates for some of the parameters.
//!
//! [`Sgd`] is a plain loop in this crate, because it needs no tensor library and runs at the speed of the
//! memory. The crate `ps` makes a rule of any elementwise optimizer of burn.

use std::fmt;
use std::ops::Range;

use ps_runtime::codec::Bulk;
use ps_runtime::parallel::{PART_LEN, for_each, vectorized};
use serde::{Deserialize, Serialize};

use crate::ids::Version;
use crate::weights::Layout;

pub use self::groups::Groups;

mod groups;

/// Changes weights by a gradient. Implementations must be deterministic and elementwise (see the
/// [module](self)).
///
/// ```
/// use ps_actors::rule::UpdateRule;
/// use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
/// # use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
/// # use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
///
/// /// Moves each weight against the sign of its gradient.
/// #[derive(Debug)]
/// struct SignSgd;
///
/// impl UpdateRule for SignSgd {
///     fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
///         for (weight, gradient) in weights.iter_mut().zip(gradient) {
///             *weight -= learning_rate as f32 * gradient.signum();
///         }
///     }
/// }
///
/// let initial = Weights::initial(Layout::flat(2), vec![0.0, 0.0]);
/// let config = ServerConfig { learning_rate: 0.5, ..ServerConfig::default() };
/// let server = ParameterServer::new(&initial, SignSgd, config)?.spawn()?;
/// # let id = GradientId { worker: WorkerId(0), incarnation: Incarnation(1), clock: Clock(0) };
/// # let gradient = Gradient::new(vec![7.0, -0.1]);
/// # let update =
/// #     GradientUpdate { id, computed_on: Version(0), loss: 0.0, num_examples: 1, gradient };
/// // `update` is a worker's gradient: [7.0, -0.1].
/// let weights = server.ask(ApplyGradients::mean([update])).wait()??;
/// assert_eq!(weights.to_vec(), [-0.5, 0.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub trait UpdateRule: Send + fmt::Debug + 'static {
    /// Updates `weights` in place.
    ///
    /// `weights` and `gradient` always have the same length, and it is the same in every call.
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64);

    /// Writes the updated weights to `next` and leaves `weights` unchanged. The server calls this while
    /// somebody still reads `weights`. It must give the same bits as [`UpdateRule::update`].
    fn update_into(
        &mut self,
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        next: &mut [f32],
    ) {
        next.copy_from_slice(weights);
        self.update(next, gradient, learning_rate);
    }

    /// Is called once, before all other methods, with the weights of the model that the rule updates. Most rules
    /// treat all weights alike and do not need this. [`Groups`] does.
    ///
    /// # Errors
    /// If the rule cannot update them. Then there is no server.
    fn place(&mut self, layout: &Layout, range: Range<usize>) -> Result<(), PlaceError> {
        let _ = (layout, range);
        Ok(())
    }

    /// Returns the learning rate of the update that makes `version`, if the server's settings have `set`.
    /// The default is `set`. A rule with a schedule ([`Scheduled`](crate::learning_rate::Scheduled)) returns
    /// the rate of its schedule.
    ///
    /// Only the first server of a group is asked. All servers make the update with its answer.
    fn learning_rate(&mut self, version: Version, set: f64) -> f64 {
        let _ = version;
        set
    }

    /// Returns the rule's own state, such as momentum, as named vectors and numbers.
    fn save(&self) -> RuleState {
        RuleState::default()
    }

    /// Restores a state that [`UpdateRule::save`] returned.
    ///
    /// # Errors
    /// If the state is not one of this rule.
    fn restore(&mut self, state: RuleState) -> Result<(), RuleStateError> {
        if state == RuleState::default() {
            return Ok(());
        }
        Err(RuleStateError {
            rule: format!("{self:?}"),
            problem: "it keeps no state".to_owned(),
        })
    }
}

impl UpdateRule for Box<dyn UpdateRule> {
    fn place(&mut self, layout: &Layout, range: Range<usize>) -> Result<(), PlaceError> {
        (**self).place(layout, range)
    }

    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        (**self).update(weights, gradient, learning_rate);
    }

    fn update_into(
        &mut self,
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        next: &mut [f32],
    ) {
        (**self).update_into(weights, gradient, learning_rate, next);
    }

    fn learning_rate(&mut self, version: Version, set: f64) -> f64 {
        (**self).learning_rate(version, set)
    }

    fn save(&self) -> RuleState {
        (**self).save()
    }

    fn restore(&mut self, state: RuleState) -> Result<(), RuleStateError> {
        (**self).restore(state)
    }
}

/// The state of an update rule, as plain data.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RuleState {
    /// Vectors with their names. Each has one number for each weight of the range.
    pub vectors: Vec<(String, Vec<f32>)>,
    /// Single numbers with their names, such as a step count.
    pub scalars: Vec<(String, Scalar)>,
}

/// A single number of an update rule's state.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Scalar {
    /// An integer that is not negative, such as a step count.
    Unsigned(u64),
    /// A negative integer.
    Signed(i64),
    /// A real number.
    Float(f64),
    /// A truth value, such as whether something has begun.
    Bool(bool),
}

/// A [`RuleState`] whose vectors are shared and not copied, and travel beside the header of a message.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SavedRule {
    pub(crate) vectors: Vec<(String, Bulk)>,
    pub(crate) scalars: Vec<(String, Scalar)>,
}

impl SavedRule {
    /// Whether it is the state of a rule that has made no update.
    pub(crate) fn is_fresh(&self) -> bool {
        self.vectors.is_empty() && self.scalars.is_empty()
    }
}

impl From<RuleState> for SavedRule {
    fn from(RuleState { vectors, scalars }: RuleState) -> Self {
        let vectors = vectors.into_iter();
        Self {
            vectors: vectors
                .map(|(name, numbers)| (name, Bulk::from(numbers)))
                .collect(),
            scalars,
        }
    }
}

impl From<SavedRule> for RuleState {
    fn from(SavedRule { vectors, scalars }: SavedRule) -> Self {
        let vectors = vectors.into_iter();
        Self {
            vectors: vectors
                .map(|(name, numbers)| (name, numbers.into()))
                .collect(),
            scalars,
        }
    }
}

/// Parameters that an update rule cannot update.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{problem}")]
pub struct PlaceError {
    /// Which parameter it is, and what to do.
    pub problem: String,
}

/// A saved state that does not belong to the rule that should restore it.
#[derive(Debug, thiserror::Error)]
#[error("this state cannot be restored into the update rule {rule}: {problem}")]
pub struct RuleStateError {
    /// The rule, as its `Debug` prints it.
    pub rule: String,
    /// Why the state does not fit the rule.
    pub problem: String,
}

/// Stochastic gradient descent, with or without momentum.
///
/// Without momentum: `w ← w − η·g`. With momentum: `v ← μ·v + g; w ← w − η·v`, where the first `v` is `g`.
/// This is PyTorch's `torch.optim.SGD` without dampening
/// (<https://pytorch.org/docs/stable/generated/torch.optim.SGD.html>).
///
/// ```
/// use ps_actors::rule::{Sgd, UpdateRule};
///
/// let mut weights = [1.0, 2.0];
/// Sgd::new().update(&mut weights, &[1.0, -1.0], 0.5);
/// assert_eq!(weights, [0.5, 2.5]);
/// ```
#[derive(Clone, Default)]
pub struct Sgd {
    momentum: f32,
    velocity: Vec<f32>,
}

impl Sgd {
    /// Makes plain SGD: `w ← w − η·g`.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes SGD with momentum `μ`. A usual value is 0.9.
    ///
    /// ```
    /// use ps_actors::rule::{Sgd, UpdateRule};
    ///
    /// let mut rule = Sgd::with_momentum(0.5);
    /// let mut weights = [1.0];
    /// rule.update(&mut weights, &[1.0], 0.1); // v = 1.0
    /// assert_eq!(weights, [0.9]);
    /// rule.update(&mut weights, &[1.0], 0.1); // v = 0.5 · 1.0 + 1.0
    /// assert!((weights[0] - 0.75).abs() < 1e-6);
    /// ```
    ///
    /// # Panics
    /// If `momentum` is not in `0.0..1.0`.
    #[must_use]
    pub fn with_momentum(momentum: f32) -> Self {
        assert!(
            (0.0..1.0).contains(&momentum),
            "momentum {momentum} is not in 0.0..1.0"
        );
        Self {
            momentum,
            velocity: Vec::new(),
        }
    }
}

impl UpdateRule for Sgd {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        let (rate, momentum) = (learning_rate as f32, self.momentum);
        let num_bytes = size_of_val(weights);
        let parts = weights.chunks_mut(PART_LEN).zip(gradient.chunks(PART_LEN));
        if momentum == 0.0 {
            return for_each(num_bytes, parts, |(weights, gradient)| {
                vectorized(
                    #[inline(always)]
                    || {
                        for (weight, gradient) in weights.iter_mut().zip(gradient) {
                            *weight -= rate * gradient;
                        }
                    },
                );
            });
        }
        self.velocity.resize(gradient.len(), 0.0);
        let parts = parts.zip(self.velocity.chunks_mut(PART_LEN));
        for_each(num_bytes, parts, |((weights, gradient), velocity)| {
            vectorized(
                #[inline(always)]
                || {
                    for ((weight, gradient), velocity) in
                        weights.iter_mut().zip(gradient).zip(velocity)
                    {
                        *velocity = momentum * *velocity + gradient;
                        *weight -= rate * *velocity;
                    }
                },
            );
        });
    }

    fn update_into(
        &mut self,
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        next: &mut [f32],
    ) {
        if self.momentum != 0.0 {
            next.copy_from_slice(weights);
            return self.update(next, gradient, learning_rate);
        }
        let rate = learning_rate as f32;
        let num_bytes = size_of_val(next);
        let old = weights.chunks(PART_LEN).zip(gradient.chunks(PART_LEN));
        let parts = next.chunks_mut(PART_LEN).zip(old);
        for_each(num_bytes, parts, |(next, (weights, gradient))| {
            vectorized(
                #[inline(always)]
                || {
                    for ((next, weight), gradient) in next.iter_mut().zip(weights).zip(gradient) {
                        *next = weight - rate * gradient;
                    }
                },
            );
        });
    }

    fn save(&self) -> RuleState {
        if self.velocity.is_empty() {
            return RuleState::default();
        }
        let vectors = vec![("velocity".to_owned(), self.velocity.clone())];
        RuleState {
            vectors,
            scalars: Vec::new(),
        }
    }

    fn restore(&mut self, mut state: RuleState) -> Result<(), RuleStateError> {
        let velocity = match (state.vectors.pop(), &state.vectors[..], &state.scalars[..]) {
            (None, _, []) => Vec::new(),
            (Some((name, velocity)), [], []) if name == "velocity" && self.momentum != 0.0 => {
                velocity
            }
            _ => {
                let problem = "it keeps only a vector `velocity`, and only with momentum";
                return Err(RuleStateError {
                    rule: format!("{self:?}"),
                    problem: problem.to_owned(),
                });
            }
        };
        self.velocity = velocity;
        Ok(())
    }
}

impl fmt::Debug for Sgd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sgd")
            .field("momentum", &self.momentum)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps of `torch.optim.SGD([w], lr=0.1, momentum=m)` from w = [1, -2] with the
    /// gradients [1, 2], [0.5, -1], [0.25, 0.5], by hand: v1 = g1, v2 = m·v1 + g2, …
    #[test]
    fn momentum_follows_pytorchs_formula() {
        let gradients = [[1.0, 2.0], [0.5, -1.0], [0.25, 0.5]];
        for (momentum, expected) in [(0.0, [0.825, -2.15]), (0.9, [0.609, -2.402])] {
            let mut rule = Sgd::with_momentum(momentum);
            let mut weights = [1.0f32, -2.0];
            for gradient in &gradients {
                rule.update(&mut weights, gradient, 0.1);
            }
            for (got, want) in weights.iter().zip(expected) {
                assert!(
                    (got - want).abs() < 1e-6,
                    "momentum {momentum}: {weights:?}"
                );
            }
        }
    }

    #[test]
    fn updating_into_another_buffer_gives_the_same_bits() {
        for momentum in [0.0, 0.9] {
            let mut in_place = Sgd::with_momentum(momentum);
            let mut into = in_place.clone();
            let mut weights = vec![0.3f32, -0.7, 1e-8];
            for step in 0..5 {
                let gradient: Vec<f32> = weights.iter().map(|w| w * 0.37 + step as f32).collect();
                let mut next = vec![9.0; 3];
                into.update_into(&weights, &gradient, 0.01, &mut next);
                in_place.update(&mut weights, &gradient, 0.01);
                assert_eq!(weights, next);
            }
        }
    }

    #[test]
    fn long_vectors_are_updated_as_short_ones() {
        let weights: Vec<f32> = (0..3_000_001).map(|i| (i % 1013) as f32).collect();
        let gradient: Vec<f32> = (0..weights.len()).map(|i| (i % 997) as f32).collect();
        let pairs = weights.iter().zip(&gradient);
        let expected: Vec<f32> = pairs.map(|(w, g)| w - 0.5 * g).collect();
        let (mut in_place, mut next) = (weights.clone(), vec![0.0; weights.len()]);
        Sgd::new().update(&mut in_place, &gradient, 0.5);
        Sgd::new().update_into(&weights, &gradient, 0.5, &mut next);
        assert!(in_place == expected && next == expected);

        let mut rule = Sgd::with_momentum(0.9);
        let (mut got, mut expected, mut velocity) =
            (weights.clone(), weights, vec![0.0; 3_000_001]);
        for _ in 0..2 {
            rule.update(&mut got, &gradient, 0.5);
            for i in 0..expected.len() {
                velocity[i] = 0.9 * velocity[i] + gradient[i];
                expected[i] -= 0.5 * velocity[i];
            }
        }
        assert!(got == expected);
    }

    #[test]
    fn a_saved_momentum_continues_identically_and_a_foreign_state_is_refused() {
        let gradient = [0.5f32, -0.25];
        let (mut a, mut weights) = (Sgd::with_momentum(0.9), [1.0f32, 2.0]);
        a.update(&mut weights, &gradient, 0.1);
        let mut b = Sgd::with_momentum(0.9);
        b.restore(a.save()).unwrap();
        let mut other = weights;
        a.update(&mut weights, &gradient, 0.1);
        b.update(&mut other, &gradient, 0.1);
        assert_eq!(weights, other);
        let error = Sgd::new().restore(a.save()).unwrap_err();
        assert!(error.to_string().contains("velocity"), "{error}");
    }
}
