//! The options of an actor, and its start.
//!
//! Each actor has a thread and an event loop of its own, because training actors compute for a long
//! time without a pause. The actix system that is current at the spawn is also current on that thread.
//! If no system is current, a shared background system is. An actor does not end when that system ends.

use std::any::{Any, type_name};
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Context};

use super::actor_ref::{ActorRef, Handle};
use super::book::ActorId;
use super::error::SpawnError;
use super::mailbox::{Mailbox, Phase};
use super::registry::{self, Entry};
use super::thread::ThreadBody;

/// Starts an actor with the default options of [`Spawn`].
///
/// It returns at once. The factory runs on the actor's thread, and again for each restart. Calls may
/// be made before the factory has returned.
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
/// let counter = ps_runtime::spawn(|| Counter(40));
/// assert_eq!(counter.ask(Add(2)).wait()?, 42);
/// # Ok::<(), ps_runtime::CallError>(())
/// ```
///
/// # Panics
/// When the system gives no thread. [`Spawn::start`] returns an error instead.
pub fn spawn<A, F>(factory: F) -> ActorRef<A>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A + Send + 'static,
{
    Spawn::new()
        .start(factory)
        .expect("the system gives a thread for the actor")
}

/// Returns the actor that has this name, or starts it. If several callers do so at the same time, only
/// one of them starts it.
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
/// use ps_runtime::get_or_spawn;
///
/// let first = get_or_spawn("hits", || Counter(0))?;
/// let second = get_or_spawn("hits", || Counter(100))?;
/// first.ask(Add(1)).wait()?;
/// assert_eq!(second.ask(Add(1)).wait()?, 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// When the name is invalid, when it belongs to an actor that is stopping or that has another type, or
/// when the system gives no thread.
pub fn get_or_spawn<A, F>(name: impl Into<String>, factory: F) -> Result<ActorRef<A>, SpawnError>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A + Send + 'static,
{
    Spawn::new().name(name).get_or_start(factory)
}

/// How often an actor may be restarted after a panic.
///
/// A restart builds a new actor from the factory. The actor's state is lost; its queue is kept. A panic
/// that exceeds this policy ends the actor.
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
/// # struct Fail;
/// # impl Handler<Fail> for Counter {
/// #     type Result = ();
/// #     fn handle(&mut self, _: Fail, _: &mut Context<Self>) { panic!("as the example wants it") }
/// # }
/// use std::time::Duration;
///
/// use ps_runtime::{RestartPolicy, Spawn};
///
/// let once_a_minute = RestartPolicy { max_restarts: 1, within: Duration::from_secs(60) };
/// let counter = Spawn::new().restart(once_a_minute).start(|| Counter(0))?;
/// counter.ask(Add(5)).wait()?;
/// assert!(counter.ask(Fail).wait().is_err());
/// // It was built again, so it counts from 0.
/// assert_eq!(counter.ask(Add(1)).wait()?, 1);
/// assert_eq!(counter.restarts(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPolicy {
    /// How many restarts are allowed in any window of length `within`. With 0, the first panic ends the
    /// actor.
    pub max_restarts: u32,
    /// Length of the window. With `Duration::MAX`, all restarts of the actor are counted.
    pub within: Duration,
}

impl RestartPolicy {
    /// The first panic ends the actor.
    pub const NEVER: Self = Self {
        max_restarts: 0,
        within: Duration::MAX,
    };
}

impl Default for RestartPolicy {
    /// Three restarts per minute. An actor survives single bad inputs, but an actor that panics again and
    /// again ends.
    fn default() -> Self {
        Self {
            max_restarts: 3,
            within: Duration::from_secs(60),
        }
    }
}

/// The options of an actor that is to be started.
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
/// use ps_runtime::{RestartPolicy, Spawn, SpawnError};
///
/// let options = Spawn::new()
///     .name("clicks") // The actor lives until it is stopped.
///     .max_pending(16) // The 17th pending call fails.
///     .restart(RestartPolicy { max_restarts: 1, within: Duration::from_secs(10) });
/// let counter = options.clone().start(|| Counter(0))?;
/// assert_eq!(counter.ask(Add(1)).wait()?, 1);
///
/// let again = options.start(|| Counter(0));
/// assert!(matches!(again, Err(SpawnError::NameTaken { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use = "nothing is spawned before `start`"]
pub struct Spawn {
    name: Option<String>,
    thread_name: Option<String>,
    max_pending: usize,
    restart: RestartPolicy,
    io: Io,
}

