//! Heartbeats of a member whose own thread computes.
//!
//! A [`DataWorker`](crate::worker::DataWorker) has them during each run; whoever has a [`Session`] for
//! another reason makes them, too, or is lost when a step takes longer than the server's lease.

use std::time::Duration;

use crate::ids::GradientId;
use crate::session::Session;
use ps_runtime::actor::{Background, in_background, sleep};

/// How soon a heartbeat that was lost is sent again, before the lease is known.
const PAUSE: Duration = Duration::from_millis(100);

/// The shortest time between two heartbeats.
const SHORTEST: Duration = Duration::from_millis(1);

/// Sends heartbeats until it is dropped, from another thread: a step may take as long as it likes,
/// whatever the lease of the server is (S-4).
#[derive(Debug)]
#[must_use = "the heartbeats end when this is dropped"]
pub struct Heartbeats {
    _task: Background,
}

impl Heartbeats {
    /// Those of one membership, which is over when the worker joins again. The server says how often.
    ///
    /// # Panics
    /// When the system gives no thread for timers, in a process that never started an actor.
    pub fn of(session: &Session) -> Self {
        let GradientId {
            worker,
            incarnation,
            ..
        } = session.gradient_id(session.next_clock());
        let servers = session.servers().clone();
        let beats = async move {
            let mut pause = PAUSE;
            loop {
                match servers.heartbeat(worker, incarnation).await {
                    // The lease may be anything that a server says, also none at all.
                    Ok(Some(lease)) => pause = (lease / 4).max(SHORTEST),
                    // Nobody is lost for being silent.
                    Ok(None) => return,
                    // The worker will hear it at its next push.
                    Err(error) if !error.is_for_now() => return,
                    Err(_) => {}
                }
                sleep(pause).await;
            }
        };
        Self {
            _task: in_background(beats),
        }
    }
}
