//! One actor's queue and its phase. References and supervisor share it.
//!
//! Locks are taken in the order queue, then call. No message or result is dropped under either lock: it may
//! own a reference whose drop locks this same queue.

use std::collections::{HashMap, VecDeque};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};

use actix::{Actor, Context, Handler, Message};
use tokio::sync::watch;

use super::book::{ActorId, Book};
use super::call::Call;
use super::error::{CallError, NotDelivered};
use super::queued::{Held, Here, Loss, QueuedCall};
use crate::deadline::Deadline;
use crate::sync::{AtomicWaker, Mutex, MutexGuard};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Takes calls.
    Open,
    /// Takes no more calls, but runs those that are queued.
    Closing,
    /// Runs no more calls.
    Killed,
    /// The actor has ended.
    Ended,
}

/// What the pump does next.
pub(crate) enum Next<A: Actor> {
    Call(Arc<dyn QueuedCall<A>>),
    /// Wait until woken.
    Nothing,
    /// The queue is closed and empty.
    Drained,
}

pub(crate) struct Mailbox<A: Actor> {
    book: Book,
    queue: Mutex<Queue<A>>,
    supervisor: AtomicWaker,
    restarts: AtomicU32,
    ended: watch::Sender<bool>,
}

struct Queue<A: Actor> {
    phase: Phase,
    queued: VecDeque<Arc<dyn QueuedCall<A>>>,
    /// How many queued calls were given up by their callers since the queue was last swept. Some of them
    /// may have left the queue since.
    cancelled: usize,
    /// The call that the pump took last. It may be over already.
    current: Option<Arc<dyn QueuedCall<A>>>,
    /// Calls whose handler returned a response that is not ready.
    in_flight: HashMap<u64, Arc<dyn QueuedCall<A>>>,
    last_panic: Option<Arc<str>>,
}

impl<A: Actor> Mailbox<A> {
    pub(crate) fn new(id: ActorId, name: Arc<str>, max_pending: usize) -> Self {
        Self {
            book: Book::new(id, name, max_pending),
            queue: Mutex::new(Queue {
                phase: Phase::Open,
                queued: VecDeque::new(),
                cancelled: 0,
                current: None,
                in_flight: HashMap::new(),
                last_panic: None,
            }),
            supervisor: AtomicWaker::new(),
            restarts: AtomicU32::new(0),
            ended: watch::Sender::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue<A>> {
        // No code of the user runs under the lock, so a poisoned queue is whole.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn book(&self) -> &Book {
        &self.book
    }

    pub(crate) fn id(&self) -> ActorId {
        self.book.id()
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        self.book.name()
    }

    pub(crate) fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Acquire)
    }

    pub(crate) fn phase(&self) -> Phase {
        self.lock().phase
    }

    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    pub(crate) fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }
}

/// The caller's side.
impl<A: Actor<Context = Context<A>>> Mailbox<A> {
    /// Queues a call if a slot is free.
    pub(crate) fn push<M>(
        self: &Arc<Self>,
        message: M,
        told: bool,
    ) -> Result<Arc<Call<Here<A, M>>>, CallError>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let message = self.book.take_slot(message, || self.stopped())?;
        self.push_into_slot(Call::queued(Arc::clone(self), message, told, None, None))
    }

    /// Queues a call if a slot is free, with a value that it holds and with its deadline. `held` is
    /// dropped when the handler has returned, or when it is certain that the handler will not begin.
    pub(crate) fn push_with<M>(
        self: &Arc<Self>,
        message: M,
        held: Option<Held>,
        deadline: Option<Deadline>,
    ) -> Result<Arc<Call<Here<A, M>>>, CallError>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let message = self.book.take_slot(message, || self.stopped())?;
        let call = Call::queued(Arc::clone(self), message, false, held, deadline);
        self.push_into_slot(call)
    }

    /// Waits for a slot, in the order of arrival, and queues a call.
    pub(crate) async fn push_when_ready<M>(
        self: &Arc<Self>,
        message: M,
    ) -> Result<Arc<Call<Here<A, M>>>, CallError>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        if !self.book.wait_for_slot().await {
            return Err(self.book.undelivered(message, self.stopped()));
        }
        self.push_into_slot(Call::queued(Arc::clone(self), message, false, None, None))
    }

    fn push_into_slot<M>(&self, call: Call<Here<A, M>>) -> Result<Arc<Call<Here<A, M>>>, CallError>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let call = Arc::new(call);
        let mut queue = self.lock();
        if queue.phase != Phase::Open {
            drop(queue);
            return Err(call.reject(self.stopped()));
        }
        queue.queued.push_back(Arc::clone(&call) as _);
        drop(queue);
        self.supervisor.wake();
        Ok(call)
    }
}

