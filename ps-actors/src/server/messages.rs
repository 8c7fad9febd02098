//! What a [`ParameterServer`](super::ParameterServer) can be asked.
//!
//! Data only: no channel in any message or answer, errors included, so each can cross a wire
//! (see [`codec`](ps_runtime::codec)). A worker of a group of
//! several servers speaks to them through a [`ServerGroup`](crate::group::ServerGroup), which
//! knows what to send where.

use actix::Message;
use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::followers::GroupSecret;
use super::ledger::Outcome;
use super::protocol::{Membership, Refusal, Update};
use super::shard::{PullVersion, ShardError};
use super::status::CoordinatorStatus;
use crate::ids::{GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::weights::{Gradient, GradientUpdate, Weights};
use crate::worker::WorkerError;
use ps_runtime::actor::{CallError, NotDelivered};
use ps_runtime::remote::Kept;

/// Returns the current weights of the server's range.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Weights")]
pub struct GetWeights;

/// Returns the weights of the server's range at a certain version, waiting for it if need be.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Weights, ServerError>")]
pub struct Pull(pub PullVersion);

/// Applies some gradients as one update at once, whatever the consistency mode, and returns
/// the new weights: what a Ray-style driver does with what its workers computed.
///
/// A gradient is applied once however often it is sent: the same call again returns the current
/// weights.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Weights, ServerError>")]
pub struct ApplyGradients {
    /// The gradients, of distinct steps.
    pub gradients: Vec<GradientUpdate>,
    /// How they become one.
    pub reduction: Reduction,
}

impl ApplyGradients {
    /// Applies the mean of the gradients, weighted as [`Reduction::Mean`] says.
    pub fn mean(gradients: impl IntoIterator<Item = GradientUpdate>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Mean,
        }
    }

    /// Applies the sum of the gradients.
    pub fn sum(gradients: impl IntoIterator<Item = GradientUpdate>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Sum,
        }
    }
}

/// As [`ApplyGradients`], for gradients that are still where they were computed: the server fetches
/// them, so they do not pass through the driver. See [`ActorRef::ask_kept`](ps_runtime::ActorRef::ask_kept).
#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Weights, ServerError>")]
pub struct ApplyKept {
    /// What the workers' calls return, of distinct steps.
    pub gradients: Vec<KeptGradients>,
    /// How they become one.
    pub reduction: Reduction,
}

/// The kept result of a [`ComputeGradients`](crate::worker::ComputeGradients).
pub type KeptGradients = Kept<Result<GradientUpdate, WorkerError>>;

impl ApplyKept {
    /// Applies the mean of the gradients, weighted as [`Reduction::Mean`] says.
    pub fn mean(gradients: impl IntoIterator<Item = KeptGradients>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Mean,
        }
    }

    /// Applies the sum of the gradients.
    pub fn sum(gradients: impl IntoIterator<Item = KeptGradients>) -> Self {
        Self {
            gradients: gradients.into_iter().collect(),
            reduction: Reduction::Sum,
        }
    }
}

/// Makes a worker a member, in the life that the answer says: an earlier one of the same worker is over.
/// Sent to the first server of a group.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Membership, ServerError>")]
pub struct Join {
    /// Who.
    pub worker: WorkerId,
    /// A random number. The same `Join` again gets the same answer, one with another number
    /// begins another life.
    pub request: JoinRequest,
}

/// Ends a worker's membership; what it has pending is not applied. Sent to the first server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct Leave {
    /// Who.
    pub worker: WorkerId,
    /// Which life; a `Leave` of an earlier life changes nothing.
    pub incarnation: Incarnation,
}

/// Declares a member dead, as a driver does that saw its call fail. Sent to the first server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct ReportLost {
    /// Who.
    pub worker: WorkerId,
}

/// Tells the first server that a member is alive, and returns the server's lease: the next heartbeat,
/// or another message of the worker, has to come within it. Needed only if a step takes longer.
///
/// A [`DataWorker`](crate::worker::DataWorker) that runs steps sends them by itself.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Option<std::time::Duration>, ServerError>")]
pub struct Heartbeat {
    /// Who.
    pub worker: WorkerId,
    /// Which life.
    pub incarnation: Incarnation,
}

