//! What can be observed: plain data, which serde writes and reads.

use std::collections::BTreeMap;

use ps_actors::cluster::NodeId;
use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use ps_actors::server::Outcome;
use ps_actors::update_log::LogStatus;
use ps_actors::weights::GradientUpdate;
use ps_actors::worker::StepRecord;
use serde::{Deserialize, Serialize};

use super::number;
use super::summary::RunEnded;
use crate::source::TestResult;

mod following;

pub use following::{Computed, PartApplied, UpdateMade};

/// Something that happened in a training. Every event has a [time](Self::time).
///
/// As JSON it is one object, whose field `event` names the kind, such as `"step"`. Numbers that are not
/// finite are the texts `NaN`, `Infinity` and `-Infinity`. Later versions may add kinds, and fields to a kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Event {
    /// The training has begun. This is the first event.
    RunStarted(Box<RunStarted>),
    /// A gradient of a worker was settled.
    Step(SettledStep),
    /// Steps of a worker were settled of which nothing else is known.
    StepsMissed(StepsMissed),
    /// Weights are being evaluated, and it takes long.
    Evaluating(Evaluating),
    /// Weights were evaluated on the test data.
    Evaluated(Evaluated),
    /// A worker was started.
    WorkerJoined(WorkerJoined),
    /// A worker panicked, or was lost with its process. If it can be started again, it joins again.
    WorkerLost(WorkerLost),
    /// A worker has left in order.
    WorkerLeft(WorkerLeft),
    /// A worker goes on at another node.
    WorkerMoved(WorkerMoved),
    /// A process joined.
    NodeJoined(NodeJoined),
    /// A process left or was lost.
    NodeLost(NodeLost),
    /// A checkpoint is on the disk.
    CheckpointSaved(CheckpointSaved),
    /// A checkpoint could not be taken or written, or was skipped. The training goes on.
    CheckpointFailed(CheckpointFailed),
    /// Servers were lost. If there are checkpoints, the training goes on from the last one.
    ServersLost(ServersLost),
    /// The training goes on after servers were lost. The steps since the checkpoint come again.
    ServersRecovered(ServersRecovered),
    /// The state of the servers, about once per second.
    ServersSeen(ServersSeen),
    /// Somebody changed the training while it ran; see [`Controls`](crate::controls::Controls).
    Controlled(Controlled),
    /// The observer was too slow, and did not get some of the [steps](Self::Step), or of the events that follow each
    /// gradient.
    EventsSkipped(EventsSkipped),
    /// The file of a run does not hold all steps, before this event and after it. Only this file
    /// has such an event; no observer gets one.
    StepsThinned(StepsThinned),
    /// Another server than the first one has applied its part of a gradient. Only observers that follow
    /// [each gradient](super::Observer::follows_gradients) get it.
    PartApplied(PartApplied),
    /// A driver's own loop has got a gradient that it asked a worker for. Only observers that follow
    /// [each gradient](super::Observer::follows_gradients) get it.
    Computed(Computed),
    /// A driver's own loop has got the weights of an update that it asked the servers for. The [steps](Self::Step) of
    /// its gradients follow. Only observers that follow [each gradient](super::Observer::follows_gradients) get it.
    UpdateMade(UpdateMade),
    /// The training has ended. This is the last event.
    RunEnded(Box<RunEnded>),
}

impl Event {
    /// Whether only observers that follow each gradient get it.
    pub(super) fn is_about_each_gradient(&self) -> bool {
        matches!(
            self,
            Self::PartApplied(_) | Self::Computed(_) | Self::UpdateMade(_)
        )
    }

    /// The event of an evaluation that began and ended at these times.
    pub(crate) fn evaluated(
        began: f64,
        now: f64,
        version: Version,
        result: &TestResult,
        is_final: bool,
    ) -> Self {
        Self::Evaluated(Evaluated {
            time: began,
            seconds: now - began,
            version,
            loss: result.evaluation.mean_loss(),
            accuracy: result.evaluation.accuracy(),
            metrics: result.metrics.clone(),
            is_final,
        })
    }

