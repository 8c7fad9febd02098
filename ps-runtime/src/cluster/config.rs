//! How a process takes part in a cluster.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::resources::Resources;
use crate::net::memory::MemoryNetwork;
use crate::net::{NetConfig, Tls, Token};
use crate::remote::process::Process;

/// Settings of a driver or node. All processes of a cluster share token and transport.
#[derive(Clone, Debug)]
pub struct ClusterConfig {
    /// What peers must know to be let in.
    pub token: Option<Token>,
    /// Certificates for connections between hosts.
    pub tls: Option<Tls>,
    /// Which run of the program this process takes part in. A driver does not let in a node that was
    /// started for another one; where either side does not say, nothing is compared. Default: `None`.
    pub run_id: Option<String>,
    /// Lets anybody in who can reach this process, from any host. For networks that nobody else is on.
    pub insecure: bool,
    /// Times and limits of connections.
    pub net: NetConfig,
    /// How processes reach each other.
    pub transport: Transport,
    /// What this process offers to actors; default: as many `cpus` as it may use.
    pub resources: Resources,
    /// How long a node looks for its driver, at the start and after it was lost. Default: 60 s.
    pub join_timeout: Duration,
    /// How long a node that is asked to leave waits for the steps under way. Too short, and they
    /// are taken again elsewhere; too long, and the engine kills the node first: Kubernetes does
    /// so after 30 s, Slurm too. Zero leaves at once. Default: 10 s.
    pub leave_grace: Duration,
}

/// How the processes of a cluster reach each other.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Transport {
    /// TCP between hosts; Unix sockets within one.
    #[default]
    Sockets,
    /// TCP only, within one host, too.
    Tcp,
    /// Pipes inside one process, for tests.
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
    /// Whether nobody gets in who was not given a secret.
    pub(crate) fn is_guarded(&self) -> bool {
        self.token.is_some() || self.tls.as_ref().is_some_and(Tls::is_mutual)
    }

    /// Begins an incarnation of this process.
    pub(crate) fn process(&self) -> Arc<Process> {
        let memory = match &self.transport {
            Transport::Memory(network) => Some(network.clone()),
            _ => None,
        };
        Process::new(self.net, self.token.clone(), self.tls.clone(), memory)
    }
}

/// What to do when another run has the port.
fn busy_port(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            ": another run may have it; give each run on a machine a port of its own (--master-port)"
        }
        _ => "",
    }
}

/// What to do when there are no threads for the network.
pub(super) const NO_THREADS: &str = "the system gives no thread for the network: raise the limits on \
     open files (ulimit -n) and threads (ulimit -u)";

/// Why a process could not take part.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// Anybody could have trained along.
    #[error(
        "{0} can be reached from other hosts, so it needs a token: set PS_TOKEN (16 characters or \
         more, the same for all processes), or use certificates for both sides (mutual TLS), or \
         say --insecure on a network of your own"
    )]
    NoToken(SocketAddr),
    /// The address cannot be listened on.
    #[error("could not listen on {address}{}", busy_port(source))]
    Listen {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The driver's address leads nowhere.
    #[error("could not find the address of {address}")]
    Address {
        /// Which.
        address: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The driver does not answer.
    #[error("the driver at {address} could not be reached for {after:?}: {reason}")]
    NoDriver {
        /// Where it should be.
        address: String,
        /// How long it was tried.
        after: Duration,
        /// What happened at the last try.
        reason: String,
    },
    /// The driver does not want this process; trying again will not help.
    #[error("the driver at {address} did not take this process: {reason}")]
    Refused {
        /// Where it is.
        address: String,
        /// Why.
        reason: String,
    },
    /// There is nobody to look after connections.
    #[error("{NO_THREADS}")]
    Threads(#[source] std::io::Error),
    /// An agent or its thread could not be started.
    #[error("could not start an actor")]
    Spawn(#[from] crate::actor::SpawnError),
    /// Fewer nodes have joined than were waited for.
    #[error("{joined} of {wanted} nodes have joined within {after:?}")]
    NotAllJoined {
        /// How many are there.
        joined: usize,
        /// How many were waited for.
        wanted: usize,
        /// For how long.
        after: Duration,
    },
    /// The driver itself has refused all who have not joined: they were started with other settings or
    /// data, or are another build of the program.
    #[error(
        "{joined} of {wanted} nodes have joined, and no more will; rank {rank} was told: {reason}"
    )]
    NodesRefused {
        /// How many are there.
        joined: usize,
        /// How many were waited for.
        wanted: usize,
        /// The first one that was refused.
        rank: u32,
        /// Why.
        reason: String,
    },
    /// Processes that this one has started have ended before they joined.
    #[error("{joined} of {wanted} nodes have joined; the others have ended: see what they say")]
    Refusals {
        /// How many are there.
        joined: usize,
        /// How many were waited for.
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
                | Self::NodesRefused { .. }
                | Self::Listen { .. }
        )
    }
}
