//! The messages of a [`ParameterServer`](super::ParameterServer).
//!
//! They are data only. No message, answer or error contains a channel, so each can cross a wire (see
//! [`codec`](ps_runtime::codec)). A worker of a group of several servers uses a
//! [`ServerGroup`](crate::group::ServerGroup), which sends the right messages to each server.

use actix::Message;
use ps_runtime::actor::{CallError, NotDelivered};
use ps_runtime::remote::Kept;
use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::followers::GroupSecret;
use super::ledger::Outcome;
use super::protocol::{Membership, Refusal, Update};
use super::shard::{PullVersion, ShardError};
use super::status::{CoordinatorStatus, LostServer};
use crate::ids::{GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::update_log::LogStatus;
use crate::weights::{Gradient, GradientUpdate, Precision, Weights};
use crate::worker::WorkerError;

/// Returns the current weights of the server's range.
///
/// ```
/// use ps_actors::ids::Version;
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{
///     Consistency, GetStatus, GetWeights, ParameterServer, ServerConfig, SetConsistency, SetLearningRate, SetPaused,
/// };
/// use ps_actors::weights::{Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(2), vec![1.0, 2.0]);
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// assert_eq!(server.ask(GetWeights).wait()?.to_vec(), [1.0, 2.0]);
///
/// // Both hold from the next update on.
/// server.ask(SetConsistency(Consistency::Ssp { bound: 2 })).wait()??;
/// server.ask(SetLearningRate(0.5)).wait()??;
/// let status = server.ask(GetStatus).wait()?;
/// assert_eq!((status.version, status.learning_rate), (Version(0), 0.5));
///
/// // No push is applied until the pause ends.
/// server.ask(SetPaused(true)).wait()??;
/// server.ask(SetPaused(false)).wait()??;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Weights")]
pub struct GetWeights;

/// Returns the weights of the server's range at a certain version. Waits until this version exists.
///
/// For an example, see [`Push`].
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Weights, ServerError>")]
pub struct Pull {
    /// The version of the weights that is wanted: the current one, exactly one, or one from it on.
    pub wanted: PullVersion,
    /// With how many bits the weights travel to another process.
    pub precision: Precision,
}

impl Pull {
    /// Makes the message for weights as they are.
    #[must_use]
    pub fn new(wanted: PullVersion) -> Self {
        Self {
            wanted,
            precision: Precision::F32,
        }
    }
}

/// Applies some gradients as one update, at once and in any consistency mode. Returns the new weights. A
/// Ray-style driver sends it with the gradients that its workers computed.
///
/// A gradient is applied at most once, however often it is sent. The same call again returns the current
/// weights.
///
/// ```
/// use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(1), vec![1.0]);
/// let config = ServerConfig { learning_rate: 0.5, ..ServerConfig::default() };
/// let server = ParameterServer::new(&initial, Sgd::new(), config)?.spawn()?;
///
/// let update = |rank, number: f32| GradientUpdate {
///     id: GradientId { worker: WorkerId(rank), incarnation: Incarnation(1), clock: Clock(0) },
///     computed_on: Version(0),
///     loss: 0.0,
///     num_examples: 1,
///     gradient: Gradient::new(vec![number]),
/// };
/// let both = ApplyGradients::mean([update(0, 1.0), update(1, 3.0)]);
/// let weights = server.ask(both.clone()).wait()??;
/// assert_eq!(weights.to_vec(), [0.0]); // 1.0 − 0.5 · (1.0 + 3.0) / 2
///
/// let again = server.ask(both).wait()??;
/// assert_eq!(again.version(), Version(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Weights, ServerError>")]
pub struct ApplyGradients {
    /// The gradients. No two of them may have the same id.
    pub gradients: Vec<GradientUpdate>,
    /// How the gradients are combined into one.
    pub reduction: Reduction,
}

impl ApplyGradients {
    /// Makes a call that applies the mean of the gradients, weighted as [`Reduction::Mean`] says.
    pub fn mean(gradients: impl IntoIterator<Item = GradientUpdate>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Mean,
        }
    }

    /// Makes a call that applies the sum of the gradients.
    pub fn sum(gradients: impl IntoIterator<Item = GradientUpdate>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Sum,
        }
    }
}

