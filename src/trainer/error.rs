//! Why a training could not be started, or did not finish.

use ps_actors::actor::CallError;
use ps_actors::checkpoint::CheckpointError;
use ps_actors::cluster::{SpawnOnError, StartError};
use ps_actors::group::GroupSpawnError;
use ps_actors::ids::WorkerId;
use ps_actors::server::{Consistency, ConsistencyError, GroupError};
use ps_actors::worker::WorkerError;
use ps_model::{DeviceError, ModelError, RuleError};

use super::ReplayError;
use crate::learning_rate::ScheduleError;
use crate::report::Report;
use crate::source::SetupError;

/// Why a training run could not be started, or did not finish.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let mnist = Mnist::bundled_sample();
/// let error = Trainer::new(ConvNet::init(1, &device), mnist.train).workers(0).run().unwrap_err();
/// assert!(matches!(error, TrainError::NoWorkers));
/// assert_eq!(error.to_string(), "training needs at least one worker");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The number of workers is 0.
    #[error("training needs at least one worker")]
    NoWorkers,
    /// There are more workers than can be numbered.
    #[error("{0} workers are too many: at most {max} can take part", max = u16::MAX)]
    TooManyWorkers(usize),
    /// A batch cannot be cut into so many parts.
    #[error(
        "a batch of {batch_size} examples cannot be computed in {parts} micro-batches: give 1 to the batch size"
    )]
    MicroBatches {
        /// The number of parts.
        parts: usize,
        /// The number of examples in a batch.
        batch_size: usize,
    },
    /// A condition on evaluations should end the training, but the training has no evaluations.
    #[error(
        "a training that must stop early needs evaluations: set `test_data`, and `evaluate_every` to a number \
         of updates"
    )]
    NoEvaluations,
    /// There is a metric, but no data to compute it on.
    #[error("the metric {0:?} needs data to be computed on: set `test_data`")]
    MetricWithoutData(String),
    /// The consistency mode does not fit the number of workers.
    #[error(transparent)]
    Consistency(#[from] ConsistencyError),
    /// In this mode, the next gradient needs the update of the one before.
    #[error(
        "in {0}, workers cannot compute while they push, because the next gradient needs the update of the one before: \
         use asp or ssp:BOUND, or no `overlap`"
    )]
    Overlap(Consistency),
    /// The list of devices is empty.
    #[error("there is no device to train on: `devices` was given an empty list")]
    NoDevice,
    /// The default device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model or its data cannot be used.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The optimizer cannot be used.
    #[error("the optimizer cannot be used")]
    Rule(#[from] RuleError),
    /// A group of parameters has none of the parameters that are trained.
    #[error(
        "no parameter that is trained belongs to the group of {what}: paths of parameters look like `{example}`"
    )]
    EmptyGroup {
        /// The optimizer or the rate of the group.
        what: String,
        /// The path of one of the model's parameters.
        example: String,
    },
    /// This factor of a group's learning rate is negative or not finite.
    #[error("{0} is no factor of a learning rate: it must be finite and at least 0")]
    RateFactor(f64),
    /// The schedule of the learning rate cannot be used.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The directory for checkpoints cannot be used, or has no checkpoint from which this training can go
    /// on.
    #[error("checkpoints cannot be used")]
    Checkpoint(#[from] CheckpointError),
    /// The training could not be recorded or replayed.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The servers could not be started.
    #[error("the servers could not be started")]
    Servers(#[from] GroupSpawnError),
    /// The servers failed during the run.
    #[error("the servers failed")]
    Group(#[from] GroupError),
    /// The processes did not find each other.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A worker or server could not be started on a node.
    #[error("an actor could not be started")]
    Spawn(#[from] SpawnOnError),
    /// The system gave no event loop for the training.
    #[error("the system gives no event loop: raise the limit on open files (ulimit -n)")]
    EventLoop(#[source] std::io::Error),
    /// A worker failed.
    #[error("a worker failed")]
    Worker(#[from] WorkerError),
    /// A worker panicked more often than is allowed, or could not be reached.
    #[error("{worker} was lost")]
    WorkerLost {
        /// The worker that was lost.
        worker: WorkerId,
        /// Why its last call failed.
        #[source]
        source: CallError,
    },
    /// The model does not accept the test data. This is found before the first step.
    #[error("the model cannot evaluate the test data")]
    TestData(#[source] ModelError),
    /// The training diverged.
    #[error(
        "training has diverged: {what}; a lower learning rate helps most often, then a smaller \
         initialization or clipping in the model; data that contain NaN do the same. Where \
         `max_gradient_norm` is set, it may be too low"
    )]
    Diverged {
        /// How the result shows it.
        what: String,
    },
    /// More than half of the gradients were refused because of their norm.
    #[error(
        "{num_refused} of {num_all} gradients were refused because of their norm, so the weights were trained \
         on the smaller part of the data; if the limit (`max_gradient_norm`) is too low, raise it, or clip \
         gradients (`clip_norm`) and do not refuse them; if there is no limit, the gradients are not finite, \
         and a lower learning rate helps most often"
    )]
    MostRefused {
        /// How many gradients were refused.
        num_refused: u64,
        /// How many gradients there were.
        num_all: u64,
    },
    /// The run failed, but there are weights that were trained until then.
    #[error("the training ended without success after {} updates", .report.num_updates)]
    Incomplete {
        /// The result until then, with the weights. Figures that only workers know may be missing.
        report: Box<Report>,
        /// Why the run failed.
        #[source]
        source: Box<Self>,
    },
    /// The weights could not be evaluated.
    #[error("the weights could not be evaluated")]
    Evaluate(#[from] ModelError),
    /// The system gives no thread to evaluate on.
    #[error("the system gives no thread to evaluate on: raise the limit on threads (ulimit -u)")]
    Thread(#[source] std::io::Error),
    /// The operating system does not let this process receive signals.
    #[error(
        "could not prepare for signals that end the training; `heed_signals(false)` switches this off"
    )]
    Signals(#[source] std::io::Error),
}

impl TrainError {
    /// Returns the result until the error, if there is one.
    #[must_use]
    pub fn report(&self) -> Option<&Report> {
        match self {
            Self::Incomplete { report, .. } => Some(report),
            _ => None,
        }
    }
}
