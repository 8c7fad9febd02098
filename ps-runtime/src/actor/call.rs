//! The stages of one call: queued with its message, running, done with its result.
//!
//! One allocation holds message and result. The queue and the caller's reply share it, so either
//! side can end the call first. A caller that gives up takes the message back while it is queued.
//! An actor that ends fails the call without its handler's help. The code that moves the call out
//! of `Queued` or `Running` also gives its slot back, before the caller can see the result.

use std::any::type_name;
use std::future::poll_fn;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use actix::dev::MessageResponse;
use actix::{Actor, Context, Handler, Message};
use futures_util::future::LocalBoxFuture;
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::book::ActorId;
use super::caller_gone::{CallerGone, Entered, Watched, Watchers};
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

/// Why the caller no longer waits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GiveUp {
    TimedOut(Duration),
    WouldDeadlock,
}

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

/// A call as the caller sees it. Calls to other processes implement it, too.
pub(crate) trait ReplySlot<R>: Send + Sync {
    fn target(&self) -> ActorId;

    fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<Result<R, CallError>>;

    /// Ends the caller's interest; returns the result if it is there after all.
    fn give_up(&self, why: GiveUp) -> Result<R, CallError>;

    /// Ends the caller's interest without an answer.
    fn abandon(&self);
}

pub(crate) struct Call<A: Actor, M: Message> {
    mailbox: Arc<Mailbox<A>>,
    /// The call was made with `tell`: nobody waits for the reply, and a loss is a dead letter.
    told: bool,
    /// The handler does not begin after this time.
    deadline: Option<Deadline>,
    state: Mutex<State<M>>,
}

struct State<M: Message> {
    stage: Stage<M>,
    waker: Option<Waker>,
    held: Option<Held>,
    /// The futures that wait for the caller to give up. Only a running call has any.
    watchers: Watchers,
}

enum Stage<M: Message> {
    Queued(M),
    /// `wanted` is false when nobody will read the result.
    Running {
        wanted: bool,
    },
    Done(Result<M::Result, CallError>),
    /// Given up before it began, or its result has been read.
    Over,
}

impl<A: Actor, M: Message + Send + 'static> Call<A, M> {
    pub(crate) fn new(mailbox: Arc<Mailbox<A>>, message: M, told: bool) -> Self {
        Self {
            mailbox,
            told,
            deadline: None,
            state: Mutex::new(State {
                stage: Stage::Queued(message),
                waker: None,
                held: None,
                watchers: Watchers::default(),
            }),
        }
    }

    /// Keeps `held` until the handler has returned, or until it is certain that it will not begin.
    pub(crate) fn holding(mut self, held: Option<Held>) -> Self {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.held = held;
        self
    }

    /// Keeps the handler from beginning after `deadline`, even if nobody polls the reply.
    pub(crate) fn due(mut self, deadline: Option<Deadline>) -> Self {
        self.deadline = deadline;
        self
    }

    fn lock(&self) -> MutexGuard<'_, State<M>> {
        // No code of the user runs under the lock, so a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the message out and gives the slot back, if the handler has not begun.
    fn take_message(&self) -> Option<M> {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Queued(_)) {
            return None;
        }
        let Stage::Queued(message) = mem::replace(&mut state.stage, Stage::Over) else {
            unreachable!("the stage was checked under the same lock");
        };
        // The waker may own this call, so it is dropped outside the lock.
        let unneeded = (state.held.take(), state.waker.take());
        drop(state);
        drop(unneeded);
        self.mailbox.book().release_slot();
        Some(message)
    }

    /// Takes back a call that did not get into the queue.
    pub(crate) fn reject(&self, reason: NotDelivered) -> CallError {
        let message = self
            .take_message()
            .expect("a call outside the queue has not begun");
        self.mailbox.book().undelivered(message, reason)
    }

    fn begin(&self) -> Option<(M, Option<Held>)> {
        if let Some(deadline) = self.deadline.filter(Deadline::is_over) {
            let after = deadline.after();
            self.end_queued(NotDelivered::TimedOut { after });
            return None;
        }
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Queued(_)) {
            return None;
        }
        let running = Stage::Running { wanted: !self.told };
        match mem::replace(&mut state.stage, running) {
            Stage::Queued(message) => Some((message, state.held.take())),
            _ => unreachable!("the stage was checked under the same lock"),
        }
    }

    fn end(&self, result: Result<M::Result, CallError>) {
        let mut state = self.lock();
        let Stage::Running { wanted } = state.stage else {
            // Failed from outside while the handler was running.
            drop(state);
            drop(result);
            return;
        };
        self.mailbox.book().release_slot();
        let watchers = mem::take(&mut state.watchers);
        if wanted {
            state.stage = Stage::Done(result);
            let waker = state.waker.take();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        } else {
            state.stage = Stage::Over;
            drop(state);
            if let (true, Err(error)) = (self.told, &result) {
                self.mailbox
                    .book()
                    .count_dead_letter(type_name::<M>(), error);
            }
        }
        drop(watchers);
    }

    /// Ends a queued call with an error that holds its message; false if it was not queued.
    fn end_queued(&self, reason: NotDelivered) -> bool {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Queued(_)) {
            return false;
        }
        let Stage::Queued(message) = mem::replace(&mut state.stage, Stage::Over) else {
            unreachable!("the stage was checked under the same lock");
        };
        let held = state.held.take();
        let error = self.mailbox.book().undelivered(message, reason);
        self.mailbox.book().release_slot();
        if self.told {
            drop(state);
            self.mailbox
                .book()
                .count_dead_letter(type_name::<M>(), &error);
        } else {
            state.stage = Stage::Done(Err(error));
            let waker = state.waker.take();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
        }
        drop(held);
        true
    }
}

