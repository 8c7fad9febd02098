//! The cluster as the driver sees it: lists the nodes, and spawns and finds actors.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt;
use futures_util::future::join_all;
use rustix::process::geteuid;

use super::agent::{DriverAgent, Find, Release, find_anywhere, hosted_name};
use super::config::{ClusterConfig, ClusterError};
use super::endpoint::{Bound, Endpoint};
use super::host::Hosts;
use super::launched::ChildProcesses;
use super::members::{Member, Members};
use super::placement::NodeInfo;
use super::task::Task;
use super::task_scope::TaskScope;
use super::way::{SAY_WAITING, pause_after};
use crate::actor::{ActorRef, Spawn};
use crate::net::{Address, threads};
use crate::remote::Remote;
use crate::remote::dial::DialError;
use crate::remote::listen::Incarnations;
use crate::remote::process::{NodeId, Process};
use crate::remote::reference::reference;

mod spawning;

/// How long the driver waits for each node to answer that it heard of the end of the run.
const FAREWELL: Duration = Duration::from_secs(2);

/// The processes that work together, as the driver sees them. A clone is another handle to the same
/// cluster.
///
/// When the last handle is dropped, all nodes are released. The drop waits until every node has answered, and until
/// every process that was refused has read why, but no longer than 2 s for each of the two. A drop on a thread of the
/// network does not wait.
///
/// For examples, see [`alone`](Self::alone), [`listen`](Self::listen) and [`launch`](Self::launch).
#[derive(Clone)]
pub struct Cluster {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    addresses: Vec<Address>,
    /// `None` if no other process can join.
    listening: Option<(ActorRef<DriverAgent>, Endpoint)>,
    children: Option<ChildProcesses>,
}

/// What a task may hold. Not the cluster: nobody may wait for the task, and the end of the last handle releases the
/// nodes.
struct Shared {
    process: Arc<Process>,
    scope: Arc<TaskScope>,
    members: Arc<Members>,
    /// How many actors were spawned on the next node in turn.
    next: AtomicUsize,
    /// Held while the nodes are told to end.
    releasing: tokio::sync::Mutex<()>,
}

