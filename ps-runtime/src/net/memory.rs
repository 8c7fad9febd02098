//! A network inside one process, for tests: pipes in place of sockets, and faults on demand.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

mod faults;

pub use faults::{FaultCounts, Faults, Outage};

use self::faults::Trouble;
use super::threads;

/// The size of a pipe's buffer in bytes, similar to that of a socket.
const PIPE: usize = 256 << 10;

/// How many connections may wait to be accepted.
const BACKLOG: usize = 128;

/// A network in which processes reach each other without sockets. A clone is the same network.
#[derive(Clone, Default)]
pub struct MemoryNetwork {
    inner: Arc<Inner>,
    /// The number of the host whose view of the network this is, if there are several hosts.
    host: Option<u32>,
}

#[derive(Default)]
struct Inner {
    next_place: AtomicU64,
    listeners: Mutex<HashMap<u64, Listener>>,
    trouble: Option<Arc<Trouble>>,
    /// The outages between two hosts.
    between: Mutex<HashMap<(u32, u32), Arc<Trouble>>>,
}

#[derive(Clone)]
struct Listener {
    host: Option<u32>,
    backlog: mpsc::Sender<DuplexStream>,
}

impl MemoryNetwork {
    /// Makes an empty network without faults.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a network with these faults. The same seed gives the same random numbers.
    #[must_use]
    pub fn with_faults(seed: u64, faults: Faults) -> Self {
        let inner = Inner {
            trouble: Some(Arc::new(Trouble::new(seed, faults))),
            ..Inner::default()
        };
        Self {
            inner: Arc::new(inner),
            host: None,
        }
    }

    /// Returns the network as the host of this number sees it, for outages between two hosts.
    #[must_use]
    pub fn of_host(&self, host: u32) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            host: Some(host),
        }
    }

    /// Begins or ends an outage between two hosts. Both still reach all other hosts. It affects only
    /// connections that are made after the first call for these two hosts.
    pub fn set_outage_between(&self, one: u32, other: u32, outage: Option<Outage>) {
        let pair = (one.min(other), one.max(other));
        // Each operation on the map is whole.
        let between = self.inner.between.lock();
        let mut between = between.unwrap_or_else(PoisonError::into_inner);
        let sound = || Arc::new(Trouble::new(0, Faults::default()));
        between.entry(pair).or_insert_with(sound).set_outage(outage);
    }

    /// Returns the faults of a connection to this listener.
    fn trouble_to(&self, listener: &Listener) -> Option<Arc<Trouble>> {
        let between = self.inner.between.lock();
        let between = between.unwrap_or_else(PoisonError::into_inner);
        let pair = self.host.zip(listener.host);
        let pair = pair.map(|(one, other)| (one.min(other), one.max(other)));
        let trouble = pair.and_then(|pair| between.get(&pair));
        trouble.or(self.inner.trouble.as_ref()).cloned()
    }

    /// Returns how often each fault has happened so far.
    #[must_use]
    pub fn fault_counts(&self) -> FaultCounts {
        let trouble = self.inner.trouble.as_ref();
        trouble.map_or_else(FaultCounts::default, |trouble| trouble.counts())
    }

    /// Begins or ends an outage of the whole network.
    ///
    /// # Panics
    /// When the network was not made with [`with_faults`](Self::with_faults).
    pub fn set_outage(&self, outage: Option<Outage>) {
        let trouble = self.inner.trouble.as_ref();
        trouble
            .expect("only a network with faults has outages")
            .set_outage(outage);
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
        let host = self.host;
        self.listeners().insert(place, Listener { host, backlog });
        (place, receiver)
    }

    pub(crate) fn connect(&self, place: u64) -> io::Result<DuplexStream> {
        let listener = self.listeners().get(&place).cloned();
        let (ours, theirs) = tokio::io::duplex(PIPE);
        let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
        let listener = listener.ok_or_else(refused)?;
        let Some(trouble) = self.trouble_to(&listener) else {
            let listener = listener.backlog;
            listener.try_send(theirs).map_err(|_| refused())?;
            return Ok(ours);
        };
        if trouble.outage() == Some(Outage::Refused) {
            return Err(refused());
        }
        let (relay, accepted) = tokio::io::duplex(PIPE);
        let listener = listener.backlog;
        listener.try_send(accepted).map_err(|_| refused())?;
        threads::next().spawn(async move { trouble.relay(theirs, relay).await });
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