    /// Returns when it happened, in seconds since the run started.
    #[must_use]
    pub fn time(&self) -> f64 {
        match self {
            Self::RunStarted(event) => event.time,
            Self::Step(event) => event.time,
            Self::StepsMissed(event) => event.time,
            Self::Evaluating(event) => event.time,
            Self::Evaluated(event) => event.time,
            Self::WorkerJoined(event) => event.time,
            Self::WorkerLost(event) => event.time,
            Self::WorkerLeft(event) => event.time,
            Self::WorkerMoved(event) => event.time,
            Self::NodeJoined(event) => event.time,
            Self::NodeLost(event) => event.time,
            Self::CheckpointSaved(event) => event.time,
            Self::CheckpointFailed(event) => event.time,
            Self::ServersLost(event) => event.time,
            Self::ServersRecovered(event) => event.time,
            Self::ServersSeen(event) => event.time,
            Self::Controlled(event) => event.time,
            Self::EventsSkipped(event) => event.time,
            Self::StepsThinned(event) => event.time,
            Self::PartApplied(event) => event.time,
            Self::Computed(event) => event.time,
            Self::UpdateMade(event) => event.time,
            Self::RunEnded(event) => event.time,
        }
    }

    /// Returns the same event at a time that is later by so many seconds.
    #[cfg(feature = "runs")]
    pub(crate) fn later(mut self, seconds: f64) -> Self {
        let time = match &mut self {
            Self::RunStarted(event) => &mut event.time,
            Self::Step(event) => &mut event.time,
            Self::StepsMissed(event) => &mut event.time,
            Self::Evaluating(event) => &mut event.time,
            Self::Evaluated(event) => &mut event.time,
            Self::WorkerJoined(event) => &mut event.time,
            Self::WorkerLost(event) => &mut event.time,
            Self::WorkerLeft(event) => &mut event.time,
            Self::WorkerMoved(event) => &mut event.time,
            Self::NodeJoined(event) => &mut event.time,
            Self::NodeLost(event) => &mut event.time,
            Self::CheckpointSaved(event) => &mut event.time,
            Self::CheckpointFailed(event) => &mut event.time,
            Self::ServersLost(event) => &mut event.time,
            Self::ServersRecovered(event) => &mut event.time,
            Self::ServersSeen(event) => &mut event.time,
            Self::Controlled(event) => &mut event.time,
            Self::EventsSkipped(event) => &mut event.time,
            Self::StepsThinned(event) => &mut event.time,
            Self::PartApplied(event) => &mut event.time,
            Self::Computed(event) => &mut event.time,
            Self::UpdateMade(event) => &mut event.time,
            Self::RunEnded(event) => &mut event.time,
        };
        *time += seconds;
        self
    }
}

/// The training has begun.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunStarted {
    /// Seconds since the run started: 0.
    pub time: f64,
    /// When the run started, in seconds since 1970.
    pub unix_time: f64,
    /// The settings of the training, as the program gave them.
    pub settings: Settings,
    /// The versions of ps and of burn.
    pub versions: Versions,
    /// The version of the weights from which the training goes on. 0 for a new one.
    pub first_version: Version,
}

/// The settings of a training. All fields have a default, so a driver's own loop fills in what it knows.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct Settings {
    /// The name of the training. Empty if it has none.
    pub name: String,
    /// The type of the model.
    pub model: String,
    /// How many trainable weights the model has.
    pub num_weights: usize,
    /// How many examples the training data have.
    pub num_examples: usize,
    /// The number of workers.
    pub num_workers: usize,
    /// The number of servers.
    pub num_servers: usize,
    /// The number of examples in each batch of a worker.
    pub batch_size: usize,
    /// How many steps each worker takes, counted from the beginning of the training.
    pub steps_per_worker: u64,
    /// The seed of the order of examples and of dropout.
    pub seed: u64,
    /// The learning rate of the first update.
    #[serde(with = "number")]
    pub learning_rate: f64,
    /// The schedule of the learning rate. Empty if the rate stays the same.
    #[serde(default)]
    pub schedule: String,
    /// The consistency mode, such as `ssp:3`.
    pub consistency: String,
    /// How the gradients of one update are combined, such as `mean`.
    pub reduction: String,
    /// The optimizer and its settings.
    pub optimizer: String,
    /// The device to compute on.
    pub device: String,
}

