//! Where in a cluster an actor is started, with which options, and why it was not.

use super::agent::SpawnRefused;
use super::config::NO_THREADS;
use super::host::Hosts;
use super::resources::Resources;
use crate::actor::CallError;
use crate::remote::process::NodeId;

/// The process in which an actor is to be started.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # use ps_runtime::cluster::Hosted;
/// # use ps_runtime::remote::{Messages, Remote};
/// # use serde::{Deserialize, Serialize};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # #[derive(Message, Serialize, Deserialize)]
/// # #[rtype(result = "u64")]
/// # struct Add(u64);
/// # impl Handler<Add> for Counter {
/// #     type Result = u64;
/// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
/// # }
/// # impl Remote for Counter {
/// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
/// # }
/// # impl Hosted for Counter { type Args = u64; }
/// # use ps_runtime::cluster::{Cluster, Hosts};
/// use ps_runtime::cluster::{Placement, Resources, SpawnOnError};
///
/// // A cluster of this process alone.
/// let cluster = Cluster::alone(Hosts::new().host(|start: u64| Ok(Counter(start))));
/// let counter = cluster.spawn_with::<Counter>(Placement::Driver.into(), 40).wait()?;
/// assert!(counter.is_local());
///
/// let many_gpus = Placement::Needs(Resources::none().gpus(1000.0));
/// let error = cluster.spawn_with::<Counter>(many_gpus.into(), 0).wait();
/// assert!(matches!(error, Err(SpawnOnError::NoRoom { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Placement {
    /// The nodes in turn, or the driver if there are no nodes.
    #[default]
    RoundRobin,
    /// The process of the driver.
    Driver,
    /// The node with this id. An id names one incarnation of a rank.
    Node(NodeId),
    /// The node that has this rank, in any incarnation. Rank 0 is the driver.
    Rank(u32),
    /// In turn the nodes that have these resources free, or else the driver. The resources are reserved
    /// until the actor ends.
    Needs(Resources),
}

/// What the driver knows about a node.
///
/// ```
/// use std::time::Duration;
///
/// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node};
///
/// let local = ([127, 0, 0, 1], 0).into();
/// let cluster = Cluster::listen(ClusterConfig::default(), local, Hosts::new())?;
/// let address = cluster.address().expect("it has a TCP socket").to_string();
/// // Usually the node is another process.
/// let node = Node::new(ClusterConfig::default(), 1, 0, address, Hosts::new()).serve();
/// cluster.wait_for_nodes(1, Duration::from_secs(30)).wait()?;
///
/// let nodes = cluster.nodes();
/// assert_eq!(nodes[0].node.rank, 1);
/// assert_eq!(nodes[0].pid, std::process::id());
/// println!("{} offers {}", nodes[0].host, nodes[0].resources);
/// # cluster.release().wait();
/// # node.wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// The rank and the incarnation of the node.
    pub node: NodeId,
    /// The name of its host.
    pub host: String,
    /// Its process id on that host.
    pub pid: u32,
    /// The resources that it offered when it joined.
    pub resources: Resources,
    /// Whether it was asked to leave. Nothing more is started there.
    pub is_leaving: bool,
}

/// Why an actor could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnOnError {
    /// The node asked for has left, or never joined.
    #[error("there is no {0} in the cluster")]
    NoSuchNode(String),
    /// No node has the resources that the actor needs, or has them free.
    #[error("no node has {needs} free; there are: {nodes}")]
    NoRoom {
        /// The resources that were asked for.
        needs: Resources,
        /// The nodes and the resources that each of them offers.
        nodes: String,
    },
    /// The arguments cannot be sent.
    #[error("the arguments of {} cannot be sent: {reason}", short(.actor_type))]
    Args {
        /// The actor's type.
        actor_type: &'static str,
        /// Why the arguments cannot be written as bytes.
        reason: String,
    },
    /// The node answered that it did not start the actor.
    #[error("{node} did not start {}", short(.actor_type))]
    Refused {
        /// The node that was asked.
        node: NodeId,
        /// The actor's type.
        actor_type: &'static str,
        /// The node's answer.
        #[source]
        source: SpawnRefused,
    },
    /// The node did not answer.
    #[error("{node} did not answer when asked to start {}", short(.actor_type))]
    Call {
        /// The node that was asked.
        node: NodeId,
        /// The actor's type.
        actor_type: &'static str,
        /// The error of the call to the node.
        #[source]
        source: Box<CallError>,
    },
    /// The actor has ended already.
    #[error("{0}")]
    Ended(String),
    /// The system gave no threads for the network.
    #[error("{NO_THREADS}")]
    Threads(#[source] std::io::Error),
}

/// Returns the name of a type without the paths in it.
fn short(type_name: &str) -> String {
    let parts = type_name.split_inclusive(|c: char| !(c.is_alphanumeric() || "_:".contains(c)));
    let last = |part: &str| part.rsplit("::").next().unwrap_or_default().to_owned();
    parts.map(last).collect()
}

/// The options of an actor that is started in a cluster.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # use ps_runtime::cluster::Hosted;
/// # use ps_runtime::remote::{Messages, Remote};
/// # use serde::{Deserialize, Serialize};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # #[derive(Message, Serialize, Deserialize)]
/// # #[rtype(result = "u64")]
/// # struct Add(u64);
/// # impl Handler<Add> for Counter {
/// #     type Result = u64;
/// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
/// # }
/// # impl Remote for Counter {
/// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
/// # }
/// # impl Hosted for Counter { type Args = u64; }
/// use ps_runtime::cluster::{Cluster, Hosts, Placement, SpawnOn};
///
/// let cluster = Cluster::alone(Hosts::new().host(|start: u64| Ok(Counter(start))));
/// let options = SpawnOn::new().name("clicks").place(Placement::Driver);
/// let counter = cluster.spawn_with::<Counter>(options, 40).wait()?;
/// assert_eq!(counter.name(), "clicks");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "nothing is spawned before `start`"]
pub struct SpawnOn {
    pub(super) placement: Placement,
    pub(super) name: Option<String>,
    pub(super) variant: Option<String>,
    pub(super) here: Option<Hosts>,
}

impl From<Placement> for SpawnOn {
    fn from(placement: Placement) -> Self {
        Self::new().place(placement)
    }
}

impl SpawnOn {
    /// Returns the default options: any node, no name, no variant.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the process in which the actor is started.
    pub fn place(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Gives the actor a name. All processes of the cluster can look it up.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Asks for this [variant](Hosts::host_variant).
    pub fn variant(mut self, variant: impl Into<String>) -> Self {
        self.variant = Some(variant.into());
        self
    }

    /// Sets the [`Hosts`] that make the actor if it is made in this process. They replace the hosts
    /// that the cluster was made with.
    pub fn here(mut self, hosts: Hosts) -> Self {
        self.here = Some(hosts);
        self
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn type_names_are_shown_without_paths() {
        assert_eq!(
            super::short("a::b::Worker<c::Source<[u8; 4], d::Net>>"),
            "Worker<Source<[u8; 4], Net>>"
        );
    }
}