/// The same as [`ApplyGradients`], for gradients that are still in the processes that computed them. The
/// server fetches them there, so they do not pass through the driver. See
/// [`ActorRef::ask_kept`](ps_runtime::ActorRef::ask_kept).
///
/// ```
/// use ps_actors::ids::{Clock, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ApplyKept, GetWeights, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Gradient, Layout, Weights};
/// use ps_actors::worker::{ComputeGradients, DataWorker, LocalGradient};
///
/// let initial = Weights::initial(Layout::flat(1), vec![0.0]);
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let worker = ps_actors::spawn(|| {
///     DataWorker::new(WorkerId(0), |_: Clock, _: &Weights| {
///         let gradient = Gradient::new(vec![-100.0]);
///         Ok(LocalGradient { gradient, loss: 1.0, num_examples: 32 })
///     })
/// });
///
/// let weights = server.ask(GetWeights).wait()?;
/// let kept = worker.ask_kept(ComputeGradients(weights)).wait()?; // A ticket, not the numbers.
/// let weights = server.ask(ApplyKept::mean([kept])).wait()??;
/// assert_eq!(weights.to_vec(), [1.0]); // The default learning rate is 0.01.
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Weights, ServerError>")]
pub struct ApplyKept {
    /// The kept results of the workers' calls. No two of the gradients may have the same id.
    pub gradients: Vec<KeptGradients>,
    /// How the gradients are combined into one.
    pub reduction: Reduction,
}

/// The kept result of a [`ComputeGradients`](crate::worker::ComputeGradients).
pub type KeptGradients = Kept<Result<GradientUpdate, WorkerError>>;

impl ApplyKept {
    /// Makes a call that applies the mean of the gradients, weighted as [`Reduction::Mean`] says.
    pub fn mean(gradients: impl IntoIterator<Item = KeptGradients>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Mean,
        }
    }

    /// Makes a call that applies the sum of the gradients.
    pub fn sum(gradients: impl IntoIterator<Item = KeptGradients>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Sum,
        }
    }
}

/// Makes a worker a member, in the incarnation that the answer names. This ends an earlier membership of
/// the same worker. Sent to the first server of a group.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Membership, ServerError>")]
pub struct Join {
    /// The worker that joins.
    pub worker: WorkerId,
    /// A random number. The same `Join` again gets the same answer. A `Join` with another number begins
    /// another incarnation.
    pub request: JoinRequest,
}

/// Ends a worker's membership. Its pending gradients are not applied. Sent to the first server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct Leave {
    /// The worker that leaves.
    pub worker: WorkerId,
    /// The incarnation that leaves. A `Leave` of an earlier incarnation changes nothing.
    pub incarnation: Incarnation,
}

/// Declares a member dead. A driver sends it when its call to the worker has failed. Sent to the first
/// server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct ReportLost {
    /// The worker that is dead.
    pub worker: WorkerId,
}

/// Tells the first server that a member is alive. Returns the server's worker lease, if it has one. The
/// next heartbeat, or another message of the worker, must arrive within this time. Needed only if a step
/// takes longer than the lease.
///
/// A [`DataWorker`](crate::worker::DataWorker) that runs steps sends heartbeats by itself.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Option<std::time::Duration>, ServerError>")]
pub struct Heartbeat {
    /// The member that is alive.
    pub worker: WorkerId,
    /// The incarnation of the member.
    pub incarnation: Incarnation,
}

/// Keeps a gradient until the first server decides whether it is applied. Sent to every other server of a
/// group, before the [`Push`] to the first one.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct Stage {
    /// The id of the gradient.
    pub id: GradientId,
    /// The numbers. They cover exactly the server's range, or exactly all weights of the model.
    pub gradient: Gradient,
}

/// Pushes a gradient over exactly the weights of the model. It is applied when the consistency mode says
/// so. Sent to the first server.
///
/// ```
/// use ps_actors::ids::{Clock, GradientId, JoinRequest, Version, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{
///     Consistency, Join, ParameterServer, Pull, PullVersion, Push, PushPull, ServerConfig,
/// };
/// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let config = ServerConfig {
///     consistency: Consistency::Asp,
///     learning_rate: 0.5,
///     ..ServerConfig::default()
/// };
/// let initial = Weights::initial(Layout::flat(1), vec![2.0]);
/// let server = ParameterServer::new(&initial, Sgd::new(), config)?.spawn()?;
///
/// let worker = WorkerId(0);
/// let joined = server.ask(Join { worker, request: JoinRequest(7) }).wait()??;
/// let update = |clock| GradientUpdate {
///     id: GradientId { worker, incarnation: joined.incarnation, clock: Clock(clock) },
///     computed_on: Version(clock),
///     loss: 0.0,
///     num_examples: 1,
///     gradient: Gradient::new(vec![1.0]),
/// };
/// let outcome = server.ask(Push(update(0))).wait()??;
/// assert_eq!(outcome.version(), Version(1));
///
/// // The same with the new weights in the answer: 2.0 − 2 · 0.5 · 1.0.
/// let pushed = server.ask(PushPull::new(update(1))).wait()??;
/// assert_eq!(pushed.weights.to_vec(), [1.0]);
///
/// let pulled = server.ask(Pull::new(PullVersion::AtLeast(Version(2)))).wait()??;
/// assert_eq!(pulled.to_vec(), [1.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Outcome, ServerError>")]
pub struct Push(pub GradientUpdate);

