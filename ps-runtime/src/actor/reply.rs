//! The caller's side of one call.

use std::fmt;
use std::mem;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::task::coop::{Unconstrained, unconstrained};
use tokio::time::Sleep;

use super::background;
use super::call::{GiveUp, ReplySlot};
use super::error::{AskError, CallError};
use super::mailbox::ActorId;
use crate::busy_poll::Awaiting;

/// The result of a call that is under way: a future, or something to block on.
///
/// Dropping it, or letting its timeout pass, before the handler has begun takes the call back: the
/// handler then never begins. A handler that has begun goes on to its end in any case.
#[must_use = "a dropped reply takes its call back; `tell` calls without a reply"]
pub struct Reply<R> {
    state: State<R>,
    timeout: Option<Timeout>,
    awaiting: Awaiting,
}

enum State<R> {
    Waiting(Arc<dyn ReplySlot<R>>),
    /// Over before anyone waited.
    Ready(Result<R, CallError>),
    /// The result has been handed out.
    Over,
}

struct Timeout {
    after: Duration,
    deadline: Instant,
    /// Set at the first poll; blocking waits need no timer. Outside tokio's budget, or thousands
    /// of replies in one task would keep waking each other.
    timer: Option<Pin<Box<Unconstrained<Sleep>>>>,
}

impl<R> Reply<R> {
    pub(crate) fn started(call: Result<Arc<impl ReplySlot<R> + 'static>, CallError>) -> Self {
        Self::begun(call.map(|slot| slot as _))
    }

    pub(crate) fn begun(call: Result<Arc<dyn ReplySlot<R>>, CallError>) -> Self {
        let state = match call {
            Ok(slot) => State::Waiting(slot),
            Err(error) => State::Ready(Err(error)),
        };
        Self {
            state,
            timeout: None,
            awaiting: Awaiting::default(),
        }
    }

    /// Fails the call when no result has come after this time, counted from now.
    ///
    /// The error says whether the handler had begun: if not, the message comes back in
    /// [`CallError::NotDelivered`]; else it is [`CallError::Unknown`]. Of several timeouts the one
    /// that ends first holds. A result that is there counts, however late it is looked at.
    pub fn timeout(mut self, after: Duration) -> Self {
        // A deadline beyond the end of time is none.
        if let Some(deadline) = Instant::now().checked_add(after)
            && self
                .timeout
                .as_ref()
                .is_none_or(|old| deadline < old.deadline)
        {
            self.timeout = Some(Timeout {
                after,
                deadline,
                timer: None,
            });
        }
        self
    }

    /// Blocks this thread until the call is over; Ray's `get`.
    ///
    /// May be called on any thread, inside or outside of asynchronous code. On the thread of the
    /// called actor the call could never end: unless its result is there, it fails with
    /// `WouldDeadlock` as reason. A ring of *several* actors that wait for each other is not
    /// detected, so actors should await, or set a timeout.
    ///
    /// # Errors
    /// As the call itself.
    pub fn wait(mut self) -> Result<R, CallError> {
        if self.would_deadlock() {
            return self.give_up(GiveUp::WouldDeadlock);
        }
        let deadline = self.timeout.as_ref().map(|timeout| timeout.deadline);
        match background::block_on(Untimed(&mut self), deadline) {
            Some(result) => result,
            None => {
                let after = self.timeout.as_ref().map_or(Duration::ZERO, |t| t.after);
                self.give_up(GiveUp::TimedOut(after))
            }
        }
    }

    /// Blocks as [`Reply::wait`], no longer than the timeout; short for `timeout` and `wait`.
    ///
    /// # Errors
    /// As the call itself, and as [`Reply::timeout`].
    pub fn wait_timeout(self, timeout: Duration) -> Result<R, CallError> {
        self.timeout(timeout).wait()
    }

    /// The actor that was called, while the call is under way.
    pub(crate) fn target(&self) -> Option<ActorId> {
        match &self.state {
            State::Waiting(slot) => Some(slot.target()),
            State::Ready(_) | State::Over => None,
        }
    }

    /// Whether a blocking wait on this thread would keep the handler from running.
    pub(crate) fn would_deadlock(&self) -> bool {
        self.target()
            .is_some_and(|target| background::current_actor() == Some(target))
    }

    /// Ends a call that would deadlock; the reply is then ready.
    pub(crate) fn refuse_to_block(&mut self) {
        let result = self.give_up(GiveUp::WouldDeadlock);
        self.state = State::Ready(result);
    }

    fn give_up(&mut self, why: GiveUp) -> Result<R, CallError> {
        match mem::replace(&mut self.state, State::Over) {
            State::Waiting(slot) => slot.give_up(why),
            State::Ready(result) => result,
            State::Over => unreachable!("{POLLED_AGAIN}"),
        }
    }