impl<A: Actor> Mailbox<A> {
    fn stopped(&self) -> NotDelivered {
        NotDelivered::Stopped {
            panic: self.lock().last_panic.clone(),
        }
    }

    #[cfg(test)]
    pub(super) fn num_queued(&self) -> usize {
        self.lock().queued.len()
    }

    /// Counts a queued call that was given up, and removes such calls when they are half of the queue.
    /// Otherwise callers that time out and try again would fill the queue of an actor that is stuck.
    pub(crate) fn sweep_cancelled(&self) {
        let mut queue = self.lock();
        queue.cancelled += 1;
        if queue.cancelled * 2 > queue.queued.len() {
            queue.queued.retain(|call| !call.is_cancelled());
            queue.cancelled = 0;
        }
    }

    /// Takes no more calls, and lets the actor end when the queued and running calls are done.
    pub(crate) fn close(&self) {
        let mut queue = self.lock();
        if queue.phase == Phase::Open {
            queue.phase = Phase::Closing;
            drop(queue);
            self.book.close();
            self.supervisor.wake();
        }
    }

    /// Fails all queued calls and lets the actor end when its running handler returns.
    pub(crate) fn kill(&self) {
        let queued = {
            let mut queue = self.lock();
            if queue.phase != Phase::Ended {
                queue.phase = Phase::Killed;
            }
            mem::take(&mut queue.queued)
        };
        self.book.close();
        self.fail_all(queued);
        self.supervisor.wake();
    }

    /// Like `kill`, but also fails running calls, for an actor whose handler may never return.
    pub(crate) fn abandon(&self) {
        self.kill();
        self.fail_running();
    }

    fn fail_running(&self) {
        let (current, in_flight) = {
            let mut queue = self.lock();
            (queue.current.take(), mem::take(&mut queue.in_flight))
        };
        self.fail_all(current.into_iter().chain(in_flight.into_values()));
    }

    fn fail_all(&self, calls: impl IntoIterator<Item = Arc<dyn QueuedCall<A>>>) {
        let panic = self.lock().last_panic.clone();
        let loss = Loss::Stopped { panic };
        for call in calls {
            // `fail` may drop a message whose destructor panics. The other calls must still be failed.
            if catch_unwind(AssertUnwindSafe(|| call.fail(&loss))).is_err() {
                tracing::error!(actor = %self.name(), "a message panicked while it was dropped");
            }
        }
    }
}

/// The supervisor's side.
impl<A: Actor> Mailbox<A> {
    /// Asks for a wake-up at the next push, close or kill.
    pub(crate) fn register(&self, waker: &std::task::Waker) {
        self.supervisor.register(waker);
    }

    pub(crate) fn next(&self) -> Next<A> {
        let mut queue = self.lock();
        let next = match queue.phase {
            Phase::Killed | Phase::Ended => return Next::Nothing,
            Phase::Open | Phase::Closing => queue.queued.pop_front(),
        };
        let previous = mem::replace(&mut queue.current, next.clone());
        let phase = queue.phase;
        drop(queue);
        drop(previous);
        match next {
            Some(call) => Next::Call(call),
            None if phase == Phase::Closing => Next::Drained,
            None => Next::Nothing,
        }
    }

    /// Moves the current call to the calls whose response is not ready.
    pub(crate) fn set_in_flight(&self, key: u64) {
        let mut queue = self.lock();
        if let Some(call) = queue.current.take() {
            queue.in_flight.insert(key, call);
        }
    }

    pub(crate) fn remove_in_flight(&self, key: u64) {
        let call = self.lock().in_flight.remove(&key);
        drop(call);
    }

    pub(crate) fn take_current(&self) -> Option<Arc<dyn QueuedCall<A>>> {
        self.lock().current.take()
    }

    pub(crate) fn count_restart(&self) {
        self.restarts.fetch_add(1, Ordering::Release);
    }

    /// Takes no more calls, because this panic exceeded the restart budget.
    pub(crate) fn give_up_after(&self, panic: &Arc<str>) {
        self.lock().last_panic = Some(Arc::clone(panic));
        self.kill();
    }

    /// Fails the calls that are left. Called when the actor has ended.
    pub(crate) fn finish(&self) {
        self.kill();
        self.fail_running();
        self.lock().phase = Phase::Ended;
        self.ended.send_replace(true);
    }
}
