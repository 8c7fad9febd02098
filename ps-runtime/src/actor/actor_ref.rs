//! The typed reference to an actor that callers hold.
//!
//! It is the same for an actor of this process and for an actor of another process.

use std::any::{TypeId, type_name};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message};

use super::background;
use super::book::{ActorId, Book};
use super::error::{CallError, NotDelivered};
use super::mailbox::{Mailbox, Phase};
use super::port::{Begun, How, Port};
use super::registry::AnyMailbox;
use super::reply::Reply;
use super::shutdown::Shutdown;
use crate::deadline::Deadline;

/// A reference to an actor. It is cheap to clone, usable from any thread, and typed by the actor.
///
/// It stays valid when the actor is restarted. When the last reference to an actor without a name
/// is dropped, the actor stops, as [`ActorRef::stop`] describes.
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
/// let other = counter.clone();
/// other.tell(Add(40))?; // Nobody waits for it.
/// // Messages of one sender begin in the order in which they were sent.
/// assert_eq!(other.ask(Add(2)).wait()?, 42);
///
/// counter.kill();
/// ps_runtime::actor::run(counter.stopped());
/// assert!(!other.is_alive());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct ActorRef<A: Actor> {
    handle: Arc<Handle<A>>,
}

/// Shared by all references to one actor. It is dropped with the last of them.
pub(crate) struct Handle<A: Actor> {
    target: Target<A>,
}

