//! Spawns actors in several processes, on one machine or many, and finds them.
//!
//! There is no cluster manager. The same program is started several times. The copy of rank 0 is the
//! driver and holds the [`Cluster`]. The other copies are nodes ([`Node`]). A node joins the driver,
//! makes the actors that it is asked for, and ends when the driver releases it. A node that loses its
//! driver ends its actors and joins again as a new [`NodeId`]. Whatever its earlier incarnation sends
//! is then refused.
//!
//! | module | what it holds |
//! |---|---|
//! | `host` | the actor types that a process can make |
//! | `driver`, `node` | the two roles |
//! | `way` | a node's way to the driver, and what may be wrong with it |
//! | `placement` | where an actor is started |
//! | `agent`, `members` | the messages between driver and nodes; the driver's list of nodes |
//! | `task_scope` | the actors that a process has made for others |
//! | `door`, `incarnations` | decide which processes may join; which incarnations are over |
//! | `launched` | turns the command line into a cluster |
//! | `endpoint`, `config` | sockets; settings and errors |
//! | `socket_directory` | the directory of the Unix socket; removes those of dead processes |
//! | `lookup` | finds actors by name from inside an actor |
//! | `value` | values that stay in one process, and handles to them |
//! | `resources`, `task` | resources of nodes; results that are under way |

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
mod placement;
mod resources;
mod socket_directory;
mod task;
mod task_scope;
#[cfg(test)]
mod tests;
mod value;
mod way;

pub use agent::SpawnRefused;
pub use config::{ClusterConfig, ClusterError, Transport};
pub use driver::Cluster;
pub use host::{Hosted, Hosts, MakeError};
pub use launched::StartError;
pub use lookup::lookup;
pub use node::{Node, NodeExit};
pub use placement::{NodeInfo, Placement, SpawnOn, SpawnOnError};
pub use resources::{Resources, ResourcesError};
pub use task::Task;
pub use value::{Method, Owned, RemoteRef, Value};
pub use way::unreachable;

pub use crate::remote::NodeId;
