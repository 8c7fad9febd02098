//! The parameter server, which holds weights and applies gradients to them.
//!
//! [`ParameterServer`] is the actor. It is a thin shell around two pure state machines. The `coordinator`
//! decides which gradients make which update. It does so by [`Consistency`] mode, by membership, and by the
//! `ledger` that makes each push count exactly once. A `shard` holds a range of the weights and follows
//! those decisions. Neither of the two knows of time, threads or actix, so tests can run both under any
//! schedule.
//!
//! | module | what it holds |
//! |---|---|
//! | `actor`, `config` | the actor, its settings |
//! | `messages`, `handlers`, `pushes` | the messages to it, and what it does with each |
//! | `coordinator`, `protocol` | which gradients are in which update; events and effects |
//! | `ledger` | the outcome of each gradient |
//! | `followers`, `following` | how the first server tells the others, and how they follow |
//! | `applied_parts` | what the others remember of it, for a trace |
//! | `replay` | what an update log has of the decisions; how a saved state follows it |
//! | `simulation` | all of this in virtual time, with faults |
//! | `saving` | how all servers fix their state at one version, for a checkpoint |
//! | `shard`, `partition` | the weights; how they are split |
//! | `consistency`, `status` | modes; what is reported |

mod actor;
mod applied_parts;
mod config;
mod consistency;
mod coordinator;
mod decisions;
mod followers;
mod following;
#[cfg(test)]
mod fuzz;
mod handlers;
mod leases;
mod ledger;
mod messages;
mod partition;
mod protocol;
mod pushes;
mod replay;
mod saving;
mod shard;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
mod stall;
mod status;
#[cfg(test)]
mod tests;

mod update_times;
mod waiting;

pub use actor::ParameterServer;
pub use applied_parts::{AppliedPart, AppliedParts, GetAppliedParts, MAX_PARTS};
pub(crate) use config::check_learning_rate;
pub use config::{Clipping, ConfigError, ServerConfig};
pub use consistency::{Consistency, ConsistencyError, Reduction, ReductionError};
pub(crate) use coordinator::{CoordinatorState, beside_header};
pub(crate) use followers::GroupSecret;
pub use ledger::Outcome;
pub use messages::{
    ApplyGradients, ApplyKept, GetStatus, GetWeights, GroupError, Heartbeat, Join, KeptGradients,
    Leave, Pull, Push, PushPull, Pushed, ReportLost, ServerError, ServerStatus, SetConsistency,
    SetLearningRate, SetPaused, Stage,
};
pub(crate) use partition::split;
pub use partition::{Cut, partition};
pub(crate) use protocol::Update;
pub use protocol::{Membership, Refusal};
pub(crate) use replay::{LogEntry, Replay};
pub use saving::{ForgetSavedStates, GetSavedState, ServerState, TakeCheckpoint};
pub use shard::{PullVersion, ShardError};
pub use status::{Awaited, CoordinatorStatus, Histogram, LostServer, WorkerStatus};
