//! What callers hold: a typed reference to an actor.
//!
//! Callers see no difference between an actor of this process and one elsewhere.

use std::any::type_name;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message};

use super::background;
use super::deadline::Deadline;
use super::error::CallError;
use super::mailbox::{ActorId, Mailbox, Phase};
use super::registry::AnyMailbox;
use super::reply::Reply;
use super::shutdown::Shutdown;
use crate::net::frame::Kind;
use crate::remote::NodeId;
use crate::remote::caller::RemoteActor;
use crate::remote::kept::{KeepHere, Kept};
use crate::remote::reference::Remotely;
use crate::remote::table::Table;

/// A reference to an actor: cheap to clone, usable from any thread, typed by the actor.
///
/// It stays valid when the actor is restarted. When the last reference to an actor without a name
/// is dropped, the actor stops as after [`ActorRef::stop`].
pub struct ActorRef<A: Actor> {
    handle: Arc<Handle<A>>,
}

/// Shared by all references to one actor; its drop is the drop of the last one.
pub(crate) struct Handle<A: Actor> {
    target: Target<A>,
}

/// Where the actor is.
pub(crate) enum Target<A: Actor> {
    Here(Arc<Mailbox<A>>),
    There(Remotely<A>),
}

impl<A: Actor> Handle<A> {
    pub(crate) fn new(mailbox: Arc<Mailbox<A>>) -> Self {
        Self {
            target: Target::Here(mailbox),
        }
    }
}

impl<A: Actor> Drop for Handle<A> {
    fn drop(&mut self) {
        match &self.target {
            Target::Here(mailbox) => mailbox.close(),
            Target::There(remote) => remote.actor.release(),
        }
    }
}

impl<A: Actor> ActorRef<A> {
    pub(crate) fn new(handle: Arc<Handle<A>>) -> Self {
        Self { handle }
    }

    /// Makes a reference to an actor of another process; `actor` counts it as a holder already.
    pub(crate) fn there(actor: Arc<RemoteActor>, table: Arc<Table<A>>) -> Self {
        let target = Target::There(Remotely { actor, table });
        Self::new(Arc::new(Handle { target }))
    }

    pub(crate) fn target(&self) -> &Target<A> {
        &self.handle.target
    }

    /// The queue of an actor of this process.
    ///
    /// # Panics
    /// When the actor is elsewhere.
    pub(crate) fn mailbox_here(&self) -> &Arc<Mailbox<A>> {
        match self.target() {
            Target::Here(mailbox) => mailbox,
            Target::There(_) => unreachable!("{} was started in this process", self.name()),
        }
    }

    pub(crate) fn handle(&self) -> &Arc<Handle<A>> {
        &self.handle
    }

    /// The reference to the actor whose code is running, for it to hand out or keep.
    ///
    /// `None` outside of an `A`'s thread, and when no reference to the actor is left. An actor
    /// without a name that keeps a reference to itself lives until it is stopped.
    pub fn current() -> Option<Self> {
        let handle = background::current_handle()?;
        handle.downcast().ok().map(Self::new)
    }

    /// The actor's id in this process; an actor elsewhere has one here, too.
    pub fn id(&self) -> ActorId {
        match self.target() {
            Target::Here(mailbox) => mailbox.id(),
            Target::There(remote) => remote.actor.id(),
        }
    }

    /// The actor's name; one that was given none is called by its type and id, as `Counter#7`.
    pub fn name(&self) -> &str {
        match self.target() {
            Target::Here(mailbox) => mailbox.name(),
            Target::There(remote) => remote.actor.name(),
        }
    }

    /// Whether the actor runs in this process.
    pub fn is_local(&self) -> bool {
        matches!(self.target(), Target::Here(_))
    }

    /// The process that the actor runs in; `None` if it is this one.
    pub fn node(&self) -> Option<NodeId> {
        match self.target() {
            Target::Here(_) => None,
            Target::There(remote) => Some(remote.actor.wire().node),
        }
    }

    /// Whether the actor takes calls: it has not been told to stop, and has not ended.
    ///
    /// Of an actor elsewhere: whether this process has not heard of its end.
    pub fn is_alive(&self) -> bool {
        match self.target() {
            Target::Here(mailbox) => mailbox.phase() == Phase::Open,
            Target::There(remote) => !remote.actor.has_ended(),
        }
    }

    /// How many calls are queued or running; of an actor elsewhere: how many of this process.
    pub fn pending(&self) -> usize {
        match self.target() {
            Target::Here(mailbox) => mailbox.pending(),
            Target::There(remote) => remote.actor.pending(),
        }
    }

    /// How many times the actor has been restarted after a panic; 0 for an actor elsewhere, whose
    /// process keeps the count.
    pub fn restarts(&self) -> u32 {
        match self.target() {
            Target::Here(mailbox) => mailbox.restarts(),
            Target::There(_) => 0,
        }
    }

