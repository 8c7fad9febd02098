//! Kept results: they stay in the process that computed them until a process takes them.
//!
//! A driver that passes a worker's gradient to a server does not need the gradient itself. With
//! [`ActorRef::ask_kept`] it gets a ticket for the gradient and sends the ticket on. The process that
//! takes the value fetches it from the process that made it. Inside one process the ticket contains the
//! value itself.

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
use crate::actor::book::ActorId;
use crate::actor::call::{GiveUp, ReplySlot};
use crate::actor::{ActorRef, CallError, Reply, Spawn};
use crate::codec::{self, Blob, CodecError, Encoded};
use crate::schema::is_tracing;

/// How many values a process keeps for other processes at the same time.
pub const MAX_KEPT: usize = 4096;

/// How long a value is kept if no process takes it: the process that had the ticket may have died.
pub const KEPT_FOR: Duration = Duration::from_secs(600);

/// A ticket for a kept result: a value that stays in the process that made it; see
/// [`ActorRef::ask_kept`].
///
/// It can be sent to other actors, in messages and replies. The first process that takes the value gets
/// it, and the value can be taken once. The value is removed when it is taken, when a receiver drops its
/// ticket without having sent it on, after [`KEPT_FOR`], and when its process loses the driver.
///
/// For an example, see [`take`](Self::take).
pub struct Kept<T> {
    place: Mutex<Place<T>>,
}

enum Place<T> {
    Here(T),
    There {
        ticket: Ticket,
        process: Arc<Process>,
        /// The ticket was sent on, so its receiver discards the value, not this sender.
        is_sent: bool,
    },
    Taken,
}

/// The data that is sent in place of the value.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ticket {
    store: ActorRef<KeptResults>,
    number: u64,
}

