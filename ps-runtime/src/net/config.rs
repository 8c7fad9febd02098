//! The limits and times of connections.

use std::time::Duration;

/// How long to wait for peers, and how much to accept from them. "Peer" means the process at the other
/// end of a connection.
///
/// ```
/// use std::time::Duration;
///
/// use ps_runtime::cluster::ClusterConfig;
/// use ps_runtime::net::NetConfig;
///
/// // A silent peer counts as lost after 10 s. Messages have at most 16 Mi numbers (64 MiB).
/// let net = NetConfig { max_numbers: 1 << 24, ..NetConfig::default() }
///     .with_process_lease(Duration::from_secs(10));
/// assert_eq!(net.heartbeat, Duration::from_secs(2));
/// let config = ClusterConfig { net, ..ClusterConfig::default() };
/// # drop(config);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct NetConfig {
    /// How often this process sends a heartbeat on a connection on which it has nothing else to send.
    /// Default: 1 s.
    pub heartbeat: Duration,
    /// How long nothing may arrive on a connection before it counts as lost. If it is too short, busy peers
    /// are taken for lost; if it is long, lost peers are noticed late. Default: 5 s.
    pub process_lease: Duration,
    /// How long a handshake may take. Default: 5 s.
    pub handshake: Duration,
    /// How many numbers (`f32`) a message to this process may have. Default: 2³⁰ numbers, which are 4 GiB. Numbers of 16
    /// bits count half, and take twice as much as that when they have been read.
    pub max_numbers: u64,
    /// How many connections to this process may be open at the same time. Default: 4,096.
    ///
    /// Connections in their handshake may take no more than a quarter of this, and no more than a quarter of
    /// the open files that the system allows (`ulimit -n`). One more closes the oldest of them.
    pub max_connections: usize,
    /// Whether the receiver of a large message may copy its numbers directly from the memory of the sender.
    /// This applies to two processes of the same user on one Linux host. If the system forbids it, sockets
    /// are used. Default: `true`.
    pub read_peer_memory: bool,
}

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(1),
            process_lease: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            max_numbers: 1 << 30,
            max_connections: 4096,
            read_peer_memory: true,
        }
    }
}

impl NetConfig {
    /// Sets the process lease, and sets the heartbeat to a fifth of it.
    #[must_use]
    pub fn with_process_lease(mut self, lease: Duration) -> Self {
        self.process_lease = lease;
        self.heartbeat = lease / 5;
        self
    }
}
