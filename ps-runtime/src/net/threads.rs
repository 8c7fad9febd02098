//! The threads that run connections.
//!
//! Each thread has an event loop of its own. Two gradients can arrive on two loops at the same time, and a
//! loop of one thread wakes faster than a work-stealing pool. Actors compute on threads of their own, so a
//! heartbeat never waits for a computation.

use std::future::pending;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;

use tokio::runtime::{Builder, Handle};

/// The largest number of threads. More threads do not make a network faster.
const MAX_THREADS: usize = 4;

static NEXT: AtomicUsize = AtomicUsize::new(0);

/// Starts the threads if they do not run yet.
///
/// # Errors
/// When the system gives no thread at all.
pub(crate) fn ready() -> io::Result<()> {
    all().map(drop)
}

/// Returns the event loop that takes the next connection. The loops take turns.
///
/// # Panics
/// When there are no threads. A caller that can return an error calls [`ready`] first.
pub(crate) fn next() -> Handle {
    let threads = all().unwrap_or_else(|error| {
        panic!(
            "the system gives no thread for the network ({error}): raise the limits on open files \
             (ulimit -n) and threads (ulimit -u)"
        )
    });
    let turn = NEXT.fetch_add(1, Ordering::Relaxed);
    threads[turn % threads.len()].clone()
}

/// Returns all event loops. There is at least one.
fn all() -> io::Result<&'static [Handle]> {
    static THREADS: OnceLock<Vec<Handle>> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());

    if let Some(started) = THREADS.get() {
        return Ok(started);
    }
    let _turn = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(started) = THREADS.get() {
        return Ok(started);
    }
    let cores = thread::available_parallelism().map_or(1, usize::from);
    // If the system gives fewer threads, fewer are used. At least one is needed.
    let mut started = vec![start(0)?];
    started.extend((1..cores.min(MAX_THREADS)).filter_map(|index| start(index).ok()));
    Ok(THREADS.get_or_init(|| started))
}

fn start(index: usize) -> io::Result<Handle> {
    let (started, start) = mpsc::channel();
    thread::Builder::new()
        .name(format!("ps-net-{index}"))
        .spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => {
                    // This cannot fail: the receiver waits for it.
                    let _ = started.send(Ok(runtime.handle().clone()));
                    runtime.block_on(pending::<()>());
                }
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
    start.recv().map_err(io::Error::other)?
}

/// Whether this is one of these threads, which must not block.
pub(crate) fn is_current() -> bool {
    thread::current()
        .name()
        .is_some_and(|name| name.starts_with("ps-net-"))
}
