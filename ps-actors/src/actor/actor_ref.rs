//! What callers hold: a typed reference to an actor.
//!
//! Callers see no difference between an actor of this process and one elsewhere; which it is stays
//! behind [`Handle`].

use std::any::type_name;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message};

use super::background;
use super::error::CallError;
use super::mailbox::{ActorId, Mailbox, Phase};
use super::reply::Reply;
use super::shutdown::Shutdown;

/// A reference to an actor: cheap to clone, usable from any thread, typed by the actor.
///
/// It stays valid when the actor is restarted. When the last reference to an actor without a name
/// is dropped, the actor stops as after [`ActorRef::stop`].
pub struct ActorRef<A: Actor> {
    handle: Arc<Handle<A>>,
}

/// Shared by all references to one actor; its drop is the drop of the last one.
pub(crate) struct Handle<A: Actor> {
    mailbox: Arc<Mailbox<A>>,
}

impl<A: Actor> Handle<A> {
    pub(crate) fn new(mailbox: Arc<Mailbox<A>>) -> Self {
        Self { mailbox }
    }
}

impl<A: Actor> Drop for Handle<A> {
    fn drop(&mut self) {
        self.mailbox.close();
    }
}

impl<A: Actor> ActorRef<A> {
    pub(crate) fn new(handle: Arc<Handle<A>>) -> Self {
        Self { handle }
    }

    fn mailbox(&self) -> &Arc<Mailbox<A>> {
        &self.handle.mailbox
    }

    /// The reference to the actor whose code is running, for it to hand out or keep.
    ///
    /// `None` outside of an `A`'s thread, and when no reference to the actor is left. An actor
    /// without a name that keeps a reference to itself lives until it is stopped.
    pub fn current() -> Option<Self> {
        let handle = background::current_handle()?;
        handle.downcast().ok().map(Self::new)
    }

    /// The actor's id in this process.
    pub fn id(&self) -> ActorId {
        self.mailbox().id()
    }

    /// The actor's name; one that was given none is called by its type and id, as `Counter#7`.
    pub fn name(&self) -> &str {
        self.mailbox().name()
    }

    /// Whether the actor takes calls: it has not been told to stop, and has not ended.
    pub fn is_alive(&self) -> bool {
        self.mailbox().phase() == Phase::Open
    }

    /// How many calls are queued or running.
    pub fn pending(&self) -> usize {
        self.mailbox().pending()
    }

    /// How many times the actor has been restarted after a panic.
    pub fn restarts(&self) -> u32 {
        self.mailbox().restarts()
    }

    /// How many messages of [`ActorRef::tell`] to this actor were lost after they had been queued.
    pub fn dead_letters(&self) -> u64 {
        self.mailbox().dead_letters()
    }

    /// Stops the actor gracefully: it takes no more calls, runs those that are queued, waits for
    /// asynchronous responses, and then stops as after `ctx.stop()`.
    ///
    /// As in actix, a `stopping` hook may refuse; the actor then goes on without taking calls,
    /// until it stops itself.
    pub fn stop(&self) {
        self.mailbox().close();
    }

    /// Ends the actor without running its queue: queued calls fail at once as not delivered.
    ///
    /// A handler that is running goes on to its end, and its caller gets the result. Asynchronous
    /// responses are dropped; their callers get [`CallError::Unknown`]. The actor's `stopping` and
    /// `stopped` hooks do not run, its destructor does.
    pub fn kill(&self) {
        self.mailbox().kill();
    }

    /// Waits until the actor has ended: its state is dropped, its name is free.
    pub async fn stopped(&self) {
        let mut ended = self.mailbox().ended();
        // The sender lives in the mailbox that `self` holds.
        let _ = ended.wait_for(|ended| *ended).await;
    }

    /// Stops the actor gracefully within a bound; begins at once, await or wait for the outcome.
    ///
    /// When the time is over, the actor is killed and all its pending calls fail. If it is stuck
    /// in a handler, its thread is left behind, and the outcome is an error that says so.
    pub fn shutdown(&self, timeout: Duration) -> Shutdown {
        Shutdown::start(vec![Arc::clone(self.mailbox()) as _], timeout)
    }
}

impl<A: Actor<Context = Context<A>>> ActorRef<A> {
    /// Calls the actor: the message is queued before this returns.
    ///
    /// If the actor has stopped or its `max_pending` calls are taken, the reply fails at once and
    /// hands the message back.
    pub fn ask<M>(&self, message: M) -> Reply<M::Result>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        match self.mailbox().push(message, false) {
            Ok(call) => Reply::new(call),
            Err(error) => Reply::failed(error),
        }
    }

    /// Waits until the actor has room for a call, first come first served, and calls it.
    ///
    /// Dropping this future before it is ready drops the message; the actor then never sees it.
    pub async fn ask_when_ready<M>(&self, message: M) -> Reply<M::Result>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        match self.mailbox().push_when_ready(message).await {
            Ok(call) => Reply::new(call),
            Err(error) => Reply::failed(error),
        }
    }

    /// Queues a message without waiting for a reply; the handler's result is dropped.
    ///
    /// If the message is lost later (the actor stops before it, or panics during it), that is
    /// logged as a warning and counted: [`ActorRef::dead_letters`].
    ///
    /// # Errors
    /// [`CallError::NotDelivered`] with the message, when the actor has stopped or its
    /// `max_pending` calls are taken.
    pub fn tell<M>(&self, message: M) -> Result<(), CallError>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        self.mailbox().push(message, true).map(drop)
    }
}

impl<A: Actor> Clone for ActorRef<A> {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.handle))
    }
}

impl<A: Actor> fmt::Debug for ActorRef<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ActorRef<{}>({})", type_name::<A>(), self.name())
    }
}
