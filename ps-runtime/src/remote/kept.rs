//! Results that stay where they were computed until somebody needs them.
//!
//! A driver that brings a worker's gradient to a server does not need the gradient. With
//! [`ActorRef::ask_kept`] it gets a ticket for it, which it can send on; whoever takes the value
//! fetches it from the process that made it. Inside one process the value itself is in the ticket.

use std::collections::HashMap;
use std::fmt;
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, Message};
use serde::de::DeserializeOwned;
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::process::Process;
use super::reference::{NOT_IN_A_CALL, Remotely, current, on_behalf_of};
use super::{Messages, Remote};
use crate::actor::actor_ref::Target;
use crate::actor::call::{GiveUp, ReplySlot};
use crate::actor::mailbox::ActorId;
use crate::actor::{ActorRef, CallError, Reply, Spawn};
use crate::codec::{self, Blob, CodecError, Encoded};
use crate::schema::is_tracing;

/// How many values a process keeps for others at once.
pub const MAX_KEPT: usize = 4096;

/// How long a value is kept that nobody takes: whoever had its ticket may have died.
pub const KEPT_FOR: Duration = Duration::from_secs(600);

/// A value that is kept where it was made; see [`ActorRef::ask_kept`].
///
/// It can be sent to other actors, in messages and replies, and taken once, by whoever comes first.
/// It is gone when it is taken, when the last receiver drops it, after [`KEPT_FOR`], and when its
/// process loses the driver.
pub struct Kept<T> {
    place: Mutex<Place<T>>,
}

enum Place<T> {
    Here(T),
    There {
        ticket: Ticket,
        process: Arc<Process>,
        /// Whoever received it lets go of it, not this sender.
        is_sent: bool,
    },
    Taken,
}

/// What travels in place of the value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ticket {
    store: ActorRef<KeptResults>,
    number: u64,
}

/// Why a kept value could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeptError {
    /// Somebody else has taken it, or let go of it.
    #[error("the value is not kept any more: it was taken, or a ticket for it was dropped")]
    Gone,
    /// The process that keeps it did not answer.
    #[error("the process that keeps the value did not answer")]
    Call(#[from] CallError),
    /// What came is not the value.
    #[error("the value cannot be read")]
    Unreadable(#[from] CodecError),
}

impl<T> Kept<T> {
    fn new(place: Place<T>) -> Self {
        Self {
            place: Mutex::new(place),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Place<T>> {
        // Every place is whole.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: DeserializeOwned> Kept<T> {
    /// Fetches the value, straight from the process that keeps it.
    ///
    /// # Errors
    /// When it is gone, or its process cannot be reached.
    pub async fn take(self) -> Result<T, KeptError> {
        let place = mem::replace(&mut *self.lock(), Place::Taken);
        match place {
            Place::Here(value) => Ok(value),
            Place::There {
                ticket: Ticket { store, number },
                process,
                ..
            } => {
                let blob = store.ask(Take(number)).await?.ok_or(KeptError::Gone)?;
                Ok(on_behalf_of(&process, || blob.read())?)
            }
            Place::Taken => Err(KeptError::Gone),
        }
    }
}

impl<T> Drop for Kept<T> {
    fn drop(&mut self) {
        let place = mem::replace(&mut *self.lock(), Place::Taken);
        if let Place::There {
            ticket: Ticket { store, number },
            is_sent: false,
            ..
        } = place
            && let Err(error) = store.tell(Discard(number))
        {
            tracing::debug!(%error, "a kept value could not be let go of");
        }
    }
}

/// Sends the ticket; a value that is here is put aside for whoever brings it.
impl<T: Serialize> Serialize for Kept<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut place = self.lock();
        let ticket = match &mut *place {
            Place::There {
                ticket, is_sent, ..
            } => {
                *is_sent = true;
                ticket.clone()
            }
            Place::Here(value) => {
                let process = current().ok_or_else(|| S::Error::custom(NOT_IN_A_CALL))?;
                let encoded = codec::encode(value).map_err(S::Error::custom)?;
                let ticket = process.keep_result(encoded).map_err(S::Error::custom)?;
                *place = Place::There {
                    ticket: ticket.clone(),
                    process,
                    is_sent: true,
                };
                ticket
            }
            Place::Taken => return Err(S::Error::custom(KeptError::Gone)),
        };
        drop(place);
        ticket.serialize(serializer)
    }
}

impl<'de, T> Deserialize<'de> for Kept<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ticket = Ticket::deserialize(deserializer)?;
        if is_tracing() {
            return Ok(Self::new(Place::Taken));
        }
        let process = current().ok_or_else(|| D::Error::custom(NOT_IN_A_CALL))?;
        Ok(Self::new(Place::There {
            ticket,
            process,
            is_sent: false,
        }))
    }
}