/// Pushes a gradient. Returns its outcome and the weights for the worker's next step, as soon as the
/// consistency mode lets this step start. Sent to the first server.
///
/// For an example, see [`Push`].
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Pushed, ServerError>")]
pub struct PushPull {
    /// The gradient that is pushed, with its id and the version that it was computed on.
    pub gradients: GradientUpdate,
    /// With how many bits the weights travel to another process.
    pub precision: Precision,
}

impl PushPull {
    /// Makes the message for weights as they are.
    #[must_use]
    pub fn new(gradients: GradientUpdate) -> Self {
        Self {
            gradients,
            precision: Precision::F32,
        }
    }
}

/// The answer to a [`PushPull`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pushed {
    /// The outcome of the gradient.
    pub outcome: Outcome,
    /// The current weights of the server's range.
    pub weights: Weights,
    /// How long the server held the push before it answered: for the round to close, for slower workers, and
    /// for the update.
    pub held: std::time::Duration,
    /// How long the server took to make the update that the gradient became part of. Other servers of the group
    /// make their parts of it at the same time or later. Zero if the gradient was not applied.
    pub applied: std::time::Duration,
    /// Whether the worker may compute its next gradient while it pushes the one before; see
    /// [`ServerConfig::overlap`](super::ServerConfig::overlap).
    pub may_overlap: bool,
}

/// Changes the consistency mode from now on. Sent to the first server.
///
/// For an example, see [`GetWeights`].
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct SetConsistency(pub Consistency);

/// Changes the learning rate of all updates from now on. Sent to the first server.
///
/// For an example, see [`GetWeights`].
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct SetLearningRate(pub f64);

/// Pauses all updates, or lets them go on. Sent to the first server.
///
/// While the server is paused, pushes wait as if for their round, so no worker gets ahead. Workers may join and
/// leave, and checkpoints can be taken. When it goes on, it decides what it would have decided without a
/// pause. A pause does not delay [`ApplyGradients`] and [`ApplyKept`]: a driver that sends them pauses by sending none.
///
/// For an example, see [`GetWeights`].
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct SetPaused(pub bool);

/// Returns the status of a server.
///
/// For an example, see [`GetWeights`].
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "ServerStatus")]
pub struct GetStatus;

/// The status of a server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// The version of the server's weights. Other servers of the group may be a few versions behind.
    pub version: Version,
    /// The range of weights that the server holds.
    pub range: std::ops::Range<usize>,
    /// How many gradients wait at this server for a decision.
    pub num_staged: usize,
    /// How many calls wait at this server for their answers.
    pub num_waiting: usize,
    /// The learning rate of the next update. If this is not the first server of its group: that of its latest
    /// update.
    pub learning_rate: f64,
    /// The status of the whole run, if this is the first server of its group.
    pub coordinator: Option<CoordinatorStatus>,
    /// The update log, if this is the first server of its group and has one.
    pub log: Option<LogStatus>,
    /// Another server of the group that is gone, if this is the first one and knows of such a server.
    pub lost: Option<LostServer>,
}

/// Decisions of the first server of a group, which the other servers follow in order. Returns the ids of
/// the gradients that are missing, so that their updates cannot be made yet.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Vec<GradientId>, ServerError>")]
pub struct Follow {
    /// Shows that the decisions come from the first server.
    pub(crate) secret: GroupSecret,
    /// One more than the number of the `Follow` before. A `Follow` that is sent again has the same number.
    pub(crate) number: u64,
    pub(crate) decisions: Vec<Decision>,
}

/// One decision of the first server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Decision {
    Stage(GradientId, Gradient),
    /// The numbers of a gradient of an earlier update, for a server that said that it lacks them.
    Complete(GradientId, Gradient),
    Update {
        update: Update,
        learning_rate: f64,
    },
    /// Save the state at this version for a checkpoint. It follows the update that makes the version.
    Save(Version),
    Discard(GradientId),
    Fence {
        worker: WorkerId,
        below: Incarnation,
    },
}

