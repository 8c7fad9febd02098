//! The faults of a [`MemoryNetwork`](super::MemoryNetwork): of single frames, and of the whole network.
//!
//! A relay between the two ends of each pipe knows where frames begin and end. So a fault of one frame
//! does not damage the next ones. A real connection loses no single frame. But for a caller with a
//! timeout, a lost frame looks like an actor or a network that is too slow, and that is much harder to
//! produce in a test. Connections to agents (joining, starting actors) lose no frames.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::sync::watch;

use super::{Inner, Listener, MemoryNetwork, PIPE};
use crate::net::frame::{HEAD_LEN, Head, Kind, parse_lengths};
use crate::net::threads;

/// How often each fault happens. Each value is the probability per frame, from 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Faults {
    /// A call does not arrive.
    pub lose_request: f64,
    /// A reply does not arrive.
    pub lose_reply: f64,
    /// A call arrives twice.
    pub duplicate_request: f64,
    /// A frame, and all frames behind it, are delayed for up to [`max_delay`](Self::max_delay).
    pub delay: f64,
    /// The longest delay.
    pub max_delay: Duration,
    /// The connection is cut in place of the frame.
    pub cut: f64,
}

/// How often each fault has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FaultCounts {
    /// Calls that did not arrive.
    pub lost_requests: u64,
    /// Replies that did not arrive.
    pub lost_replies: u64,
    /// Calls that arrived twice.
    pub duplicated_requests: u64,
    /// Frames that were delayed.
    pub delays: u64,
    /// Connections that were cut.
    pub cuts: u64,
}

/// A failure of the whole network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outage {
    /// Connections are cut and new ones are refused, as if the other processes had ended.
    Refused,
    /// Nothing arrives and no error is reported, as if a cable were unplugged.
    Silent,
}

#[derive(Default)]
struct Counters {
    lost_requests: AtomicU64,
    lost_replies: AtomicU64,
    duplicated_requests: AtomicU64,
    delays: AtomicU64,
    cuts: AtomicU64,
}

/// The host that a [`MemoryNetwork`] stands for, if there are several.
pub(super) type Host = Option<u32>;

/// What is wrong in a network.
#[derive(Default)]
pub(super) struct Troubles {
    everywhere: Option<Arc<Trouble>>,
    /// Between two hosts only.
    between: Mutex<HashMap<(u32, u32), Arc<Trouble>>>,
}

impl MemoryNetwork {
    /// Makes a network with these faults. The same seed gives the same random choices.
    #[must_use]
    pub fn with_faults(seed: u64, faults: Faults) -> Self {
        let troubles = Troubles {
            everywhere: Some(Arc::new(Trouble::new(seed, faults))),
            ..Troubles::default()
        };
        let inner = Inner {
            troubles,
            ..Inner::default()
        };
        Self {
            inner: Arc::new(inner),
            host: None,
        }
    }

    /// Returns the network as the host with this number sees it. Use it to test outages between two
    /// hosts.
    #[must_use]
    pub fn of_host(&self, host: u32) -> Self {
        Self {
            inner: Arc::clone(&self.inner),
            host: Some(host),
        }
    }

    /// Begins or ends an outage between two hosts, while both reach all others. It affects only the
    /// connections that were made after the first call for these two hosts.
    pub fn set_outage_between(&self, one: u32, other: u32, outage: Option<Outage>) {
        let sound = || Arc::new(Trouble::new(0, Faults::default()));
        let mut between = self.inner.troubles.between();
        let trouble = between.entry(pair(one, other)).or_insert_with(sound);
        trouble.set_outage(outage);
    }

    /// How often something went wrong so far.
    #[must_use]
    pub fn fault_counts(&self) -> FaultCounts {
        let trouble = self.inner.troubles.everywhere.as_ref();
        trouble.map_or_else(FaultCounts::default, |trouble| trouble.counts())
    }

