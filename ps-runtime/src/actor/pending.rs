//! A set of calls that are under way. It returns them in the order in which they end; Ray's `wait`.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::Stream;
use futures_util::stream::{FuturesUnordered, StreamExt};

use super::background;
use super::book::ActorId;
use super::error::{CallError, NoReply};
use super::reply::Reply;

/// A set of replies that returns them in the order in which they become ready. The caller gives each
/// reply a key.
///
/// Inserting a reply and taking the next one cost the same for any number of replies. If the set is
/// dropped, its replies are dropped, so calls that have not begun are taken back.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # use ps_runtime::{Pending, spawn};
/// # struct Doubler;
/// # impl Actor for Doubler { type Context = Context<Self>; }
/// # #[derive(Message)]
/// # #[rtype(result = "u64")]
/// # struct Double(u64);
/// # impl Handler<Double> for Doubler {
/// #     type Result = u64;
/// #     fn handle(&mut self, message: Double, _: &mut Context<Self>) -> u64 { 2 * message.0 }
/// # }
/// let workers = [spawn(|| Doubler), spawn(|| Doubler)];
/// let mut pending = Pending::new();
/// for (index, worker) in workers.iter().enumerate() {
///     pending.insert(index, worker.ask(Double(21)));
/// }
/// while let Some((index, result)) = pending.wait_next() {
///     assert!(index < 2);
///     assert_eq!(result?, 42);
/// }
/// # Ok::<(), ps_runtime::CallError>(())
/// ```
pub struct Pending<K, R> {
    replies: FuturesUnordered<Keyed<K, R>>,
    /// How many replies of each actor the set waits for. It shows which replies a blocking wait on an
    /// actor's thread can never get.
    targets: HashMap<ActorId, usize>,
}

struct Keyed<K, R> {
    key: Option<K>,
    target: Option<ActorId>,
    reply: Reply<R>,
}

// The key is moved out, never pinned, and a reply is `Unpin`.
impl<K, R> Unpin for Keyed<K, R> {}