    /// How many messages of [`ActorRef::tell`] to this actor were lost after they had been queued.
    pub fn dead_letters(&self) -> u64 {
        match self.target() {
            Target::Here(mailbox) => mailbox.dead_letters(),
            Target::There(remote) => remote.actor.dead_letters(),
        }
    }

    /// Stops the actor gracefully: it takes no more calls, runs those that are queued, waits for
    /// asynchronous responses, and then stops as after `ctx.stop()`.
    ///
    /// As in actix, a `stopping` hook may refuse; the actor then goes on without taking calls,
    /// until it stops itself.
    pub fn stop(&self) {
        match self.target() {
            Target::Here(mailbox) => mailbox.close(),
            Target::There(remote) => remote.actor.signal(Kind::Stop),
        }
    }

    /// Ends the actor without running its queue: queued calls fail at once as not delivered.
    ///
    /// A handler that is running goes on to its end, and its caller gets the result. Asynchronous
    /// responses are dropped; their callers get [`CallError::Unknown`]. The actor's `stopping` and
    /// `stopped` hooks do not run, its destructor does.
    pub fn kill(&self) {
        match self.target() {
            Target::Here(mailbox) => mailbox.kill(),
            Target::There(remote) => remote.actor.signal(Kind::Kill),
        }
    }

    /// Waits until the actor has ended: its state is dropped, its name is free.
    ///
    /// An actor elsewhere also counts as ended when its process could not be reached for the
    /// length of the lease: nothing more will be heard of it.
    pub async fn stopped(&self) {
        match self.target() {
            Target::Here(mailbox) => {
                // The sender lives in the mailbox that `self` holds.
                let _ = mailbox.ended().wait_for(|ended| *ended).await;
            }
            Target::There(remote) => remote.actor.gone().await,
        }
    }

    /// Stops the actor gracefully within a bound; begins at once, await or wait for the outcome.
    ///
    /// When the time is over, the actor is killed and all its pending calls fail. If it is stuck
    /// in a handler, its thread is left behind, and the outcome is an error that says so.
    pub fn shutdown(&self, timeout: Duration) -> Shutdown {
        let begin = |actor: Arc<dyn AnyMailbox>| Shutdown::start(vec![actor], timeout);
        match self.target() {
            Target::Here(mailbox) => begin(Arc::clone(mailbox) as _),
            Target::There(remote) => {
                // The `kill` at the end needs the connection, which goes with the last reference.
                begin(Arc::clone(&remote.actor) as _).holding(Arc::clone(&self.handle) as _)
            }
        }
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
        match self.target() {
            Target::Here(mailbox) => Reply::started(mailbox.push(message, false)),
            Target::There(remote) => {
                Reply::started(remote.actor.call(&remote.table, message, false))
            }
        }
    }

    /// Calls the actor with a time limit, which goes with the call: when it is over, the handler
    /// does not begin any more, also if nobody looks at the reply, and, for an actor elsewhere, if
    /// its process hears nothing more from this one.
    ///
    /// For whoever looks at the reply it is [`ask`](Self::ask) with a [`timeout`](Reply::timeout):
    /// a handler that has begun goes on. An actor elsewhere counts in milliseconds, from the
    /// arrival of the call; see `docs/semantics.md`, A-5 and R-6.
    pub fn ask_within<M>(&self, message: M, limit: Duration) -> Reply<M::Result>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        let deadline = Deadline::within(limit);
        let reply = match self.target() {
            Target::Here(mailbox) => Reply::started(mailbox.push_with(message, None, deadline)),
            Target::There(remote) => {
                let call = remote.actor.call_within(&remote.table, message, deadline);
                Reply::started(call)
            }
        };
        reply.timeout(limit)
    }

    /// Calls the actor, and leaves the result where it is computed until somebody takes it.
    ///
    /// The ticket can be sent on inside a message; the result then goes straight from the process
    /// that made it to the one that takes it, not through this one.
    pub fn ask_kept<M>(&self, message: M) -> Reply<Kept<M::Result>>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        match self.target() {
            Target::Here(mailbox) => {
                let call = mailbox.push(message, false);
                Reply::started(call.map(|call| Arc::new(KeepHere(call as _))))
            }
            Target::There(remote) => Reply::started(remote.actor.call_kept(&remote.table, message)),
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
        match self.target() {
            Target::Here(mailbox) => Reply::started(mailbox.push_when_ready(message).await),
            Target::There(remote) => {
                let call = remote.actor.call_when_ready(&remote.table, message);
                Reply::started(call.await)
            }
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
        match self.target() {
            Target::Here(mailbox) => mailbox.push(message, true).map(drop),
            Target::There(remote) => remote.actor.call(&remote.table, message, true).map(drop),
        }
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
