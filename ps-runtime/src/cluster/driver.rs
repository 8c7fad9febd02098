//! The driver's view: who is there, and actors anywhere.

use std::any::type_name;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt;
use futures_util::future::join_all;

use super::agent::{
    DriverAgent, Find, Make, Release, SpawnRefused, TaskScope, find_anywhere, hosted_name,
};
use super::config::{ClusterConfig, ClusterError, NO_THREADS};
use super::endpoint::{Bound, Endpoint};
use super::host::{Args, Hosted, Hosts};
use super::launched::ChildProcesses;
use super::members::{Member, Members, Refusal};
use super::resources::Resources;
use super::task::Task;
use crate::actor::error::error_chain;
use crate::actor::{ActorRef, CallError, Spawn};
use crate::net::{Address, threads};
use crate::remote::Remote;
use crate::remote::dial::DialError;
use crate::remote::listen::Incarnations;
use crate::remote::process::{NodeId, Process};
use crate::remote::reference::{Wire, reference};

/// How often all nodes are asked in turn to start an actor.
const MAX_ROUNDS: usize = 3;

/// How long nodes are given to hear that the run is over.
const FAREWELL: Duration = Duration::from_secs(2);

/// The processes that work together, seen from the driver. Cloning gives another handle.
///
/// When the last handle is dropped, all nodes are released. The drop waits until each of them has heard
/// it, and no longer than 2 s if one does not answer, unless it happens on a thread of the network.
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    process: Arc<Process>,
    scope: Arc<TaskScope>,
    members: Arc<Members>,
    next: AtomicUsize,
    addresses: Vec<Address>,
    /// `None` where nobody can join.
    listening: Option<(ActorRef<DriverAgent>, Endpoint)>,
    children: Option<ChildProcesses>,
}

/// Where an actor is to be started.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum Placement {
    /// On the nodes in turn; in the driver if there are none.
    #[default]
    RoundRobin,
    /// In the driver.
    Driver,
    /// On this node.
    Node(NodeId),
    /// On the node of this rank, in whatever incarnation; 0 is the driver.
    Rank(u32),
    /// On the nodes in turn that have this free; it is theirs until the actor ends.
    Needs(Resources),
}

/// What the driver knows about a node.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeInfo {
    /// Which.
    pub node: NodeId,
    /// The name of its host.
    pub host: String,
    /// Its process number there.
    pub pid: u32,
    /// What it offered when it joined.
    pub resources: Resources,
}

/// Why an actor could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnOnError {
    /// The node asked for has left, or never joined.
    #[error("there is no {0} in the cluster")]
    NoSuchNode(String),
    /// No node has, or has free, what the actor needs.
    #[error("no node has {needs} free; there are: {nodes}")]
    NoRoom {
        /// What was asked for.
        needs: Resources,
        /// What the nodes offer.
        nodes: String,
    },
    /// The arguments cannot be sent.
    #[error("the arguments of {} cannot be sent: {reason}", short(.actor_type))]
    Args {
        /// The actor's type.
        actor_type: &'static str,
        /// Why.
        reason: String,
    },
    /// The node did not do it.
    #[error("{node} did not start {}", short(.actor_type))]
    Refused {
        /// Which node.
        node: NodeId,
        /// The actor's type.
        actor_type: &'static str,
        /// Why.
        #[source]
        source: SpawnRefused,
    },
    /// The node did not answer.
    #[error("{node} did not answer when asked to start {}", short(.actor_type))]
    Call {
        /// Which node.
        node: NodeId,
        /// The actor's type.
        actor_type: &'static str,
        /// What became of the call.
        #[source]
        source: Box<CallError>,
    },
    /// The actor has ended already.
    #[error("{0}")]
    Ended(String),
    /// There is nobody to look after it.
    #[error("{NO_THREADS}")]
    Threads(#[source] std::io::Error),
}