/// Why a server did not do what a message asked. The weights did not change.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ServerError {
    /// The worker or its gradient was refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The gradient does not fit the weights, or the version is no longer kept.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The gradient's norm is NaN, infinite or above the limit.
    #[error(
        "the gradient's norm is {norm}, above the limit of {limit}; the weights were not changed"
    )]
    BadNorm {
        /// The norm of the gradient.
        norm: f64,
        /// The largest norm that is accepted.
        limit: f64,
    },
    /// Only the first server of a group accepts this message.
    #[error("this server follows the first one of its group: send the message there")]
    NotFirst,
    /// A setting, of the server or in the message, cannot work.
    #[error("{0}")]
    Config(#[from] super::config::ConfigError),
    /// Another server of the group is gone, and a part of the weights with it.
    #[error("server {index} of the group is gone: {reason}")]
    GroupBroken {
        /// The index of that server in the group.
        index: usize,
        /// Why the last call to that server failed.
        reason: String,
    },
    /// Another server of the group is too slow.
    #[error(
        "server {index} of the group is too slow: it is {num_behind} decisions behind, and {} MiB of \
         gradients are kept for it; try again later",
        num_kept_bytes >> 20
    )]
    FollowerBehind {
        /// The index of that server in the group.
        index: usize,
        /// How many decisions that server is behind.
        num_behind: usize,
        /// How many bytes of gradients are kept for that server, because it may lack them.
        num_kept_bytes: usize,
    },
    /// Too many calls wait for their answers.
    #[error("{limit} calls wait for this server already; try again later")]
    TooManyWaiting {
        /// How many calls may wait.
        limit: usize,
    },
    /// A decision does not come from the first server, or cannot be followed.
    #[error("not followed: {reason}")]
    NotFollowed {
        /// Why the decision was not followed.
        reason: String,
    },
    /// A kept gradient did not arrive, or was not computed.
    #[error("a gradient could not be fetched: {reason}")]
    NotFetched {
        /// Why there is no gradient.
        reason: String,
    },
    /// The server stopped before it could answer.
    #[error("the server stopped before it could answer")]
    Stopping,
}

/// Why a call to a group of servers failed.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum GroupError {
    /// A server could not be reached, or did not answer.
    #[error("server {index} of the group did not answer")]
    Call {
        /// The index of the server in the group.
        index: usize,
        /// Why the call failed.
        #[source]
        source: CallError,
    },
    /// A server refused the call.
    #[error("server {index} of the group refused")]
    Server {
        /// The index of the server in the group.
        index: usize,
        /// Why the server refused.
        #[source]
        source: ServerError,
    },
    /// A server sent weights that are not its part of the model's weights.
    #[error(
        "server {index} of the group sent weights that are of no use: {reason}; all servers must be of one \
         group, in the order of their ranges"
    )]
    BadWeights {
        /// The index of the server in the group.
        index: usize,
        /// What is wrong with the weights.
        reason: String,
    },
}

impl ServerError {
    /// Whether the server may accept the same message a little later.
    #[must_use]
    pub fn is_for_now(&self) -> bool {
        matches!(
            self,
            Self::FollowerBehind { .. }
                | Self::TooManyWaiting { .. }
                | Self::Refused(Refusal::TooManyPending { .. })
                | Self::Shard(ShardError::TooManyStaged { .. })
        )
    }
}

impl GroupError {
    /// Whether the same call may succeed a little later. If a server cannot be reached, the answer is no,
    /// because the group has already repeated the call.
    #[must_use]
    pub fn is_for_now(&self) -> bool {
        match self {
            Self::Call { source, .. } => matches!(
                source,
                CallError::NotDelivered {
                    reason: NotDelivered::QueueFull { .. },
                    ..
                }
            ),
            Self::Server { source, .. } => source.is_for_now(),
            Self::BadWeights { .. } => false,
        }
    }

    /// Whether a server is lost, or cannot be reached any more. Its part of the weights is lost with it.
    #[must_use]
    pub fn is_server_lost(&self) -> bool {
        match self {
            Self::Call { .. } => !self.is_for_now(),
            Self::Server { source, .. } => {
                matches!(
                    source,
                    ServerError::GroupBroken { .. } | ServerError::Stopping
                )
            }
            Self::BadWeights { .. } => false,
        }
    }

    /// Returns why the first server refused the worker or its gradient, if it did.
    #[must_use]
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Server {
                source: ServerError::Refused(refusal),
                ..
            } => Some(refusal),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests;