impl<T> fmt::Debug for Kept<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &*self.lock() {
            Place::Here(_) => "here",
            Place::There { .. } => "elsewhere",
            Place::Taken => "taken",
        };
        write!(f, "Kept<{}>({place})", std::any::type_name::<T>())
    }
}

impl<A: Actor<Context = Context<A>>> ActorRef<A> {
    /// Calls the actor, and leaves the result where it is computed until somebody takes it.
    ///
    /// The ticket can be sent on inside a message; the result then goes straight from the process
    /// that made it to the one that takes it, not through this one.
    pub fn ask_kept<M>(&self, message: M) -> Reply<Kept<M::Result>>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        match self.target() {
            Target::Here(mailbox) => {
                let call = mailbox.push(message, false);
                Reply::started(call.map(|call| Arc::new(KeepHere(call as _))))
            }
            Target::There(port) => {
                let Remotely { actor, table } = Remotely::of(&**port);
                Reply::started(actor.call_kept(table, message))
            }
        }
    }
}

/// The reply of a call inside this process, as a kept value.
struct KeepHere<R>(Arc<dyn ReplySlot<R>>);

impl<R: Send> ReplySlot<Kept<R>> for KeepHere<R> {
    fn target(&self) -> ActorId {
        self.0.target()
    }

    fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<Result<Kept<R>, CallError>> {
        let kept = |value| Kept::new(Place::Here(value));
        self.0.poll(cx).map(|result| result.map(kept))
    }

    fn give_up(&self, why: GiveUp) -> Result<Kept<R>, CallError> {
        let kept = |value| Kept::new(Place::Here(value));
        self.0.give_up(why).map(kept)
    }

    fn abandon(&self) {
        self.0.abandon();
    }
}

/// Hands out what a process keeps for others.
pub(crate) struct KeptResults {
    values: Arc<Values>,
}

/// The values themselves, written already: whoever takes one gets the numbers without a copy.
#[derive(Default)]
pub(crate) struct Values {
    next: AtomicU64,
    by_number: Mutex<HashMap<u64, (Instant, Encoded)>>,
}

