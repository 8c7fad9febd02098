//! The threads that connections live on.
//!
//! Each is an event loop of its own: on two loops two gradients arrive at once, and a loop of one
//! thread wakes faster than a pool that steals work. Actors compute on threads of their own, so
//! a heartbeat never waits for a gradient.

use std::future::pending;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, mpsc};
use std::thread;

use tokio::runtime::{Builder, Handle};

/// More do not make a network faster.
const MAX_THREADS: usize = 4;

static NEXT: AtomicUsize = AtomicUsize::new(0);

/// The event loop whose turn it is to take a connection.
pub(crate) fn next() -> Handle {
    let threads = all();
    let turn = NEXT.fetch_add(1, Ordering::Relaxed);
    threads[turn % threads.len()].clone()
}

/// All event loops; at least one.
fn all() -> &'static [Handle] {
    static THREADS: LazyLock<Vec<Handle>> = LazyLock::new(|| {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let started = (0..cores.min(MAX_THREADS)).map(start);
        // Where threads are short, fewer do; without any, no process could do anything at all.
        let started: Vec<_> = started.filter_map(Result::ok).collect();
        assert!(
            !started.is_empty(),
            "the system gives no thread for the network"
        );
        started
    });
    &THREADS
}

fn start(index: usize) -> io::Result<Handle> {
    let (started, start) = mpsc::channel();
    thread::Builder::new()
        .name(format!("ps-net-{index}"))
        .spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build();
            match runtime {
                Ok(runtime) => {
                    // The receiver waits for this, so it is there.
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
