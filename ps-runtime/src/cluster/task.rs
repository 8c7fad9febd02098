//! Work that runs on the network's threads.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use crate::actor::background::block_on;
use crate::net::threads;

/// A result that is under way. Await it, or block on it with [`wait`](Self::wait). The work starts at
/// once, and goes on if this is dropped.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # use ps_runtime::cluster::Hosted;
/// # use ps_runtime::remote::{Messages, Remote};
/// # use serde::{Deserialize, Serialize};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # #[derive(Message, Serialize, Deserialize)]
/// # #[rtype(result = "u64")]
/// # struct Add(u64);
/// # impl Handler<Add> for Counter {
/// #     type Result = u64;
/// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
/// # }
/// # impl Remote for Counter {
/// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
/// # }
/// # impl Hosted for Counter { type Args = u64; }
/// use ps_runtime::cluster::{Cluster, Hosts};
///
/// let cluster = Cluster::alone(Hosts::new().host(|start: u64| Ok(Counter(start))));
/// // Both start at once.
/// let (first, second) = (cluster.spawn::<Counter>(1), cluster.spawn::<Counter>(2));
/// let (first, second) = (first.wait()?, ps_runtime::actor::run(second)?);
/// assert_eq!(first.ask(Add(0)).wait()? + second.ask(Add(0)).wait()?, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "await it, or wait for it"]
pub struct Task<T> {
    result: oneshot::Receiver<T>,
}

impl<T: Send + 'static> Task<T> {
    /// Starts the work.
    ///
    /// # Panics
    /// When the system gives no thread for the network.
    pub(crate) fn start(work: impl Future<Output = T> + Send + 'static) -> Self {
        let (sender, result) = oneshot::channel();
        threads::next().spawn(async move {
            // This fails if the task was dropped.
            let _ = sender.send(work.await);
        });
        Self { result }
    }

    /// Like [`start`](Self::start), for callers that may be the first to need the network's threads. If
    /// there are no threads, the result is that of `failed`.
    pub(crate) fn try_start(
        work: impl Future<Output = T> + Send + 'static,
        failed: impl FnOnce(io::Error) -> T,
    ) -> Self {
        match threads::ready() {
            Ok(()) => Self::start(work),
            Err(error) => Self::ready(failed(error)),
        }
    }

    /// Makes a task whose result is ready.
    pub(crate) fn ready(output: T) -> Self {
        let (sender, result) = oneshot::channel();
        // This cannot fail: the receiver still exists.
        let _ = sender.send(output);
        Self { result }
    }

    /// Blocks this thread until the result is ready.
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