    fn poll_untimed(&mut self, cx: &mut Context<'_>) -> Poll<Result<R, CallError>> {
        if let State::Waiting(slot) = &self.state {
            let polled = slot.poll(cx);
            if polled.is_ready() {
                self.state = State::Over;
            }
            return polled;
        }
        match mem::replace(&mut self.state, State::Over) {
            State::Ready(result) => Poll::Ready(result),
            _ => unreachable!("{POLLED_AGAIN}"),
        }
    }
}

impl<T, E> Reply<Result<T, E>> {
    /// Folds the two errors of such a call, its own and the one that the actor answers with, into one, so that
    /// one `?` is enough.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::{actor::AskError, spawn};
    /// # struct Divider;
    /// # impl Actor for Divider { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "Result<u64, std::num::TryFromIntError>")]
    /// # struct Narrow(i64);
    /// # impl Handler<Narrow> for Divider {
    /// #     type Result = Result<u64, std::num::TryFromIntError>;
    /// #     fn handle(&mut self, Narrow(number): Narrow, _: &mut Context<Self>) -> Self::Result {
    /// #         number.try_into()
    /// #     }
    /// # }
    /// # let actor = spawn(|| Divider);
    /// assert_eq!(actor.ask(Narrow(7)).flatten().wait()?, 7);
    /// let error = actor.ask(Narrow(-7)).flatten().wait().unwrap_err();
    /// assert!(matches!(error, AskError::Actor(_)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn flatten(self) -> FlatReply<T, E> {
        FlatReply(self)
    }
}

/// A [`Reply`] to a message whose result is a `Result`, with one error; see [`Reply::flatten`].
#[must_use = "a dropped reply takes its call back; `tell` calls without a reply"]
pub struct FlatReply<T, E>(Reply<Result<T, E>>);

impl<T, E> FlatReply<T, E> {
    /// As [`Reply::timeout`].
    pub fn timeout(self, after: Duration) -> Self {
        Self(self.0.timeout(after))
    }

    /// As [`Reply::wait`].
    ///
    /// # Errors
    /// As the call itself, and as the actor answers.
    pub fn wait(self) -> Result<T, AskError<E>> {
        flat(self.0.wait())
    }

    /// As [`Reply::wait_timeout`].
    ///
    /// # Errors
    /// As [`wait`](Self::wait), and as [`Reply::timeout`].
    pub fn wait_timeout(self, timeout: Duration) -> Result<T, AskError<E>> {
        self.timeout(timeout).wait()
    }
}

impl<T, E> Future for FlatReply<T, E> {
    type Output = Result<T, AskError<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(flat)
    }
}

impl<T, E> fmt::Debug for FlatReply<T, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("FlatReply").field(&self.0).finish()
    }
}

fn flat<T, E>(result: Result<Result<T, E>, CallError>) -> Result<T, AskError<E>> {
    result.map_err(AskError::Call)?.map_err(AskError::Actor)
}

const POLLED_AGAIN: &str = "a Reply must not be polled again after it was ready";

impl<R> Future for Reply<R> {
    type Output = Result<R, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        if let Poll::Ready(result) = this.poll_untimed(cx) {
            this.awaiting.is_over();
            return Poll::Ready(result);
        }
        this.awaiting.stay_awake(cx);
        let Some(timeout) = &mut this.timeout else {
            return Poll::Pending;
        };
        let deadline = timeout.deadline;
        let timer = timeout
            .timer
            .get_or_insert_with(|| Box::pin(unconstrained(background::sleep_until(deadline))));
        if timer.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        let after = timeout.after;
        Poll::Ready(this.give_up(GiveUp::TimedOut(after)))
    }
}

/// A reply without its timer, for a thread that keeps time itself.
struct Untimed<'a, R>(&'a mut Reply<R>);

impl<R> Future for Untimed<'_, R> {
    type Output = Result<R, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll_untimed(cx)
    }
}

// Nothing in a reply is pinned in place: the result comes by value, the timer has its own box.
impl<R> Unpin for Reply<R> {}

impl<R> Drop for Reply<R> {
    fn drop(&mut self) {
        if let State::Waiting(slot) = &self.state {
            slot.abandon();
        }
    }
}

impl<R> fmt::Debug for Reply<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.state {
            State::Waiting(_) => "waiting",
            State::Ready(_) => "ready",
            State::Over => "over",
        };
        f.debug_struct("Reply")
            .field("state", &state)
            .field("timeout", &self.timeout.as_ref().map(|t| t.after))
            .finish()
    }
}