impl<K, R> Future for Keyed<K, R> {
    type Output = (K, Option<ActorId>, Result<R, CallError>);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        match Pin::new(&mut this.reply).poll(cx) {
            Poll::Ready(result) => {
                let key = this.key.take().expect("a reply is ready once");
                Poll::Ready((key, this.target, result))
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<K, R> Pending<K, R> {
    /// Makes an empty set.
    pub fn new() -> Self {
        Self {
            replies: FuturesUnordered::new(),
            targets: HashMap::new(),
        }
    }

    /// Adds a reply. Several replies may have the same key.
    pub fn insert(&mut self, key: K, reply: Reply<R>) {
        let target = reply.target();
        if let Some(target) = target {
            *self.targets.entry(target).or_default() += 1;
        }
        self.replies.push(Keyed {
            key: Some(key),
            target,
            reply,
        });
    }

    /// Waits until the next reply is ready, and returns it. Returns `None` if the set is empty.
    ///
    /// If the returned future is dropped, no reply is lost.
    pub async fn next(&mut self) -> Option<(K, Result<R, CallError>)> {
        StreamExt::next(self).await
    }

    /// Blocks this thread until the next reply is ready. Returns `None` if the set is empty.
    ///
    /// On an actor's thread, replies of that same actor fail as in [`Reply::wait`].
    pub fn wait_next(&mut self) -> Option<(K, Result<R, CallError>)> {
        self.wait_until(None).flatten()
    }

    /// Blocks like [`wait_next`](Self::wait_next), but no longer than `timeout`. If no reply arrives in
    /// time, all replies stay in the set.
    ///
    /// ```
    /// # use actix::{Actor, Context, Handler, Message};
    /// # use ps_runtime::{Pending, spawn};
    /// # use std::sync::mpsc;
    /// # struct Waiter;
    /// # impl Actor for Waiter { type Context = Context<Self>; }
    /// # #[derive(Message)]
    /// # #[rtype(result = "u64")]
    /// # struct Until(mpsc::Receiver<u64>);
    /// # impl Handler<Until> for Waiter {
    /// #     type Result = u64;
    /// #     fn handle(&mut self, Until(told): Until, _: &mut Context<Self>) -> u64 { told.recv().unwrap_or(0) }
    /// # }
    /// use std::time::Duration;
    ///
    /// let waiter = spawn(|| Waiter);
    /// let (sender, receiver) = mpsc::channel();
    /// let mut pending = Pending::new();
    /// // The handler of `Until` returns what the channel brings.
    /// pending.insert("slow", waiter.ask(Until(receiver)));
    /// let error = pending.wait_next_timeout(Duration::from_millis(10)).unwrap_err();
    /// assert_eq!(error.num_out, 1); // The call is still under way.
    ///
    /// sender.send(7)?;
    /// let (key, result) = pending.wait_next_timeout(Duration::from_secs(60))?.expect("there is one");
    /// assert_eq!((key, result?), ("slow", 7));
    /// assert!(pending.wait_next_timeout(Duration::ZERO)?.is_none()); // The set is empty.
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// When no reply has arrived in time.
    #[allow(
        clippy::type_complexity,
        reason = "what `wait_next` returns, or an error"
    )]
    pub fn wait_next_timeout(
        &mut self,
        timeout: Duration,
    ) -> Result<Option<(K, Result<R, CallError>)>, NoReply> {
        // A deadline beyond the end of time is none.
        let deadline = Instant::now().checked_add(timeout);
        self.wait_until(deadline).ok_or_else(|| NoReply {
            after: timeout,
            num_out: self.len(),
        })
    }

    /// `None` when the time is over.
    #[allow(
        clippy::type_complexity,
        reason = "as above, and `None` when the time is over"
    )]
    fn wait_until(
        &mut self,
        deadline: Option<Instant>,
    ) -> Option<Option<(K, Result<R, CallError>)>> {
        if let Some(current) = background::current_actor()
            && self.targets.remove(&current).is_some()
        {
            self.refuse_to_block_on(current);
        }
        background::block_on(StreamExt::next(self), deadline)
    }

    /// How many replies the set waits for.
    pub fn len(&self) -> usize {
        self.replies.len()
    }

    /// Whether the set waits for no reply.
    pub fn is_empty(&self) -> bool {
        self.replies.is_empty()
    }

    /// The keys of the replies that the set waits for, in no particular order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.replies.iter().filter_map(|keyed| keyed.key.as_ref())
    }

    fn refuse_to_block_on(&mut self, current: ActorId) {
        let replies = mem::take(&mut self.replies);
        self.replies.extend(replies.into_iter().map(|mut keyed| {
            if keyed.target == Some(current) {
                keyed.reply.refuse_to_block();
                keyed.target = None;
            }
            keyed
        }));
    }
}

impl<K, R> Stream for Pending<K, R> {
    type Item = (K, Result<R, CallError>);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        let Poll::Ready(next) = this.replies.poll_next_unpin(cx) else {
            return Poll::Pending;
        };
        Poll::Ready(next.map(|(key, target, result)| {
            if let Some(target) = target
                && let Entry::Occupied(mut count) = this.targets.entry(target)
            {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
            (key, result)
        }))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.len(), Some(self.len()))
    }
}

impl<K, R> Default for Pending<K, R> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K, R> Extend<(K, Reply<R>)> for Pending<K, R> {
    fn extend<I: IntoIterator<Item = (K, Reply<R>)>>(&mut self, replies: I) {
        for (key, reply) in replies {
            self.insert(key, reply);
        }
    }
}

impl<K, R> FromIterator<(K, Reply<R>)> for Pending<K, R> {
    fn from_iter<I: IntoIterator<Item = (K, Reply<R>)>>(replies: I) -> Self {
        let mut pending = Self::new();
        pending.extend(replies);
        pending
    }
}

impl<K, R> fmt::Debug for Pending<K, R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pending").field("len", &self.len()).finish()
    }
}