impl<A, M> QueuedCall<A> for Call<A, M>
where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message + Send + 'static,
    M::Result: Send,
{
    fn start(self: Arc<Self>, actor: &mut A, ctx: &mut Context<A>) -> Option<InFlight<A>> {
        // `held` is dropped at the end of this function, or when the handler's panic unwinds it.
        let (message, mut held) = self.begin()?;
        let (reply, mut response) = oneshot::channel();
        {
            let _current = Entered::call(Arc::clone(&self) as _);
            actor.handle(message, ctx).handle(ctx, Some(reply));
        }
        match response.try_recv() {
            Ok(result) => self.end(Ok(result)),
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
                            self.end(Ok(result));
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
        let actor = Arc::clone(self.mailbox.name());
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
        self.end(Err(error));
    }

    fn is_cancelled(&self) -> bool {
        matches!(self.lock().stage, Stage::Over)
    }
}

impl<A, M> ReplySlot<M::Result> for Call<A, M>
where
    A: Actor,
    M: Message + Send + 'static,
    M::Result: Send,
{
    fn target(&self) -> ActorId {
        self.mailbox.id()
    }

    fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<Result<M::Result, CallError>> {
        let mut state = self.lock();
        if matches!(state.stage, Stage::Done(_)) {
            let Stage::Done(result) = mem::replace(&mut state.stage, Stage::Over) else {
                unreachable!("the stage was checked under the same lock");
            };
            return Poll::Ready(result);
        }
        // A call that was given up produces nothing more: a waker kept here would stay for ever.
        if matches!(
            state.stage,
            Stage::Queued(_) | Stage::Running { wanted: true }
        ) {
            match &mut state.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
        }
        Poll::Pending
    }

    fn give_up(&self, why: GiveUp) -> Result<M::Result, CallError> {
        if let Some(message) = self.take_message() {
            self.mailbox.sweep_cancelled();
            let reason = match why {
                GiveUp::TimedOut(after) => NotDelivered::TimedOut { after },
                GiveUp::WouldDeadlock => NotDelivered::WouldDeadlock,
            };
            return Err(self.mailbox.book().undelivered(message, reason));
        }
        let mut state = self.lock();
        match mem::replace(&mut state.stage, Stage::Over) {
            Stage::Done(result) => return result,
            Stage::Running { .. } => state.stage = Stage::Running { wanted: false },
            Stage::Queued(_) | Stage::Over => {}
        }
        let (waker, watchers) = (state.waker.take(), mem::take(&mut state.watchers));
        drop(state);
        drop(waker);
        watchers.tell();
        Err(CallError::Unknown {
            actor: Arc::clone(self.mailbox.name()),
            reason: match why {
                GiveUp::TimedOut(after) => UnknownOutcome::TimedOut { after },
                GiveUp::WouldDeadlock => UnknownOutcome::WouldDeadlock,
            },
        })
    }

    fn abandon(&self) {
        if let Some(message) = self.take_message() {
            self.mailbox.sweep_cancelled();
            drop(message);
            return;
        }
        let mut state = self.lock();
        let unread = match &mut state.stage {
            Stage::Running { wanted } => {
                *wanted = false;
                None
            }
            stage => Some(mem::replace(stage, Stage::Over)),
        };
        let (waker, watchers) = (state.waker.take(), mem::take(&mut state.watchers));
        drop(state);
        drop((unread, waker));
        watchers.tell();
    }
}

impl<A: Actor, M: Message + Send + 'static> Watched for Call<A, M> {
    fn watch_caller(&self) -> CallerGone {
        let mut state = self.lock();
        match state.stage {
            Stage::Running { wanted: true } => state.watchers.add(),
            Stage::Running { wanted: false } if !self.told => CallerGone::already(),
            // Made with `tell`, or failed from outside.
            _ => CallerGone::never(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use actix::ResponseFuture;

    use super::*;
    use crate::actor::{ActorRef, spawn};

    /// Answers when its channel says so.
    struct Gate;

    impl Actor for Gate {
        type Context = Context<Self>;
    }

    #[derive(Message)]
    #[rtype(result = "()")]
    struct Later(oneshot::Receiver<()>);

    impl Handler<Later> for Gate {
        type Result = ResponseFuture<()>;

        fn handle(&mut self, Later(open): Later, _: &mut Context<Self>) -> Self::Result {
            Box::pin(async move { open.await.unwrap_or(()) })
        }
    }

    #[derive(Message)]
    #[rtype(result = "()")]
    struct Block(mpsc::Receiver<()>);

    impl Handler<Block> for Gate {
        type Result = ();

        fn handle(&mut self, Block(open): Block, _: &mut Context<Self>) {
            let _ = open.recv();
        }
    }

    /// Says on its channel when it is dropped.
    struct Witness(mpsc::Sender<()>);

    impl Drop for Witness {
        fn drop(&mut self) {
            let _ = self.0.send(());
        }
    }

    fn held() -> (Option<Held>, mpsc::Receiver<()>) {
        let (sender, dropped) = mpsc::channel();
        (Some(Box::new(Witness(sender))), dropped)
    }

    /// Blocks the actor until the returned sender is dropped.
    fn block(gate: &ActorRef<Gate>) -> mpsc::Sender<()> {
        let (open, blocked) = mpsc::channel();
        gate.tell(Block(blocked)).unwrap();
        open
    }

    #[test]
    fn what_a_call_holds_is_kept_until_its_handler_has_returned_but_not_for_its_response() {
        let gate = spawn(|| Gate);
        let blocked = block(&gate);
        let (held, dropped) = held();
        let (open, later) = oneshot::channel();
        let call = gate.mailbox_here().push_with(Later(later), held, None);
        let call = call.unwrap();
        assert_eq!(dropped.try_recv(), Err(mpsc::TryRecvError::Empty));
        drop(blocked);
        dropped.recv().unwrap();
        // The response is still under way.
        assert_eq!(gate.pending(), 1);
        drop(open);
        crate::actor::background::block_on(std::future::poll_fn(|cx| call.poll(cx)), None)
            .unwrap()
            .unwrap();
    }

    #[test]
    fn what_a_call_holds_goes_with_a_call_that_never_begins() {
        let gate = spawn(|| Gate);
        let _blocked = block(&gate);
        let (first, first_dropped) = held();
        let (second, second_dropped) = held();
        let push = |held| {
            let (_, never) = mpsc::channel();
            let call = gate.mailbox_here().push_with(Block(never), held, None);
            call.unwrap()
        };
        let taken_back = push(first);
        let _killed = push(second);
        taken_back.abandon();
        first_dropped.recv().unwrap();
        assert_eq!(second_dropped.try_recv(), Err(mpsc::TryRecvError::Empty));
        gate.kill();
        second_dropped.recv().unwrap();
    }

    /// A waker that closes its channel when its last clone is dropped.
    fn wakes_nobody() -> (Waker, mpsc::Receiver<()>) {
        struct Nobody(#[expect(dead_code, reason = "kept for its end")] Witness);

        impl std::task::Wake for Nobody {
            fn wake(self: Arc<Self>) {}
        }

        let (sender, dropped) = mpsc::channel();
        (Waker::from(Arc::new(Nobody(Witness(sender)))), dropped)
    }

    /// The waker of a remote call owns the call, and the connection that it came on.
    #[test]
    fn a_call_that_was_given_up_lets_go_of_its_waker() {
        let gate = spawn(|| Gate);
        let blocked = block(&gate);
        let push = || {
            let (open, later) = oneshot::channel();
            let call = gate.mailbox_here().push_with(Later(later), None, None);
            (call.expect("there is room"), open)
        };
        let is_forgotten = |call: &Call<Gate, Later>, end: fn(&Call<Gate, Later>)| {
            let (waker, dropped) = wakes_nobody();
            assert!(call.poll(&mut TaskContext::from_waker(&waker)).is_pending());
            end(call);
            // A later poll does not keep its waker either.
            assert!(call.poll(&mut TaskContext::from_waker(&waker)).is_pending());
            drop(waker);
            assert_eq!(dropped.try_recv(), Ok(()));
        };
        let abandon: fn(&Call<Gate, Later>) = |call| call.abandon();
        let give_up: fn(&Call<Gate, Later>) = |call| {
            assert!(call.give_up(GiveUp::TimedOut(Duration::ZERO)).is_err());
        };
        let calls: Vec<_> = std::iter::repeat_with(push).take(4).collect();
        is_forgotten(&calls[0].0, abandon);
        is_forgotten(&calls[1].0, give_up);
        drop(blocked);
        // The others are running when a call behind them has run.
        let (open, later) = oneshot::channel();
        open.send(()).expect("the other end is here");
        gate.ask(Later(later)).wait().expect("it is answered");
        is_forgotten(&calls[2].0, abandon);
        is_forgotten(&calls[3].0, give_up);
    }
}
