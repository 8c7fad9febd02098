//! Heartbeats of a member whose own thread computes.

use std::time::Duration;

use crate::actor::background::{self, Task};
use crate::group::ServerGroup;
use crate::ids::{Incarnation, WorkerId};

/// How soon a heartbeat that was lost is sent again, before the lease is known.
const PAUSE: Duration = Duration::from_millis(100);

/// Sends heartbeats until it is dropped, from another thread: a step may take as long as it likes,
/// whatever the lease of the server is (S-4).
#[derive(Debug)]
pub(crate) struct Heartbeats {
    _task: Task,
}

impl Heartbeats {
    /// Of a worker in one life; the server says how often.
    pub(crate) fn of(servers: &ServerGroup, worker: WorkerId, incarnation: Incarnation) -> Self {
        let servers = servers.clone();
        let beats = async move {
            let mut pause = PAUSE;
            loop {
                match servers.heartbeat(worker, incarnation).await {
                    Ok(Some(lease)) => pause = lease / 4,
                    // Nobody is lost for being silent.
                    Ok(None) => return,
                    // The worker will hear it at its next push.
                    Err(error) if !error.is_for_now() => return,
                    Err(_) => {}
                }
                background::sleep(pause).await;
            }
        };
        Self {
            _task: background::start(beats),
        }
    }
}