/// The versions of the software that runs a training.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Versions {
    /// The version of ps.
    pub ps: String,
    /// The version of burn that this version of ps was made with.
    pub burn: String,
}

impl Versions {
    /// The version of burn in the lock file of ps.
    const BURN: &str = "0.22.1";

    /// Returns the versions of this program.
    #[must_use]
    pub fn here() -> Self {
        Self {
            ps: env!("CARGO_PKG_VERSION").to_owned(),
            burn: Self::BURN.to_owned(),
        }
    }
}

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

/// Weights are being evaluated. It comes four times per second, and not at all if the evaluation is quick.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Evaluating {
    /// Seconds since the run started.
    pub time: f64,
    /// The version of the weights.
    pub version: Version,
    /// How many batches of the test set are evaluated.
    pub num_done: usize,
    /// How many batches there are.
    pub num_batches: usize,
    /// Whether these are the final weights.
    pub is_final: bool,
}

/// Weights were evaluated on the whole test set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Evaluated {
    /// When the weights were pulled, in seconds since the run started.
    pub time: f64,
    /// How long the evaluation took, in seconds.
    pub seconds: f64,
    /// The version of the weights.
    pub version: Version,
    /// The mean loss of the examples.
    #[serde(with = "number")]
    pub loss: f64,
    /// The fraction of right answers, from 0 to 1. `None` if the model does not classify.
    pub accuracy: Option<f64>,
    /// The metrics of [`Trainer::metric`](crate::Trainer::metric), by their names.
    #[serde(
        default,
        with = "number::map",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub metrics: BTreeMap<String, f64>,
    /// Whether these are the final weights.
    pub is_final: bool,
}

/// A worker was started on a node, or has come by itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerJoined {
    /// Seconds since the run started.
    pub time: f64,
    /// The worker that was started.
    pub worker: WorkerId,
    /// The node on which it computes. `None` for a worker over HTTP, which is not on a node of the
    /// cluster.
    pub node: Option<NodeId>,
    /// The clock of its next step. Clock 0 in files of earlier versions.
    #[serde(default)]
    pub next_clock: Clock,
}

/// A worker panicked, or was lost with its process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerLost {
    /// Seconds since the run started.
    pub time: f64,
    /// The worker that was lost.
    pub worker: WorkerId,
    /// The node on which it computed. `None` if it spoke HTTP.
    pub node: Option<NodeId>,
    /// Why the driver took it for lost.
    pub reason: String,
}

/// A worker has left in order: it came by itself, over HTTP, and may come again; or the training ends early, and it
/// has taken its last step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerLeft {
    /// Seconds since the run started.
    pub time: f64,
    /// The worker that left.
    pub worker: WorkerId,
}

/// A worker goes on at another node, because its node leaves or another one has joined.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerMoved {
    /// Seconds since the run started.
    pub time: f64,
    /// The worker that moves.
    pub worker: WorkerId,
    /// The node on which it computed.
    pub from: NodeId,
    /// The node on which it goes on.
    pub to: NodeId,
}

/// A process joined the cluster, or was there when the training began.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeJoined {
    /// Seconds since the run started.
    pub time: f64,
    /// The id of the process in the cluster: rank and incarnation.
    pub node: NodeId,
    /// The name of its machine.
    pub host: String,
    /// The number of the process on its machine.
    pub pid: u32,
}

/// A process left the cluster or was lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeLost {
    /// Seconds since the run started.
    pub time: f64,
    /// The id that the process had in the cluster: rank and incarnation.
    pub node: NodeId,
}

/// A checkpoint is on the disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CheckpointSaved {
    /// Seconds since the run started.
    pub time: f64,
    /// The version of the weights.
    pub version: Version,
    /// The directory of the checkpoint.
    pub path: String,
    /// How long it took to write it, in seconds.
    pub seconds: f64,
    /// The size of its files. 0 if that is not known: files of earlier runs do not have it.
    #[serde(default)]
    pub bytes: u64,
}

/// A checkpoint could not be taken or written, or was skipped because the one before was not yet written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CheckpointFailed {
    /// Seconds since the run started.
    pub time: f64,
    /// Why it was not saved.
    pub reason: String,
}

