//! One call, from its message to its outcome. It is the same for an actor of this process and of another one.
//!
//! One allocation holds the message and later the outcome. The caller's reply shares it with the side that
//! answers, so either side can end the call first. A caller that gives up takes the message back while the
//! handler has not begun. The code that ends a call also gives its slot back, before the caller can see the
//! outcome.
//!
//! What differs is the [`Route`]: `queued` is the one through the queue of an actor of this process, and
//! `remote::call` is the one over a connection.

use std::any::type_name;
use std::mem;
use std::sync::{Arc, PoisonError};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use super::book::{ActorId, Book};
use super::caller_gone::{CallerGone, Watchers};
use super::error::{CallError, NotDelivered, UnknownOutcome};
use crate::deadline::Deadline;
use crate::sync::{Mutex, MutexGuard};

/// Why the caller no longer waits.
#[derive(Debug, Clone, Copy)]
pub(crate) enum GiveUp {
    TimedOut(Duration),
    WouldDeadlock,
}

/// A call as the caller sees it.
pub(crate) trait ReplySlot<R>: Send + Sync {
    fn target(&self) -> ActorId;

    fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<Result<R, CallError>>;

    /// Ends the caller's interest; returns the result if it has arrived after all.
    fn give_up(&self, why: GiveUp) -> Result<R, CallError>;

    /// Ends the caller's interest without an answer.
    fn abandon(&self);
}

/// How a call reaches its actor, and how its outcome comes back.
pub(crate) trait Route: Send + Sync {
    type Message: 'static;
    type Result;
    /// What is kept until the handler begins, or until it is known what became of the call.
    type Waiting: Send;
    type Outcome: Send;

    fn book(&self) -> &Book;

    /// Keeps a call from being run, because its caller has given up. False if it may run all the same.
    fn take_back(&self) -> bool;

    /// Makes an error that hands the message back.
    fn undelivered(&self, waiting: Self::Waiting, reason: NotDelivered) -> CallError;

    /// Reads an outcome. `deadline` is the caller's time limit.
    fn read(
        &self,
        outcome: Self::Outcome,
        deadline: Option<Deadline>,
    ) -> Result<Self::Result, CallError>;

    /// Returns the error in an outcome that nobody waits for.
    fn loss(&self, outcome: Self::Outcome) -> Option<CallError>;
}

pub(crate) struct Call<R: Route> {
    route: R,
    /// The call was made with `tell`: nobody waits for the reply, and a loss is a dead letter.
    told: bool,
    /// The handler does not begin after this time.
    deadline: Option<Deadline>,
    state: Mutex<State<R>>,
}

struct State<R: Route> {
    stage: Stage<R>,
    waker: Option<Waker>,
}

enum Stage<R: Route> {
    /// The handler has not begun, as far as this process knows.
    Waiting(R::Waiting),
    /// The handler is running in this process.
    Running {
        /// False when nobody will read the result.
        wanted: bool,
        /// The futures that wait for the caller to give up.
        watchers: Watchers,
    },
    Settled(R::Outcome),
    /// Given up before it began, or its outcome has been read.
    Over,
}

/// What a caller leaves behind when it gives up.
enum Left<R: Route> {
    /// The handler never begins.
    Untouched(R::Waiting),
    /// The handler may have begun.
    Begun,
    Settled(R::Outcome),
}

impl<R: Route> Call<R> {
    /// Makes a call that has its slot. The handler does not begin after `deadline`, even if nobody polls the
    /// reply.
    pub(crate) fn new(
        route: R,
        told: bool,
        deadline: Option<Deadline>,
        waiting: R::Waiting,
    ) -> Self {
        Self {
            route,
            told,
            deadline,
            state: Mutex::new(State {
                stage: Stage::Waiting(waiting),
                waker: None,
            }),
        }
    }

    pub(crate) fn route(&self) -> &R {
        &self.route
    }

    pub(crate) fn deadline(&self) -> Option<Deadline> {
        self.deadline
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        // No code of the user runs under the lock, so a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the call was given up before its handler began, or its outcome has been read.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.lock().stage, Stage::Over)
    }

    /// Takes out what waits, because the handler begins.
    pub(crate) fn begin(&self) -> Option<R::Waiting> {
        let running = Stage::Running {
            wanted: !self.told,
            watchers: Watchers::default(),
        };
        let (waiting, state) = self.leave_waiting(running)?;
        drop(state);
        Some(waiting)
    }

    /// Takes back a call that has not been queued.
    pub(crate) fn reject(&self, reason: NotDelivered) -> CallError {
        let unqueued = self.leave_waiting(Stage::Over);
        let (waiting, state) = unqueued.expect("a call outside the queue has not begun");
        drop(state);
        self.route.book().release_slot();
        self.route.undelivered(waiting, reason)
    }