    /// Begins or ends an outage of the whole network.
    ///
    /// # Panics
    /// When the network was not made with [`with_faults`](Self::with_faults).
    pub fn set_outage(&self, outage: Option<Outage>) {
        let trouble = self.inner.troubles.everywhere.as_ref();
        trouble
            .expect("only a network with faults has outages")
            .set_outage(outage);
    }

    /// What may go wrong on a connection to there.
    pub(super) fn trouble_to(&self, listener: &Listener) -> Option<Arc<Trouble>> {
        let troubles = &self.inner.troubles;
        let hosts = self.host.zip(listener.host);
        let between = hosts.and_then(|(one, other)| {
            let between = troubles.between();
            between.get(&pair(one, other)).cloned()
        });
        between.or_else(|| troubles.everywhere.clone())
    }
}

fn pair(one: u32, other: u32) -> (u32, u32) {
    (one.min(other), one.max(other))
}

impl Troubles {
    fn between(&self) -> MutexGuard<'_, HashMap<(u32, u32), Arc<Trouble>>> {
        // Each operation on the map is whole.
        self.between.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The faults of one network, or between two hosts.
pub(super) struct Trouble {
    faults: Faults,
    seeds: Mutex<Dice>,
    counters: Counters,
    outage: watch::Sender<Option<Outage>>,
}

impl Trouble {
    pub(super) fn new(seed: u64, faults: Faults) -> Self {
        Self {
            faults,
            seeds: Mutex::new(Dice(seed)),
            counters: Counters::default(),
            outage: watch::Sender::new(None),
        }
    }

    pub(super) fn counts(&self) -> FaultCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FaultCounts {
            lost_requests: read(&self.counters.lost_requests),
            lost_replies: read(&self.counters.lost_replies),
            duplicated_requests: read(&self.counters.duplicated_requests),
            delays: read(&self.counters.delays),
            cuts: read(&self.counters.cuts),
        }
    }

    pub(super) fn set_outage(&self, outage: Option<Outage>) {
        self.outage.send_replace(outage);
    }

    pub(super) fn outage(&self) -> Option<Outage> {
        *self.outage.borrow()
    }

    /// Puts itself between a caller and the end of its connection, and returns the end for the listener.
    pub(super) fn between(self: Arc<Self>, caller: DuplexStream) -> io::Result<DuplexStream> {
        if self.outage() == Some(Outage::Refused) {
            // Not `ConnectionRefused`, which would say that the process has ended.
            return Err(io::ErrorKind::HostUnreachable.into());
        }
        let (relay, accepted) = tokio::io::duplex(PIPE);
        threads::next().spawn(async move { self.relay(caller, relay).await });
        Ok(accepted)
    }

    /// Carries bytes between the caller's pipe and the listener's until one closes, or a cut.
    async fn relay(&self, caller: DuplexStream, listener: DuplexStream) {
        let seeds = || {
            // A number is whole at any time.
            let mut seeds = self.seeds.lock().unwrap_or_else(|error| error.into_inner());
            Dice(seeds.roll())
        };
        let (requests, replies) = (seeds(), seeds());
        let (from_caller, to_caller) = tokio::io::split(caller);
        let (from_listener, to_listener) = tokio::io::split(listener);
        let (is_agent, wait_for_agent) = watch::channel(None);
        let up = self.requests(from_caller, to_listener, requests, is_agent);
        let down = self.replies(from_listener, to_caller, replies, wait_for_agent);
        let refused = async {
            let mut outage = self.outage.subscribe();
            // The sender lives as long as `self`.
            let _ = outage
                .wait_for(|outage| *outage == Some(Outage::Refused))
                .await;
        };
        // If one direction fails, the other one ends, because the pipes are dropped. If one direction ends
        // in order, the other one can finish.
        tokio::select! {
            _ = futures_util::future::try_join(up, down) => {}
            () = refused => {}
        }
    }

    async fn requests(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        mut dice: Dice,
        is_agent: watch::Sender<Option<bool>>,
    ) -> io::Result<()> {
        let head = read_http_head(&mut from).await?;
        let spared = head.starts_with(b"GET /ps/v1/actors/0 ");
        is_agent.send_replace(Some(spared));
        self.pass(&mut to, &head).await?;
        self.frames(&mut from, &mut to, &mut dice, spared).await
    }

