//! Options of an actor, and the start of its thread.
//!
//! Each actor has a thread and an event loop of its own, because training actors compute. The
//! actix system that is current at the spawn stays current on that thread; where there is none, a
//! background system is shared. Ending that system does not end our actors.

use std::any::{Any, type_name};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use actix::{Actor, Context, System};

use super::actor_ref::{ActorRef, Handle};
use super::background;
use super::error::SpawnError;
use super::mailbox::{ActorId, Mailbox, Phase};
use super::registry::{self, Entry};
use super::supervisor::Supervisor;

/// Starts an actor with the default options of [`Spawn`].
///
/// Returns at once; the factory runs on the actor's thread, and again for each restart. Calls may
/// be made before it has finished.
///
/// # Panics
/// When the system gives no thread; [`Spawn::start`] returns that as an error.
pub fn spawn<A, F>(factory: F) -> ActorRef<A>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A + Send + 'static,
{
    Spawn::new()
        .start(factory)
        .expect("the system gives a thread for the actor")
}

/// Returns the actor of that name, or starts it; of many callers at once, one starts it.
///
/// # Errors
/// When the name is not usable or belongs to an actor that is stopping or of another type, or when
/// the system gives no thread.
pub fn get_or_spawn<A, F>(name: impl Into<String>, factory: F) -> Result<ActorRef<A>, SpawnError>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A + Send + 'static,
{
    Spawn::new().name(name).get_or_start(factory)
}

/// How often an actor may be restarted after a panic.
///
/// A restart builds a new actor from the factory: its state is lost, its queue is kept. A panic
/// beyond the budget ends the actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPolicy {
    /// Restarts allowed in any window of length `within`. Zero ends the actor at its first panic.
    pub max_restarts: u32,
    /// Length of the window. `Duration::MAX` counts over the actor's whole life.
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
    /// Three restarts in a minute: rides out a bad input, gives up on an actor that cannot work.
    fn default() -> Self {
        Self {
            max_restarts: 3,
            within: Duration::from_secs(60),
        }
    }
}

/// Options of an actor to be started.
#[derive(Debug, Clone)]
#[must_use = "nothing is spawned before `start`"]
pub struct Spawn {
    name: Option<String>,
    thread_name: Option<String>,
    max_pending: usize,
    restart: RestartPolicy,
    with_io: bool,
}

impl Default for Spawn {
    fn default() -> Self {
        Self::new()
    }
}

impl Spawn {
    /// No name, 1,024 pending calls, the default restart policy.
    pub fn new() -> Self {
        Self {
            name: None,
            thread_name: None,
            max_pending: 1024,
            restart: RestartPolicy::default(),
            with_io: true,
        }
    }

    /// Gives the actor a name, unique among the living actors of the process.
    ///
    /// A named actor lives until it is stopped; one without a name also ends when its last
    /// [`ActorRef`] is dropped.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Names the actor's thread in debuggers and panic messages; default: the actor's name.
    ///
    /// Linux shows the first 15 bytes.
    pub fn thread_name(mut self, thread_name: impl Into<String>) -> Self {
        self.thread_name = Some(thread_name.into());
        self
    }

    /// Bounds the calls that are queued or running, at least 1; default 1,024.
    ///
    /// Too low a bound makes callers wait for each other; a high one lets more messages wait in
    /// memory. When it is reached, [`ActorRef::ask`] and [`ActorRef::tell`] hand the message back
    /// and [`ActorRef::ask_when_ready`] waits.
    pub fn max_pending(mut self, calls: usize) -> Self {
        self.max_pending = calls;
        self
    }

    /// Sets how often the actor may be restarted after a panic.
    pub fn restart(mut self, policy: RestartPolicy) -> Self {
        self.restart = policy;
        self
    }

    /// Leaves out what the actor needs to use sockets, child processes and signals on its own event loop,
    /// which takes four file descriptors for each actor. Timers and calls work as ever.
    ///
    /// For many small actors: with the usual limit of 1,024 open files a process can have some 250
    /// with it, and as many without it as it may have threads. Code of the actor that uses tokio's sockets
    /// panics without it.
    pub fn without_io(mut self) -> Self {
        self.with_io = false;
        self
    }

    /// Whether the factory may be called more than once.
    pub(crate) fn may_restart(&self) -> bool {
        self.restart.max_restarts > 0
    }

    /// Starts an actor on a thread of its own and returns at once.
    ///
    /// The factory runs on that thread, and again for each restart. If it panics, that counts as a
    /// panic of the actor.
    ///
    /// # Errors
    /// When an option is invalid, the name is taken, or the system gives no thread.
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

    /// Returns the actor of that name, or starts it with these options.
    ///
    /// # Errors
    /// As [`Spawn::start`], and when the actor of that name is stopping or of another type.
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

    /// Starts the thread and enters the actor into the registry, under the registry's lock: an
    /// actor that ends at once removes itself only after it was entered.
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
            with_io: self.with_io,
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

/// `Counter` of `my_crate::Counter<T>`.
fn short_type_name<A>() -> &'static str {
    let path = type_name::<A>();
    let path = path.split('<').next().unwrap_or(path);
    path.rsplit("::").next().unwrap_or(path)
}

/// What moves to the actor's thread.
struct ThreadBody<A: Actor, F> {
    mailbox: Arc<Mailbox<A>>,
    handle: Weak<Handle<A>>,
    restart: RestartPolicy,
    with_io: bool,
    factory: F,
}

