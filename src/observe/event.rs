//! What can be observed: plain data, which serde writes and reads.

use std::collections::BTreeMap;

use ps_actors::cluster::NodeId;
use ps_actors::ids::{Clock, Version, WorkerId};
use ps_actors::update_log::LogStatus;
use serde::{Deserialize, Serialize};

use super::number;
use super::summary::RunEnded;
use crate::source::TestResult;

mod following;
mod settled;

pub use following::{Computed, PartApplied, UpdateMade};
pub use settled::{SettledStep, StepOutcome, StepTimes, StepsMissed, StepsThinned};

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
    /// The training ends after the current steps of its workers.
    EndAsked,
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

/// Events for the tests of several modules.
#[cfg(test)]
pub(crate) mod testing {
    use ps_actors::ids::Incarnation;

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
mod tests;
