//! An actor of another process, with the connection to it that all its calls share.
//!
//! There is one connection per actor. It keeps the calls in order without numbering them. It lets a small
//! call to one actor pass a large call to another. And it tells the other process that references to the
//! actor exist. It is opened at the first use, and again when it was lost, as long as this process holds
//! a reference. When it is lost, calls of which nothing was written wait for the next connection. All
//! other calls end as `Unknown`.

use std::any::type_name;
use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use actix::{Actor, Message};
use tokio::sync::{Semaphore, watch};

use super::call::{Called, Lost, RemoteCall, There};
use super::kept::Kept;
use super::process::Process;
use super::reference::{Wire, on_behalf_of};
use super::table::{Codec, Decode, Table, keeping};
use crate::actor::book::{ActorId, Book};
use crate::actor::call::Call;
use crate::actor::error::error_chain;
use crate::actor::mailbox::Phase;
use crate::actor::port::How;
use crate::actor::registry::AnyMailbox;
use crate::actor::{NotDelivered, UnknownOutcome};
use crate::codec::CodecError;
use crate::deadline::Deadline;
use crate::net::frame::{self, Kind, OutFrame};
use crate::net::outbox::Outbox;
use crate::net::threads;

mod connecting;
#[cfg(test)]
mod fuzz;

use connecting::{connect, seek};

/// An actor of another process. All references to it in this process share this value.
pub(crate) struct RemoteActor {
    /// Calls to it never block the thread they are made on.
    book: Book,
    wire: Wire,
    process: Arc<Process>,
    state: Mutex<State>,
    /// Whether it has ended, or could not be reached for one process lease.
    gone: watch::Sender<bool>,
    /// How many numbers its process accepts in one message, as that process said last. Before it has said
    /// so, all messages are queued, and checked when the connection is open.
    max_numbers: AtomicU64,
}

struct State {
    link: Link,
    next_call: u64,
    calls: HashMap<u64, Arc<dyn RemoteCall>>,
    /// The frames that wait for a connection, in the order of the calls.
    unsent: VecDeque<OutFrame>,
    num_handles: usize,
    /// No reference is left, so the connection ends when the last call is over.
    is_released: bool,
    /// There was a connection.
    was_reached: bool,
    /// A task waits for the time to connect again.
    is_sought: bool,
}

enum Link {
    /// Not connected, and no task tries to connect.
    Down,
    Connecting,
    Up(Arc<Outbox>),
    Ended,
}

impl RemoteActor {
    pub(crate) fn new(process: Arc<Process>, wire: Wire) -> Arc<Self> {
        let max_pending = (wire.max_pending as usize).clamp(1, Semaphore::MAX_PERMITS);
        Arc::new(Self {
            book: Book::new(ActorId::next(), Arc::clone(&wire.name), max_pending),
            max_numbers: u64::MAX.into(),
            wire,
            process,
            state: Mutex::new(State {
                link: Link::Down,
                next_call: 1,
                calls: HashMap::new(),
                unsent: VecDeque::new(),
                num_handles: 0,
                is_released: false,
                was_reached: false,
                is_sought: false,
            }),
            gone: watch::Sender::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code of the user runs under the lock, so a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        self.book.name()
    }

    pub(crate) fn wire(&self) -> &Wire {
        &self.wire
    }

    /// Waits until the actor has ended, or could not be reached for one process lease.
    pub(crate) async fn gone(&self) {
        // The sender lives as long as `self`.
        let _ = self.gone.subscribe().wait_for(|gone| *gone).await;
    }

    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.lock().link, Link::Ended)
    }

