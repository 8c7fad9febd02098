//! The events of settled steps, and the times of a step.

use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use ps_actors::server::Outcome;
use ps_actors::weights::GradientUpdate;
use ps_actors::worker::StepRecord;
use serde::{Deserialize, Serialize};

use crate::observe::number;

/// A gradient of a worker was settled: applied, dropped as late, or refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SettledStep {
    /// When the worker got the answer, in seconds since the run started.
    pub time: f64,
    /// The worker that took the step.
    pub worker: WorkerId,
    /// The incarnation that the worker had when it took the step.
    pub incarnation: Incarnation,
    /// The clock of the step: 0 for the worker's first one.
    pub clock: Clock,
    /// The version of the weights that the gradient was computed on.
    pub computed_on: Version,
    /// What became of the gradient.
    pub outcome: StepOutcome,
    /// The version of the weights that the update made. If the gradient was not applied, the version at
    /// that time.
    pub version: Version,
    /// How many updates there were between the two versions, without the gradient's own.
    pub staleness: u64,
    /// The mean loss of the batch.
    #[serde(with = "number")]
    pub loss: f32,
    /// The Euclidean norm of the gradient.
    #[serde(with = "number")]
    pub norm: f64,
    /// How many examples the batch had.
    pub num_examples: u64,
    /// How long the parts of the step took. `None` if the driver's own loop does not know it.
    pub times: Option<StepTimes>,
}

impl SettledStep {
    /// Returns the name of the gradient.
    #[must_use]
    pub fn gradient(&self) -> GradientId {
        GradientId {
            worker: self.worker,
            incarnation: self.incarnation,
            clock: self.clock,
        }
    }

    /// Makes the event of a gradient that a driver's own loop has applied, in the update that made
    /// `version`. `time` is in seconds since the run started.
    #[must_use]
    pub fn applied(time: f64, gradient: &GradientUpdate, version: Version) -> Self {
        let made_from = version.0.saturating_sub(1);
        Self {
            time,
            worker: gradient.id.worker,
            incarnation: gradient.id.incarnation,
            clock: gradient.id.clock,
            computed_on: gradient.computed_on,
            outcome: StepOutcome::Applied,
            version,
            staleness: made_from.saturating_sub(gradient.computed_on.0),
            loss: gradient.loss,
            norm: gradient.gradient.norm(),
            num_examples: gradient.num_examples as u64,
            times: None,
        }
    }

    pub(crate) fn of(worker: WorkerId, record: &StepRecord, time: f64) -> Self {
        let version = record.outcome.version();
        let (outcome, staleness) = match record.outcome {
            Outcome::Applied { staleness, .. } => (StepOutcome::Applied, staleness),
            Outcome::DroppedLate { staleness, .. } => (StepOutcome::Late, staleness),
            Outcome::RefusedNorm { .. } => (
                StepOutcome::Refused,
                version.0.saturating_sub(record.computed_on.0),
            ),
        };
        Self {
            time,
            worker,
            incarnation: record.incarnation,
            clock: record.clock,
            computed_on: record.computed_on,
            outcome,
            version,
            staleness,
            loss: record.loss,
            norm: record.norm,
            num_examples: record.num_examples,
            times: Some(StepTimes {
                data: record.data.as_secs_f64(),
                compute: record.compute.as_secs_f64(),
                wire: record.wire.as_secs_f64(),
                waiting: record.waiting.as_secs_f64(),
                apply: record.apply.as_secs_f64(),
            }),
        }
    }
}

/// What became of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepOutcome {
    /// It is part of an update of the weights.
    Applied,
    /// Its round had already closed, so it was dropped.
    Late,
    /// Its norm was NaN, infinite or too large. The weights did not change.
    Refused,
}

/// How long the parts of a step took, in seconds. Their sum is the whole step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepTimes {
    /// Waiting for the batch.
    pub data: f64,
    /// Computing the gradient.
    pub compute: f64,
    /// Sending the gradient and receiving weights, including the queues in between.
    pub wire: f64,
    /// Waiting at the server: for the round to close, for slower workers, and for the update log.
    pub waiting: f64,
    /// Waiting for the update itself, as long as the first server took to make it. If another server takes
    /// longer, the difference is part of `wire`. Zero if the gradient was not applied.
    #[serde(default)]
    pub apply: f64,
}

impl StepTimes {
    /// The names of the [parts](Self::parts).
    pub const NAMES: [&str; 5] = ["data", "compute", "wire", "waiting", "apply"];

    /// Makes the times of a step of its [parts](Self::parts), in seconds.
    #[must_use]
    pub fn new([data, compute, wire, waiting, apply]: [f64; 5]) -> Self {
        Self {
            data,
            compute,
            wire,
            waiting,
            apply,
        }
    }

    /// Returns the parts: data, compute, wire, waiting, apply.
    #[must_use]
    pub fn parts(&self) -> [f64; 5] {
        [self.data, self.compute, self.wire, self.waiting, self.apply]
    }

    /// Returns how long the whole step took, in seconds.
    #[must_use]
    pub fn total(&self) -> f64 {
        self.parts().iter().sum()
    }
}

/// Steps of a worker were settled of which nothing else is known: the worker was lost before it could tell
/// of them, or it took more steps between two looks than it keeps records of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepsMissed {
    /// Seconds since the run started.
    pub time: f64,
    /// The worker that took the steps.
    pub worker: WorkerId,
    /// The clock of the first of these steps. The others follow it.
    pub first: Clock,
    /// How many steps there are.
    pub num_steps: u64,
}

/// Not all steps are kept in the file of a run, because it has grown too large. No observer gets this event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct StepsThinned {
    /// Seconds since the run started.
    pub time: f64,
    /// The file keeps only the steps whose clock is a multiple of this number.
    pub kept_every: u64,
    /// How many events were left out until now by this process.
    pub num_left_out: u64,
}
