//! Ends actors within a time limit, whatever their handlers do.

use std::any::Any;
use std::fmt;
use std::future::{pending, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::future::{BoxFuture, Either, join_all, select};

use super::background;
use super::error::StillRunning;
use super::registry::{self, AnyMailbox};

/// Stops all actors of this process gracefully, at the same time, within a time limit.
///
/// The stop begins at once. Await the returned future, or block on it with [`Shutdown::wait`]. Actors
/// that are spawned later are not included. [`ActorRef::shutdown`](super::ActorRef::shutdown) says what
/// happens when the time is over.
///
/// ```standalone_crate
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
/// use std::time::Duration;
///
/// use ps_runtime::{shutdown_all, spawn};
///
/// let counters: Vec<_> = (0..3).map(|_| spawn(|| Counter(0))).collect();
/// let replies: Vec<_> = counters.iter().map(|counter| counter.ask(Add(1))).collect();
/// shutdown_all(Duration::from_secs(10)).wait()?;
/// // What was queued has run.
/// for reply in replies {
///     assert_eq!(reply.wait()?, 1);
/// }
/// assert!(counters.iter().all(|counter| !counter.is_alive()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn shutdown_all(timeout: Duration) -> Shutdown {
    Shutdown::start(registry::living(), timeout)
}

/// A future that becomes ready when one actor or all actors have ended, or when the time is over.
///
/// If it is dropped, the actors go on stopping, but without a time limit.
#[must_use = "await it, or wait for it: dropped, it enforces no bound"]
pub struct Shutdown {
    actors: Vec<Arc<dyn AnyMailbox>>,
    timeout: Duration,
    /// Keeps the connection to an actor of another process open until the actor has been killed.
    holds: Option<Arc<dyn Any + Send + Sync>>,
    /// `None` when the timeout is beyond the end of time.
    deadline: Option<Instant>,
    /// Says whether all actors have ended in time.
    outcome: BoxFuture<'static, bool>,
}

impl Shutdown {
    pub(crate) fn start(actors: Vec<Arc<dyn AnyMailbox>>, timeout: Duration) -> Self {
        let deadline = Instant::now().checked_add(timeout);
        for actor in &actors {
            Arc::clone(actor).request_stop();
        }
        let ended: Vec<_> = actors.iter().map(|actor| actor.ended()).collect();
        let all_ended = Box::pin(join_all(ended.into_iter().map(|mut ended| async move {
            // An error means that the mailbox was dropped, so the actor has ended.
            let _ = ended.wait_for(|ended| *ended).await;
        })));
        let none = actors.is_empty();
        let outcome = async move {
            if none {
                return true;
            }
            let time_is_over = match deadline {
                Some(deadline) => Either::Left(background::sleep_until(deadline)),
                None => Either::Right(pending()),
            };
            let time_is_over = Box::pin(time_is_over);
            matches!(select(all_ended, time_is_over).await, Either::Left(_))
        };
        Self {
            actors,
            timeout,
            holds: None,
            deadline,
            outcome: Box::pin(outcome),
        }
    }

    /// Holds a reference until the outcome is known.
    pub(crate) fn holding(mut self, reference: Arc<dyn Any + Send + Sync>) -> Self {
        self.holds = Some(reference);
        self
    }

    /// Blocks this thread until the actors have ended or the time is over.
    ///
    /// An actor cannot end while its thread waits here. So if this is called on the thread of one of the
    /// actors, the error names that actor.
    ///
    /// # Errors
    /// [`StillRunning`] with the names of the actors that have not ended in time.
    pub fn wait(mut self) -> Result<(), StillRunning> {
        let in_time = background::block_on(&mut self.outcome, self.deadline);
        self.conclude(in_time.unwrap_or(false))
    }

    fn conclude(&mut self, in_time: bool) -> Result<(), StillRunning> {
        let mut left_behind = Vec::new();
        for actor in self.actors.drain(..) {
            if !in_time && !actor.has_ended() {
                tracing::error!(actor = actor.name(), "actor left behind by a shutdown");
                left_behind.push(actor.name().to_owned());
                registry::free_name(actor.id());
                actor.leave_behind();
            }
        }
        self.holds = None;
        self.outcome = Box::pin(ready(in_time));
        if left_behind.is_empty() {
            return Ok(());
        }
        left_behind.sort();
        Err(StillRunning {
            actors: left_behind,
            after: self.timeout,
        })
    }
}

impl Future for Shutdown {
    type Output = Result<(), StillRunning>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.outcome.as_mut().poll(cx) {
            Poll::Ready(in_time) => Poll::Ready(self.conclude(in_time)),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let actors: Vec<_> = self.actors.iter().map(|actor| actor.name()).collect();
        f.debug_struct("Shutdown")
            .field("actors", &actors)
            .field("timeout", &self.timeout)
            .finish()
    }
}