/// Whether an actor's event loop can use sockets, child processes and signals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Io {
    /// Nobody has said anything: it can.
    Unsaid,
    /// It can, because [`Spawn::with_io`] says so.
    With,
    /// It cannot, because [`Spawn::without_io`] says so.
    Without,
}

impl Default for Spawn {
    fn default() -> Self {
        Self::new()
    }
}

impl Spawn {
    /// Returns the default options: no name, 1,024 pending calls, the default restart policy.
    pub fn new() -> Self {
        Self {
            name: None,
            thread_name: None,
            max_pending: 1024,
            restart: RestartPolicy::default(),
            io: Io::Unsaid,
        }
    }

    /// Gives the actor a name. No other living actor of the process may have it.
    ///
    /// A named actor lives until it is stopped. An actor without a name also ends when its last
    /// [`ActorRef`] is dropped.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the name of the actor's thread in debuggers and panic messages. The default is the actor's
    /// name. Linux shows its first 15 bytes.
    pub fn thread_name(mut self, thread_name: impl Into<String>) -> Self {
        self.thread_name = Some(thread_name.into());
        self
    }

    /// Sets how many calls may be queued or running at most. It must be at least 1; the default is 1,024.
    ///
    /// If it is too low, callers wait for each other. If it is high, more messages can wait in memory.
    /// When it is reached, [`ActorRef::ask`] and [`ActorRef::tell`] hand the message back, and
    /// [`ActorRef::ask_when_ready`] waits.
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.max_pending = calls;
        self
    }

    /// Sets how often the actor may be restarted after a panic.
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.restart = policy;
        self
    }

    /// Starts the actor with an event loop that cannot use sockets, child processes and signals. This
    /// saves four file descriptors per actor. Timers and calls work as usual.
    ///
    /// Use it for many small actors. With the usual limit of 1,024 open files, a process can have about
    /// 250 actors with the full event loop. Without it, only the limit on threads counts. Code of such an
    /// actor that uses tokio's sockets on the actor's own thread panics. It can still use them on a tokio
    /// runtime of its own.
    ///
    /// If [`with_io`](Self::with_io) was called too, before or after this, this does nothing.
    pub fn without_io(mut self) -> Self {
        if self.io != Io::With {
            self.io = Io::Without;
        }
        self
    }

    /// Starts the actor with an event loop that can use sockets, child processes and signals, even if its
    /// type usually does without ([`without_io`](Self::without_io)).
    ///
    /// This is the default for actors of your own. Parameter servers, workers, part servers and values do
    /// without. Use this if your code in such an actor, such as the source of a worker's gradients, starts
    /// tasks on the actor's thread that use tokio's sockets.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # struct Prober;
    /// # impl Actor for Prober { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "bool")]
    /// # struct CanUseSockets;
    /// # impl Handler<CanUseSockets> for Prober {
    /// #     type Result = bool;
    /// #     fn handle(&mut self, _: CanUseSockets, _: &mut Context<Self>) -> bool {
    /// #         let socket = std::net::UdpSocket::bind("127.0.0.1:0").expect("a port is free");
    /// #         socket.set_nonblocking(true).expect("it can be set");
    /// #         std::panic::catch_unwind(|| tokio::net::UdpSocket::from_std(socket)).is_ok()
    /// #     }
    /// # }
    /// use ps_runtime::Spawn;
    ///
    /// /// The options of a library, for all actors of one type.
    /// fn options(given: Spawn) -> Spawn {
    ///     given.without_io()
    /// }
    ///
    /// let small = options(Spawn::new()).start(|| Prober)?;
    /// let full = options(Spawn::new().with_io()).start(|| Prober)?;
    /// assert!(!small.ask(CanUseSockets).wait()?);
    /// assert!(full.ask(CanUseSockets).wait()?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn with_io(mut self) -> Self {
        self.io = Io::With;
        self
    }

    /// Whether the factory may be called more than once.
    pub(crate) fn may_restart(&self) -> bool {
        self.restart.max_restarts > 0
    }

    /// Starts an actor on a thread of its own and returns at once.
    ///
    /// The factory runs on that thread, and again for each restart. A panic in the factory counts as a
    /// panic of the actor.
    ///
    /// # Errors
    /// When an option is invalid, when the name is taken, or when the system gives no thread.
    pub fn start<A, F>(self, factory: F) -> Result<ActorRef<A>, SpawnError>
    where
        A: Actor<Context = Context<A>>,
        F: FnMut() -> A + Send + 'static,
    {
        self.validate()?;
        let mut registry = registry::lock();
        if let Some(name) = &self.name
            && let Some(entry) = registry.named(name)
        {
            let state = match entry.phase() {
                Phase::Open => "running already",
                Phase::Closing | Phase::Killed | Phase::Ended => "still stopping",
            };
            let name = name.clone();
            return Err(SpawnError::NameTaken { name, state });
        }
        self.start_registered(&mut registry, factory)
    }

    /// Returns the actor that has this name, or starts it with these options.
    ///
    /// # Errors
    /// Those of [`Spawn::start`]. Also when the actor that has the name is stopping or has another type.
    pub fn get_or_start<A, F>(self, factory: F) -> Result<ActorRef<A>, SpawnError>
    where
        A: Actor<Context = Context<A>>,
        F: FnMut() -> A + Send + 'static,
    {
        self.validate()?;
        let mut registry = registry::lock();
        if let Some(name) = &self.name
            && let Some(entry) = registry.named(name)
        {
            let found = entry.actor_ref(name).map_err(SpawnError::Lookup)?;
            if entry.phase() == Phase::Open {
                return Ok(found);
            }
            return Err(SpawnError::NameTaken {
                name: name.clone(),
                state: "still stopping",
            });
        }
        self.start_registered(&mut registry, factory)
    }

    fn validate(&self) -> Result<(), SpawnError> {
        for name in self.name.iter().chain(&self.thread_name) {
            let problem = if name.is_empty() {
                "it is empty"
            } else if name.contains(char::is_control) {
                "it contains a control character"
            } else {
                continue;
            };
            let name = name.clone();
            return Err(SpawnError::InvalidName { name, problem });
        }
        if self.max_pending == 0 {
            return Err(SpawnError::NoPendingCalls);
        }
        if self.restart.within.is_zero() {
            return Err(SpawnError::NoRestartWindow);
        }
        Ok(())
    }

    /// Starts the thread and enters the actor into the registry. The caller holds the registry's lock, so
    /// that an actor that ends at once removes itself only after it was entered.
    fn start_registered<A, F>(
        self,
        registry: &mut registry::Registry,
        factory: F,
    ) -> Result<ActorRef<A>, SpawnError>
    where
        A: Actor<Context = Context<A>>,
        F: FnMut() -> A + Send + 'static,
    {
        let id = ActorId::next();
        let name: Arc<str> = match &self.name {
            Some(name) => name.as_str().into(),
            None => format!("{}#{id}", short_type_name::<A>()).into(),
        };
        let max_pending = self.max_pending.min(tokio::sync::Semaphore::MAX_PERMITS);
        let mailbox = Arc::new(Mailbox::new(id, Arc::clone(&name), max_pending));
        let handle = Arc::new(Handle::new(Arc::clone(&mailbox)));
        let weak = Arc::downgrade(&handle);
        let body = ThreadBody {
            mailbox: Arc::clone(&mailbox),
            handle: weak,
            restart: self.restart,
            with_io: self.io != Io::Without,
            factory,
        };
        let thread_name = self.thread_name.unwrap_or_else(|| name.to_string());
        body.start(thread_name)
            .map_err(|source| SpawnError::Thread {
                actor: name,
                source,
            })?;
        let named = self
            .name
            .map(|name| (name, Arc::clone(&handle) as Arc<dyn Any + Send + Sync>));
        registry.insert(Entry::new(mailbox, type_name::<A>(), named));
        Ok(ActorRef::new(handle))
    }
}

/// Returns the last part of a type's path: `Counter` for `my_crate::Counter<T>`.
fn short_type_name<A>() -> &'static str {
    let path = type_name::<A>();
    let path = path.split('<').next().unwrap_or(path);
    path.rsplit("::").next().unwrap_or(path)
}
