//! The thread of an actor, from its start to its end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;

use actix::{Actor, Context, System};

use super::actor_ref::Handle;
use super::background;
use super::mailbox::Mailbox;
use super::registry;
use super::spawn::RestartPolicy;
use super::supervisor::Supervisor;

/// The values that are moved to the actor's thread.
pub(super) struct ThreadBody<A: Actor, F> {
    pub(super) mailbox: Arc<Mailbox<A>>,
    pub(super) handle: Weak<Handle<A>>,
    pub(super) restart: RestartPolicy,
    pub(super) with_io: bool,
    pub(super) factory: F,
}

impl<A, F> ThreadBody<A, F>
where
    A: Actor<Context = Context<A>>,
    F: FnMut() -> A + Send + 'static,
{
    pub(super) fn start(self, thread_name: String) -> std::io::Result<()> {
        let system = background::system_or_background()?;
        let runtime = background::event_loop(self.with_io)?;
        let spawn = |body| {
            thread::Builder::new()
                .name(thread_name)
                .spawn(body)
                .map(drop)
        };
        hand_over(runtime, spawn, move |runtime| self.run(system, runtime))
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

/// What a new thread does.
pub(super) type Body = Box<dyn FnOnce() + Send>;

/// Lets a new thread run with a runtime. If there is no thread, the runtime must not be dropped here: the
/// caller may be asynchronous, and tokio panics then. So it is handed over in a place from which it can be
/// taken back.
pub(super) fn hand_over(
    runtime: tokio::runtime::Runtime,
    spawn: impl FnOnce(Body) -> std::io::Result<()>,
    run: impl FnOnce(tokio::runtime::Runtime) + Send + 'static,
) -> std::io::Result<()> {
    let place = Arc::new(Mutex::new(Some(runtime)));
    let handed_over = Arc::clone(&place);
    let take = |place: &Mutex<Option<tokio::runtime::Runtime>>| {
        let mut place = place.lock().unwrap_or_else(PoisonError::into_inner);
        place.take()
    };
    let started = spawn(Box::new(move || {
        run(take(&handed_over).expect("it is taken back only without this thread"));
    }));
    if started.is_err()
        && let Some(runtime) = take(&place)
    {
        runtime.shutdown_background();
    }
    started
}

/// Frees the actor's name and fails the calls that are left, however the actor's thread ends.
struct FinishOnDrop<A: Actor>(Arc<Mailbox<A>>);

impl<A: Actor> Drop for FinishOnDrop<A> {
    fn drop(&mut self) {
        registry::remove(self.0.id());
        self.0.finish();
    }
}
