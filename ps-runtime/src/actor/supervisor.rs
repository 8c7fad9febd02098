//! The loop around an actor's context: builds the actor, catches its panics, restarts it.
//!
//! All code of the actor runs inside a poll of its context: handlers, timers, streams, asynchronous
//! responses, hooks. A panic in any of them unwinds to this loop and no further. The queue and the
//! replies are kept outside the context, so a restart goes on with them.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Instant;

use actix::dev::ContextFut;
use actix::{Actor, ActorContext, AsyncContext, Context};

use super::mailbox::{Mailbox, Phase};
use super::pump::{Pump, Replies};
use super::queued::Loss;
use super::spawn::RestartPolicy;

/// Runs an actor from its first start to its end.
pub(crate) struct Supervisor<A: Actor<Context = Context<A>>, F> {
    mailbox: Arc<Mailbox<A>>,
    factory: F,
    budget: RestartBudget,
    replies: Rc<Replies<A>>,
    running: Option<ContextFut<A, Context<A>>>,
}

impl<A, F> Supervisor<A, F>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A,
{
    pub(crate) fn new(mailbox: Arc<Mailbox<A>>, factory: F, policy: RestartPolicy) -> Self {
        Self {
            replies: Rc::new(Replies::new(Arc::clone(&mailbox))),
            mailbox,
            factory,
            budget: RestartBudget::new(policy),
            running: None,
        }
    }

    /// Runs the actor until it waits (`Pending`) or has stopped (`Ready`); `Err` is a panic.
    fn advance(&mut self, cx: &mut TaskContext<'_>) -> Result<Poll<()>, Box<dyn Any + Send>> {
        catch_unwind(AssertUnwindSafe(|| {
            let running = match &mut self.running {
                Some(running) => running,
                none => {
                    let actor = (self.factory)();
                    let mut ctx = Context::new();
                    ctx.spawn(Pump::new(
                        Arc::clone(&self.mailbox),
                        Rc::clone(&self.replies),
                    ));
                    none.insert(ctx.into_future(actor))
                }
            };
            Pin::new(running).poll(cx)
        }))
    }

    /// Drops the actor and its context without running its `stopping` and `stopped` hooks.
    fn discard(&mut self) {
        if let Some(mut running) = self.running.take() {
            // Without this, the context's destructor would poll the actor once more.
            running.ctx().terminate();
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(running))) {
                let panic = panic_text(panic);
                tracing::error!(actor = %self.mailbox.name(), %panic, "actor panicked while it was dropped");
            }
        }
    }

    /// Cleans up after a panic; returns whether the actor may start again.
    fn recover(&mut self, cx: &mut TaskContext<'_>, panic: Box<dyn Any + Send>) -> bool {
        let actor = self.mailbox.name();
        let (panic, may_restart): (Arc<str>, bool) = match panic.downcast::<NotMade>() {
            // The error reaches the process that asked for the actor, so it is not logged here.
            Ok(why) => (why.0.into(), false),
            Err(panic) => {
                let panic = panic_text(panic);
                let may_restart = self.budget.allows(Instant::now());
                tracing::error!(%actor, %panic, may_restart, "actor panicked");
                (panic.into(), may_restart)
            }
        };
        self.discard();
        // The caller's view of the actor changes before its call fails.
        if may_restart {
            self.mailbox.count_restart();
        } else {
            self.mailbox.give_up_after(&panic);
        }
        let loss = Loss::Panicked(panic);
        if let Some(call) = self.mailbox.take_current() {
            call.fail(&loss);
        }
        // Responses that lived in the context are lost with it; those on tasks of their own go on.
        self.replies.poll(cx, &loss);
        may_restart
    }
}

impl<A, F> Future for Supervisor<A, F>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A,
{
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.mailbox.register(cx.waker());
        loop {
            if this.mailbox.phase() == Phase::Killed {
                this.discard();
                return Poll::Ready(());
            }
            match this.advance(cx) {
                Ok(outcome) => {
                    let progress = this.replies.poll(cx, &Loss::NoReply);
                    if outcome.is_ready() {
                        this.discard();
                        return Poll::Ready(());
                    }
                    if !(progress && this.mailbox.phase() == Phase::Closing) {
                        return Poll::Pending;
                    }
                    // The pump waits for the last replies before it stops the actor.
                }
                Err(panic) => {
                    if !this.recover(cx, panic) {
                        return Poll::Ready(());
                    }
                }
            }
        }
    }
}

// The factory is called through a plain reference, never pinned.
impl<A: Actor<Context = Context<A>>, F> Unpin for Supervisor<A, F> {}

impl<A: Actor<Context = Context<A>>, F> Drop for Supervisor<A, F> {
    fn drop(&mut self) {
        if let Some(running) = &mut self.running {
            running.ctx().terminate();
        }
    }
}

/// The payload with which a factory unwinds if it cannot make the actor at all. It is not logged as a
/// panic, and the factory is not called again.
pub(crate) struct NotMade(pub(crate) String);

/// Counts restarts within the policy's window.
struct RestartBudget {
    policy: RestartPolicy,
    restarts: VecDeque<Instant>,
}

impl RestartBudget {
    fn new(policy: RestartPolicy) -> Self {
        Self {
            policy,
            restarts: VecDeque::new(),
        }
    }

    fn allows(&mut self, now: Instant) -> bool {
        while let Some(oldest) = self.restarts.front()
            && now.duration_since(*oldest) >= self.policy.within
        {
            self.restarts.pop_front();
        }
        let allowed = self.restarts.len() < self.policy.max_restarts as usize;
        if allowed {
            self.restarts.push_back(now);
        }
        allowed
    }
}

/// The text of a panic, as the default hook would print it.
fn panic_text(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => match panic.downcast_ref::<&'static str>() {
            Some(text) => (*text).to_owned(),
            None => "(a panic without text)".to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn restarts_are_forgotten_after_the_window() {
        let mut budget = RestartBudget::new(RestartPolicy {
            max_restarts: 2,
            within: Duration::from_secs(10),
        });
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(budget.allows(at(0)));
        assert!(budget.allows(at(5)));
        assert!(!budget.allows(at(9)));
        assert!(
            budget.allows(at(10)),
            "the restart at 0 s has left the window"
        );
        assert!(!budget.allows(at(14)));
        assert!(budget.allows(at(15)));
    }

    #[test]
    fn no_restart_is_allowed_without_a_budget() {
        assert!(!RestartBudget::new(RestartPolicy::NEVER).allows(Instant::now()));
    }

    #[test]
    fn panic_payloads_of_any_type_have_a_text() {
        assert_eq!(panic_text(Box::new("literal")), "literal");
        assert_eq!(panic_text(Box::new(format!("value {}", 3))), "value 3");
        assert_eq!(panic_text(Box::new(3_u8)), "(a panic without text)");
    }
}
