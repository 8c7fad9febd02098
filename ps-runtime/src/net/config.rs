//! The limits and times of connections.

use std::time::Duration;

/// How long to wait for peers, and how much to take from them.
#[derive(Clone, Copy, Debug)]
pub struct NetConfig {
    /// A peer that has nothing else to say says so this often. Default: 1 s.
    pub heartbeat: Duration,
    /// A peer of which nothing was heard for this long is lost. Default: 5 s.
    pub process_lease: Duration,
    /// How long a handshake may take. Default: 5 s.
    pub handshake: Duration,
    /// The most numbers (`f32`) in one message. Default: 2³⁰, which are 4 GiB.
    pub max_numbers: u64,
    /// How many connections may be open to this process at once. Default: 4,096.
    pub max_connections: usize,
    /// Whether a process may copy large messages straight out of the memory of the one that sends them,
    /// where both are of the same user on the same Linux host. Default: true; what the system forbids
    /// is noticed, and then sockets are used.
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
    /// Sets the lease, and a heartbeat of a fifth of it.
    #[must_use]
    pub fn with_process_lease(mut self, lease: Duration) -> Self {
        self.process_lease = lease;
        self.heartbeat = lease / 5;
        self
    }
}
