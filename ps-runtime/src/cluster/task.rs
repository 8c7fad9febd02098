//! Something that is under way on the network's threads.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use crate::actor::background::block_on;
use crate::net::threads;

/// A result that is under way: await it, or [`wait`](Self::wait) for it. It was begun at once, and
/// goes on if this is dropped.
#[must_use = "await it, or wait for it"]
pub struct Task<T> {
    result: oneshot::Receiver<T>,
}

impl<T: Send + 'static> Task<T> {
    /// Starts it.
    ///
    /// # Panics
    /// When the system gives no thread for the network.
    pub(crate) fn start(work: impl Future<Output = T> + Send + 'static) -> Self {
        let (sender, result) = oneshot::channel();
        threads::next().spawn(async move {
            // Nobody may wait any more.
            let _ = sender.send(work.await);
        });
        Self { result }
    }

    /// As [`start`](Self::start), for whoever may be the first to need the network's threads.
    pub(crate) fn try_start(
        work: impl Future<Output = T> + Send + 'static,
        failed: impl FnOnce(io::Error) -> T,
    ) -> Self {
        match threads::ready() {
            Ok(()) => Self::start(work),
            Err(error) => Self::ready(failed(error)),
        }
    }

    /// Something that is over already.
    pub(crate) fn ready(output: T) -> Self {
        let (sender, result) = oneshot::channel();
        // The receiver is here.
        let _ = sender.send(output);
        Self { result }
    }

    /// Blocks this thread until the result is there.
    ///
    /// # Panics
    /// When the work has panicked.
    pub fn wait(self) -> T {
        block_on(self, None).expect("there is no deadline")
    }
}

impl<T> Future for Task<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let result = Pin::new(&mut self.result).poll(cx);
        result.map(|result| result.expect("the task ends with a result unless it panics"))
    }
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Task")
    }
}