/// Keeps a gradient until the first server decides what becomes of it. Sent to every other
/// server of a group, before the [`Push`] to the first.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct Stage {
    /// Which gradient.
    pub id: GradientId,
    /// The numbers, over exactly the server's range or exactly the whole model's.
    pub gradient: Gradient,
}

/// Pushes a gradient over exactly the weights of the model, to be applied as the consistency mode says.
/// Sent to the first server.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Outcome, ServerError>")]
pub struct Push(pub GradientUpdate);

/// Pushes a gradient and returns the weights for the worker's next step, once the consistency
/// mode lets it start. Sent to the first server.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Pushed, ServerError>")]
pub struct PushPull(pub GradientUpdate);

/// The answer to a [`PushPull`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pushed {
    /// What became of the gradient.
    pub outcome: Outcome,
    /// The current weights of the server's range.
    pub weights: Weights,
}

/// Changes the consistency mode from now on. Sent to the first server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct SetConsistency(pub Consistency);

/// Changes the learning rate of all updates from now on. Sent to the first server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), ServerError>")]
pub struct SetLearningRate(pub f64);

/// Returns what a server knows about itself.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "ServerStatus")]
pub struct GetStatus;

/// A server's view of itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerStatus {
    /// The version of its weights; those of other servers of the group may lag a little.
    pub version: Version,
    /// The range of weights that it holds.
    pub range: std::ops::Range<usize>,
    /// How many gradients wait here for a decision.
    pub num_staged: usize,
    /// How many calls wait here for their answers.
    pub num_waiting: usize,
    /// The learning rate of the next update.
    pub learning_rate: f64,
    /// The run as a whole, if this is the first server of its group.
    pub coordinator: Option<CoordinatorStatus>,
}

/// What the first server of a group decided, for the others to follow, in order. Returns the gradients
/// that are missing: those of updates that cannot be made yet.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Vec<GradientId>, ServerError>")]
pub struct Follow {
    /// Shows that it comes from the first server.
    pub(crate) secret: GroupSecret,
    /// One more than that of the `Follow` before; one that comes again has the same.
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
    Discard(GradientId),
    Fence {
        worker: WorkerId,
        below: Incarnation,
    },
}

/// Why a server did not do what it was asked to. The weights are as they were.
#[derive(Clone, Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ServerError {
    /// The gradient or worker is not acceptable.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The gradient does not fit, or the version is gone.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// The gradient's norm is NaN, infinite or above the limit.
    #[error(
        "the gradient's norm is {norm}, above the limit of {limit}; the weights were not changed"
    )]
    BadNorm {
        /// What it is.
        norm: f64,
        /// What it may be at most.
        limit: f64,
    },
    /// Only the first server of a group takes this message.
    #[error("this server follows the first one of its group: send the message there")]
    NotFirst,
    /// The server was started with, or asked for, a setting that cannot work.
    #[error("{0}")]
    Config(#[from] super::config::ConfigError),
    /// Another server of the group is gone, and with it a part of the weights.
    #[error("server {index} of the group is gone: {reason}")]
    GroupBroken {
        /// Which.
        index: usize,
        /// Why its last call failed.
        reason: String,
    },
    /// Another server of the group does not keep up.
    #[error("server {index} of the group is {num_behind} decisions behind; try again later")]
    FollowerBehind {
        /// Which.
        index: usize,
        /// How far.
        num_behind: usize,
    },
    /// Too many calls wait for their answers.
    #[error("{limit} calls wait for this server already; try again later")]
    TooManyWaiting {
        /// How many may.
        limit: usize,
    },
    /// A decision that is not the first server's, or cannot be followed.
    #[error("not followed: {reason}")]
    NotFollowed {
        /// Why.
        reason: String,
    },
    /// A gradient that was to be fetched did not come, or was not computed.
    #[error("a gradient could not be fetched: {reason}")]
    NotFetched {
        /// Why.
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
        /// Which.
        index: usize,
        /// What happened to the call.
        #[source]
        source: CallError,
    },
    /// A server refused.
    #[error("server {index} of the group refused")]
    Server {
        /// Which.
        index: usize,
        /// Why.
        #[source]
        source: ServerError,
    },
    /// A server sent weights that are not its part of the model's.
    #[error(
        "server {index} of the group sent weights that are of no use: {reason}; all servers must be of one \
         group, in the order of their ranges"
    )]
    BadWeights {
        /// Which.
        index: usize,
        /// What is wrong with them.
        reason: String,
    },
}

