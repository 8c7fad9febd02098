//! A process that makes actors for the driver.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt;
use rustix::process::geteuid;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::agent::{
    DriverAgent, Join, JoinRefused, Joined, Leave, NodeAgent, PrepareToLeave, Resolve, agent_of,
};
use super::config::{ClusterConfig, ClusterError, Transport};
use super::driver::{SAY_WAITING, random};
use super::endpoint::{Bound, Endpoint};
use super::host::Hosts;
use super::incarnations::{AsNode, NodeIncarnations};
use super::task::Task;
use super::task_scope::TaskScope;
use crate::actor::{ActorRef, CallError, NotDelivered, Spawn};
use crate::net::{Address, threads};
use crate::remote::dial::{DialError, is_refusal};
use crate::remote::listen::Incarnations;
use crate::remote::process::{Joining, NodeId, Process};

/// The longest pause between two tries to reach the driver.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// A process that joins a driver and makes actors for it until the driver releases it.
///
/// ```no_run
/// use ps_runtime::cluster::{ClusterConfig, Hosts, Node, NodeExit};
/// # let hosts = Hosts::new();
///
/// // Rank 1, started for the first time.
/// let node = Node::new(ClusterConfig::default(), 1, 0, "192.168.0.10:29500", hosts);
/// assert_eq!(node.serve().wait()?, NodeExit::Released);
/// # Ok::<(), ps_runtime::cluster::ClusterError>(())
/// ```
///
/// [`Cluster::launch`](super::Cluster::launch) does this for all copies of a program but the driver.
/// [`Cluster::listen`](super::Cluster::listen) has an example with both sides.
pub struct Node {
    config: ClusterConfig,
    rank: u32,
    attempt: u64,
    driver: String,
    hosts: Hosts,
    /// A random number that tells this process from others that ask for the same rank.
    process: u64,
}

/// Why a node ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeExit {
    /// The driver has released the node.
    Released,
    /// The node was told to leave: the future given to [`Node::serve_until`] became ready.
    Left,
}

/// One membership of the node. It lasts from joining to the loss of the driver.
struct Membership {
    scope: Arc<TaskScope>,
    driver: ActorRef<DriverAgent>,
    released: watch::Receiver<bool>,
    id: NodeId,
    _agent: ActorRef<NodeAgent>,
    _endpoint: Endpoint,
    /// The task that follows which incarnations of other nodes are over. It ends with this membership.
    _following: JoinSet<()>,
}

impl Node {
    /// Makes the node of rank `rank`, which is at least 1. `driver` is the host and port of the driver, as
    /// in `192.168.0.10:29500`.
    ///
    /// `attempt` says how often this rank was started before. A process with a higher attempt replaces one
    /// with a lower attempt.
    #[must_use]
    pub fn new(
        config: ClusterConfig,
        rank: u32,
        attempt: u64,
        driver: impl Into<String>,
        hosts: Hosts,
    ) -> Self {
        Self {
            config,
            rank,
            attempt,
            driver: driver.into(),
            hosts,
            process: random(),
        }
    }

    /// Joins the driver and makes actors until the driver releases this node.
    ///
    /// When the driver is lost, the actors that were made for it end, and the node tries to join again.
    pub fn serve(self) -> Task<Result<NodeExit, ClusterError>> {
        self.serve_until(std::future::pending())
    }