impl<A, F> ThreadBody<A, F>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A + Send + 'static,
{
    fn start(self, thread_name: String) -> std::io::Result<()> {
        let system = background::system_or_background()?;
        let runtime = background::event_loop(self.with_io)?;
        thread::Builder::new()
            .name(thread_name)
            .spawn(move || self.run(system, runtime))?;
        Ok(())
    }

    fn run(self, system: System, runtime: tokio::runtime::Runtime) {
        let _finish = FinishOnDrop(Arc::clone(&self.mailbox));
        background::enter_actor_thread(self.mailbox.id(), self.handle);
        let runtime = Arc::new(runtime);
        // A system per thread gives the thread its arbiter; the caller's system is then made the
        // current one, so that `System::current()` and actix's services mean the same everywhere.
        let runner = System::with_tokio_rt({
            let runtime = Arc::clone(&runtime);
            || runtime
        });
        System::set_current(system);
        let supervisor = Supervisor::new(self.mailbox, self.factory, self.restart);
        let ended = catch_unwind(AssertUnwindSafe(|| {
            runner.block_on(supervisor);
            // Tasks that the actor spawned on its thread end here.
            drop(runner);
        }));
        if let Some(runtime) = Arc::into_inner(runtime) {
            // A blocking task of the actor must not delay the news of its end.
            runtime.shutdown_background();
        }
        if ended.is_err() {
            tracing::error!("an actor's thread panicked while it ended");
        }
    }
}

/// Frees the actor's name and fails what is left, however its thread ends.
struct FinishOnDrop<A: Actor>(Arc<Mailbox<A>>);

impl<A: Actor> Drop for FinishOnDrop<A> {
    fn drop(&mut self) {
        registry::remove(self.0.id());
        self.0.finish();
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;
    use crate::cluster::{
        Cluster, ClusterConfig, ClusterError, Hosts, Node, SpawnOn, SpawnOnError, StartError,
    };
    use crate::cluster::{Owned, RemoteRef, Value};
    use crate::launch::LaunchOptions;

    #[derive(Clone, serde::Serialize, serde::Deserialize)]
    struct Nothing;

    impl Value for Nothing {}

    struct Idle;

    impl Actor for Idle {
        type Context = Context<Self>;
    }

    fn idle(options: Spawn) -> Result<ActorRef<Idle>, SpawnError> {
        options.start(|| Idle)
    }

    /// Allows so many more open files than there are.
    fn allow_files(more: u64) {
        let open = std::fs::read_dir("/proc/self/fd").expect("Linux has it");
        let limit = Rlimit {
            // One of them was for the look at the folder.
            current: Some(open.count() as u64 - 1 + more),
            maximum: getrlimit(Resource::Nofile).maximum,
        };
        setrlimit(Resource::Nofile, limit).expect("the greatest limit stays");
    }

    /// In a process of its own, with few descriptors.
    #[test]
    fn without_descriptors_there_are_errors_and_actors_that_need_none() {
        const CHILD: &str = "PS_TEST_FEW_FILES";
        const NAME: &str =
            "actor::spawn::tests::without_descriptors_there_are_errors_and_actors_that_need_none";
        if std::env::var_os(CHILD).is_none() {
            let program = std::env::current_exe().expect("this test has a program");
            let mut child = std::process::Command::new(program);
            let child = child.args(["--exact", NAME, "--nocapture"]).env(CHILD, "1");
            let output = child.output().expect("the program runs");
            assert!(output.status.success(), "{output:?}");
            return;
        }
        // The background loop runs from the first actor on.
        let first = idle(Spawn::new()).expect("there is room");
        allow_files(2);
        let local = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let cluster = Cluster::listen(ClusterConfig::default(), local, Hosts::new());
        assert!(
            matches!(cluster, Err(ClusterError::Threads(_))),
            "{cluster:?}"
        );
        let node = Node::new(ClusterConfig::default(), 1, 0, "127.0.0.1:1", Hosts::new());
        let node = node.serve().wait();
        assert!(matches!(node, Err(ClusterError::Threads(_))), "{node:?}");
        let alone = Cluster::alone(Hosts::new());
        let value = RemoteRef::new_on(&alone, SpawnOn::new(), Nothing).wait();
        assert!(matches!(value, Err(SpawnOnError::Threads(_))), "{value:?}");
        let nodes = alone.wait_for_nodes(0, Duration::ZERO).wait();
        assert!(matches!(nodes, Err(ClusterError::Threads(_))), "{nodes:?}");
        assert!(
            crate::cluster::lookup::<Owned<Nothing>>("nobody")
                .wait()
                .is_none()
        );
        assert!(alone.lookup::<Owned<Nothing>>("nobody").wait().is_none());
        alone.release().wait();
        let launched = Cluster::launch(
            &LaunchOptions::default(),
            ClusterConfig::default(),
            Hosts::new(),
        );
        assert!(
            matches!(launched, Err(StartError::Cluster(ClusterError::Threads(_)))),
            "{launched:?}"
        );
        allow_files(20);
        let mut actors = Vec::new();
        let error = loop {
            match idle(Spawn::new()) {
                Ok(actor) => actors.push(actor),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, SpawnError::Thread { .. }), "{error}");
        assert!(error.to_string().contains("ulimit -n"), "{error}");
        assert!(actors.len() <= 10, "{} actors", actors.len());
        for _ in 0..100 {
            actors.push(idle(Spawn::new().without_io()).expect("it needs no descriptor"));
        }
        assert!(actors.iter().all(ActorRef::is_alive) && first.is_alive());
    }
}