    /// Moves on from `Waiting`, and keeps the lock.
    fn leave_waiting(&self, next: Stage<R>) -> Option<(R::Waiting, MutexGuard<'_, State<R>>)> {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Waiting(_)) {
            return None;
        }
        match mem::replace(&mut state.stage, next) {
            Stage::Waiting(waiting) => Some((waiting, state)),
            _ => unreachable!("the stage was checked under the same lock"),
        }
    }

    /// Ends a call whose handler has not begun here. `outcome` runs under the lock. Returns false, without
    /// running it, if the call is past that.
    pub(crate) fn settle_waiting(&self, outcome: impl FnOnce(R::Waiting) -> R::Outcome) -> bool {
        let Some((waiting, state)) = self.leave_waiting(Stage::Over) else {
            return false;
        };
        let outcome = outcome(waiting);
        self.settle(state, !self.told, outcome);
        true
    }

    /// Ends a call whose handler runs here.
    pub(crate) fn settle_running(&self, outcome: R::Outcome) {
        let mut state = self.lock();
        if !matches!(state.stage, Stage::Running { .. }) {
            // Failed from outside while the handler was running.
            drop(state);
            drop(outcome);
            return;
        }
        let Stage::Running { wanted, watchers } = mem::replace(&mut state.stage, Stage::Over)
        else {
            unreachable!("the stage was checked under the same lock");
        };
        self.settle(state, wanted, outcome);
        drop(watchers);
    }

    /// The stage is `Over` already.
    fn settle(&self, mut state: MutexGuard<'_, State<R>>, wanted: bool, outcome: R::Outcome) {
        self.route.book().release_slot();
        if wanted {
            state.stage = Stage::Settled(outcome);
            let waker = state.waker.take();
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            return;
        }
        drop(state);
        if self.told
            && let Some(error) = self.route.loss(outcome)
        {
            let message = type_name::<R::Message>();
            self.route.book().count_dead_letter(message, &error);
        }
    }

    /// Ends the caller's interest.
    fn leave(&self) -> Left<R> {
        let mut state = self.lock();
        // The waker may own this call, so it is dropped outside the lock.
        let waker = state.waker.take();
        match mem::replace(&mut state.stage, Stage::Over) {
            Stage::Waiting(waiting) => {
                drop(state);
                drop(waker);
                let never_begins = self.route.take_back();
                self.route.book().release_slot();
                match never_begins {
                    true => Left::Untouched(waiting),
                    false => Left::Begun,
                }
            }
            Stage::Running { watchers, .. } => {
                state.stage = Stage::Running {
                    wanted: false,
                    watchers: Watchers::default(),
                };
                drop(state);
                drop(waker);
                watchers.tell();
                Left::Begun
            }
            Stage::Settled(outcome) => Left::Settled(outcome),
            Stage::Over => Left::Begun,
        }
    }

    /// Returns a future that is ready when nobody waits for the outcome.
    pub(super) fn watch_caller(&self) -> CallerGone {
        let mut state = self.lock();
        match &mut state.stage {
            Stage::Running {
                wanted: true,
                watchers,
            } => watchers.add(),
            Stage::Running { wanted: false, .. } if !self.told => CallerGone::already(),
            // Made with `tell`, or failed from outside.
            _ => CallerGone::never(),
        }
    }
}

impl<R: Route> ReplySlot<R::Result> for Call<R> {
    fn target(&self) -> ActorId {
        self.route.book().id()
    }

    fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<Result<R::Result, CallError>> {
        let mut state = self.lock();
        if matches!(state.stage, Stage::Settled(_)) {
            let Stage::Settled(outcome) = mem::replace(&mut state.stage, Stage::Over) else {
                unreachable!("the stage was checked under the same lock");
            };
            drop(state);
            return Poll::Ready(self.route.read(outcome, self.deadline));
        }
        // A call that was given up produces nothing more: a waker kept here would stay for ever.
        if matches!(
            state.stage,
            Stage::Waiting(_) | Stage::Running { wanted: true, .. }
        ) {
            match &mut state.waker {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
        }
        Poll::Pending
    }

    fn give_up(&self, why: GiveUp) -> Result<R::Result, CallError> {
        let (not_delivered, unknown) = match why {
            GiveUp::TimedOut(after) => (
                NotDelivered::TimedOut { after },
                UnknownOutcome::TimedOut { after },
            ),
            GiveUp::WouldDeadlock => (NotDelivered::WouldDeadlock, UnknownOutcome::WouldDeadlock),
        };
        match self.leave() {
            Left::Untouched(waiting) => Err(self.route.undelivered(waiting, not_delivered)),
            Left::Settled(outcome) => self.route.read(outcome, self.deadline),
            Left::Begun => Err(CallError::Unknown {
                actor: Arc::clone(self.route.book().name()),
                reason: unknown,
            }),
        }
    }

    fn abandon(&self) {
        drop(self.leave());
    }
}
