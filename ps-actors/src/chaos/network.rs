//! Faults of the network between this process and servers of other processes.
//!
//! Between processes there are reliable streams, which lose and double nothing. What does get lost is a connection,
//! with all calls that wait for an answer. The callers then repeat those calls, and that is how a message arrives
//! twice. So this is what the clauses of a plan mean for real processes:
//!
//! | clause | what happens to a call |
//! |---|---|
//! | `drop 5%` | the connection is cut when the call is on its way: at once, or up to 3 ms later, so that the message or its answer is lost. (An answer that came earlier is thrown away, and the call is made again.) All other calls on the connection are lost too |
//! | `dup 2%` | the call is made twice |
//! | `delay 20..80ms` | the call is made so much later |
//!
//! The calls are those of workers, of the driver and of the first server to servers of other processes: pushes,
//! pulls, joins, heartbeats, decisions. All else is left alone. There are no calls of that kind in a single process.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use actix::{Handler, Message};
use futures_util::future::{Either, select};
use ps_runtime::actor::{ActorRef, CallError, sleep};
use ps_runtime::remote::Remote;

use super::Plan;

/// The longest time from a call to the cut of its connection. A call on one machine takes about as long.
const LATEST_CUT: Duration = Duration::from_millis(3);

/// How often something happened to a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkFaults {
    /// Connections that were cut.
    pub num_cut: u64,
    /// Calls that were made twice.
    pub num_doubled: u64,
    /// Calls that were delayed.
    pub num_delayed: u64,
}

struct Network {
    drop_share: f64,
    dup_share: f64,
    delay: Option<(Duration, Duration)>,
    dice: AtomicU64,
    num_cut: AtomicU64,
    num_doubled: AtomicU64,
    num_delayed: AtomicU64,
}

static NETWORK: OnceLock<Network> = OnceLock::new();

/// Gives the network of this process the faults of the plan, from now on. Only the first call in a process has
/// an effect. `seed` decides the random choices, so it should differ between the processes of a run.
pub fn disturb(plan: &Plan, seed: u64) {
    let _ = NETWORK.set(Network {
        drop_share: plan.drop_percent / 100.0,
        dup_share: plan.dup_percent / 100.0,
        delay: plan.delay,
        dice: AtomicU64::new(seed),
        num_cut: AtomicU64::new(0),
        num_doubled: AtomicU64::new(0),
        num_delayed: AtomicU64::new(0),
    });
}

/// Returns how often something has happened to a call of this process.
#[must_use]
pub fn network_faults() -> NetworkFaults {
    NETWORK.get().map_or(NetworkFaults::default(), |network| {
        let count = |count: &AtomicU64| count.load(Relaxed);
        NetworkFaults {
            num_cut: count(&network.num_cut),
            num_doubled: count(&network.num_doubled),
            num_delayed: count(&network.num_delayed),
        }
    })
}

impl Network {
    /// Returns a number from 0 to 1.
    fn throw(&self) -> f64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        let state = self.dice.fetch_add(0x9e37_79b9_7f4a_7c15, Relaxed);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn happens(&self, share: f64) -> bool {
        share > 0.0 && self.throw() < share
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

/// Calls an actor over the network as it is. If it has no faults, the call starts at once.
pub(super) fn ask<A, M>(
    actor: &ActorRef<A>,
    message: M,
) -> impl Future<Output = Result<M::Result, CallError>> + use<A, M>
where
    A: Remote + Handler<M>,
    M: Message + Clone + Send + 'static,
    M::Result: Send,
{
    match NETWORK.get().filter(|_| !actor.is_local()) {
        None => Either::Left(actor.ask(message)),
        Some(network) => Either::Right(network.ask(actor.clone(), message)),
    }
}

impl Network {
    async fn ask<A, M>(&self, actor: ActorRef<A>, message: M) -> Result<M::Result, CallError>
    where
        A: Remote + Handler<M>,
        M: Message + Clone + Send + 'static,
        M::Result: Send,
    {
        if let Some((shortest, longest)) = self.delay {
            sleep(shortest + (longest - shortest).mul_f64(self.throw())).await;
            count(&self.num_delayed);
        }
        if self.happens(self.dup_share) && actor.tell(message.clone()).is_ok() {
            count(&self.num_doubled);
        }
        if !self.happens(self.drop_share) {
            return actor.ask(message).await;
        }
        let call = actor.ask(message.clone());
        // Half of the connections are cut at once.
        let later = LATEST_CUT.mul_f64((2.0 * self.throw() - 1.0).max(0.0));
        let under_way = match later.is_zero() {
            true => Some(call),
            false => match select(call, std::pin::pin!(sleep(later))).await {
                // It is the answer that is lost.
                Either::Left(_) => None,
                Either::Right(((), under_way)) => Some(under_way),
            },
        };
        if actor.cut_connection() {
            count(&self.num_cut);
        }
        match under_way {
            Some(call) => call.await,
            // Its caller would make it again.
            None => actor.ask(message).await,
        }
    }
}
