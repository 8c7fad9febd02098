//! A network inside one process: pipes in place of sockets. Tests can add faults.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

#[cfg(any(test, feature = "test-util"))]
mod faults;

#[cfg(any(test, feature = "test-util"))]
pub use faults::{FaultCounts, Faults, Outage};

/// The size of a pipe's buffer in bytes, similar to that of a socket.
const PIPE: usize = 256 << 10;

/// How many connections may wait to be accepted.
const BACKLOG: usize = 128;

/// A network in which processes reach each other without sockets. A clone is the same network.
#[derive(Clone, Default)]
pub struct MemoryNetwork {
    inner: Arc<Inner>,
    #[cfg(any(test, feature = "test-util"))]
    host: faults::Host,
}

#[derive(Default)]
struct Inner {
    next_place: AtomicU64,
    listeners: Mutex<HashMap<u64, Listener>>,
    #[cfg(any(test, feature = "test-util"))]
    troubles: faults::Troubles,
}

#[derive(Clone)]
struct Listener {
    #[cfg(any(test, feature = "test-util"))]
    host: faults::Host,
    backlog: mpsc::Sender<DuplexStream>,
}

impl Listener {
    /// Hands over the other end of a connection.
    fn accept(&self, stream: DuplexStream) -> io::Result<()> {
        let accepted = self.backlog.try_send(stream);
        accepted.map_err(|_| io::ErrorKind::ConnectionRefused.into())
    }
}

impl MemoryNetwork {
    /// Makes an empty network without faults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn listeners(&self) -> MutexGuard<'_, HashMap<u64, Listener>> {
        // Each operation on the map is whole.
        let listeners = self.inner.listeners.lock();
        listeners.unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place to listen at. The first place is 0.
    pub(crate) fn listen(&self) -> (u64, mpsc::Receiver<DuplexStream>) {
        let place = self.inner.next_place.fetch_add(1, Ordering::Relaxed);
        let (backlog, receiver) = mpsc::channel(BACKLOG);
        let listener = Listener {
            #[cfg(any(test, feature = "test-util"))]
            host: self.host,
            backlog,
        };
        self.listeners().insert(place, listener);
        (place, receiver)
    }

    pub(crate) fn connect(&self, place: u64) -> io::Result<DuplexStream> {
        let listener = self.listeners().get(&place).cloned();
        let listener = listener.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = tokio::io::duplex(PIPE);
        #[cfg(any(test, feature = "test-util"))]
        let theirs = match self.trouble_to(&listener) {
            Some(trouble) => trouble.between(theirs)?,
            None => theirs,
        };
        listener.accept(theirs)?;
        Ok(ours)
    }
}

impl fmt::Debug for MemoryNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let num_listeners = self.listeners().len();
        f.debug_struct("MemoryNetwork")
            .field("num_listeners", &num_listeners)
            .finish()
    }
}
