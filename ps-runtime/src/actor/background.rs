//! The actor that a thread belongs to, blocking waits, and the helper thread that runs timers.
//!
//! Timeouts run on one background event loop, not on the caller's. Therefore they work if the caller
//! has no event loop, or blocks its event loop. They measure real time even if a test has paused
//! tokio's clock, because the actor that they wait for works in real time, too.

use std::any::Any;
use std::cell::RefCell;
use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError, Weak, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use actix::System;
use tokio::runtime::{Handle, Runtime};
use tokio::task::AbortHandle;
use tokio::time::Sleep;

use super::book::ActorId;
use crate::busy_poll::BusyPoll;

thread_local! {
    static ACTOR: RefCell<Option<(ActorId, Weak<dyn Any + Send + Sync>)>> =
        const { RefCell::new(None) };
}

/// Records that this thread belongs to an actor.
pub(crate) fn enter_actor_thread(id: ActorId, handle: Weak<dyn Any + Send + Sync>) {
    ACTOR.set(Some((id, handle)));
}

/// The actor that this thread belongs to.
pub(crate) fn current_actor() -> Option<ActorId> {
    ACTOR.with_borrow(|actor| actor.as_ref().map(|(id, _)| *id))
}

/// The shared data of the references to the actor that this thread belongs to, while there are any.
pub(crate) fn current_handle() -> Option<Arc<dyn Any + Send + Sync>> {
    ACTOR.with_borrow(|actor| actor.as_ref().and_then(|(_, handle)| handle.upgrade()))
}

/// Runs a future to its end on this thread, with an actix system around it.
///
/// Use it in programs without `#[actix::main]`.
///
/// ```
/// let sum = ps_runtime::actor::run(async { 40 + 2 });
/// assert_eq!(sum, 42);
/// ```
///
/// # Panics
/// When it is called from asynchronous code, or when the system gives no event loop. [`try_run`] returns
/// an error in the second case.
pub fn run<F: Future>(future: F) -> F::Output {
    try_run(future).unwrap_or_else(|error| {
        panic!(
            "the system gives no event loop ({error}): raise the limit on open files (ulimit -n)"
        )
    })
}

/// Like [`run`], and returns an error if the system gives no event loop.
///
/// ```
/// let sum = ps_runtime::actor::try_run(async { 40 + 2 })?;
/// assert_eq!(sum, 42);
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// # Errors
/// When there are no file descriptors for the event loop. The future is dropped.
///
/// # Panics
/// When it is called from asynchronous code.
pub fn try_run<F: Future>(future: F) -> io::Result<F::Output> {
    let runtime = event_loop(true)?;
    Ok(System::with_tokio_rt(|| runtime).block_on(future))
}

/// Polls a future on this thread until it is ready or the deadline has passed.
///
/// It works with and without an event loop on this thread.
pub(crate) fn block_on<F: Future>(future: F, deadline: Option<Instant>) -> Option<F::Output> {
    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut cx = Context::from_waker(&waker);
    let busy_polling = BusyPoll::begin();
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
            return Some(output);
        }
        let left = match deadline {
            None => None,
            Some(deadline) => match deadline.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => return None,
            },
        };
        if busy_polling.goes_on() {
            continue;
        }
        match left {
            None => thread::park(),
            Some(left) => thread::park_timeout(left),
        }
    }
}

/// Makes an event loop for one thread, with timers. If `with_io`, it also has sockets, which take four
/// file descriptors.
pub(crate) fn event_loop(with_io: bool) -> io::Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    if with_io {
        builder.enable_io();
    }
    builder.enable_time().build()
}

/// The actix system that is current on this thread, else the background system. The background system
/// is started in any case.
pub(crate) fn system_or_background() -> io::Result<System> {
    let (system, _) = background()?;
    Ok(System::try_current().unwrap_or(system))
}

/// A timer on the background event loop.
pub(crate) fn sleep_until(deadline: Instant) -> Sleep {
    let (_, runtime) = background().expect("the background loop runs since the first spawn");
    let _inside = runtime.enter();
    tokio::time::sleep_until(deadline.into())
}

/// Returns a timer that works on any thread, with or without an event loop, and measures real time.
///
/// # Panics
/// When the process has never started an actor, and the system gives no thread for the timer.
pub fn sleep(time: Duration) -> impl Future<Output = ()> + Send + 'static {
    let (_, runtime) = background().expect("the background loop runs since the first spawn");
    let _inside = runtime.enter();
    tokio::time::sleep(time)
}

/// A task that runs in the background until this is dropped.
#[derive(Debug)]
#[must_use = "it ends when this is dropped"]
pub struct Background(AbortHandle);

impl Drop for Background {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts a task on the event loop that runs all timers. The task must never block its thread.
///
/// ```
/// use std::sync::mpsc;
/// use std::time::Duration;
///
/// use ps_runtime::actor::{in_background, sleep};
///
/// let (sender, ticks) = mpsc::channel();
/// let ticking = in_background(async move {
///     while sender.send("tick").is_ok() {
///         sleep(Duration::from_millis(1)).await;
///     }
/// });
/// assert_eq!(ticks.recv()?, "tick");
/// assert_eq!(ticks.recv()?, "tick");
/// drop(ticking); // It ends here.
/// # Ok::<(), mpsc::RecvError>(())
/// ```
///
/// # Panics
/// When the process has never started an actor, and the system gives no thread for the event loop.
pub fn in_background(task: impl Future<Output = ()> + Send + 'static) -> Background {
    let (_, runtime) = background().expect("the background loop runs since the first spawn");
    Background(runtime.spawn(task).abort_handle())
}

/// The background system and its event loop. They are started at first use and live as long as the
/// process.
fn background() -> io::Result<(System, Handle)> {
    static BACKGROUND: Mutex<Option<(System, Handle)>> = Mutex::new(None);

    let mut background = BACKGROUND.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(running) = &*background {
        return Ok(running.clone());
    }
    let runtime = event_loop(true)?;
    let (started, start) = mpsc::channel();
    thread::Builder::new()
        .name("ps-background".to_owned())
        .spawn(move || {
            let handle = runtime.handle().clone();
            let runner = System::with_tokio_rt(|| runtime);
            // This cannot fail: the receiver waits for it.
            let _ = started.send((System::current(), handle));
            // Not `runner.run()`: an actor that stops "its" system must not stop all timers.
            runner.block_on(pending::<()>());
        })?;
    let running = start.recv().map_err(io::Error::other)?;
    *background = Some(running.clone());
    Ok(running)
}