impl Values {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Instant, Encoded)>> {
        // Each operation on the map is whole.
        self.by_number
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// The shelf of one process, started when something is first put on it.
#[derive(Default)]
pub(crate) struct ObjectStore {
    started: OnceLock<(ActorRef<KeptResults>, Arc<Values>)>,
}

impl ObjectStore {
    /// Keeps a value for whoever brings the ticket.
    pub(crate) fn put(&self, value: Encoded) -> Result<Ticket, String> {
        let (store, values) = match self.started.get() {
            Some(started) => started,
            None => {
                let values = Arc::new(Values::default());
                let shared = Arc::clone(&values);
                let spawn = Spawn::new().thread_name("ps-store").without_io();
                let store = spawn.start(move || KeptResults {
                    values: Arc::clone(&shared),
                });
                let store = store.map_err(|error| error.to_string())?;
                // Of two at the same time, one stays.
                self.started.get_or_init(|| (store, values))
            }
        };
        let number = values.next.fetch_add(1, Ordering::Relaxed);
        let mut by_number = values.lock();
        if by_number.len() >= MAX_KEPT {
            return Err(format!(
                "{MAX_KEPT} values are kept already; take some, or drop them"
            ));
        }
        by_number.insert(number, (Instant::now(), value));
        drop(by_number);
        let store = store.clone();
        Ok(Ticket { store, number })
    }
}

impl ObjectStore {
    /// Lets go of what nobody has come for.
    pub(crate) fn sweep(&self, now: Instant) {
        let Some((_, values)) = self.started.get() else {
            return;
        };
        let is_old = |since: Instant| now.saturating_duration_since(since) > KEPT_FOR;
        let old: Vec<_> = values
            .lock()
            .extract_if(|_, (since, _)| is_old(*since))
            .collect();
        if !old.is_empty() {
            tracing::warn!(num_values = old.len(), "kept values were never taken");
        }
    }
}

impl Actor for KeptResults {
    type Context = Context<Self>;
}

impl Remote for KeptResults {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Take>().add::<Discard>();
    }
}

#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Option<Blob>")]
struct Take(u64);

impl Handler<Take> for KeptResults {
    type Result = Option<Blob>;

    fn handle(&mut self, Take(number): Take, _: &mut Self::Context) -> Self::Result {
        let (_, value) = self.values.lock().remove(&number)?;
        Some(value.into())
    }
}

#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
struct Discard(u64);

impl Handler<Discard> for KeptResults {
    type Result = ();

    fn handle(&mut self, Discard(number): Discard, _: &mut Self::Context) {
        let discarded = self.values.lock().remove(&number);
        drop(discarded);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Some actor that can be exported.
    pub(crate) fn store() -> ActorRef<KeptResults> {
        let start = Spawn::new().start(|| KeptResults {
            values: Arc::default(),
        });
        start.expect("the system gives a thread")
    }
    use crate::actor::run;
    use crate::net::NetConfig;
    use crate::remote::NodeId;

    fn process() -> Arc<Process> {
        let process = Process::new(NetConfig::default(), None, None, None);
        process.enter(NodeId::DRIVER, 1);
        process
    }

    fn shelved(process: &Arc<Process>, value: u64) -> impl Fn() -> Kept<u64> + use<> {
        let ticket = process.keep_result(codec::encode(&value).unwrap()).unwrap();
        let process = Arc::clone(process);
        move || {
            Kept::new(Place::There {
                ticket: ticket.clone(),
                process: Arc::clone(&process),
                is_sent: false,
            })
        }
    }

    #[test]
    fn a_value_is_taken_once() {
        let ticket = shelved(&process(), 7);
        assert_eq!(run(ticket().take()).unwrap(), 7);
        let second = run(ticket().take());
        assert!(matches!(second, Err(KeptError::Gone)), "{second:?}");
    }

    #[test]
    fn a_value_goes_with_its_ticket_unless_that_was_sent_on() {
        let process = process();
        let ticket = shelved(&process, 7);
        let sent = ticket();
        on_behalf_of(&process, || codec::encode(&sent)).unwrap();
        drop(sent);
        assert_eq!(run(ticket().take()).unwrap(), 7, "the receiver has it now");
        let ticket = shelved(&process, 8);
        drop(ticket());
        assert!(matches!(run(ticket().take()), Err(KeptError::Gone)));
    }

    #[test]
    fn what_nobody_comes_for_goes_after_a_while() {
        let process = process();
        let ticket = shelved(&process, 7);
        process.sweep_kept(Instant::now());
        assert_eq!(run(ticket().take()).unwrap(), 7);
        let ticket = shelved(&process, 8);
        process.sweep_kept(Instant::now() + KEPT_FOR + Duration::from_secs(1));
        assert!(matches!(run(ticket().take()), Err(KeptError::Gone)));
    }
}
