//! The messages that a worker takes, and what it answers.

use std::time::Duration;

use actix::Message;
use ps_runtime::codec::Bulk;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Steps, WorkerError};
use crate::group::ServerGroup;
use crate::ids::{Clock, Incarnation};
use crate::weights::{GradientUpdate, Weights};

/// Computes the gradient of the worker's next batch at these weights, and returns it.
///
/// For an example, see [`DataWorker`](super::DataWorker).
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<GradientUpdate, WorkerError>")]
pub struct ComputeGradients(pub Weights);

/// Takes `num_steps` steps with these servers. Each step pulls the weights, computes the gradient and
/// pushes it. It ends earlier if the source [has no more](super::GradientSource::has_step) steps.
///
/// A step counts once its gradient has been applied, dropped as late, or refused.
///
/// ```
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::{Clock, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::ServerConfig;
/// use ps_actors::weights::{Gradient, Layout, Weights};
/// use ps_actors::worker::{DataWorker, LocalGradient, RunSteps};
///
/// let initial = Weights::initial(Layout::flat(1), vec![4.0]);
/// let config = ServerConfig { learning_rate: 0.5, ..ServerConfig::default() };
/// let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new()))?;
/// let worker = ps_actors::spawn(|| {
///     DataWorker::new(WorkerId(0), |_: Clock, weights: &Weights| {
///         // The loss is w² / 2, so the gradient is w.
///         let weight = weights.to_vec()[0];
///         let gradient = Gradient::new(vec![weight]);
///         Ok(LocalGradient { gradient, loss: weight * weight / 2.0, num_examples: 1 })
///     })
/// });
///
/// let report = worker.ask(RunSteps { servers, num_steps: 3 }).wait()??;
/// assert_eq!(report.losses, [8.0, 2.0, 0.5]);
/// assert_eq!(report.num_applied, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<RunReport, WorkerError>")]
pub struct RunSteps {
    /// The servers that hold the weights.
    pub servers: ServerGroup,
    /// How many steps to take at most.
    pub num_steps: u64,
}

/// Sets the step of the next [`ComputeGradients`]. Send it to a worker that replaces a lost worker. It has
/// no effect while the worker runs steps.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct GoOnAt {
    /// The clock of the next step.
    pub clock: Clock,
    /// The incarnation of the lost worker. The gradients of this worker get a later one.
    pub after: Incarnation,
}

/// Ends a [`RunSteps`] after the current step.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct StopSteps;

/// Lets the next [`RunSteps`] keep its membership when it ends before all steps are taken: when [`StopSteps`] ends
/// it, when it fails, and when the worker is killed or panics. Another worker goes on in its place, so no round
/// closes without it. The sender of this message must start that worker, [report](crate::server::ReportLost) this one
/// lost, or end the servers.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct KeepMembership;

/// Returns what the worker has done so far.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Progress")]
pub struct GetProgress;

/// What a worker has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// How many gradients the worker has computed.
    pub num_computed: u64,
    /// The mean loss of the latest batch.
    pub latest_loss: f32,
}

/// The result of a [`RunSteps`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The mean loss of each step's batch, at the weights before the step's update.
    #[serde(with = "losses")]
    pub losses: Vec<f32>,
    /// How many gradients were applied.
    pub num_applied: u64,
    /// How many gradients were dropped because their round had already closed.
    pub num_dropped_late: u64,
    /// How many gradients were refused because of their norm.
    pub num_refused: u64,
    /// How many examples the batches of all steps had together.
    pub num_examples: u64,
    /// Whether [`StopSteps`] ended the run before all steps were taken.
    pub was_stopped: bool,
    /// Total time of computing gradients.
    pub compute_time: Duration,
    /// Total time of waiting for the servers. This includes transfers, queues, updates, and waiting for
    /// other workers.
    pub wait_time: Duration,
    /// The records of the latest steps that nobody has asked for; see [`GetSteps`](super::GetSteps). None if nobody observes.
    pub unfetched: Steps,
}

impl RunReport {
    /// Adds the report of a later run of the same worker to this one.
    pub fn append(&mut self, later: Self) {
        let Self {
            losses,
            num_applied,
            num_dropped_late,
            num_refused,
            num_examples,
            was_stopped,
            compute_time,
            wait_time,
            unfetched,
        } = later;
        // The numbers may come from a peer, so adding them must not overflow.
        let add = |sum: &mut u64, number| *sum = sum.saturating_add(number);
        let add_time = |sum: &mut Duration, time| *sum = sum.saturating_add(time);
        self.losses.extend(losses);
        add(&mut self.num_applied, num_applied);
        add(&mut self.num_dropped_late, num_dropped_late);
        add(&mut self.num_refused, num_refused);
        add(&mut self.num_examples, num_examples);
        self.was_stopped = was_stopped;
        add_time(&mut self.compute_time, compute_time);
        add_time(&mut self.wait_time, wait_time);
        // They include those of the earlier run.
        self.unfetched = unfetched;
    }
}

/// Writes the losses as bulk data, because those of a long run would not fit into a header.
mod losses {
    use super::{Bulk, Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        losses: &[f32],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        Bulk::from(losses.to_vec()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<f32>, D::Error> {
        Bulk::deserialize(deserializer).map(|losses| losses.to_vec())
    }
}