    /// Like [`serve`](Self::serve), and leaves in an orderly way when `stop` is ready. Actors that
    /// [hand over](super::Hosted::hand_over) finish their step first. Then the others are killed.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use std::time::Duration;
    ///
    /// use ps_runtime::cluster::{Cluster, ClusterConfig, Hosts, Node, NodeExit};
    /// use tokio::sync::Notify;
    ///
    /// let local = ([127, 0, 0, 1], 0).into();
    /// let cluster = Cluster::listen(ClusterConfig::default(), local, Hosts::new())?;
    /// let address = cluster.address().expect("it has a TCP socket").to_string();
    ///
    /// let leave = Arc::new(Notify::new());
    /// let told = Arc::clone(&leave);
    /// let node = Node::new(ClusterConfig::default(), 1, 0, address, Hosts::new());
    /// let node = node.serve_until(async move { told.notified().await });
    /// cluster.wait_for_nodes(1, Duration::from_secs(30)).wait()?;
    ///
    /// leave.notify_one();
    /// assert_eq!(node.wait()?, NodeExit::Left);
    /// # Ok::<(), ps_runtime::cluster::ClusterError>(())
    /// ```
    pub fn serve_until(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> Task<Result<NodeExit, ClusterError>> {
        self.serve_until_told(stop, std::future::pending())
    }

    /// Like [`serve_until`](Self::serve_until), and waits for no step any more when `at_once` is
    /// ready. `at_once` is polled only after `stop` is ready.
    pub(super) fn serve_until_told(
        self,
        stop: impl Future<Output = ()> + Send + 'static,
        at_once: impl Future<Output = ()> + Send + 'static,
    ) -> Task<Result<NodeExit, ClusterError>> {
        if let Err(error) = threads::ready() {
            return Task::ready(Err(ClusterError::Threads(error)));
        }
        Task::start(async move {
            let mut stop = std::pin::pin!(stop.fuse());
            let mut at_once = std::pin::pin!(at_once.fuse());
            // Once it has joined, it was started for that driver. The next one may be that of another run.
            let mut user = Some(geteuid().as_raw());
            loop {
                let membership = tokio::select! {
                    membership = self.join(user) => membership?,
                    () = &mut stop => return Ok(NodeExit::Left),
                };
                user = None;
                tracing::info!(node = %membership.id, driver = self.driver, "joined");
                let mut released = membership.released.clone();
                let exit = tokio::select! {
                    // A driver ends soon after it has released its nodes, so the release is looked at first.
                    biased;
                    // An error means that the agent has ended: nothing can be made here any more.
                    _ = released.wait_for(|released| *released) => Some(NodeExit::Released),
                    () = &mut stop => Some(NodeExit::Left),
                    () = membership.driver.stopped() => None,
                };
                if exit == Some(NodeExit::Left) {
                    tokio::select! {
                        () = self.hand_over(&membership) => {}
                        () = &mut at_once => {}
                        _ = released.wait_for(|released| *released) => {}
                        () = membership.driver.stopped() => {}
                    }
                }
                membership.scope.kill_all();
                if exit == Some(NodeExit::Left) {
                    // If this fails, the driver notices the end of the connection.
                    let limit = self.config.net.process_lease;
                    let _ = membership
                        .driver
                        .ask_within(Leave(membership.id), limit)
                        .await;
                }
                if let Some(exit) = exit {
                    return Ok(exit);
                }
                tracing::warn!(node = %membership.id, "the driver is lost; its actors here have ended");
            }
        })
    }

    /// Lets the actors of this node finish their steps, for `leave_grace` at most.
    async fn hand_over(&self, membership: &Membership) {
        let grace = self.config.leave_grace;
        let handed_over = async {
            // The driver is told before an actor ends, so that the actor is not started again on this
            // node. It gets half of the grace, because the actors need the rest to finish their steps.
            let prepare = PrepareToLeave(membership.id);
            if let Err(error) = membership.driver.ask_within(prepare, grace / 2).await {
                tracing::warn!(%error, "the driver does not know that this node leaves");
            }
            membership.scope.hand_over().await;
        };
        if tokio::time::timeout(grace, handed_over).await.is_err() {
            tracing::warn!(?grace, "leaving before all actors have ended");
        }
    }

    async fn join(&self, user: Option<u32>) -> Result<Membership, ClusterError> {
        // `None` if the clock cannot represent the deadline; then there is none.
        let begun = Instant::now();
        let deadline = begun.checked_add(self.config.join_timeout);
        let mut pause = Duration::from_millis(20);
        let mut say_after = SAY_WAITING;
        loop {
            let reason = match self.try_to_join(user).await {
                Ok(membership) => return Ok(membership),
                Err(JoinError::Permanent(error)) => return Err(error),
                Err(JoinError::Temporary(reason)) => reason,
            };
            if deadline.is_some_and(|deadline| Instant::now() + pause > deadline) {
                return Err(ClusterError::NoDriver {
                    address: self.driver.clone(),
                    after: self.config.join_timeout,
                    reason,
                });
            }
            tracing::debug!(driver = self.driver, reason, "not joined yet");
            if begun.elapsed() >= say_after {
                let (driver, at_most) = (&self.driver, self.config.join_timeout);
                tracing::info!(driver, reason, ?at_most, "waiting for the driver");
                say_after = say_after.saturating_mul(3);
            }
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(MAX_PAUSE);
        }
    }

    async fn try_to_join(&self, user: Option<u32>) -> Result<Membership, JoinError> {
        let process = self.config.process();
        let run_id = self.config.run_id.as_deref();
        process.wants(Joining::new(self.rank, run_id, user));
        let (driver_address, local) = self.way_to_driver(&process).await?;
        let bound = Bound::bind(&self.config, SocketAddr::new(local, 0));
        let bound = bound.map_err(JoinError::Permanent)?;
        let driver_addresses = vec![driver_address];
        let me = Arc::downgrade(&process);
        process.resolve_with(Box::new(move |node| {
            if node == NodeId::DRIVER {
                return std::future::ready(Ok(driver_addresses.clone())).boxed();
            }
            let Some(process) = me.upgrade() else {
                return std::future::ready(Err(DialError::Ended("left".to_owned()))).boxed();
            };
            async move {
                let driver = agent_of::<DriverAgent>(&process, NodeId::DRIVER);
                // A connection attempt lasts no longer than this, and the next one asks again.
                let limit = process.config().process_lease;
                match driver.ask_within(Resolve(node), limit).await {
                    Ok(Some(addresses)) => Ok(addresses),
                    Ok(None) => Err(DialError::Ended(format!("{node} has left the cluster"))),
                    Err(error) => Err(DialError::Unreachable(error.to_string())),
                }
            }
            .boxed()
        }));
        let driver = agent_of::<DriverAgent>(&process, NodeId::DRIVER);
        let join = Join {
            rank: self.rank,
            attempt: self.attempt,
            process: self.process,
            run_id: self.config.run_id.clone(),
            user,
            addresses: bound.addresses.clone(),
            resources: self.config.resources.clone(),
            host: host_name(),
            pid: std::process::id(),
            facts: self.hosts.facts(),
        };
        let scope = TaskScope::new(
            Arc::clone(&process),
            self.hosts.clone(),
            self.config.resources.clone(),
        );
        let released = watch::Sender::new(false);
        let watched = released.subscribe();
        let agent = {
            let scope = Arc::clone(&scope);
            let spawn = Spawn::new()
                .thread_name(format!("ps-node-{}", self.rank))
                .without_io();
            spawn.start(move || NodeAgent {
                scope: Arc::clone(&scope),
                released: released.clone(),
            })
        };
        let agent = agent.map_err(|error| JoinError::Permanent(error.into()))?;
        process.export_agent(&agent);
        // The driver may first have to find out that another process of this rank is dead, which takes two
        // leases at most.
        let limit = self.config.net.process_lease.saturating_mul(3);
        let joined = driver.ask_within(join, limit).await;
        let Joined { node, session } = match joined {
            Ok(Ok(joined)) => joined,
            Ok(Err(refused)) => return Err(self.refused(&refused)),
            Err(CallError::NotDelivered {
                reason: NotDelivered::Unreachable { reason },
                ..
            }) if is_refusal(&reason) => {
                return Err(JoinError::Permanent(ClusterError::Refused {
                    address: self.driver.clone(),
                    reason,
                }));
            }
            Err(error) => return Err(JoinError::Temporary(error.to_string())),
        };
        process.enter(node, session);
        // Connects again, now as this node: the first connection was made without a `NodeId`.
        drop(driver);
        let driver = agent_of::<DriverAgent>(&process, NodeId::DRIVER);
        let lives = NodeIncarnations::new(&process);
        let as_node: Arc<dyn Incarnations> = Arc::new(AsNode(Arc::clone(&lives)));
        let endpoint = bound.serve(&process, &as_node, &Router::new());
        let mut following = JoinSet::new();
        following.spawn(lives.follow(driver.clone()));
        Ok(Membership {
            scope,
            driver,
            released: watched,
            id: node,
            _agent: agent,
            _endpoint: endpoint,
            _following: following,
        })
    }

    fn refused(&self, refused: &JoinRefused) -> JoinError {
        JoinError::Permanent(ClusterError::Refused {
            address: self.driver.clone(),
            reason: refused.to_string(),
        })
    }

    /// Returns the first of the driver's addresses that answers, and the local address of the connection
    /// to it.
    async fn way_to_driver(&self, process: &Process) -> Result<(Address, IpAddr), JoinError> {
        let mut last = JoinError::Temporary(format!("{} has no address", self.driver));
        for address in self.driver_addresses().await? {
            match local_ip(process, &address).await {
                Ok(local) => return Ok((address, local)),
                Err(JoinError::Temporary(why)) => {
                    last = JoinError::Temporary(format!("{address}: {why}"));
                }
                Err(error) => return Err(error),
            }
        }
        Err(last)
    }

    async fn driver_addresses(&self) -> Result<Vec<Address>, JoinError> {
        if let Transport::Memory(_) = self.config.transport {
            let place = self
                .driver
                .strip_prefix("memory:")
                .and_then(|place| place.parse().ok());
            let place = place.map(|place| vec![Address::Memory(place)]);
            return place.ok_or_else(|| {
                JoinError::Permanent(ClusterError::Address {
                    address: self.driver.clone(),
                    source: std::io::ErrorKind::InvalidInput.into(),
                })
            });
        }
        // A host name may not be known yet while a cluster starts.
        let found = tokio::net::lookup_host(&self.driver).await;
        let found = found.map_err(|error| JoinError::Temporary(error.to_string()))?;
        Ok(found.map(Address::Tcp).collect())
    }
}

enum JoinError {
    Temporary(String),
    Permanent(ClusterError),
}

/// Returns the address of this host that the driver sees. Other nodes reach this node on the same network.
async fn local_ip(process: &Process, driver: &Address) -> Result<IpAddr, JoinError> {
    let &Address::Tcp(address) = driver else {
        return Ok(IpAddr::V4(Ipv4Addr::LOCALHOST));
    };
    let limit = process.config().handshake;
    let connected = tokio::time::timeout(limit, TcpStream::connect(address)).await;
    let connected =
        connected.map_err(|_| JoinError::Temporary(format!("no answer within {limit:?}")))?;
    let local = connected.and_then(|stream| stream.local_addr());
    Ok(local
        .map_err(|error| JoinError::Temporary(error.to_string()))?
        .ip())
}

fn host_name() -> String {
    let name = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    if name.is_empty() {
        "unknown".to_owned()
    } else {
        name
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node")
            .field("rank", &self.rank)
            .field("attempt", &self.attempt)
            .field("driver", &self.driver)
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}