/// Servers were lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ServersLost {
    /// Seconds since the run started.
    pub time: f64,
    /// How it was noticed.
    pub reason: String,
}

/// The training goes on after servers were lost.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ServersRecovered {
    /// Seconds since the run started.
    pub time: f64,
    /// The version of the weights from which it goes on.
    pub version: Version,
    /// How long it took from the [loss](ServersLost) until the workers could go on, in seconds.
    pub seconds: f64,
}

/// The state of the servers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ServersSeen {
    /// Seconds since the run started.
    pub time: f64,
    /// The learning rate of the next update.
    #[serde(with = "number")]
    pub learning_rate: f64,
    /// The consistency mode, such as `ssp:3`.
    pub consistency: String,
    /// How many pushes wait for their round, or for slower workers.
    pub num_pending: usize,
    /// The workers that the others wait for.
    pub awaited: Vec<WorkerId>,
    /// The workers that are members.
    pub members: Vec<WorkerId>,
    /// The servers, in the order of their ranges. The first one decides.
    pub servers: Vec<ServerSeen>,
    /// The update log, if the first server has one.
    #[serde(default)]
    pub log: Option<LogStatus>,
}

/// The state of one server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ServerSeen {
    /// Where the server is.
    pub node: NodeId,
    /// The version of its weights. Servers after the first one may be a few versions behind.
    pub version: Version,
    /// How many weights it holds.
    pub num_weights: usize,
    /// How many gradients wait there for a decision.
    pub num_staged: usize,
    /// How many calls wait there for their answers.
    pub num_waiting: usize,
}

/// Somebody changed the training while it ran.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Controlled {
    /// Seconds since the run started.
    pub time: f64,
    /// What was changed.
    #[serde(flatten)]
    pub change: Change,
}

/// What somebody changed; see [`Controlled`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Change {
    /// No update is made any more.
    Paused,
    /// Updates are made again.
    Resumed,
    /// A checkpoint of the current version is to be saved.
    CheckpointAsked,
    /// The learning rate of all further updates.
    LearningRate {
        /// The new learning rate.
        #[serde(with = "number")]
        learning_rate: f64,
    },
    /// The consistency mode from now on.
    Consistency {
        /// The new mode, such as `ssp:3`.
        consistency: String,
    },
    /// A worker was told to leave for good after its step.
    WorkerRemoved {
        /// The worker that leaves.
        worker: WorkerId,
    },
}

/// The observer was too slow, and did not get some of the steps, or of the events that follow
/// [each gradient](super::Observer::follows_gradients).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EventsSkipped {
    /// Seconds since the run started.
    pub time: f64,
    /// How many events there were.
    pub num_events: u64,
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

