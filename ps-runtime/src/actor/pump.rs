//! The future inside an actor's context that takes calls from the queue and runs their handlers.
//!
//! It is an item of the actix context, like a timer or a stream, and is paused like them: while
//! `ctx.wait` or an `AtomicResponse` is under way, no handler begins. When the pause is over, the
//! context polls all its items again, so the pump needs no wake-up of its own.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use actix::fut::ActorFuture;
use actix::{Actor, ActorContext, AsyncContext, Context};
use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};

use super::mailbox::{Mailbox, Next};
use super::queued::{InFlight, Loss, QueuedCall};
use crate::busy_poll::BusyPoll;

/// How many calls run before timers, streams and other items of the actor are polled.
const BATCH: usize = 64;

/// After how many calls in a row that came one at a time the actor busy-polls for the next one. If
/// several calls come at a time, it is better to sleep until there are more.
const MIN_SINGLE: u32 = 32;

/// The calls whose response is not ready. It outlives the actor's context.
pub(crate) struct Replies<A: Actor> {
    mailbox: Arc<Mailbox<A>>,
    waiting: RefCell<FuturesUnordered<LocalBoxFuture<'static, Finished<A>>>>,
    next_key: Cell<u64>,
}

type Finished<A> = (u64, Result<(), Arc<dyn QueuedCall<A>>>);

impl<A: Actor> Replies<A> {
    pub(crate) fn new(mailbox: Arc<Mailbox<A>>) -> Self {
        Self {
            mailbox,
            waiting: RefCell::new(FuturesUnordered::new()),
            next_key: Cell::new(0),
        }
    }

    fn insert(&self, response: InFlight<A>) {
        let key = self.next_key.get();
        self.next_key.set(key + 1);
        self.mailbox.set_in_flight(key);
        self.waiting
            .borrow()
            .push(Box::pin(async move { (key, response.await) }));
    }

    fn is_empty(&self) -> bool {
        self.waiting.borrow().is_empty()
    }

    /// Completes the calls whose response is ready. Calls whose response is lost fail with `loss`.
    ///
    /// Returns whether any call ended.
    pub(crate) fn poll(&self, cx: &mut TaskContext<'_>, loss: &Loss) -> bool {
        let mut progress = false;
        let mut waiting = self.waiting.borrow_mut();
        while let Poll::Ready(Some((key, outcome))) = waiting.poll_next_unpin(cx) {
            progress = true;
            self.mailbox.remove_in_flight(key);
            if let Err(call) = outcome {
                call.fail(loss);
            }
        }
        progress
    }
}

pub(crate) struct Pump<A: Actor> {
    mailbox: Arc<Mailbox<A>>,
    replies: Rc<Replies<A>>,
    has_asked_to_stop: bool,
    /// How many times in a row exactly one call was waiting.
    num_single: u32,
    /// Set while the actor busy-polls for the next call.
    busy_polling: Option<BusyPoll>,
}

impl<A: Actor> Pump<A> {
    pub(crate) fn new(mailbox: Arc<Mailbox<A>>, replies: Rc<Replies<A>>) -> Self {
        Self {
            mailbox,
            replies,
            has_asked_to_stop: false,
            num_single: 0,
            busy_polling: None,
        }
    }
}

impl<A: Actor<Context = Context<A>>> ActorFuture<A> for Pump<A> {
    type Output = ();

    fn poll(
        self: Pin<&mut Self>,
        actor: &mut A,
        ctx: &mut Context<A>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<()> {
        let this = self.get_mut();
        for num_begun in 0..BATCH {
            if ctx.waiting() {
                return Poll::Pending;
            }
            match this.mailbox.next() {
                Next::Call(call) => {
                    this.num_single = match num_begun {
                        0 => this.num_single.saturating_add(1),
                        _ => 0,
                    };
                    this.busy_polling = (this.num_single >= MIN_SINGLE).then(BusyPoll::begin);
                    if let Some(response) = call.start(actor, ctx) {
                        this.replies.insert(response);
                    }
                }
                Next::Nothing => {
                    if this.busy_polling.as_ref().is_some_and(BusyPoll::goes_on) {
                        cx.waker().wake_by_ref();
                    } else {
                        this.busy_polling = None;
                    }
                    return Poll::Pending;
                }
                Next::Drained => {
                    // Only once: an actor whose `stopping` hook refuses goes on until it stops
                    // itself or is killed.
                    if this.replies.is_empty() && !this.has_asked_to_stop {
                        this.has_asked_to_stop = true;
                        ctx.stop();
                    }
                    return Poll::Pending;
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
