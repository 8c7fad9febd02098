//! The parameter server: holds weights and applies gradients to them.
//!
//! [`ParameterServer`] is the actor; its heart is pure. The `coordinator` decides which
//! gradients make which update, by [`Consistency`] mode, membership and exactly-once
//! `ledger`; a `shard` holds a range of the weights and follows those decisions. Neither
//! knows of time, threads or actix, so both run in tests under any schedule.
//!
//! | module | what it holds |
//! |---|---|
//! | `actor`, `config` | the actor, its settings |
//! | `messages`, `handlers` | what it can be asked, and what it does then |
//! | `coordinator`, `protocol` | who is in which update; events and effects |
//! | `ledger` | what became of each gradient |
//! | `shard`, `partition` | the numbers; how they are split |
//! | `consistency`, `status` | modes; what is reported |

mod actor;
mod config;
mod consistency;
mod coordinator;
mod followers;
#[cfg(test)]
mod fuzz;
mod handlers;
mod leases;
mod ledger;
mod messages;
mod partition;
mod protocol;
mod shard;
mod status;
#[cfg(test)]
mod tests;

mod waiting;

pub use actor::ParameterServer;
pub use config::{ConfigError, ServerConfig};
pub use consistency::{Consistency, ConsistencyError, Reduction, ReductionError};
pub(crate) use followers::GroupSecret;
pub use ledger::Outcome;
pub use messages::{
    ApplyGradients, ApplyKept, GetStatus, GetWeights, GroupError, Heartbeat, Join, KeptGradients,
    Leave, Pull, Push, PushPull, Pushed, ReportLost, ServerError, ServerStatus, SetConsistency,
    SetLearningRate, Stage,
};
pub use partition::partition;
pub use protocol::{Membership, Refusal};
pub use shard::{PullVersion, ShardError};
pub use status::{Awaited, CoordinatorStatus, Histogram, WorkerStatus};
