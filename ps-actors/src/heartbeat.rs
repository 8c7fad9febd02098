//! Heartbeats of a member whose own thread computes.
//!
//! A [`DataWorker`](crate::worker::DataWorker) sends heartbeats during each run. If you use a [`Session`]
//! without a `DataWorker`, make [`Heartbeats`] too. Otherwise the worker counts as lost as soon as one of
//! its steps takes longer than the server's worker lease.

use std::time::Duration;

use ps_runtime::actor::{Background, in_background, sleep};

use crate::ids::GradientId;
use crate::session::Session;

/// The pause after a lost heartbeat, before the lease is known.
const PAUSE: Duration = Duration::from_millis(100);

/// The shortest time between two heartbeats.
const SHORTEST: Duration = Duration::from_millis(1);

/// Sends heartbeats from another thread until it is dropped. So a step may take as long as it likes,
/// whatever the lease of the server is (S-4).
#[derive(Debug)]
#[must_use = "the heartbeats end when this is dropped"]
pub struct Heartbeats {
    _task: Background,
}

impl Heartbeats {
    /// Starts the heartbeats of one membership. The server says how often they must come.
    ///
    /// They end by themselves when the membership is over. After [`Session::rejoin`], make new ones.
    ///
    /// # Panics
    /// If the operating system starts no thread for timers. This can only happen in a process that has
    /// never started an actor.
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
                    // The lease is a number from the server, so it may be anything, even 0.
                    Ok(Some(lease)) => pause = (lease / 4).max(SHORTEST),
                    // The server has no lease, so it does not need heartbeats.
                    Ok(None) => return,
                    // The worker gets the same error from its next push.
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