impl Cluster {
    /// Listens for nodes at `address` and starts a cluster, which at first is this process alone. Port 0
    /// takes any free port; [`address`](Self::address) returns it.
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
    /// use std::time::Duration;
    ///
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node, NodeExit};
    ///
    /// let hosts = Hosts::new().host(|start: u64| Ok(Counter(start)));
    /// let local = ([127, 0, 0, 1], 0).into();
    /// let cluster = Cluster::listen(ClusterConfig::default(), local, hosts.clone())?;
    /// let address = cluster.address().expect("it has a TCP socket").to_string();
    ///
    /// // Usually the node is another process.
    /// let node = Node::new(ClusterConfig::default(), 1, 0, address, hosts).serve();
    /// cluster.wait_for_nodes(1, Duration::from_secs(30)).wait()?;
    ///
    /// let counter = cluster.spawn::<Counter>(40).wait()?;
    /// assert_eq!(counter.node().map(|node| node.rank), Some(1));
    /// assert_eq!(counter.ask(Add(2)).wait()?, 42);
    ///
    /// cluster.release().wait();
    /// assert_eq!(node.wait()?, NodeExit::Released);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// When this process cannot listen at the address, or when other hosts can reach the address and
    /// neither a token nor certificates are set.
    pub fn listen(
        config: ClusterConfig,
        address: SocketAddr,
        hosts: Hosts,
    ) -> Result<Self, ClusterError> {
        Self::listen_with(config, address, hosts, Router::new())
    }

    /// Like [`listen`](Self::listen), and also serves `routes` over HTTP on the same port, behind the same
    /// token.
    ///
    /// ```
    /// use std::io::{Read, Write};
    ///
    /// use axum::Router;
    /// use axum::routing::get;
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts};
    ///
    /// let routes = Router::new().route("/progress", get(|| async { "step 7" }));
    /// let local = ([127, 0, 0, 1], 0).into();
    /// let cluster = Cluster::listen_with(ClusterConfig::default(), local, Hosts::new(), routes)?;
    ///
    /// let mut stream = std::net::TcpStream::connect(cluster.address().expect("it listens"))?;
    /// stream.write_all(b"GET /progress HTTP/1.1\r\nhost: ps\r\nconnection: close\r\n\r\n")?;
    /// let mut answer = String::new();
    /// stream.read_to_string(&mut answer)?;
    /// assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("step 7"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`listen`](Self::listen).
    pub fn listen_with(
        config: ClusterConfig,
        address: SocketAddr,
        hosts: Hosts,
        routes: Router,
    ) -> Result<Self, ClusterError> {
        threads::ready().map_err(ClusterError::Threads)?;
        // Sockets need an event loop.
        Task::start(async move { Self::start(config, address, hosts, routes) }).wait()
    }

    /// Makes a cluster of this process alone. No other process can join it.
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
    /// use ps_runtime::cluster::{Cluster, Hosts};
    ///
    /// let cluster = Cluster::alone(Hosts::new().host(|start: u64| Ok(Counter(start))));
    /// let counter = cluster.spawn::<Counter>(40).wait()?;
    /// assert_eq!(counter.ask(Add(2)).wait()?, 42);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn alone(hosts: Hosts) -> Self {
        let config = ClusterConfig::default();
        let process = Process::new(config.net, None, None, None);
        process.enter(NodeId::DRIVER, random());
        Self {
            inner: Arc::new(Inner {
                shared: Arc::new(Shared {
                    scope: TaskScope::new(Arc::clone(&process), hosts, config.resources),
                    process,
                    members: Arc::new(Members::new(Vec::new(), None, false, None)),
                    next: AtomicUsize::new(0),
                    releasing: tokio::sync::Mutex::new(()),
                }),
                addresses: Vec::new(),
                listening: None,
                children: None,
            }),
        }
    }

    /// Keeps the child processes that this process has started until the cluster ends.
    pub(crate) fn keep_children(&mut self, children: ChildProcesses) {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.children = Some(children);
        }
    }

    /// Returns a function that is told the rank of a process that is known to have ended. So nobody waits for the
    /// lease of its node.
    pub(crate) fn node_ended(&self) -> impl Fn(u32) + Send + use<> {
        let members = Arc::downgrade(&self.inner.shared.members);
        let process = Arc::downgrade(&self.inner.shared.process);
        move |rank| {
            let (Some(members), Some(process)) = (members.upgrade(), process.upgrade()) else {
                return;
            };
            let members_of_rank = members.list().into_iter();
            for Member { node, .. } in members_of_rank.filter(|member| member.node.rank == rank) {
                if members.remove(node, false) {
                    process.sever(node);
                    tracing::warn!(%node, "a node is lost: its process has ended");
                }
            }
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
        let takes_far_nodes = is_guarded || config.insecure;
        let user = (!takes_far_nodes).then(|| geteuid().as_raw());
        let members = Members::new(addresses.clone(), config.run_id.clone(), is_guarded, user);
        let members = Arc::new(members);
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
                shared: Arc::new(Shared {
                    process,
                    scope,
                    members,
                    next: AtomicUsize::new(0),
                    releasing: tokio::sync::Mutex::new(()),
                }),
                addresses,
                listening: Some((agent, endpoint)),
                children: None,
            }),
        })
    }

    #[cfg(test)]
    pub(super) fn inside(&self) -> (Arc<Process>, Arc<Members>) {
        (
            Arc::clone(&self.inner.shared.process),
            Arc::clone(&self.inner.shared.members),
        )
    }

    /// The address of this driver's TCP socket. Nodes connect to it.
    ///
    /// `None` if the transport has no TCP socket.
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

    /// All addresses of this driver, the fastest one first.
    #[must_use]
    pub fn addresses(&self) -> &[Address] {
        &self.inner.addresses
    }

    /// The nodes that are in the cluster now, in the order of their ranks.
    #[must_use]
    pub fn nodes(&self) -> Vec<NodeInfo> {
        nodes_in(&self.inner.shared.members)
    }

    /// Waits until the nodes in the cluster are others than `known`, and returns them. So a program learns
    /// that a node has joined or is lost.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// use ps_runtime::actor::run;
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node};
    ///
    /// let local = ([127, 0, 0, 1], 0).into();
    /// let cluster = Cluster::listen(ClusterConfig::default(), local, Hosts::new())?;
    /// let address = cluster.address().expect("it has a TCP socket").to_string();
    ///
    /// let node = Node::new(ClusterConfig::default(), 1, 0, address, Hosts::new()).serve();
    /// let nodes = run(cluster.nodes_other_than(&[]));
    /// assert_eq!(nodes[0].node.rank, 1);
    ///
    /// drop(cluster);
    /// node.wait()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn nodes_other_than(&self, known: &[NodeId]) -> Vec<NodeInfo> {
        let mut changed = self.inner.shared.members.changed();
        loop {
            let nodes = self.nodes();
            if !nodes.iter().map(|node| node.node).eq(known.iter().copied()) {
                return nodes;
            }
            // The sender lives as long as the cluster.
            let _ = changed.changed().await;
        }
    }

    /// Waits until at least `wanted` nodes are in the cluster, and returns them. For an example see
    /// [`listen`](Self::listen).
    ///
    /// After 2 s, and then every 5 s, it logs which ranks are missing, and how long it will wait for them. After a
    /// minute it does so every 30 s. The task fails with [`ClusterError::NotAllJoined`] when fewer nodes have joined
    /// `within` this time.
    pub fn wait_for_nodes(
        &self,
        wanted: usize,
        within: Duration,
    ) -> Task<Result<Vec<NodeInfo>, ClusterError>> {
        let members = Arc::clone(&self.inner.shared.members);
        let waiting = async move {
            let mut changed = members.changed();
            let enough = async {
                while members.list().len() < wanted && members.check_not_over().is_ok() {
                    // The sender lives as long as the members.
                    let _ = changed.changed().await;
                }
            };
            let missing = || members.missing(wanted);
            let say = async {
                let begun = tokio::time::Instant::now();
                let mut pause = SAY_WAITING;
                loop {
                    tokio::time::sleep(pause).await;
                    let joined = members.list().len();
                    let left = format!("{} s", within.saturating_sub(begun.elapsed()).as_secs());
                    tracing::info!(
                        joined,
                        wanted,
                        missing = missing(),
                        left,
                        "waiting for nodes: those that are missing are not started, or cannot reach this process, as \
                         their own lines say"
                    );
                    pause = pause_after(begun.elapsed());
                }
            };
            let _ = tokio::time::timeout(within, async {
                tokio::select! {
                    () = enough => {}
                    () = say => {}
                }
            })
            .await;
            let nodes = nodes_in(&members);
            match nodes.len() {
                joined if joined < wanted => Err(ClusterError::NotAllJoined {
                    joined,
                    wanted,
                    missing: missing(),
                    after: within,
                }),
                _ => Ok(nodes),
            }
        };
        Task::try_start(waiting, |error| Err(ClusterError::Threads(error)))
    }

    pub(super) fn members(&self) -> &Arc<Members> {
        &self.inner.shared.members
    }

    /// Whether this process is the whole cluster, and no other process can join.
    #[must_use]
    pub fn is_alone(&self) -> bool {
        self.inner.listening.is_none()
    }

    /// Looks for an actor by its name, in this process and on all nodes. A process finds actors of the types
    /// that it [hosts](Hosts::host) or [lets others find](Hosts::find).
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
    /// use ps_runtime::cluster::{Cluster, Hosts, SpawnOn};
    ///
    /// let cluster = Cluster::alone(Hosts::new().host(|start: u64| Ok(Counter(start))));
    /// let named = SpawnOn::new().name("downloads");
    /// let _counter = cluster.spawn_with::<Counter>(named, 40).wait()?;
    ///
    /// let found = cluster.lookup::<Counter>("downloads").wait().expect("it lives");
    /// assert_eq!(found.ask(Add(2)).wait()?, 42);
    /// assert!(cluster.lookup::<Counter>("uploads").wait().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn lookup<A: Remote>(&self, name: impl Into<String>) -> Task<Option<ActorRef<A>>> {
        let shared = Arc::clone(&self.inner.shared);
        let find = Find {
            type_name: hosted_name::<A>(),
            name: name.into(),
        };
        let here = || {
            let wire = self.inner.shared.scope.find(&find)?;
            reference(&self.inner.shared.process, wire).ok()
        };
        let sought = find.clone();
        let everywhere = async move {
            let wire = find_anywhere(&shared.scope, &shared.members, sought).await?;
            reference(&shared.process, wire).ok()
        };
        // Without threads for the network there are no nodes.
        Task::try_start(everywhere, |_| here())
    }

    /// Releases all nodes, which then end. After this no node can join. The drop of the last handle does
    /// the same.
    pub fn release(&self) -> Task<()> {
        let shared = Arc::clone(&self.inner.shared);
        let releasing = async move {
            let _releasing = shared.releasing.lock().await;
            release(&shared.members).await;
        };
        // Without threads for the network no node has joined.
        Task::try_start(releasing, drop)
    }
}

