//! What callers hold: a typed reference to an actor.
//!
//! Callers see no difference between an actor of this process and one elsewhere.

use std::any::{TypeId, type_name};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message};

use super::background;
use super::error::{CallError, NotDelivered, Undelivered};
use super::mailbox::{ActorId, Mailbox, Phase};
use super::port::{Begun, How, Port};
use super::registry::AnyMailbox;
use super::reply::Reply;
use super::shutdown::Shutdown;
use crate::deadline::Deadline;

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
    There(Box<dyn Port<A>>),
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
            Target::There(port) => port.release(),
        }
    }
}

impl<A: Actor> ActorRef<A> {
    pub(crate) fn new(handle: Arc<Handle<A>>) -> Self {
        Self { handle }
    }

    /// Makes a reference to an actor of another process; the port counts it as a holder already.
    pub(crate) fn there(port: Box<dyn Port<A>>) -> Self {
        let target = Target::There(port);
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
            Target::There(port) => port.id(),
        }
    }

    /// The actor's name; one that was given none is called by its type and id, as `Counter#7`.
    pub fn name(&self) -> &str {
        match self.target() {
            Target::Here(mailbox) => mailbox.name(),
            Target::There(port) => port.name(),
        }
    }

    /// Whether the actor runs in this process.
    pub fn is_local(&self) -> bool {
        matches!(self.target(), Target::Here(_))
    }

    /// Whether the actor takes calls: it has not been told to stop, and has not ended.
    ///
    /// Of an actor elsewhere: whether this process has not heard of its end.
    pub fn is_alive(&self) -> bool {
        match self.target() {
            Target::Here(mailbox) => mailbox.phase() == Phase::Open,
            Target::There(port) => port.is_alive(),
        }
    }

    /// How many calls are queued or running; of an actor elsewhere: how many of this process.
    pub fn pending(&self) -> usize {
        match self.target() {
            Target::Here(mailbox) => mailbox.pending(),
            Target::There(port) => port.pending(),
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
            Target::There(port) => port.dead_letters(),
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
            Target::There(port) => port.stop(),
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
            Target::There(port) => port.kill(),
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
            Target::There(port) => port.ended().await,
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
            Target::There(port) => {
                // The `kill` at the end needs the connection, which goes with the last reference.
                begin(port.mailbox()).holding(Arc::clone(&self.handle) as _)
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
            Target::There(port) => Reply::begun(begin(&**port, message, How::Ask(None))),
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
            Target::There(port) => Reply::begun(begin(&**port, message, How::Ask(deadline))),
        };
        reply.timeout(limit)
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
            Target::There(port) => {
                let how = match port.take_room().await {
                    true => How::InRoom,
                    // It says how the actor ended.
                    false => How::Ask(None),
                };
                Reply::begun(begin(&**port, message, how))
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
            Target::There(port) => begin(&**port, message, How::Tell).map(drop),
        }
    }
}

/// Begins a call to an actor elsewhere.
fn begin<A, M>(port: &dyn Port<A>, message: M, how: How) -> Begun<M>
where
    A: Actor,
    M: Message + Send + 'static,
    M::Result: Send,
{
    let mut message = Some(message);
    if let Some(begun) = port.begin(TypeId::of::<M>(), &mut message, how) {
        let begun = begun.downcast::<Begun<M>>();
        return *begun.expect("a port begins the call that it was given");
    }
    let message = message.expect("a port that does not take a message leaves it");
    Err(CallError::NotDelivered {
        actor: Arc::clone(port.name()),
        reason: NotDelivered::NotRegistered {
            message: type_name::<M>().to_owned(),
            actor_type: type_name::<A>().to_owned(),
        },
        message: Undelivered::new(message),
    })
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