/// Whether the actor is in this process or in another one.
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

    /// Makes a reference to an actor of another process. The port has already counted this reference.
    pub(crate) fn there(port: Box<dyn Port<A>>) -> Self {
        let target = Target::There(port);
        Self::new(Arc::new(Handle { target }))
    }

    pub(crate) fn target(&self) -> &Target<A> {
        &self.handle.target
    }

    fn book(&self) -> &Book {
        match self.target() {
            Target::Here(mailbox) => mailbox.book(),
            Target::There(port) => port.book(),
        }
    }

    /// The queue of an actor of this process.
    ///
    /// # Panics
    /// When the actor is in another process.
    pub(crate) fn mailbox_here(&self) -> &Arc<Mailbox<A>> {
        match self.target() {
            Target::Here(mailbox) => mailbox,
            Target::There(_) => unreachable!("{} was started in this process", self.name()),
        }
    }

    pub(crate) fn handle(&self) -> &Arc<Handle<A>> {
        &self.handle
    }

    /// Returns a reference to the actor whose code is running. The actor can send it to others.
    ///
    /// Returns `None` on a thread that does not belong to an actor of type `A`, and when no reference to
    /// the actor is left. An actor without a name that keeps a reference to itself lives until it is
    /// stopped.
    ///
    /// ```
    /// use actix::{Actor, Context, Handler, Message};
    /// use ps_runtime::ActorRef;
    ///
    /// struct Greeter;
    /// # impl Actor for Greeter { type Context = Context<Self>; }
    ///
    /// #[derive(Message)]
    /// #[rtype(result = "Option<String>")]
    /// struct GetName;
    ///
    /// impl Handler<GetName> for Greeter {
    ///     type Result = Option<String>;
    ///
    ///     fn handle(&mut self, _: GetName, _: &mut Context<Self>) -> Option<String> {
    ///         let this = ActorRef::<Self>::current()?;
    ///         Some(this.name().to_owned())
    ///     }
    /// }
    ///
    /// let greeter = ps_runtime::Spawn::new().name("greeter").start(|| Greeter)?;
    /// assert_eq!(greeter.ask(GetName).wait()?.as_deref(), Some("greeter"));
    /// // This thread is not an actor's.
    /// assert!(ActorRef::<Greeter>::current().is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn current() -> Option<Self> {
        let handle = background::current_handle()?;
        handle.downcast().ok().map(Self::new)
    }

    /// The actor's id in this process. An actor of another process also has an id here.
    pub fn id(&self) -> ActorId {
        self.book().id()
    }

    /// The actor's name. An actor that was given no name has its type and id as name, like `Counter#7`.
    pub fn name(&self) -> &str {
        self.book().name()
    }

    /// Whether the actor runs in this process.
    pub fn is_local(&self) -> bool {
        matches!(self.target(), Target::Here(_))
    }

    /// Whether the actor takes calls: it has not been told to stop, and has not ended.
    ///
    /// For an actor of another process: `true` until this process hears that the actor has ended.
    pub fn is_alive(&self) -> bool {
        match self.target() {
            Target::Here(mailbox) => mailbox.phase() == Phase::Open,
            Target::There(port) => port.is_alive(),
        }
    }

    /// How many calls are queued or running. For an actor of another process, only the calls of this
    /// process are counted.
    pub fn pending(&self) -> usize {
        self.book().pending()
    }

    /// How many times the actor has been restarted after a panic. For an actor of another process it is
    /// always 0.
    pub fn restarts(&self) -> u32 {
        match self.target() {
            Target::Here(mailbox) => mailbox.restarts(),
            Target::There(_) => 0,
        }
    }

    /// How many messages sent to this actor with [`ActorRef::tell`] were lost after they had been queued.
    /// For an actor of another process, only the messages of this process are counted.
    pub fn dead_letters(&self) -> u64 {
        self.book().dead_letters()
    }

    /// Stops the actor gracefully: it takes no more calls, runs the calls that are queued, waits for
    /// asynchronous responses, and then stops as `ctx.stop()` does.
    ///
    /// As in actix, a `stopping` hook may refuse. The actor then goes on without taking calls, until it
    /// stops itself or is killed.
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
    /// let queued = counter.ask(Add(2));
    /// counter.stop();
    /// // What was queued before still runs. What comes later is refused.
    /// assert_eq!(queued.wait()?, 2);
    /// assert!(counter.tell(Add(3)).is_err());
    /// # Ok::<(), ps_runtime::CallError>(())
    /// ```
    pub fn stop(&self) {
        match self.target() {
            Target::Here(mailbox) => mailbox.close(),
            Target::There(port) => port.stop(),
        }
    }

    /// Ends the actor without running its queue: queued calls fail at once as
    /// [`CallError::NotDelivered`].
    ///
    /// A handler that is running goes on to its end, and its caller gets the result. Asynchronous
    /// responses are dropped, and their callers get [`CallError::Unknown`]. The actor's destructor runs,
    /// but its `stopping` and `stopped` hooks do not.
    pub fn kill(&self) {
        match self.target() {
            Target::Here(mailbox) => mailbox.kill(),
            Target::There(port) => port.kill(),
        }
    }

    /// Waits until the actor has ended. Its state is then dropped and its name is free.
    ///
    /// An actor of another process also counts as ended when its process could not be reached for one
    /// [process lease](crate::net::NetConfig::process_lease).
    pub async fn stopped(&self) {
        match self.target() {
            Target::Here(mailbox) => {
                // The sender lives in the mailbox that `self` holds.
                let _ = mailbox.ended().wait_for(|ended| *ended).await;
            }
            Target::There(port) => port.ended().await,
        }
    }

    /// Stops the actor gracefully within a time limit. The stop begins at once. Await the returned
    /// future, or block on it with [`Shutdown::wait`].
    ///
    /// When the time is over, the actor is killed and all its pending calls fail. If the actor is then
    /// still in a handler, its thread stays until the handler returns, and the outcome is an error that
    /// names the actor.
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
    /// use std::time::Duration;
    ///
    /// let counter = ps_runtime::spawn(|| Counter(0));
    /// counter.shutdown(Duration::from_secs(5)).wait()?;
    /// assert!(!counter.is_alive());
    /// # Ok::<(), ps_runtime::actor::StillRunning>(())
    /// ```
    pub fn shutdown(&self, timeout: Duration) -> Shutdown {
        let begin = |actor: Arc<dyn AnyMailbox>| Shutdown::start(vec![actor], timeout);
        match self.target() {
            Target::Here(mailbox) => begin(Arc::clone(mailbox) as _),
            Target::There(port) => {
                // The `kill` at the end needs the connection, which is dropped with the last reference.
                begin(port.mailbox()).holding(Arc::clone(&self.handle) as _)
            }
        }
    }
}