/// The name of a type without the paths in it.
fn short(type_name: &str) -> String {
    let parts = type_name.split_inclusive(|c: char| !(c.is_alphanumeric() || "_:".contains(c)));
    let last = |part: &str| part.rsplit("::").next().unwrap_or_default().to_owned();
    parts.map(last).collect()
}

/// Options of an actor that is started somewhere in the cluster.
#[derive(Clone, Debug, Default)]
#[must_use = "nothing is spawned before `start`"]
pub struct SpawnOn {
    placement: Placement,
    name: Option<String>,
    variant: Option<String>,
    here: Option<Hosts>,
}

impl From<Placement> for SpawnOn {
    fn from(placement: Placement) -> Self {
        Self::new().place(placement)
    }
}

impl SpawnOn {
    /// Anywhere, without a name.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says where.
    pub fn place(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Gives the actor a name, by which all processes can look it up.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Asks for this [variant](Hosts::host_variant).
    pub fn variant(mut self, variant: impl Into<String>) -> Self {
        self.variant = Some(variant.into());
        self
    }

    /// Where this process makes the actor itself, these hosts do it, in place of those that the
    /// cluster was made with.
    pub fn here(mut self, hosts: Hosts) -> Self {
        self.here = Some(hosts);
        self
    }
}

impl Cluster {
    /// Listens for nodes at `address`, port 0 for any, and begins as a cluster of this process.
    ///
    /// # Errors
    /// When the address cannot be listened on, or would be open to other hosts without a token.
    pub fn listen(
        config: ClusterConfig,
        address: SocketAddr,
        hosts: Hosts,
    ) -> Result<Self, ClusterError> {
        Self::listen_with(config, address, hosts, Router::new())
    }

    /// Serves more over HTTP on the same port, behind the same token.
    ///
    /// # Errors
    /// As [`listen`](Self::listen).
    pub fn listen_with(
        config: ClusterConfig,
        address: SocketAddr,
        hosts: Hosts,
        routes: Router,
    ) -> Result<Self, ClusterError> {
        threads::ready().map_err(ClusterError::Threads)?;
        // On an event loop, which sockets need.
        Task::start(async move { Self::start(config, address, hosts, routes) }).wait()
    }

    /// Makes a cluster of this process alone; nobody can join it.
    #[must_use]
    pub fn alone(hosts: Hosts) -> Self {
        let config = ClusterConfig::default();
        let process = Process::new(config.net, None, None, None);
        process.enter(NodeId::DRIVER, random());
        Self {
            inner: Arc::new(Inner {
                scope: TaskScope::new(Arc::clone(&process), hosts, config.resources),
                process,
                members: Arc::new(Members::new(Vec::new(), None, false)),
                next: AtomicUsize::new(0),
                addresses: Vec::new(),
                listening: None,
                children: None,
            }),
        }
    }

