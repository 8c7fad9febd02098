//! How a handler learns that nobody waits for its result any more.
//!
//! A handler that has begun goes on (A-6). One that may wait for long, for something that may never
//! come, can ask here for the end of its caller's interest, and end then by itself: it would
//! otherwise keep its slot (A-7) and whatever else it has.

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// Is ready once nobody waits for the result of a call: its reply was dropped or timed out, or the
/// connection that it came on is lost. See [`caller_gone`].
///
/// Stays pending for ever if the call ends before. Of a message that was told, nobody ever waited for
/// a result, so nobody stops to.
#[derive(Debug)]
#[must_use = "a future does nothing unless it is polled"]
pub struct CallerGone(Option<oneshot::Receiver<()>>);

impl CallerGone {
    pub(super) fn never() -> Self {
        Self(None)
    }

    pub(super) fn already() -> Self {
        let (gone, caller) = oneshot::channel();
        // The receiver is right here.
        let _ = gone.send(());
        Self(Some(caller))
    }
}

impl Future for CallerGone {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(caller) = &mut self.0 else {
            return Poll::Pending;
        };
        match Pin::new(caller).poll(cx) {
            Poll::Ready(Ok(())) => Poll::Ready(()),
            Poll::Ready(Err(_the_call_is_over)) => {
                self.0 = None;
                Poll::Pending
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Returns a future that is ready when nobody waits any more for the result of the call whose handler
/// this is.
///
/// For handlers that wait: of such a handler the asynchronous response can end with it, and so give its
/// slot back. It has to be asked for inside of [`handle`](actix::Handler::handle) itself, not in the
/// response; elsewhere it is never ready. Works the same for callers in other processes.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message, ResponseFuture};
/// # use ps_runtime::actor;
/// # struct Patient;
/// # impl Actor for Patient { type Context = Context<Self>; }
/// # #[derive(Message)]
/// # #[rtype(result = "()")]
/// # struct Wait;
/// impl Handler<Wait> for Patient {
///     type Result = ResponseFuture<()>;
///
///     fn handle(&mut self, _: Wait, _: &mut Context<Self>) -> Self::Result {
///         let gone = actor::caller_gone();
///         Box::pin(async move {
///             tokio::select! {
///                 () = std::future::pending() => {}
///                 () = gone => {} // and the slot is free
///             }
///         })
///     }
/// }
/// ```
pub fn caller_gone() -> CallerGone {
    CURRENT.with_borrow(|current| match current {
        Some(call) => call.watch_caller(),
        None => CallerGone::never(),
    })
}

/// A call whose handler is running.
pub(super) trait Watched {
    fn watch_caller(&self) -> CallerGone;
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<dyn Watched>>> = const { RefCell::new(None) };
}

/// Makes a call the current one of this thread until this is dropped.
pub(super) struct Entered(Option<Arc<dyn Watched>>);

impl Entered {
    pub(super) fn call(call: Arc<dyn Watched>) -> Self {
        Self(CURRENT.replace(Some(call)))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let left = CURRENT.replace(self.0.take());
        drop(left);
    }
}

/// Those who want to hear that the caller of one call has gone.
#[derive(Debug, Default)]
pub(super) struct Watchers(Vec<oneshot::Sender<()>>);

impl Watchers {
    pub(super) fn add(&mut self) -> CallerGone {
        let (gone, caller) = oneshot::channel();
        self.0.push(gone);
        CallerGone(Some(caller))
    }

    /// Tells them. Wakes tasks, so never under a lock.
    pub(super) fn tell(self) {
        for watcher in self.0 {
            // Who does not listen any more has ended.
            let _ = watcher.send(());
        }
    }
}