impl ServerError {
    /// Whether the same message may be taken if it is sent again a little later.
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
    /// Whether the same call may succeed if it is made again a little later. Of a server that cannot be
    /// reached the calls were made again already.
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

    /// Returns the refusal, if the first server refused the worker or its gradient.
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
mod tests {
    use super::super::config::ConfigError;
    use super::*;
    use crate::ids::Clock;
    use ps_runtime::actor::{Undelivered, UnknownOutcome};
    use ps_runtime::test_util::check_error_crosses;

    const WORKER: WorkerId = WorkerId(3);
    const LEAST: Incarnation = Incarnation(u64::MAX);

    fn every_server_error() -> Vec<ServerError> {
        let (worker, least, version) = (WORKER, LEAST, Version(9));
        let got = Incarnation(5);
        let id = GradientId {
            worker,
            incarnation: got,
            clock: Clock(7),
        };
        let refusals = [
            Refusal::NotMember { worker },
            Refusal::Silent {
                worker,
                lease: std::time::Duration::MAX,
            },
            Refusal::Fenced { worker, got, least },
            Refusal::LifeAhead {
                worker,
                got: LEAST,
                newest: got,
            },
            Refusal::ClockAhead {
                id,
                most: Clock(u64::MAX),
            },
            Refusal::TooManyExamples {
                id,
                claimed: u64::MAX,
            },
            Refusal::TwoLives {
                worker,
                one: got,
                other: LEAST,
            },
            Refusal::Forgotten { id },
            Refusal::AlreadyPushed { id },
            Refusal::FromTheFuture {
                id,
                claimed: Version(u64::MAX),
                version,
            },
            Refusal::TooManyPending { worker },
            Refusal::TooManyWorkers { worker },
            Refusal::Empty,
        ]
        .map(ServerError::from);
        let shard = [
            ShardError::WrongRange {
                id,
                got: 0..usize::MAX,
                expected: 4..7,
            },
            ShardError::Fenced { id, least },
            ShardError::TooManyStaged { worker },
            ShardError::TooManyStrangers { id },
            ShardError::VersionGone {
                asked: Version(1),
                oldest: version,
            },
            ShardError::WrongUpdate {
                got: version,
                expected: Version(1),
            },
            ShardError::BadUpdate { version },
        ]
        .map(ServerError::from);
        let config = [
            ConfigError::LearningRate(f64::NAN),
            ConfigError::MaxNorm(-0.5),
            ConfigError::Lease(std::time::Duration::from_nanos(1)),
            ConfigError::NoQuorum,
        ]
        .map(ServerError::from);
        let own = [
            ServerError::BadNorm {
                norm: f64::INFINITY,
                limit: 1e-3,
            },
            ServerError::NotFirst,
            ServerError::GroupBroken {
                index: 2,
                reason: "it has stopped".to_owned(),
            },
            ServerError::FollowerBehind {
                index: 1,
                num_behind: 1000,
            },
            ServerError::TooManyWaiting { limit: 65536 },
            ServerError::NotFollowed {
                reason: "only the first server decides".to_owned(),
            },
            ServerError::Stopping,
        ];
        let every = refusals.into_iter().chain(shard).chain(config);
        every.chain(own).collect()
    }

    #[test]
    fn every_server_error_crosses_a_wire() {
        for sent in every_server_error() {
            let got = check_error_crosses(&sent);
            assert_eq!(format!("{got:?}"), format!("{sent:?}"));
        }
    }

    #[test]
    fn a_group_error_crosses_a_wire_with_what_caused_it() {
        let call = [
            CallError::NotDelivered {
                actor: "server-1".into(),
                reason: NotDelivered::QueueFull { limit: 64 },
                message: Undelivered::new(GetStatus),
            },
            CallError::Unknown {
                actor: "server-1".into(),
                reason: UnknownOutcome::Stopped,
            },
        ];
        let call = call.map(|source| GroupError::Call { index: 1, source });
        let server = every_server_error().into_iter();
        let server = server.map(|source| GroupError::Server { index: 0, source });
        for sent in call.into_iter().chain(server) {
            let got = check_error_crosses(&sent);
            assert_eq!(format!("{got:?}"), format!("{sent:?}"));
            assert_eq!(got.refusal(), sent.refusal());
        }
    }
}
