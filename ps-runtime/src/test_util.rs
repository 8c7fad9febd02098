//! Helpers for tests of this crate and of the crates that use it. They are not part of the product.

use std::any::Any;
use std::collections::HashMap;
use std::error::Error;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::buffer::Buffer;
use crate::cluster::{Cluster, ClusterConfig, Transport};
use crate::codec::{CodecError, Encoded, decode, encode};
use crate::net::memory::MemoryNetwork;
use crate::net::{Address, NetConfig};

pub use self::fuzz::{CALLER_FRAMES, Dice, Fed, Fuzz, Sent, frame, offers_all};
#[cfg(test)]
pub(crate) use self::fuzz::{damage, number};

mod fuzz;

/// The time limit of tests: whatever is awaited happens within this time or never.
pub const SOON: Duration = Duration::from_secs(60);

/// The loopback address with any free port.
pub const LOCAL: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Polls until the condition holds.
///
/// # Panics
/// When the condition does not hold within [`SOON`].
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < SOON, "never happened: {what}");
        // After 5 ms it may take seconds, so the processor is left to other threads.
        match start.elapsed() < Duration::from_millis(5) {
            true => std::thread::yield_now(),
            false => std::thread::park_timeout(Duration::from_millis(1)),
        }
    }
}

/// All transports between two processes.
#[must_use]
pub fn transports() -> [Transport; 3] {
    [
        Transport::Memory(MemoryNetwork::new()),
        Transport::Tcp,
        Transport::Sockets,
    ]
}

/// Settings that fit a busy machine.
#[must_use]
pub fn config(transport: Transport) -> ClusterConfig {
    ClusterConfig {
        transport,
        net: NetConfig {
            // The machine that tests run on may be busy.
            process_lease: Duration::from_secs(20),
            handshake: Duration::from_secs(20),
            ..NetConfig::default()
        },
        ..ClusterConfig::default()
    }
}

/// The address of the driver, for nodes.
///
/// # Panics
/// When the driver does not listen.
#[must_use]
pub fn driver_address(cluster: &Cluster) -> String {
    let mut addresses = cluster.addresses().iter();
    let reachable = addresses.find(|address| !matches!(address, Address::Unix(_)));
    reachable.expect("it listens at one").to_string()
}

/// Encodes and decodes a message, and returns the result.
///
/// # Errors
/// When it cannot be written or read.
pub fn transport<T: Serialize + DeserializeOwned>(message: &T) -> Result<T, CodecError> {
    let Encoded { header, bulk } = encode(message)?;
    let buffers = bulk.iter().map(|bulk| Buffer::from(bulk.to_vec()));
    decode(&header, buffers.collect())
}

/// Encodes and decodes an error, checks that its text and those of all its sources are unchanged, and
/// returns it.
///
/// # Panics
/// When a text has changed.
pub fn check_error_crosses<E>(sent: &E) -> E
where
    E: Error + Serialize + DeserializeOwned + 'static,
{
    let got = transport(sent).expect("an error can cross");
    assert_eq!(chain(&got), chain(sent));
    got
}

fn chain(error: &(dyn Error + 'static)) -> Vec<String> {
    std::iter::successors(Some(error), |&error| error.source())
        .map(ToString::to_string)
        .collect()
}

/// Sends a value that cannot be written as bytes, such as a closure. It is sent as a number in a table of
/// this process, and the sender keeps the value. So a message that was taken back cannot be read any more.
#[derive(Debug)]
pub struct Parked<T>(Arc<Mutex<Option<T>>>);

type Table = Mutex<HashMap<u64, Weak<dyn Any + Send + Sync>>>;

static TABLE: LazyLock<Table> = LazyLock::new(Mutex::default);

impl<T> Parked<T> {
    /// Parks a value.
    pub fn new(value: T) -> Self {
        Self(Arc::new(Mutex::new(Some(value))))
    }

    /// Takes the value out. Afterwards the sender does not have it either.
    ///
    /// # Panics
    /// When the value was taken before.
    #[must_use]
    pub fn take(self) -> T {
        let value = self.0.lock().expect("no test panics with it").take();
        value.expect("a message begins at most once")
    }
}

impl<T: Send + 'static> Serialize for Parked<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Made-up numbers, which are used to find the fields of a message, are below 1000. They must not
        // match any entry.
        static NEXT: AtomicU64 = AtomicU64::new(1000);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let parked: Arc<dyn Any + Send + Sync> = Arc::clone(&self.0) as _;
        TABLE
            .lock()
            .expect("no test panics with it")
            .insert(number, Arc::downgrade(&parked));
        number.serialize(serializer)
    }
}

impl<'de, T: Send + 'static> Deserialize<'de> for Parked<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u64::deserialize(deserializer)?;
        let parked = TABLE
            .lock()
            .expect("no test panics with it")
            .remove(&number);
        let parked = parked.and_then(|parked| parked.upgrade());
        let parked = parked.and_then(|parked| parked.downcast().ok());
        parked
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("its sender has taken it back"))
    }
}