/// Why a kept value could not be taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeptError {
    /// The value was taken already, or a ticket for it was dropped.
    #[error("the value is not kept any more: it was taken, or a ticket for it was dropped")]
    Gone,
    /// The process that keeps the value did not answer.
    #[error("the process that keeps the value did not answer")]
    Call(#[from] CallError),
    /// The bytes that arrived cannot be read as the value.
    #[error("the value cannot be read")]
    Unreadable(#[from] CodecError),
}

impl<T> Kept<T> {
    fn new(place: Place<T>) -> Self {
        Self {
            place: Mutex::new(place),
        }
    }

    /// A value that the object store of this process has.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn of_ticket(ticket: Ticket, process: &Arc<Process>) -> Self {
        Self::new(Place::There {
            ticket,
            process: Arc::clone(process),
            is_sent: false,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Place<T>> {
        // Every place is whole.
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: DeserializeOwned> Kept<T> {
    /// Fetches the value directly from the process that keeps it.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # struct Counter(u64);
    /// # impl Actor for Counter { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "u64")]
    /// # struct Add(u64);
    /// # impl Handler<Add> for Counter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
    /// # }
    /// # use ps_runtime::remote::Kept;
    /// let counter = ps_runtime::spawn(|| Counter(0));
    /// let ticket: Kept<u64> = counter.ask_kept(Add(2)).wait()?;
    /// // A driver would send the ticket to another actor here.
    /// let sum = ps_runtime::actor::run(ticket.take())?;
    /// assert_eq!(sum, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// When the value is not kept any more, when its process cannot be reached, or when the value cannot be
    /// read.
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
            tracing::debug!(%error, "a kept value could not be discarded");
        }
    }
}

/// Sends the ticket. If the value is still inside the ticket, it is first put into the object store.
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
    /// Calls the actor, and keeps the result in the actor's process until it is taken with
    /// [`Kept::take`].
    ///
    /// The reply is a ticket for the result. It can be sent on inside a message. The result then goes
    /// directly from the actor's process to the process that takes it, not through this one.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # struct Counter(u64);
    /// # impl Actor for Counter { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "u64")]
    /// # struct Add(u64);
    /// # impl Handler<Add> for Counter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
    /// # }
    /// let counter = ps_runtime::spawn(|| Counter(0));
    /// let ticket = counter.ask_kept(Add(2)).wait()?;
    /// assert_eq!(ps_runtime::actor::run(ticket.take())?, 2);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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

/// The actor that returns the values that a process keeps for others.
pub(crate) struct KeptResults {
    values: Arc<Values>,
}

/// The kept values. They are stored as bytes, so that their numbers can be sent without a copy.
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

/// The object store of one process. It is started when the first value is put into it.
#[derive(Default)]
pub(crate) struct ObjectStore {
    started: OnceLock<(ActorRef<KeptResults>, Arc<Values>)>,
}

impl ObjectStore {
    /// Keeps a value and returns its ticket.
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
                // If two threads get here at the same time, one of the two stores stays.
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
    /// Removes values that no process has taken for `KEPT_FOR`.
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
pub(crate) struct Take(pub(crate) u64);

impl Handler<Take> for KeptResults {
    type Result = Option<Blob>;

    fn handle(&mut self, Take(number): Take, _: &mut Self::Context) -> Self::Result {
        let (_, value) = self.values.lock().remove(&number)?;
        Some(value.into())
    }
}

#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Discard(pub(crate) u64);

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

    /// An actor that can be exported.
    pub(crate) fn store() -> ActorRef<KeptResults> {
        let start = Spawn::new().start(|| KeptResults {
            values: Arc::default(),
        });
        start.expect("the system gives a thread")
    }

    /// A store with so many values, numbered from 0, and how many it has.
    pub(crate) fn store_of(num_values: u64) -> (ActorRef<KeptResults>, impl Fn() -> usize) {
        let values = Arc::new(Values::default());
        let value = codec::encode(&7_u64).unwrap();
        let all = (0..num_values).map(|number| (number, (Instant::now(), value.clone())));
        values.lock().extend(all);
        let kept = Arc::clone(&values);
        let start = Spawn::new().start(move || KeptResults {
            values: Arc::clone(&values),
        });
        let store = start.expect("the system gives a thread");
        (store, move || kept.lock().len())
    }
    use crate::actor::run;
    use crate::net::NetConfig;
    use crate::remote::NodeId;

    fn process() -> Arc<Process> {
        let process = Process::new(NetConfig::default(), None, None, None);
        process.enter(NodeId::DRIVER, 1);
        process
    }

    fn kept(process: &Arc<Process>, value: u64) -> impl Fn() -> Kept<u64> + use<> {
        let ticket = process.keep_result(codec::encode(&value).unwrap()).unwrap();
        let process = Arc::clone(process);
        move || Kept::of_ticket(ticket.clone(), &process)
    }

    /// R-15
    #[test]
    fn a_value_is_taken_once() {
        let ticket = kept(&process(), 7);
        assert_eq!(run(ticket().take()).unwrap(), 7);
        let second = run(ticket().take());
        assert!(matches!(second, Err(KeptError::Gone)), "{second:?}");
    }

    /// R-15
    #[test]
    fn a_value_goes_with_its_ticket_unless_that_was_sent_on() {
        let process = process();
        let ticket = kept(&process, 7);
        let sent = ticket();
        on_behalf_of(&process, || codec::encode(&sent)).unwrap();
        drop(sent);
        assert_eq!(run(ticket().take()).unwrap(), 7, "the receiver has it now");
        let ticket = kept(&process, 8);
        drop(ticket());
        assert!(matches!(run(ticket().take()), Err(KeptError::Gone)));
    }

    /// R-15
    #[test]
    fn what_nobody_comes_for_goes_after_a_while() {
        let process = process();
        let ticket = kept(&process, 7);
        process.sweep_kept(Instant::now());
        assert_eq!(run(ticket().take()).unwrap(), 7);
        let ticket = kept(&process, 8);
        process.sweep_kept(Instant::now() + KEPT_FOR + Duration::from_secs(1));
        assert!(matches!(run(ticket().take()), Err(KeptError::Gone)));
    }
}
