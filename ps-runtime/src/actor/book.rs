//! The book that this process keeps of an actor, here or in another process: who it is, how many calls to it
//! are under way, and which messages to it were lost.
//!
//! A call takes a slot before it is queued or sent, and gives it back when it is over. So the slots bound
//! queued and running calls together. A slot is a number, not a guard: a call that ends gives its slot back
//! before its caller can see the outcome and make the next call.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::TryAcquireError;

use super::error::{CallError, NotDelivered, Undelivered};
use crate::sync::Semaphore;

/// Identifies an actor within this process. A number is never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ActorId(u64);

impl ActorId {
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    pub(crate) fn number(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ActorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

static DEAD_LETTERS: AtomicU64 = AtomicU64::new(0);

/// Returns how many messages sent with `tell` this process has lost after it had queued them.
///
/// A message is lost when its actor stops before the handler begins, or panics while the handler runs.
/// Each loss is also logged as a warning.
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
/// // The actor ends before it has handled anything.
/// let (before, of_actor) = (ps_runtime::actor::dead_letters(), counter.dead_letters());
/// # struct Hold(std::sync::mpsc::Receiver<()>);
/// # impl Message for Hold { type Result = (); }
/// # impl Handler<Hold> for Counter {
/// #     type Result = ();
/// #     fn handle(&mut self, Hold(until): Hold, _: &mut Context<Self>) { let _ = until.recv(); }
/// # }
/// # let (go_on, until) = std::sync::mpsc::channel();
/// # let busy = counter.ask(Hold(until));
/// counter.tell(Add(1))?;
/// counter.kill();
/// # drop(go_on);
/// # let _ = busy.wait();
/// assert_eq!(counter.dead_letters(), of_actor + 1);
/// assert!(ps_runtime::actor::dead_letters() > before);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn dead_letters() -> u64 {
    DEAD_LETTERS.load(Ordering::Relaxed)
}

pub(crate) struct Book {
    id: ActorId,
    name: Arc<str>,
    limit: usize,
    slots: Semaphore,
    dead_letters: AtomicU64,
}

impl Book {
    /// Opens the book of an actor that has at most `limit` calls at a time.
    pub(crate) fn new(id: ActorId, name: Arc<str>, limit: usize) -> Self {
        Self {
            id,
            name,
            limit,
            slots: Semaphore::new(limit),
            dead_letters: AtomicU64::new(0),
        }
    }

    pub(crate) fn id(&self) -> ActorId {
        self.id
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// How many calls there can be at a time.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// How many slots are taken.
    pub(crate) fn pending(&self) -> usize {
        self.limit.saturating_sub(self.slots.available_permits())
    }

    /// Takes a slot for a call with this message, if one is free. `stopped` says why there are no more.
    pub(crate) fn take_slot<M: Send + 'static>(
        &self,
        message: M,
        stopped: impl FnOnce() -> NotDelivered,
    ) -> Result<M, CallError> {
        let reason = match self.slots.try_acquire() {
            Ok(slot) => {
                slot.forget();
                return Ok(message);
            }
            Err(TryAcquireError::NoPermits) => NotDelivered::QueueFull { limit: self.limit },
            Err(TryAcquireError::Closed) => stopped(),
        };
        Err(self.undelivered(message, reason))
    }

    /// Waits for a slot, in the order of arrival, and takes it. False if there are no more.
    pub(crate) async fn wait_for_slot(&self) -> bool {
        let slot = self.slots.acquire().await;
        slot.map(|slot| slot.forget()).is_ok()
    }

    /// Gives back the slot of a call that is over.
    pub(crate) fn release_slot(&self) {
        self.slots.add_permits(1);
    }

    /// Gives out no more slots. Those who wait for one are told.
    pub(crate) fn close(&self) {
        self.slots.close();
    }

    /// Makes an error that hands the message back.
    pub(crate) fn undelivered<M: Send + 'static>(
        &self,
        message: M,
        reason: NotDelivered,
    ) -> CallError {
        CallError::NotDelivered {
            actor: Arc::clone(&self.name),
            reason,
            message: Undelivered::new(message),
        }
    }

    pub(crate) fn dead_letters(&self) -> u64 {
        self.dead_letters.load(Ordering::Relaxed)
    }

    /// Counts and logs the loss of a message that was sent with `tell`.
    pub(crate) fn count_dead_letter(&self, message: &'static str, error: &CallError) {
        self.dead_letters.fetch_add(1, Ordering::Relaxed);
        DEAD_LETTERS.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(actor = &*self.name, message, %error, "a message sent with tell was lost");
    }
}
