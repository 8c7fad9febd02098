//! Learning rates that change during a run.
//!
//! A [`LearningRateSchedule`] says the rate of each update. [`Scheduled`] adds one to an update rule. The
//! first server of a group asks its own rule for the rate of each update that it decides, and sends the rate
//! with the decision. So all servers use the same rate, to the bit. It is also what the update log and a
//! recorded schedule have.

use std::fmt;
use std::ops::Range;

use crate::ids::Version;
use crate::rule::{PlaceError, RuleState, RuleStateError, UpdateRule};
use crate::weights::Layout;

/// Says the learning rate of each update.
///
/// The rate must depend only on the number of the update. So a run that goes on from a checkpoint, or whose
/// number of workers changes, has the rates of an undisturbed run. Nothing of a schedule is saved.
///
/// For an example, see [`Scheduled`].
pub trait LearningRateSchedule: Send + fmt::Debug + 'static {
    /// Returns the rate of the update that makes `version`: a number from 0 to the largest `f32`. The first
    /// update of a run makes version 1. Usually the versions are asked for in order, and some more than once.
    fn learning_rate(&mut self, version: Version) -> f64;
}

/// An update rule with a schedule of its learning rate.
///
/// The schedule replaces [`ServerConfig::learning_rate`](crate::server::ServerConfig::learning_rate). It ends
/// when somebody sends [`SetLearningRate`](crate::server::SetLearningRate) to the first server: from then on
/// the rate is the one that was set.
///
/// ```
/// use ps_actors::ids::Version;
/// use ps_actors::learning_rate::{LearningRateSchedule, Scheduled};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ApplyGradients, GetStatus, ParameterServer, ServerConfig};
/// # use ps_actors::ids::{Clock, GradientId, Incarnation, WorkerId};
/// # use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// /// Halves the rate with each update.
/// #[derive(Debug)]
/// struct Halving(f64);
///
/// impl LearningRateSchedule for Halving {
///     fn learning_rate(&mut self, version: Version) -> f64 {
///         self.0 * 0.5_f64.powi(version.0 as i32 - 1)
///     }
/// }
///
/// let initial = Weights::initial(Layout::flat(1), vec![0.0]);
/// let rule = Scheduled::new(Sgd::new(), Halving(1.0));
/// let server = ParameterServer::new(&initial, rule, ServerConfig::default())?.spawn()?;
/// for clock in 0..2 {
/// #   let id = GradientId { worker: WorkerId(0), incarnation: Incarnation(1), clock: Clock(clock) };
/// #   let gradient = Gradient::new(vec![-1.0]);
/// #   let update =
/// #       GradientUpdate { id, computed_on: Version(clock), loss: 0.0, num_examples: 1, gradient };
///     // `update` is a worker's gradient: [-1.0].
///     server.ask(ApplyGradients::mean([update])).flatten().wait()?;
/// }
/// let status = server.ask(GetStatus).wait()?;
/// assert_eq!(status.learning_rate, 0.25); // Of the third update.
/// # let weights = server.ask(ps_actors::server::GetWeights).wait()?;
/// assert_eq!(weights.to_vec(), [1.0 + 0.5]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Scheduled<R, S> {
    rule: R,
    schedule: S,
}

impl<R: UpdateRule, S: LearningRateSchedule> Scheduled<R, S> {
    /// Lets `schedule` say the learning rates of `rule`.
    #[must_use]
    pub fn new(rule: R, schedule: S) -> Self {
        Self { rule, schedule }
    }
}

impl<R: UpdateRule, S: LearningRateSchedule> UpdateRule for Scheduled<R, S> {
    fn place(&mut self, layout: &Layout, range: Range<usize>) -> Result<(), PlaceError> {
        self.rule.place(layout, range)
    }

    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        self.rule.update(weights, gradient, learning_rate);
    }

    fn update_into(
        &mut self,
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        next: &mut [f32],
    ) {
        self.rule
            .update_into(weights, gradient, learning_rate, next);
    }

    /// # Panics
    /// If the schedule gives a rate that no server can use. The server then stops, and all calls to it fail
    /// with this reason.
    fn learning_rate(&mut self, version: Version, _: f64) -> f64 {
        let rate = self.schedule.learning_rate(version);
        if let Err(error) = check_rate(&self.schedule, version, rate) {
            panic!("{error}");
        }
        rate
    }

    fn save(&self) -> RuleState {
        self.rule.save()
    }

    fn restore(&mut self, state: RuleState) -> Result<(), RuleStateError> {
        self.rule.restore(state)
    }
}

impl LearningRateSchedule for Box<dyn LearningRateSchedule> {
    fn learning_rate(&mut self, version: Version) -> f64 {
        (**self).learning_rate(version)
    }
}

/// A schedule that gives a learning rate which no server can use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "the learning-rate schedule {schedule} gives {rate:?} for update {update}, but a learning rate is a \
     number from 0 to {max:.1e}",
    max = f32::MAX
)]
pub struct BadRate {
    /// The schedule, as its `Debug` prints it.
    pub schedule: String,
    /// The number of the update. The first one has the number 1.
    pub update: u64,
    /// The rate that the schedule gave.
    pub rate: f64,
}

/// Checks the rates of the first `num_updates` updates, so that a mistake is found before a run begins.
///
/// ```
/// use ps_actors::ids::Version;
/// use ps_actors::learning_rate::{LearningRateSchedule, check_rates};
///
/// #[derive(Debug)]
/// struct Sinking;
///
/// impl LearningRateSchedule for Sinking {
///     fn learning_rate(&mut self, version: Version) -> f64 {
///         0.25 - 0.1 * version.0 as f64
///     }
/// }
///
/// assert_eq!(check_rates(&mut Sinking, 2), Ok(()));
/// let error = check_rates(&mut Sinking, 1000).unwrap_err();
/// assert_eq!(error.update, 3);
/// ```
///
/// # Errors
/// If one of them is not a number from 0 to the largest `f32`. The error names the first such update.
pub fn check_rates(
    schedule: &mut impl LearningRateSchedule,
    num_updates: u64,
) -> Result<(), BadRate> {
    (1..=num_updates).try_for_each(|update| {
        let version = Version(update);
        let rate = schedule.learning_rate(version);
        check_rate(schedule, version, rate)
    })
}

fn check_rate(
    schedule: &impl LearningRateSchedule,
    version: Version,
    rate: f64,
) -> Result<(), BadRate> {
    match crate::server::check_learning_rate(rate) {
        Ok(()) => Ok(()),
        Err(_) => Err(BadRate {
            schedule: format!("{schedule:?}"),
            update: version.0,
            rate,
        }),
    }
}