    /// Keeps the processes that this one has started until the cluster ends.
    pub(crate) fn keep_children(&mut self, children: ChildProcesses) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.children = Some(children);
        }
    }

    fn start(
        config: ClusterConfig,
        address: SocketAddr,
        hosts: Hosts,
        routes: Router,
    ) -> Result<Self, ClusterError> {
        let process = config.process();
        process.enter(NodeId::DRIVER, random());
        let bound = Bound::bind(&config, address)?;
        let addresses = bound.addresses.clone();
        let is_guarded = config.is_guarded();
        let members = Members::new(addresses.clone(), config.run_id.clone(), is_guarded);
        let members = Arc::new(members);
        let takes_far_nodes = is_guarded || config.insecure;
        let scope = TaskScope::new(Arc::clone(&process), hosts, config.resources);
        let known = Arc::clone(&members);
        process.resolve_with(Box::new(move |node| {
            let found = known.addresses(node);
            let ended = || DialError::Ended(format!("{node} has left the cluster"));
            std::future::ready(found.ok_or_else(ended)).boxed()
        }));
        let agent = {
            let (process, scope) = (Arc::clone(&process), Arc::clone(&scope));
            let members = Arc::clone(&members);
            Spawn::new()
                .thread_name("ps-driver")
                .without_io()
                // Each node always has one call under way, which waits for news.
                .max_pending(1 << 16)
                .start(move || DriverAgent {
                    process: Arc::clone(&process),
                    scope: Arc::clone(&scope),
                    members: Arc::clone(&members),
                    takes_far_nodes,
                })?
        };
        process.export_agent(&agent);
        let incarnations: Arc<dyn Incarnations> = Arc::clone(&members) as _;
        let endpoint = bound.serve(&process, &incarnations, &routes);
        Ok(Self {
            inner: Arc::new(Inner {
                process,
                scope,
                members,
                next: AtomicUsize::new(0),
                addresses,
                listening: Some((agent, endpoint)),
                children: None,
            }),
        })
    }

    #[cfg(test)]
    pub(super) fn inside(&self) -> (Arc<Process>, Arc<Members>) {
        (
            Arc::clone(&self.inner.process),
            Arc::clone(&self.inner.members),
        )
    }

    /// Where the nodes find this driver: host and port of its TCP socket.
    ///
    /// `None` with a transport that has none.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.inner
            .addresses
            .iter()
            .find_map(|address| match address {
                Address::Tcp(address) => Some(*address),
                _ => None,
            })
    }

    /// All addresses of this driver, the best one first.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.inner.addresses
    }

    /// The nodes that take part now, by rank.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let members = self.inner.members.list().into_iter();
        let info = |Member {
                        node,
                        host,
                        pid,
                        resources,
                        ..
                    }: Member| NodeInfo {
            node,
            host,
            pid,
            resources,
        };
        members.map(info).collect()
    }

    /// Waits until at least so many nodes take part.
    pub fn wait_for_nodes(
        &self,
        wanted: usize,
        within: Duration,
    ) -> Task<Result<Vec<NodeInfo>, ClusterError>> {
        let cluster = self.clone();
        let waiting = async move {
            let mut changed = cluster.inner.members.changed();
            let enough = async {
                while cluster.inner.members.list().len() < wanted {
                    // The sender lives as long as the cluster.
                    let _ = changed.changed().await;
                }
            };
            let _ = tokio::time::timeout(within, enough).await;
            let nodes = cluster.nodes();
            match nodes.len() {
                joined if joined < wanted => Err(ClusterError::NotAllJoined {
                    joined,
                    wanted,
                    after: within,
                }),
                _ => Ok(nodes),
            }
        };
        Task::try_start(waiting, |error| Err(ClusterError::Threads(error)))
    }

    /// Waits until each of the ranks 1 to `last` takes part or was refused for good, at least one of
    /// them; returns the error that says why the first one was refused.
    pub(super) async fn refused(&self, last: u32) -> ClusterError {
        let members = &self.inner.members;
        let mut changed = members.changed();
        loop {
            if members.are_settled(last)
                && let Some(error) = self.refusal(last)
            {
                return error;
            }
            // The sender lives as long as the cluster.
            let _ = changed.changed().await;
        }
    }

    /// Why the first of the ranks 1 to `last` was refused that have not joined.
    pub(super) fn refusal(&self, last: u32) -> Option<ClusterError> {
        let members = &self.inner.members;
        let Refusal { rank, reason, .. } = members.first_refusal(last)?;
        Some(ClusterError::NodesRefused {
            joined: members.list().len(),
            wanted: last as usize,
            rank,
            reason,
        })
    }

    /// Starts an actor on the next node, or in this process if it is alone.
    pub fn spawn<A: Hosted>(&self, args: A::Args) -> Task<Result<ActorRef<A>, SpawnOnError>> {
        self.spawn_with(SpawnOn::new(), args)
    }

    /// Starts an actor where the options say.
    pub fn spawn_with<A: Hosted>(
        &self,
        options: SpawnOn,
        args: A::Args,
    ) -> Task<Result<ActorRef<A>, SpawnOnError>> {
        let cluster = self.clone();
        let spawning = async move { cluster.spawn_somewhere(options, args).await };
        Task::try_start(spawning, |error| Err(SpawnOnError::Threads(error)))
    }

    async fn spawn_somewhere<A: Hosted>(
        &self,
        options: SpawnOn,
        args: A::Args,
    ) -> Result<ActorRef<A>, SpawnOnError> {
        let actor_type = type_name::<A>();
        let SpawnOn {
            placement,
            name,
            variant,
            here,
        } = options;
        let Inner {
            process, members, ..
        } = &*self.inner;
        let args = Args::write(process, &args).map_err(|error| SpawnOnError::Args {
            actor_type,
            reason: error_chain(&error),
        })?;
        let needs = match &placement {
            Placement::Needs(needs) => needs.clone(),
            _ => Resources::none(),
        };
        let order = Make {
            order: random(),
            type_name: hosted_name::<A>(),
            variant,
            args,
            name,
            needs: needs.clone(),
        };
        // A node that dies while it is asked is no reason to give up where others would do.
        let mut lost = None;
        for _ in 0..MAX_ROUNDS {
            for candidate in self.candidates(&placement)? {
                let node = candidate
                    .as_ref()
                    .map_or(NodeId::DRIVER, |member| member.node);
                let made = match candidate {
                    Some(member) => ask_to_make(&member, &order).await,
                    None => Ok(self.make_here(here.as_ref(), order.clone()).await),
                };
                match made {
                    Ok(Ok(wire)) => return reference(process, wire).map_err(SpawnOnError::Ended),
                    Ok(Err(SpawnRefused::NoRoom { .. })) => {}
                    // Asked again it is not among the candidates.
                    Ok(Err(source @ SpawnRefused::Leaving)) => {
                        lost = Some(SpawnOnError::Refused {
                            node,
                            actor_type,
                            source,
                        });
                    }
                    Ok(Err(source)) => {
                        return Err(SpawnOnError::Refused {
                            node,
                            actor_type,
                            source,
                        });
                    }
                    Err(source) => {
                        tracing::warn!(%node, %source, "could not start an actor");
                        let source = Box::new(source);
                        lost = Some(SpawnOnError::Call {
                            node,
                            actor_type,
                            source,
                        });
                    }
                }
            }
            if lost.is_none() {
                break;
            }
        }
        Err(lost.unwrap_or_else(|| {
            let nodes = members.list().into_iter();
            let nodes = nodes.map(|member| format!("{} with {}", member.node, member.resources));
            let nodes = nodes.collect::<Vec<_>>().join("; ");
            SpawnOnError::NoRoom { needs, nodes }
        }))
    }

    async fn make_here(&self, hosts: Option<&Hosts>, order: Make) -> Result<Wire, SpawnRefused> {
        let scope = Arc::clone(&self.inner.scope);
        match hosts {
            Some(hosts) => {
                let host = hosts.get(&order.type_name, order.variant.as_deref())?;
                scope.make_by(host, order).await
            }
            None => scope.make(order).await,
        }
    }

    /// Whether this process is the whole cluster, and nobody can join.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.inner.listening.is_none()
    }

    /// The nodes to ask, in order; `None` is this process.
    fn candidates(&self, placement: &Placement) -> Result<Vec<Option<Member>>, SpawnOnError> {
        let mut members = self.inner.members.list();
        members.retain(|member| !member.is_leaving);
        let in_turn = |members: &mut Vec<Member>| {
            let admitted = self.inner.next.fetch_add(1, Ordering::Relaxed);
            let len = members.len().max(1);
            members.rotate_left(admitted % len);
        };
        let one = |members: Vec<Member>, is_it: &dyn Fn(NodeId) -> bool, what: String| {
            let found = members.into_iter().find(|member| is_it(member.node));
            found
                .map(|member| vec![Some(member)])
                .ok_or(SpawnOnError::NoSuchNode(what))
        };
        match placement {
            Placement::Driver | Placement::Node(NodeId::DRIVER) | Placement::Rank(0) => {
                Ok(vec![None])
            }
            Placement::Node(node) => one(members, &|other| other == *node, node.to_string()),
            Placement::Rank(rank) => one(
                members,
                &|other| other.rank == *rank,
                format!("node {rank}"),
            ),
            Placement::RoundRobin if members.is_empty() => Ok(vec![None]),
            Placement::RoundRobin => {
                in_turn(&mut members);
                Ok(members.into_iter().map(Some).collect())
            }
            Placement::Needs(needs) => {
                in_turn(&mut members);
                members.retain(|member| member.resources.include(needs));
                let nodes = members.into_iter().map(Some);
                // The driver comes last: it has other things to do.
                Ok(nodes.chain([None]).collect())
            }
        }
    }

    /// Looks for an actor by its name, in this process and on all nodes.
    pub fn lookup<A: Remote>(&self, name: impl Into<String>) -> Task<Option<ActorRef<A>>> {
        let cluster = self.clone();
        let find = Find {
            type_name: hosted_name::<A>(),
            name: name.into(),
        };
        let here = || {
            let wire = self.inner.scope.find(&find)?;
            reference(&self.inner.process, wire).ok()
        };
        let sought = find.clone();
        let everywhere = async move {
            let Inner {
                process,
                scope,
                members,
                ..
            } = &*cluster.inner;
            let wire = find_anywhere(scope, members, sought).await?;
            reference(process, wire).ok()
        };
        // Without threads for the network there is nobody else.
        Task::try_start(everywhere, |_| here())
    }

    /// Releases all nodes, which then end; takes no more. Also done when the last handle is dropped.
    pub fn release(&self) -> Task<()> {
        let inner = Arc::clone(&self.inner);
        // Without threads for the network nobody has joined.
        Task::try_start(async move { inner.release().await }, drop)
    }
}

