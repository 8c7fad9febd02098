//! Several processes, on one machine or many, as one place to spawn actors in.
//!
//! There is no cluster manager. The same program is started several times; the copy of rank 0 is
//! the driver, holds the [`Cluster`], and the others are nodes, which join it ([`Node`]), make the
//! actors that they are asked to, and end when the driver lets them go. A node that loses its
//! driver ends its actors and joins again as a new [`NodeId`]: nothing of an earlier incarnation is
//! listened to.
//!
//! | module | what it holds |
//! |---|---|
//! | `host` | the actor types that a process can make |
//! | `driver`, `node` | the two roles |
//! | `agent`, `members` | how they speak to each other, and the driver's list |
//! | `door` | who is let in |
//! | `launched` | from the command line to a cluster |
//! | `endpoint`, `config` | sockets; settings and errors |
//! | `socket_directory` | where the Unix socket is, and what dead processes have left |
//! | `lookup` | names, from inside an actor |
//! | `value` | values that stay where they are, and handles to them |
//! | `resources`, `task` | where actors fit; results that are under way |

pub(crate) mod agent;
mod config;
mod door;
mod driver;
mod endpoint;
mod host;
mod incarnations;
mod launched;
mod lookup;
mod members;
mod node;
mod resources;
mod socket_directory;
mod task;
#[cfg(test)]
mod tests;
mod value;

pub use agent::SpawnRefused;
pub use config::{ClusterConfig, ClusterError, Transport};
pub use driver::{Cluster, NodeInfo, Placement, SpawnOn, SpawnOnError};
pub use host::{Hosted, Hosts, MakeError};
pub use launched::StartError;
pub use lookup::lookup;
pub use node::{Node, NodeExit};
pub use resources::{Resources, ResourcesError};
pub use task::Task;
pub use value::{Method, Owned, RemoteRef, Value};

pub use crate::remote::NodeId;
