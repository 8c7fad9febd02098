//! Connects a reference to its actor, again and again while that may help.

use std::mem;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::{Link, Lost, RemoteActor};
use crate::actor::NotDelivered;
use crate::deadline::latest;
use crate::net::connection::{Connection, Ended, Frame, Peer};
use crate::net::frame::{FrameError, Kind};
use crate::net::outbox::Outbox;
use crate::remote::dial::DialError;
use crate::remote::process::NodeId;

/// Connects again after a pause, if this process still has a reference.
pub(super) async fn seek(actor: Weak<RemoteActor>, pause: Duration) {
    tokio::time::sleep(pause).await;
    let Some(actor) = actor.upgrade() else {
        return;
    };
    let mut state = actor.lock();
    state.is_sought = false;
    if state.num_handles > 0 && !actor.process.is_closed() {
        actor.connect(&mut state);
    }
}

/// In how many tries one after the other nobody listens where a process has listened before, until the process
/// counts as ended.
const MAX_DESERTED: u32 = 2;

/// Tries to connect for one process lease. Gives up earlier if the process has ended: it has listened before,
/// and now its host says that nobody listens. The connection then runs on the same thread.
pub(super) async fn connect(actor: Arc<RemoteActor>) {
    let process = Arc::clone(&actor.process);
    let config = process.config();
    let now = tokio::time::Instant::now().into_std();
    let deadline = latest(now, config.process_lease).into();
    let mut pause = Duration::from_millis(10);
    // A node listens before it joins, and before others know its address. A driver may be started last.
    let has_listened = actor.wire.node != NodeId::DRIVER || actor.lock().was_reached;
    let mut num_deserted = 0;
    let dialled = loop {
        let error = match tokio::time::timeout_at(deadline, actor.process.dial(&actor.wire)).await {
            Ok(Ok(dialled)) => break dialled,
            Ok(Err(DialError::Ended(why))) => return actor.end(why.into(), 0),
            Ok(Err(DialError::Refused(why))) => return actor.give_up(why.into(), false),
            Ok(Err(DialError::Deserted(why))) => {
                num_deserted += 1;
                if has_listened && num_deserted == MAX_DESERTED {
                    return actor.give_up(why.into(), true);
                }
                why
            }
            Ok(Err(DialError::Unreachable(why))) => {
                num_deserted = 0;
                why
            }
            Err(_elapsed) => format!("it did not answer within {:?}", config.process_lease),
        };
        if tokio::time::Instant::now() + pause > deadline {
            return actor.give_up(error.into(), true);
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(config.heartbeat);
    };
    let connection = Connection::new(dialled.stream, config);
    let max = dialled.max_numbers.unwrap_or(config.max_numbers);
    call_over(actor, connection, max, &dialled.already_read).await;
}

/// Sends the calls of an actor over a connection, and reads the answers, until the connection ends. The other side
/// accepts `max` numbers in one message.
pub(super) async fn call_over(
    actor: Arc<RemoteActor>,
    connection: Connection,
    max: u64,
    already_read: &[u8],
) {
    let process = Arc::clone(&actor.process);
    let outbox = Arc::clone(&connection.outbox);
    actor.max_numbers.store(max, Ordering::Relaxed);
    let mut too_large = Vec::new();
    {
        let mut state = actor.lock();
        if let Link::Ended = state.link {
            return;
        }
        for frame in mem::take(&mut state.unsent) {
            // The frames were made before the other side said how much it accepts.
            let len = frame.num_numbers();
            if len > max {
                let call = state.calls.remove(&frame.call());
                too_large.extend(call.map(|call| (call, FrameError::TooLong { len, max })));
                continue;
            }
            // A new connection takes all frames.
            let _ = outbox.send(frame);
        }
        state.link = Link::Up(Arc::clone(&outbox));
        state.was_reached = true;
        actor.finish_if_released(&state);
    }
    actor.gone.send_replace(false);
    for (call, error) in too_large {
        let reason = error.to_string();
        call.lost(Lost::NotDelivered(NotDelivered::TooLarge { reason }));
    }
    let client = Client { actor, outbox };
    connection
        .run(already_read, process.config(), process.buffers(), client)
        .await;
}

/// The calling side of a connection.
struct Client {
    /// Keeps the actor's data even if no reference is left: a frame that must arrive may need another
    /// connection.
    actor: Arc<RemoteActor>,
    outbox: Arc<Outbox>,
}

impl Peer for Client {
    fn actor(&self) -> Arc<str> {
        Arc::clone(self.actor.name())
    }

    fn receive(&mut self, frame: Frame) -> Result<(), Ended> {
        match frame.kind {
            Kind::Reply => {
                // If nobody waits for the reply any more, it is dropped.
                if let Some(call) = self.actor.forget(frame.call) {
                    call.arrived(frame);
                }
                Ok(())
            }
            Kind::Ended => {
                self.actor.end("the actor has ended".into(), frame.call);
                // The other side waits for this one to close.
                Err(Ended::Done("the actor has ended"))
            }
            Kind::Ping => Ok(()),
            other => {
                let why = format!("a called actor does not send {other:?}");
                Err(Ended::Peer(why))
            }
        }
    }

    fn disconnected(&mut self, why: &Arc<str>) {
        self.actor.disconnected(&self.outbox, why);
    }
}
