//! The address at which a process listens.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// An address at which a process of a cluster accepts connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Address {
    /// An IP address and port.
    Tcp(SocketAddr),
    /// A socket in the file system of one host.
    Unix(PathBuf),
    /// A place in a [`MemoryNetwork`](super::memory::MemoryNetwork).
    Memory(u64),
}

impl Address {
    /// Whether only processes of the same host can reach it.
    pub(crate) fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().is_loopback(),
            Self::Unix(_) | Self::Memory(_) => true,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Memory(place) => write!(f, "memory:{place}"),
        }
    }
}
