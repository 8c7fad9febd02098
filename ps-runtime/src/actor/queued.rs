//! A call through the queue of an actor of this process.
//!
//! Both the queue and the caller's reply hold the call. An actor that ends fails it without its handler's
//! help.

use std::future::poll_fn;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use actix::dev::MessageResponse;
use actix::{Actor, Context, Handler, Message};
use futures_util::future::LocalBoxFuture;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::book::Book;
use super::call::{Call, Route};
use super::caller_gone::{CallerGone, Entered, Watched};
use super::error::{CallError, NotDelivered, UnknownOutcome};
use super::mailbox::Mailbox;
use crate::deadline::Deadline;

/// Why a call ends without its handler's result.
#[derive(Debug, Clone)]
pub(crate) enum Loss {
    /// The actor panicked while the call was running.
    Panicked(Arc<str>),
    /// The actor ended, possibly because a panic exceeded its restart budget.
    Stopped { panic: Option<Arc<str>> },
    /// The handler dropped its reply channel without a result.
    NoReply,
}

/// Something that is kept until the handler of a call has returned. If the response is ready right
/// after that, it is kept until the response has been passed on, too.
pub(crate) type Held = Box<dyn Send>;

/// Becomes ready when an asynchronous response is ready, or lost.
pub(crate) type InFlight<A> = LocalBoxFuture<'static, Result<(), Arc<dyn QueuedCall<A>>>>;

/// A call as the actor sees it.
pub(crate) trait QueuedCall<A: Actor>: Send + Sync {
    /// Runs the handler, unless the caller has given up; returns the response if it isn't ready.
    fn start(self: Arc<Self>, actor: &mut A, ctx: &mut A::Context) -> Option<InFlight<A>>;

    /// Ends the call without a result, if it is not over.
    fn fail(&self, loss: &Loss);

    /// Whether the caller gave up before the handler began.
    fn is_cancelled(&self) -> bool;
}

/// The route of a call to an actor of this process.
pub(crate) struct Here<A: Actor, M> {
    mailbox: Arc<Mailbox<A>>,
    message: PhantomData<fn(M)>,
}

/// A message, and what the call holds until its handler has returned, or until it is certain that it will
/// not begin.
pub(crate) struct Queued<M> {
    message: M,
    held: Option<Held>,
}

impl<A: Actor, M: Message + Send + 'static> Route for Here<A, M>
where
    M::Result: Send,
{
    type Message = M;
    type Result = M::Result;
    type Waiting = Queued<M>;
    type Outcome = Result<M::Result, CallError>;

    fn book(&self) -> &Book {
        self.mailbox.book()
    }

    fn take_back(&self) -> bool {
        self.mailbox.sweep_cancelled();
        true
    }

    fn undelivered(&self, Queued { message, .. }: Queued<M>, reason: NotDelivered) -> CallError {
        self.book().undelivered(message, reason)
    }

    fn read(&self, outcome: Self::Outcome, _: Option<Deadline>) -> Self::Outcome {
        outcome
    }

    fn loss(&self, outcome: Self::Outcome) -> Option<CallError> {
        outcome.err()
    }
}

impl<A: Actor, M: Message + Send + 'static> Call<Here<A, M>>
where
    M::Result: Send,
{
    /// Makes a call whose slot is taken.
    pub(crate) fn queued(
        mailbox: Arc<Mailbox<A>>,
        message: M,
        told: bool,
        held: Option<Held>,
        deadline: Option<Deadline>,
    ) -> Self {
        let message_type = PhantomData;
        let route = Here {
            mailbox,
            message: message_type,
        };
        Self::new(route, told, deadline, Queued { message, held })
    }

    fn begin_in_time(&self) -> Option<Queued<M>> {
        if let Some(deadline) = self.deadline().filter(Deadline::is_over) {
            let after = deadline.after();
            self.end_queued(NotDelivered::TimedOut { after });
            return None;
        }
        self.begin()
    }

    /// Ends a queued call with an error that holds its message; false if it was not queued.
    fn end_queued(&self, reason: NotDelivered) -> bool {
        let mut unneeded = None;
        let ended = self.settle_waiting(|Queued { message, held }| {
            unneeded = held;
            Err(self.route().book().undelivered(message, reason))
        });
        // Outside the lock.
        drop(unneeded);
        ended
    }
}

impl<A, M> QueuedCall<A> for Call<Here<A, M>>
where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    fn start(self: Arc<Self>, actor: &mut A, ctx: &mut Context<A>) -> Option<InFlight<A>> {
        // `held` is dropped at the end of this function, or when the handler's panic unwinds it.
        let Queued { message, mut held } = self.begin_in_time()?;
        let (reply, mut response) = oneshot::channel();
        {
            let _current = Entered::call(Arc::clone(&self) as _);
            actor.handle(message, ctx).handle(ctx, Some(reply));
        }
        match response.try_recv() {
            Ok(result) => self.settle_running(Ok(result)),
            Err(TryRecvError::Closed) => self.fail(&Loss::NoReply),
            Err(TryRecvError::Empty) => {
                // Outside tokio's cooperative budget: thousands of responses may become ready at once.
                let mut response = tokio::task::unconstrained(response);
                return Some(Box::pin(async move {
                    // A response that needed only the actor is ready now. It is passed on before `held`
                    // is dropped. Any other response may take any time, so `held` is dropped at once.
                    let begun = poll_fn(|cx| Poll::Ready(Pin::new(&mut response).poll(cx))).await;
                    let result = match begun {
                        Poll::Ready(result) => result,
                        Poll::Pending => {
                            held = None;
                            response.await
                        }
                    };
                    let ended = match result {
                        Ok(result) => {
                            self.settle_running(Ok(result));
                            Ok(())
                        }
                        Err(_closed) => Err(self as Arc<dyn QueuedCall<A>>),
                    };
                    drop(held);
                    ended
                }));
            }
        }
        None
    }

    fn fail(&self, loss: &Loss) {
        let actor = Arc::clone(self.route().book().name());
        let error = match loss {
            Loss::Stopped { panic } => {
                let panic = panic.clone();
                if self.end_queued(NotDelivered::Stopped { panic }) {
                    return;
                }
                CallError::Unknown {
                    actor,
                    reason: UnknownOutcome::Stopped,
                }
            }
            Loss::Panicked(panic) => CallError::Failed {
                actor,
                panic: Arc::clone(panic),
            },
            Loss::NoReply => CallError::Unknown {
                actor,
                reason: UnknownOutcome::NoReply,
            },
        };
        self.settle_running(Err(error));
    }

    fn is_cancelled(&self) -> bool {
        self.is_over()
    }
}

impl<A: Actor, M: Message + Send + 'static> Watched for Call<Here<A, M>>
where
    M::Result: Send,
{
    fn watch_caller(&self) -> CallerGone {
        Self::watch_caller(self)
    }
}
