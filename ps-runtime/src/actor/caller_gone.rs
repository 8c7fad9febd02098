//! Tells a handler that nobody waits for its result any more.
//!
//! A handler that has begun goes on even if its caller gives up (A-6). It then keeps its slot (A-7)
//! and its memory. A handler that may wait for a long time, or for ever, can watch its caller here
//! and end by itself (A-23).

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

/// Becomes ready when nobody waits for the result of a call any more. See [`caller_gone`].
///
/// That is the case when the reply was dropped or timed out, or when the connection that the call
/// came on is lost. If the call ends first, this future stays pending for ever. It also stays pending
/// for a message that was sent with [`tell`](super::ActorRef::tell), because nobody waits for its
/// result.
#[derive(Debug)]
#[must_use = "a future does nothing unless it is polled"]
pub struct CallerGone(Option<oneshot::Receiver<()>>);

impl CallerGone {
    pub(super) fn never() -> Self {
        Self(None)
    }

    pub(super) fn already() -> Self {
        let (gone, caller) = oneshot::channel();
        // This cannot fail: `caller` is the receiver and still exists.
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

/// Returns a future that becomes ready when nobody waits any more for the result of the call that is
/// being handled.
///
/// Use it in a handler that may wait for long: its asynchronous response can end when this future is
/// ready, and so give its slot back. Call this function inside [`handle`](actix::Handler::handle)
/// itself, not in the response; elsewhere the future never becomes ready. It works in the same way
/// for callers in other processes.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message, ResponseFuture};
/// # use ps_runtime::actor;
/// # struct Patient;
/// # impl Actor for Patient { type Context = Context<Self>; }
/// # #[derive(Message)]
/// # #[rtype(result = "()")]
/// # struct Wait;
/// # #[derive(Message)]
/// # #[rtype(result = "usize")]
/// # struct Pending;
/// # impl Handler<Pending> for Patient {
/// #     type Result = usize;
/// #     fn handle(&mut self, _: Pending, _: &mut Context<Self>) -> usize {
/// #         actor::ActorRef::<Self>::current().map_or(0, |this| this.pending())
/// #     }
/// # }
/// impl Handler<Wait> for Patient {
///     type Result = ResponseFuture<()>;
///
///     fn handle(&mut self, _: Wait, _: &mut Context<Self>) -> Self::Result {
///         let gone = actor::caller_gone();
///         Box::pin(async move {
///             tokio::select! {
///                 () = std::future::pending() => {}
///                 () = gone => {} // The response ends, and its slot is free.
///             }
///         })
///     }
/// }
///
/// let actor = actor::spawn(|| Patient);
/// let wait = actor.ask(Wait);
/// // The running `Wait` and this call itself take a slot each.
/// assert_eq!(actor.ask(Pending).wait()?, 2);
/// drop(wait);
/// while actor.pending() > 0 {
///     std::thread::yield_now();
/// }
/// # Ok::<(), actor::CallError>(())
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

/// The futures to wake when the caller of one call has gone.
#[derive(Debug, Default)]
pub(super) struct Watchers(Vec<oneshot::Sender<()>>);

impl Watchers {
    pub(super) fn add(&mut self) -> CallerGone {
        let (gone, caller) = oneshot::channel();
        self.0.push(gone);
        CallerGone(Some(caller))
    }

    /// Makes all of them ready. This wakes tasks, so it must not be called under a lock.
    pub(super) fn tell(self) {
        for watcher in self.0 {
            // If the future was dropped, nobody has to be told.
            let _ = watcher.send(());
        }
    }
}