    async fn replies(
        &self,
        mut from: impl AsyncRead + Unpin,
        mut to: impl AsyncWrite + Unpin,
        mut dice: Dice,
        mut is_agent: watch::Receiver<Option<bool>>,
    ) -> io::Result<()> {
        let head = read_http_head(&mut from).await?;
        self.pass(&mut to, &head).await?;
        if !head.starts_with(b"HTTP/1.1 101 ") {
            // The answer is a refusal with a text.
            tokio::io::copy(&mut from, &mut to).await?;
            return to.shutdown().await;
        }
        let spared = is_agent.wait_for(Option::is_some).await;
        let spared = spared.is_ok_and(|spared| *spared == Some(true));
        self.frames(&mut from, &mut to, &mut dice, spared).await
    }

    async fn frames(
        &self,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
        dice: &mut Dice,
        spared: bool,
    ) -> io::Result<()> {
        while let Some((kind, frame)) = read_frame(from).await? {
            let times = if spared {
                1
            } else {
                self.fate(kind, dice).await?
            };
            for _ in 0..times {
                self.pass(to, &frame).await?;
            }
        }
        to.shutdown().await
    }

    /// Decides how often a frame arrives. An error cuts the connection.
    async fn fate(&self, kind: Kind, dice: &mut Dice) -> io::Result<u8> {
        let (faults, counters) = (&self.faults, &self.counters);
        let mut happens = |probability, counter: &AtomicU64| {
            let it_does = dice.happens(probability);
            counter.fetch_add(u64::from(it_does), Ordering::Relaxed);
            it_does
        };
        if happens(faults.cut, &counters.cuts) {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let times = match kind {
            Kind::Ask if happens(faults.lose_request, &counters.lost_requests) => 0,
            Kind::Ask if happens(faults.duplicate_request, &counters.duplicated_requests) => 2,
            Kind::Reply if happens(faults.lose_reply, &counters.lost_replies) => 0,
            _ => 1,
        };
        if happens(faults.delay, &counters.delays) {
            tokio::time::sleep(faults.max_delay.mul_f64(dice.fraction())).await;
        }
        Ok(times)
    }

    /// Writes as soon as the network is not silent.
    async fn pass(&self, to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
        let mut outage = self.outage.subscribe();
        // The sender lives as long as `self`.
        let _ = outage
            .wait_for(|outage| *outage != Some(Outage::Silent))
            .await;
        to.write_all(bytes).await
    }
}

/// Reads up to and including the empty line.
async fn read_http_head(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(from.read_u8().await?);
    }
    Ok(head)
}

/// Reads a frame as it is, or `None` at the end of the stream.
async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut frame = vec![0; HEAD_LEN];
    match from.read(&mut frame).await? {
        0 => return Ok(None),
        num_bytes => from.read_exact(&mut frame[num_bytes..]).await?,
    };
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    let fixed = frame.first_chunk().expect("a head was read");
    let head = Head::parse(fixed).map_err(invalid)?;
    let mut read = async |len: usize| {
        let start = frame.len();
        frame.resize(start + len, 0);
        from.read_exact(&mut frame[start..]).await?;
        io::Result::Ok(frame[start..].to_vec())
    };
    let table = read(8 * head.num_buffers).await?;
    let lengths = parse_lengths(&table, u64::from(u32::MAX)).map_err(invalid)?;
    read(head.header_len + 4 * lengths.iter().sum::<usize>()).await?;
    Ok(Some((head.kind, frame)))
}

/// Random numbers (splitmix64, <https://prng.di.unimi.it/splitmix64.c>).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a random number from 0 to below 1.
    fn fraction(&mut self) -> f64 {
        (self.roll() >> 11) as f64 / (1u64 << 53) as f64
    }

    fn happens(&mut self, probability: f64) -> bool {
        self.fraction() < probability
    }
}