/// Events for the tests of several modules.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    pub(crate) fn step(worker: u32, clock: u64, time: f64) -> Event {
        Event::Step(SettledStep {
            time,
            worker: WorkerId(worker),
            incarnation: Incarnation(1),
            clock: Clock(clock),
            computed_on: Version(clock),
            outcome: StepOutcome::Applied,
            version: Version(clock + 1),
            staleness: clock % 3,
            loss: 2.0,
            norm: 1.0,
            num_examples: 10,
            times: Some(StepTimes::new([0.01, 0.02, 0.03, 0.04, 0.01])),
        })
    }

    #[cfg(feature = "otel")]
    pub(crate) fn started(unix_time: f64, settings: Settings) -> RunStarted {
        RunStarted {
            time: 0.0,
            unix_time,
            settings,
            versions: Versions::here(),
            first_version: Version(0),
        }
    }

    pub(crate) fn evaluating(time: f64, num_done: usize, num_batches: usize) -> Event {
        Event::Evaluating(Evaluating {
            time,
            version: Version(0),
            num_done,
            num_batches,
            is_final: false,
        })
    }

    pub(crate) fn worker_lost(time: f64) -> Event {
        Event::WorkerLost(WorkerLost {
            time,
            worker: WorkerId(0),
            node: Some(NodeId::DRIVER),
            reason: "test".to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step() -> SettledStep {
        SettledStep {
            time: 1.5,
            worker: WorkerId(2),
            incarnation: Incarnation(1),
            clock: Clock(7),
            computed_on: Version(10),
            outcome: StepOutcome::Applied,
            version: Version(13),
            staleness: 2,
            loss: 0.1,
            norm: 3.25,
            num_examples: 32,
            times: Some(StepTimes::new([0.001, 0.25, 0.002, 0.125, 0.5])),
        }
    }

    fn check(event: &Event) -> String {
        let text = serde_json::to_string(event).unwrap();
        assert!(!text.contains('\n'), "{text}");
        let read: Event = serde_json::from_str(&text).unwrap();
        // NaN is not equal to itself.
        assert_eq!(format!("{read:?}"), format!("{event:?}"));
        text
    }

    #[test]
    fn an_event_is_one_line_of_json_and_comes_back() {
        let text = check(&Event::Step(step()));
        assert_eq!(
            text,
            r#"{"event":"step","time":1.5,"worker":2,"incarnation":1,"clock":7,"computed_on":10,"outcome":"applied","version":13,"staleness":2,"loss":0.1,"norm":3.25,"num_examples":32,"times":{"data":0.001,"compute":0.25,"wire":0.002,"waiting":0.125,"apply":0.5}}"#
        );
        check(&Event::RunStarted(Box::new(RunStarted {
            time: 0.0,
            unix_time: 1.7e9,
            settings: Settings::default(),
            versions: Versions::here(),
            first_version: Version(0),
        })));
        check(&Event::WorkerMoved(WorkerMoved {
            time: 2.0,
            worker: WorkerId(0),
            from: NodeId::DRIVER,
            to: NodeId {
                rank: 2,
                incarnation: 3,
            },
        }));
    }

    #[test]
    fn a_worker_of_an_earlier_version_joins_at_clock_0() {
        let text = r#"{"event":"worker_joined","time":0.5,"worker":1,"node":null}"#;
        let expected = Event::WorkerJoined(WorkerJoined {
            time: 0.5,
            worker: WorkerId(1),
            node: None,
            next_clock: Clock(0),
        });
        assert_eq!(serde_json::from_str::<Event>(text).unwrap(), expected);
    }

    #[test]
    fn an_event_of_an_earlier_version_has_no_size_and_no_log() {
        let read = |text| serde_json::from_str::<Event>(text).unwrap();
        let saved = read(
            r#"{"event":"checkpoint_saved","time":1.0,"version":3,"path":"one","seconds":0.5}"#,
        );
        assert!(matches!(saved, Event::CheckpointSaved(saved) if saved.bytes == 0));
        let seen = read(
            r#"{"event":"servers_seen","time":1.0,"learning_rate":0.1,"consistency":"bsp","num_pending":0,"awaited":[],"members":[],"servers":[]}"#,
        );
        assert!(matches!(&seen, Event::ServersSeen(seen) if seen.log.is_none()));
        check(&seen);
    }

    #[test]
    fn numbers_that_are_not_finite_come_back() {
        for (loss, norm, expected) in [
            (f32::NAN, f64::NAN, r#""loss":"NaN","norm":"NaN""#),
            (
                f32::INFINITY,
                f64::NEG_INFINITY,
                r#""loss":"Infinity","norm":"-Infinity""#,
            ),
            (2.0, 1e300, r#""loss":2.0,"norm":1e+300"#),
        ] {
            let text = check(&Event::Step(SettledStep {
                loss,
                norm,
                times: None,
                ..step()
            }));
            assert!(text.contains(expected), "{text}");
        }
        let bad = serde_json::from_str::<Event>(
            r#"{"event":"evaluated","time":0,"seconds":1,"version":0,"loss":"low","accuracy":null,"is_final":true}"#,
        );
        let error = bad.unwrap_err().to_string();
        assert!(error.contains("\"low\" is not a number"), "{error}");
    }

    #[test]
    fn the_version_of_burn_is_that_of_the_lock_file() {
        let lock = include_str!("../../Cargo.lock");
        let entry = format!("name = \"burn\"\nversion = \"{}\"\n", Versions::here().burn);
        assert!(lock.contains(&entry), "not in Cargo.lock: {entry}");
    }
}
