//! The settings of a process in a cluster, and the errors of starting and joining one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::resources::Resources;
use crate::net::memory::MemoryNetwork;
use crate::net::{NetConfig, Tls, Token};
use crate::remote::process::Process;

/// The settings of a driver or node. All processes of a cluster have the same token and transport.
///
/// ```
/// use std::time::Duration;
///
/// use ps_runtime::cluster::{Cluster, ClusterConfig, ClusterError, Hosts, Resources};
/// use ps_runtime::net::Token;
///
/// let config = ClusterConfig {
///     token: Some(Token::new("a-secret-of-all-of-us")?),
///     resources: Resources::none().cpus(8.0).gpus(1.0),
///     join_timeout: Duration::from_secs(10),
///     ..ClusterConfig::default()
/// };
/// let everywhere = ([0, 0, 0, 0], 0).into();
/// let cluster = Cluster::listen(config, everywhere, Hosts::new())?;
/// assert!(cluster.address().is_some());
///
/// // Without a secret, other hosts must not reach it.
/// let open = Cluster::listen(ClusterConfig::default(), everywhere, Hosts::new());
/// assert!(matches!(open, Err(ClusterError::NoToken(_))));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// The secret that a process must know to connect. Default: `None`.
    pub token: Option<Token>,
    /// Certificates for connections between hosts. Default: `None`.
    pub tls: Option<Tls>,
    /// The run of the program that this process belongs to. A driver refuses a node that was started for
    /// another run. If either side states no run, nothing is compared. Default: `None`.
    pub run_id: Option<String>,
    /// Allows every process that can reach this one to connect, from any host and without a secret. Use it
    /// only on a network that no one else uses. Default: `false`.
    pub insecure: bool,
    /// Times and limits of connections.
    pub net: NetConfig,
    /// How processes reach each other.
    pub transport: Transport,
    /// The resources that this process offers to actors. Default: as many `cpus` as it may use.
    pub resources: Resources,
    /// How long a node tries to reach its driver, at the start and after the driver was lost. Default: 60 s.
    pub join_timeout: Duration,
    /// How long a node that is asked to leave waits for the steps under way. If it is too short, the steps
    /// are repeated elsewhere. If it is too long, the system that asked kills the node first (Kubernetes
    /// and Slurm after 30 s). Zero leaves at once. Default: 10 s.
    pub leave_grace: Duration,
}

/// How the processes of a cluster reach each other.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Transport {
    /// TCP between hosts, Unix sockets within a host.
    #[default]
    Sockets,
    /// TCP only, also within a host.
    Tcp,
    /// Pipes inside one process: for tests of a program of several processes, without ports and sockets.
    Memory(MemoryNetwork),
}

impl Default for ClusterConfig {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            token: None,
            tls: None,
            run_id: None,
            insecure: false,
            net: NetConfig::default(),
            transport: Transport::default(),
            resources: Resources::none().cpus(cpus as f64),
            join_timeout: Duration::from_secs(60),
            leave_grace: Duration::from_secs(10),
        }
    }
}

impl ClusterConfig {
    /// Whether a process needs a secret to connect.
    pub(crate) fn is_guarded(&self) -> bool {
        self.token.is_some() || self.tls.as_ref().is_some_and(Tls::is_mutual)
    }

    /// Starts an incarnation of this process.
    pub(crate) fn process(&self) -> Arc<Process> {
        let memory = match &self.transport {
            Transport::Memory(network) => Some(network.clone()),
            _ => None,
        };
        Process::new(self.net, self.token.clone(), self.tls.clone(), memory)
    }
}

/// The advice for the usual mistakes.
fn listen_advice(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            ": another run may have it, or another process with rank 0; give each run on a machine a port of its own \
             (--master-port)"
        }
        std::io::ErrorKind::AddrNotAvailable => {
            ": this is no address of this machine, and rank 0 has to run on the machine whose address all processes are \
             given (--master-addr, MASTER_ADDR or PS_RENDEZVOUS)"
        }
        _ => "",
    }
}

/// The error text, with advice, for the case that there are no threads for the network.
pub(super) const NO_THREADS: &str = "the system gives no thread for the network: raise the limits on \
     open files (ulimit -n) and threads (ulimit -u)";

/// Why a process could not start or join a cluster.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// Other hosts can reach the address, and no secret is set. So any process could have joined.
    #[error(
        "{0} can be reached from other hosts, so it needs a token: set PS_TOKEN (16 characters or \
         more, the same for all processes), or use certificates for both sides (mutual TLS), or \
         say --insecure on a network of your own"
    )]
    NoToken(SocketAddr),
    /// This process cannot listen at the address.
    #[error("could not listen on {address}{}", listen_advice(source))]
    Listen {
        /// The address, or the path of the socket.
        address: String,
        /// The error of the operating system.
        #[source]
        source: std::io::Error,
    },
    /// The driver's address cannot be resolved.
    #[error("could not find the address of {address}")]
    Address {
        /// The address as it was given.
        address: String,
        /// The error of the resolver.
        #[source]
        source: std::io::Error,
    },
    /// The driver does not answer.
    #[error("the driver at {address} could not be reached for {after:?}: {reason}")]
    NoDriver {
        /// The address of the driver, as it was given.
        address: String,
        /// How long the node tried.
        after: Duration,
        /// Why the last try failed.
        reason: String,
    },
    /// The driver refused this process. Trying again will not help.
    #[error("the driver at {address} did not take this process: {reason}")]
    Refused {
        /// The address of the driver, as it was given.
        address: String,
        /// The driver's reason.
        reason: String,
    },
    /// The driver's run has ended.
    #[error("the driver at {address} did not take this process: the run is over")]
    RunOver {
        /// The address of the driver, as it was given.
        address: String,
    },
    /// The system gave no threads for the network.
    #[error("{NO_THREADS}")]
    Threads(#[source] std::io::Error),
    /// An agent or its thread could not be started.
    #[error("could not start an actor")]
    Spawn(#[from] crate::actor::SpawnError),
    /// Fewer nodes have joined than were waited for.
    #[error(
        "{joined} of {wanted} nodes have joined within {after:?}; {missing} did not: not started, or unable to reach this \
         process, as their own lines say"
    )]
    NotAllJoined {
        /// How many nodes have joined.
        joined: usize,
        /// How many nodes were waited for.
        wanted: usize,
        /// The ranks that have not joined, in words.
        missing: String,
        /// How long the driver waited.
        after: Duration,
    },
    /// The driver has refused all nodes that have not joined. They were started with other settings or
    /// data, or are another build of the program.
    #[error(
        "{joined} of {wanted} nodes have joined, and no more will; rank {rank} was told: {reason}"
    )]
    NodesRefused {
        /// How many nodes have joined.
        joined: usize,
        /// How many nodes were waited for.
        wanted: usize,
        /// The rank of the first node that was refused.
        rank: u32,
        /// The reason that this node was told.
        reason: String,
    },
    /// Child processes of this process have ended before they joined.
    #[error("{joined} of {wanted} nodes have joined; the others have ended: see their output")]
    Refusals {
        /// How many nodes have joined.
        joined: usize,
        /// How many nodes were waited for.
        wanted: usize,
    },
}

impl ClusterError {
    /// Whether the same start would fail again.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        matches!(
            self,
            Self::NoToken(_)
                | Self::Address { .. }
                | Self::Refused { .. }
                | Self::RunOver { .. }
                | Self::NodesRefused { .. }
                | Self::Listen { .. }
        )
    }
}