    /// Calls the actor.
    pub(super) fn call<A: Actor, M: Message + Send + 'static>(
        self: &Arc<Self>,
        table: &Table<A>,
        message: M,
        how: How,
    ) -> Called<M, M::Result>
    where
        M::Result: Send,
    {
        let (kind, deadline) = match how {
            How::Ask(deadline) => (Kind::Ask, deadline),
            How::Tell => (Kind::Tell, None),
            How::InSlot => (Kind::Ask, None),
        };
        let message = match how {
            How::InSlot => message,
            How::Ask(_) | How::Tell => self.book.take_slot(message, || self.stopped())?,
        };
        self.call_in_slot(table, message, deadline, |code, codec| {
            (kind, code, codec.decode)
        })
    }

    /// Calls the actor, and gets a ticket for the result.
    pub(super) fn call_kept<A: Actor, M: Message + Send + 'static>(
        self: &Arc<Self>,
        table: &Table<A>,
        message: M,
    ) -> Called<M, Kept<M::Result>>
    where
        M::Result: Send,
    {
        let message = self.book.take_slot(message, || self.stopped())?;
        self.call_in_slot(table, message, None, |code, codec| {
            (Kind::Ask, keeping(code), codec.decode_kept)
        })
    }

    /// Makes a call whose slot is taken. `how` turns the message's code and codec into the kind and code of
    /// the frame and the function that reads the reply.
    fn call_in_slot<A: Actor, M: Message + Send + 'static, R: Send + 'static>(
        self: &Arc<Self>,
        table: &Table<A>,
        message: M,
        deadline: Option<Deadline>,
        how: impl FnOnce(u32, Codec<M>) -> (Kind, u32, Decode<R>),
    ) -> Called<M, R> {
        let refuse = |message, reason| {
            self.book.release_slot();
            Err(self.book.undelivered(message, reason))
        };
        let Some((code, codec)) = table.codec::<M>() else {
            let (message_type, actor_type) = (type_name::<M>(), type_name::<A>());
            let reason = NotDelivered::NotRegistered {
                message: message_type.to_owned(),
                actor_type: actor_type.to_owned(),
            };
            return refuse(message, reason);
        };
        let encoded = on_behalf_of(&self.process, || (codec.encode)(&message));
        let encoded = match encoded {
            Ok(encoded) => encoded,
            Err(error @ CodecError::TooLong { .. }) => {
                let reason = error.to_string();
                return refuse(message, NotDelivered::TooLarge { reason });
            }
            Err(error) => {
                let reason = error_chain(&error);
                return refuse(message, NotDelivered::Encode { reason });
            }
        };
        let max_numbers = self.max_numbers.load(Ordering::Relaxed);
        if let Err(error) = frame::check(&encoded, max_numbers) {
            let reason = error.to_string();
            return refuse(message, NotDelivered::TooLarge { reason });
        }
        let (kind, code, decode) = how(code, codec);
        let mut frame = OutFrame::new(kind, 0, code, encoded).due(deadline);
        let mut state = self.lock();
        if let Link::Ended = state.link {
            drop(state);
            return refuse(message, self.stopped());
        }
        let number = state.next_call;
        state.next_call += 1;
        frame.set_call(number);
        let told = kind == Kind::Tell;
        let route = There::new(Arc::clone(self), number, decode);
        let call = Arc::new(Call::new(route, told, deadline, message));
        state.calls.insert(number, Arc::clone(&call) as _);
        self.send(&mut state, frame);
        Ok(call)
    }

    /// Sends a frame now, or on the next connection.
    fn send(self: &Arc<Self>, state: &mut State, frame: OutFrame) {
        let unsent = match &state.link {
            Link::Up(outbox) => outbox.send(frame).err(),
            Link::Down | Link::Connecting => Some(frame),
            Link::Ended => None,
        };
        state.unsent.extend(unsent);
        self.connect(state);
    }

    /// Starts to connect, unless a task already does.
    fn connect(self: &Arc<Self>, state: &mut State) {
        if let Link::Down = state.link {
            state.link = Link::Connecting;
            threads::next().spawn(connect(Arc::clone(self)));
        }
    }

    /// Opens the connection before the first call, so that the actor is not given up meanwhile.
    pub(crate) fn hold(self: &Arc<Self>) {
        let mut state = self.lock();
        self.connect(&mut state);
    }

    /// Stops or kills the actor. The signal waits for a connection if there is none.
    pub(crate) fn signal(self: &Arc<Self>, kind: Kind) {
        let mut state = self.lock();
        let frame = OutFrame::signal(kind, 0);
        self.send(&mut state, frame);
    }

    /// Counts one more reference. Returns `false` if the last one was dropped and the connection is about
    /// to end.
    pub(crate) fn claim(&self) -> bool {
        let mut state = self.lock();
        if state.is_released && state.calls.is_empty() {
            return false;
        }
        state.is_released = false;
        state.num_handles += 1;
        true
    }

    /// Counts one reference less. After the last one, the actor's process is told.
    pub(crate) fn release(&self) {
        let mut state = self.lock();
        state.num_handles -= 1;
        state.is_released = state.num_handles == 0;
        self.finish_if_released(&state);
    }

    fn finish_if_released(&self, state: &State) {
        if let (true, true, Link::Up(outbox)) =
            (state.is_released, state.calls.is_empty(), &state.link)
        {
            let _ = outbox.send(OutFrame::signal(Kind::Release, 0));
            outbox.finish();
        }
    }

    pub(super) fn process(&self) -> &Arc<Process> {
        &self.process
    }

    fn stopped(&self) -> NotDelivered {
        NotDelivered::Stopped { panic: None }
    }

    /// Ends calls without a reply.
    fn lose(
        &self,
        calls: impl IntoIterator<Item = Arc<dyn RemoteCall>>,
        reason: impl Fn() -> Lost,
    ) {
        for call in calls {
            call.lost(reason());
        }
    }

    /// Gives up: the actor's process cannot be reached. The next call tries again. If it `may_help`, this
    /// process also tries again by itself from time to time, so that the actor's process learns that there
    /// are still references.
    fn give_up(self: &Arc<Self>, why: Arc<str>, may_help: bool) {
        let (calls, unsent) = {
            let mut state = self.lock();
            state.link = Link::Down;
            if may_help && !mem::replace(&mut state.is_sought, true) {
                let pause = self.process.config().process_lease / 2;
                threads::next().spawn(seek(Arc::downgrade(self), pause));
            }
            (mem::take(&mut state.calls), mem::take(&mut state.unsent))
        };
        drop(unsent);
        self.gone.send_replace(true);
        self.lose(calls.into_values(), || {
            let reason = why.to_string();
            Lost::NotDelivered(NotDelivered::Unreachable { reason })
        });
    }

    /// Ends the connection to a process that was declared lost. Returns whether there was one.
    pub(super) fn sever(self: &Arc<Self>, why: &Arc<str>) -> bool {
        let outbox = match &self.lock().link {
            Link::Up(outbox) => Arc::clone(outbox),
            Link::Down | Link::Connecting | Link::Ended => return false,
        };
        self.disconnected(&outbox, why);
        true
    }

    /// The actor has ended for good. Of the calls that were sent, it took those up to `last_taken`.
    fn end(&self, why: Arc<str>, last_taken: u64) {
        tracing::debug!(actor = %self.name(), %why, "an actor of another process has ended");
        let (calls, unsent) = {
            let mut state = self.lock();
            state.link = Link::Ended;
            (mem::take(&mut state.calls), mem::take(&mut state.unsent))
        };
        self.book.close();
        self.gone.send_replace(true);
        drop(unsent);
        let (taken, not_taken): (HashMap<_, _>, HashMap<_, _>) = calls
            .into_iter()
            .partition(|(number, _)| *number <= last_taken);
        self.lose(not_taken.into_values(), || {
            Lost::NotDelivered(self.stopped())
        });
        self.lose(taken.into_values(), || {
            Lost::Unknown(UnknownOutcome::Stopped)
        });
    }

    /// The connection is lost. Calls that were written on it have an unknown outcome.
    fn disconnected(self: &Arc<Self>, outbox: &Arc<Outbox>, why: &Arc<str>) {
        let unwritten = outbox.close(why);
        let mut state = self.lock();
        let is_current = matches!(&state.link, Link::Up(current) if Arc::ptr_eq(current, outbox));
        if !is_current {
            return;
        }
        state.link = Link::Down;
        // Those in `unsent` came later than those that the outbox had.
        let later = mem::take(&mut state.unsent);
        state.unsent = unwritten
            .into_iter()
            .filter(OutFrame::must_arrive)
            .chain(later)
            .collect();
        let kept: HashSet<u64> = state.unsent.iter().map(OutFrame::call).collect();
        let (kept, lost): (HashMap<_, _>, HashMap<_, _>) = mem::take(&mut state.calls)
            .into_iter()
            .partition(|(number, _)| kept.contains(number));
        state.calls = kept;
        // A `stop` or `kill` must still arrive after the last reference was dropped.
        if !state.is_released || !state.calls.is_empty() || !state.unsent.is_empty() {
            self.connect(&mut state);
        }
        drop(state);
        self.lose(lost.into_values(), || {
            let reason = why.to_string();
            Lost::Unknown(UnknownOutcome::ConnectionLost { reason })
        });
    }

    fn forget(&self, call: u64) -> Option<Arc<dyn RemoteCall>> {
        let mut state = self.lock();
        let call = state.calls.remove(&call);
        self.finish_if_released(&state);
        call
    }

    /// Takes a call back if nothing of it was written. Otherwise tells the actor's process that nobody waits
    /// for its reply.
    pub(super) fn cancel(&self, call: u64) -> bool {
        let mut state = self.lock();
        let place = state
            .unsent
            .iter()
            .position(|frame| frame.call() == call && frame.is_call());
        let taken = match (place, &state.link) {
            (Some(place), _) => state.unsent.remove(place),
            (None, Link::Up(outbox)) => outbox.take_back(call),
            (None, _) => None,
        };
        if taken.is_none()
            && let Link::Up(outbox) = &state.link
        {
            let _ = outbox.send(OutFrame::signal(Kind::Cancel, call));
        }
        let forgotten = state.calls.remove(&call);
        self.finish_if_released(&state);
        drop(state);
        drop(forgotten);
        taken.is_some()
    }
}

impl AnyMailbox for RemoteActor {
    fn id(&self) -> ActorId {
        self.book.id()
    }

    fn name(&self) -> &str {
        self.book.name()
    }

    fn phase(&self) -> Phase {
        match self.has_ended() {
            true => Phase::Ended,
            false => Phase::Open,
        }
    }

    fn request_stop(self: Arc<Self>) {
        self.signal(Kind::Stop);
    }

    fn leave_behind(self: Arc<Self>) {
        self.signal(Kind::Kill);
        let calls = mem::take(&mut self.lock().calls);
        self.lose(calls.into_values(), || {
            Lost::Unknown(UnknownOutcome::Stopped)
        });
    }

    fn has_ended(&self) -> bool {
        *self.gone.borrow()
    }

    fn ended(&self) -> watch::Receiver<bool> {
        self.gone.subscribe()
    }
}