impl<A: Actor<Context = Context<A>>> ActorRef<A> {
    /// Calls the actor. The message is queued before this returns.
    ///
    /// If the actor has stopped or its `max_pending` calls are taken, the reply fails at once and
    /// hands the message back.
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
    /// // Both calls are under way before the first result is read.
    /// let (first, second) = (counter.ask(Add(2)), counter.ask(Add(3)));
    /// assert_eq!(first.wait()?, 2);
    ///
    /// // In asynchronous code, await the reply. `run` stands for `#[actix::main]`.
    /// let sum = ps_runtime::actor::run(async move { second.await })?;
    /// assert_eq!(sum, 5);
    /// # Ok::<(), ps_runtime::CallError>(())
    /// ```
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

    /// Calls the actor with a time limit that is sent with the call. After the limit the handler does
    /// not begin, even if nobody looks at the reply.
    ///
    /// For the caller it is like [`ask`](Self::ask) with a [`timeout`](Reply::timeout): a handler that
    /// has begun goes on. The limit also holds for an actor of another process, even if that process
    /// hears nothing more from this one. That process counts the limit in whole milliseconds, from the
    /// arrival of the call; see `docs/semantics.md`, A-5 and R-6.
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
    /// # #[derive(Message)]
    /// # #[rtype(result = "()")]
    /// # struct Sleep;
    /// # impl Handler<Sleep> for Counter {
    /// #     type Result = ();
    /// #     fn handle(&mut self, _: Sleep, _: &mut Context<Self>) {
    /// #         // Stands for work that takes longer than the caller's limit.
    /// #         std::thread::sleep(std::time::Duration::from_millis(200));
    /// #     }
    /// # }
    /// use std::time::Duration;
    ///
    /// let counter = ps_runtime::spawn(|| Counter(0));
    /// let busy = counter.ask(Sleep);
    /// let late = counter.ask_within(Add(1), Duration::from_millis(10));
    /// busy.wait()?;
    /// assert!(!late.wait().unwrap_err().may_have_run());
    /// // The counter was not changed.
    /// assert_eq!(counter.ask(Add(0)).wait()?, 0);
    /// # Ok::<(), ps_runtime::CallError>(())
    /// ```
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

    /// Waits until the actor has a free slot, and calls it. Waiting callers are served in the order in
    /// which they came.
    ///
    /// If this future is dropped before it is ready, the message is dropped and the actor never gets it.
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
    /// use ps_runtime::Spawn;
    ///
    /// let counter = Spawn::new().max_pending(1).start(|| Counter(0))?;
    /// ps_runtime::actor::run(async {
    ///     // Only one call is pending at any time. `ask` could fail here with `QueueFull`.
    ///     let first = counter.ask_when_ready(Add(1)).await;
    ///     let second = counter.ask_when_ready(Add(1)).await;
    ///     assert_eq!((first.await?, second.await?), (1, 2));
    ///     Ok::<(), ps_runtime::CallError>(())
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub async fn ask_when_ready<M>(&self, message: M) -> Reply<M::Result>
    where
        A: Handler<M>,
        M: Message + Send + 'static,
        M::Result: Send,
    {
        match self.target() {
            Target::Here(mailbox) => Reply::started(mailbox.push_when_ready(message).await),
            Target::There(port) => {
                let how = match port.book().wait_for_slot().await {
                    true => How::InSlot,
                    // It says how the actor ended.
                    false => How::Ask(None),
                };
                Reply::begun(begin(&**port, message, how))
            }
        }
    }

    /// Queues a message without a reply. The handler's result is dropped.
    ///
    /// The message can be lost later: the actor stops before its handler begins, or panics during its
    /// handler. Each loss is logged as a warning and counted in [`ActorRef::dead_letters`].
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
    /// counter.tell(Add(2))?;
    /// // Messages of one sender begin in the order in which they were sent.
    /// assert_eq!(counter.ask(Add(3)).wait()?, 5);
    /// # Ok::<(), ps_runtime::CallError>(())
    /// ```
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
    let reason = NotDelivered::NotRegistered {
        message: type_name::<M>().to_owned(),
        actor_type: type_name::<A>().to_owned(),
    };
    Err(port.book().undelivered(message, reason))
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