/// Returns a random number that is not 0. No other run has the same number.
pub(crate) fn random() -> u64 {
    getrandom::u64().unwrap_or_default().max(1)
}

fn nodes_in(members: &Members) -> Vec<NodeInfo> {
    let info = |Member {
                    node,
                    host,
                    pid,
                    resources,
                    is_leaving,
                    ..
                }: Member| NodeInfo {
        node,
        host,
        pid,
        resources,
        is_leaving,
    };
    members.list().into_iter().map(info).collect()
}

async fn release(members: &Members) {
    let members = members.close();
    let told = members
        .iter()
        .map(|member| member.agent.ask_within(Release, FAREWELL));
    for (member, told) in members.iter().zip(join_all(told).await) {
        if let Err(error) = told {
            tracing::warn!(node = %member.node, %error, "a node could not be told to end");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let members = self.shared.members.close();
        self.shared.scope.kill_all();
        let (listening, children) = (self.listening.take(), self.children.take());
        let guests = self.shared.process.guests().clone();
        // A release under way has taken the members. Their answers arrive through this cluster's sockets.
        let is_releasing = self.shared.releasing.try_lock().is_err();
        if members.is_empty() && guests.are_none() && !is_releasing {
            return;
        }
        let shared = Arc::clone(&self.shared);
        let told = Task::start(async move {
            let _releasing = shared.releasing.lock().await;
            let told = members
                .iter()
                .map(|member| member.agent.ask_within(Release, FAREWELL));
            join_all(told).await;
            // A process that was refused must learn it, else it tries to join until its own timeout.
            let _ = tokio::time::timeout(FAREWELL, guests.gone()).await;
            // Not earlier: the answers arrive through it, and nodes would try to join again.
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
