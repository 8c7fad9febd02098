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
use super::book::ActorId;
use super::call::{GiveUp, ReplySlot};
use super::error::{AskError, CallError};
use crate::busy_poll::Awaiting;

/// The result of a call that is under way. Await it, or block on it with [`wait`](Self::wait).
///
/// If it is dropped, or its timeout passes, before the handler has begun, the call is taken back: the
/// handler then never begins. A handler that has begun runs to its end in any case.
///
/// For examples, see [`wait`](Self::wait), [`wait_timeout`](Self::wait_timeout), [`timeout`](Self::timeout) and
/// [`flatten`](Self::flatten). To wait for the first of several replies, see [`Pending`](super::Pending).
#[must_use = "a dropped reply takes its call back; `tell` calls without a reply"]
pub struct Reply<R> {
    state: State<R>,
    timeout: Option<Timeout>,
    awaiting: Awaiting,
}

enum State<R> {
    Waiting(Arc<dyn ReplySlot<R>>),
    /// The call ended before anything waited for it.
    Ready(Result<R, CallError>),
    /// The result has been handed out.
    Over,
}

struct Timeout {
    after: Duration,
    deadline: Instant,
    /// Set at the first poll; blocking waits need no timer. It is outside tokio's cooperative budget:
    /// otherwise thousands of replies in one task would keep waking each other.
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

    /// Fails the call when no result has arrived after this time, counted from now.
    ///
    /// If the handler has not begun, the error is [`CallError::NotDelivered`] and hands the message
    /// back. If it has begun, the error is [`CallError::Unknown`]. If several timeouts are set, the one
    /// that ends first holds. A result that has arrived is returned, even if the caller looks after
    /// the timeout.
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
    /// # impl Handler<Sleep> for Counter {
    /// #     type Result = ();
    /// #     fn handle(&mut self, _: Sleep, _: &mut Context<Self>) {
    /// #         // Stands for work that takes longer than the caller's limit.
    /// #         std::thread::sleep(std::time::Duration::from_millis(200));
    /// #     }
    /// # }
    /// # #[derive(Message)]
    /// # #[rtype(result = "()")]
    /// # struct Sleep;
    /// use std::time::Duration;
    ///
    /// let counter = ps_runtime::spawn(|| Counter(0));
    /// let busy = counter.ask(Sleep);
    /// let late = counter.ask(Add(1)).timeout(Duration::from_millis(10));
    /// // The handler of `Sleep` was still running, so `Add` had not begun.
    /// let error = late.wait().unwrap_err();
    /// assert!(!error.may_have_run());
    /// assert_eq!(error.into_message::<Add>().expect("it is handed back").0, 1);
    /// # busy.wait()?;
    /// # Ok::<(), ps_runtime::CallError>(())
    /// ```
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
    /// It may be called on any thread, inside or outside of asynchronous code. On the thread of the
    /// called actor the wait would never end. Unless the result has already arrived, the call then
    /// fails with the reason `WouldDeadlock`. A ring of *several* actors that wait for each other is not
    /// detected, so actors should await, or set a timeout.
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
    /// let reply = counter.ask(Add(2)); // The call has started.
    /// assert_eq!(reply.wait()?, 2);
    /// # Ok::<(), ps_runtime::CallError>(())
    /// ```
    ///
    /// # Errors
    /// Those of the call itself.
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

    /// Blocks like [`Reply::wait`], but no longer than the timeout. It is short for `timeout` and `wait`.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use std::sync::mpsc;
    /// # struct Waiter;
    /// # impl Actor for Waiter { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "u64")]
    /// # struct Until(mpsc::Receiver<u64>);
    /// # impl Handler<Until> for Waiter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Until(told): Until, _: &mut Context<Self>) -> u64 { told.recv().unwrap_or(0) }
    /// # }
    /// use std::time::Duration;
    ///
    /// let waiter = ps_runtime::spawn(|| Waiter);
    /// let (sender, receiver) = mpsc::channel();
    /// // The handler of `Until` returns what the channel brings.
    /// let reply = waiter.ask(Until(receiver));
    /// sender.send(7)?;
    /// assert_eq!(reply.wait_timeout(Duration::from_secs(60))?, 7);
    ///
    /// let (sender, receiver) = mpsc::channel();
    /// let late = waiter.ask(Until(receiver)).wait_timeout(Duration::from_millis(10));
    /// assert!(late.is_err()); // Nothing was sent in time.
    /// # drop(sender);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// Those of the call itself, and those of [`Reply::timeout`].
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
    /// Joins the two errors of such a call into one: the error of the call itself, and the error that the
    /// actor answers with. One `?` is then enough.
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

/// A [`Reply`] to a message whose result is a `Result`, with one error type; see [`Reply::flatten`].
#[must_use = "a dropped reply takes its call back; `tell` calls without a reply"]
pub struct FlatReply<T, E>(Reply<Result<T, E>>);

impl<T, E> FlatReply<T, E> {
    /// The same as [`Reply::timeout`].
    pub fn timeout(self, after: Duration) -> Self {
        Self(self.0.timeout(after))
    }

    /// The same as [`Reply::wait`], with one error.
    ///
    /// # Errors
    /// [`AskError::Call`] when the call fails, [`AskError::Actor`] when the actor answers with an error.
    pub fn wait(self) -> Result<T, AskError<E>> {
        flat(self.0.wait())
    }

    /// The same as [`Reply::wait_timeout`], with one error.
    ///
    /// # Errors
    /// Those of [`wait`](Self::wait) and of [`Reply::timeout`].
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