/// Asks a node to make an actor. If the answer was lost on the way, the same node is asked again first: it
/// may have made the actor, and another node would make a second one of the same name.
async fn ask_to_make(
    member: &Member,
    order: &Make,
) -> Result<Result<Wire, SpawnRefused>, CallError> {
    loop {
        match member.agent.ask(order.clone()).await {
            Err(error) if error.is_connection_lost() && error.may_have_run() => {
                tracing::debug!(node = %member.node, %error, "asking again for an actor");
            }
            answer => return answer,
        }
    }
}

/// A number that no other run has; 0 means none.
pub(crate) fn random() -> u64 {
    getrandom::u64().unwrap_or_default().max(1)
}

impl Inner {
    async fn release(&self) {
        let members = self.members.close();
        let told = members
            .iter()
            .map(|member| member.agent.ask_within(Release, FAREWELL));
        for (member, told) in members.iter().zip(join_all(told).await) {
            if let Err(error) = told {
                tracing::warn!(node = %member.node, %error, "a node could not be told to end");
            }
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let members = self.members.close();
        self.scope.kill_all();
        let (listening, children) = (self.listening.take(), self.children.take());
        if members.is_empty() {
            return;
        }
        let told = Task::start(async move {
            let told = members
                .iter()
                .map(|member| member.agent.ask_within(Release, FAREWELL));
            join_all(told).await;
            // Not before: the answers come in through it, and nodes would try to join again.
            drop(listening);
        });
        // The last handle may be dropped on a thread that must not block.
        if !threads::is_current() {
            told.wait();
        }
        drop(children);
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster")
            .field("addresses", &self.inner.addresses)
            .field("nodes", &self.nodes())
            .finish()
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
