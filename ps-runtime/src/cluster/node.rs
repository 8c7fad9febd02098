//! A process that makes actors for the driver.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use futures_util::FutureExt;
use rustix::process::geteuid;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::agent::{
    DriverAgent, Join, JoinRefused, Joined, Leave, NodeAgent, PrepareToLeave, Resolve, agent_of,
};
use super::config::{ClusterConfig, ClusterError, Transport};
use super::driver::random;
use super::endpoint::{Bound, Endpoint};
use super::host::Hosts;
use super::incarnations::{AsNode, NodeIncarnations};
use super::task::Task;
use super::task_scope::TaskScope;
use super::way::{self, Progress, SAY_WAITING};
use crate::actor::{ActorRef, CallError, NotDelivered, Spawn};
use crate::net::{Address, threads};
use crate::remote::dial::{DialError, is_refusal};
use crate::remote::listen::Incarnations;
use crate::remote::process::{Joining, NodeId, Process};

/// The longest pause between two tries to reach the driver.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// How long a node without work waits for its driver's answer when it leaves.
const IDLE_FAREWELL: Duration = Duration::from_secs(1);

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
                // A node without work has nothing to hand over, and its driver may not answer any more.
                let is_idle = membership.scope.is_idle();
                if exit == Some(NodeExit::Left) && !is_idle {
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
                    let lease = self.config.net.process_lease;
                    let limit = if is_idle {
                        lease.min(IDLE_FAREWELL)
                    } else {
                        lease
                    };
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
        let progress = Progress::new();
        tokio::select! {
            joined = self.keep_trying(user, &progress) => joined,
            never = self.say_what_is_wrong(&progress) => match never {},
        }
    }

    /// Says why this node has not joined yet, at first soon, then ever more rarely.
    async fn say_what_is_wrong(&self, progress: &Progress) -> Infallible {
        let begun = Instant::now();
        let mut pause = SAY_WAITING;
        loop {
            tokio::time::sleep(pause).await;
            let waited = begun.elapsed();
            let left = self.config.join_timeout.saturating_sub(waited);
            let (driver, reason) = (&self.driver, progress.obstacle());
            tracing::info!(
                driver,
                reason,
                left = whole_seconds(left),
                "waiting for the driver"
            );
            pause = way::pause_after(waited);
        }
    }

    async fn keep_trying(
        &self,
        user: Option<u32>,
        progress: &Progress,
    ) -> Result<Membership, ClusterError> {
        // `None` if the clock cannot represent the deadline; then there is none.
        let deadline = Instant::now().checked_add(self.config.join_timeout);
        let mut pause = Duration::from_millis(20);
        loop {
            let reason = match self.try_to_join(user, progress).await {
                Ok(membership) => return Ok(membership),
                Err(JoinError::Permanent(error)) => return Err(error),
                Err(JoinError::Temporary(reason)) => reason,
            };
            progress.failed(&reason);
            if deadline.is_some_and(|deadline| Instant::now() + pause > deadline) {
                return Err(ClusterError::NoDriver {
                    address: self.driver.clone(),
                    after: self.config.join_timeout,
                    reason,
                });
            }
            tracing::debug!(driver = self.driver, reason, "not joined yet");
            tokio::time::sleep(pause).await;
            pause = (2 * pause).min(MAX_PAUSE);
        }
    }

    async fn try_to_join(
        &self,
        user: Option<u32>,
        progress: &Progress,
    ) -> Result<Membership, JoinError> {
        let process = self.config.process();
        let run_id = self.config.run_id.as_deref();
        process.wants(Joining::new(self.rank, run_id, user));
        let (driver_address, local) = self.way_to_driver(&process, progress).await?;
        progress.begin(format!(
            "{driver_address} takes connections but does not answer: another program may have the port, or the driver is \
             overloaded"
        ));
        let bound = Bound::bind(&self.config, SocketAddr::new(local, 0));
        let bound = bound.map_err(JoinError::Permanent)?;
        let driver_sockets = Arc::new(OnceLock::new());
        let known_sockets = Arc::clone(&driver_sockets);
        let me = Arc::downgrade(&process);
        process.resolve_with(Box::new(move |node| {
            if node == NodeId::DRIVER {
                // On another host the files of the sockets do not exist.
                let mut addresses: Vec<Address> = known_sockets.get().cloned().unwrap_or_default();
                addresses.push(driver_address.clone());
                return std::future::ready(Ok(addresses)).boxed();
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
        let asked = way::now();
        let joined = driver.ask_within(join, limit).await;
        let Joined {
            node,
            session,
            sockets,
            clock,
        } = match joined {
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
        // This is the only place that sets it.
        let _ = driver_sockets.set(sockets);
        let difference = way::clock_difference(asked, clock, way::now());
        if difference.abs() > way::CLOCK_TOLERANCE {
            let difference = format!("{difference:+.1} s");
            tracing::warn!(
                difference,
                "the driver's clock differs from this machine's: set the clocks by NTP"
            );
        }
        // Connects again, now as this node and over a Unix socket if it can: the first connection was made without a
        // `NodeId`.
        drop(driver);
        let driver = agent_of::<DriverAgent>(&process, NodeId::DRIVER);
        let incarnations = NodeIncarnations::new(&process);
        let as_node: Arc<dyn Incarnations> = Arc::new(AsNode(Arc::clone(&incarnations)));
        let endpoint = bound.serve(&process, &as_node, &Router::new());
        let mut following = JoinSet::new();
        following.spawn(incarnations.follow(driver.clone()));
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
        let address = self.driver.clone();
        JoinError::Permanent(match refused {
            JoinRefused::Over => ClusterError::RunOver { address },
            refused => ClusterError::Refused {
                address,
                reason: refused.to_string(),
            },
        })
    }

    /// Returns the first of the driver's addresses that answers, and the local address of the connection
    /// to it. Other nodes reach this node on the same network.
    async fn way_to_driver(
        &self,
        process: &Process,
        progress: &Progress,
    ) -> Result<(Address, IpAddr), JoinError> {
        if let Transport::Memory(_) = self.config.transport {
            let number = self.driver.strip_prefix("memory:");
            let place = number.and_then(|number| number.parse().ok());
            let place = place.ok_or_else(|| ClusterError::Address {
                address: self.driver.clone(),
                source: std::io::ErrorKind::InvalidInput.into(),
            });
            let place = place.map_err(JoinError::Permanent)?;
            return Ok((Address::Memory(place), IpAddr::V4(Ipv4Addr::LOCALHOST)));
        }
        let limit = process.config().handshake;
        let found = way::look_up(&self.driver, progress).await;
        let found = found.map_err(JoinError::Temporary)?;
        let connected = way::connect(&self.driver, &found, limit, progress).await;
        let (driver, local) = connected.map_err(JoinError::Temporary)?;
        Ok((Address::Tcp(driver), local.ip()))
    }
}

enum JoinError {
    Temporary(String),
    Permanent(ClusterError),
}

/// A time for the log, which changes with each line.
fn whole_seconds(time: Duration) -> String {
    format!("{} s", time.as_secs())
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
