//! Admission control of large calls: decides which large calls to one actor are read at the same time.
//!
//! If several callers send a gradient at the same time, each would take a buffer, and so would each
//! snapshot that goes back. On a fast network nothing is gained by that. So large calls to one actor are
//! read one after the other: the next one is read when the handler of the last one has returned and no
//! more than one large reply is still to be written. A call that is not read waits in the network, which
//! stops its sender.
//!
//! A call never waits longer than a fast link needs for a few such messages. If its wait ends without
//! success, no call waits for some time. So a slow or stalled sender costs the others memory, but not
//! time. Replies never wait, because their callers have memory for them. So two processes never wait for
//! each other.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::Instant;

/// Messages with fewer numbers than this do not wait.
const LARGE: usize = 1 << 18;

/// The speed of a fast link in numbers per microsecond (1 GB/s). On a slower link, reading several messages
/// at the same time is faster.
const FAST: u64 = 250;

/// A call waits for at most the time that this many messages of its size take on a fast link.
const MAX_AHEAD: u32 = 8;

/// How many large replies may still have to be written when the next large message is read.
const MAX_SENDING: usize = 1;

/// After a wait without success, no call waits for this many times the length of that wait.
const REST: u32 = 16;

/// The admission control of one actor.
#[derive(Debug)]
pub(crate) struct Admission {
    admitted: Arc<Semaphore>,
    num_sending: watch::Sender<usize>,
    rests_until: Mutex<Option<Instant>>,
    /// The longest wait. With longer waits a connection could lose its process lease.
    longest: Duration,
}

/// The admission of one large call. Dropping it admits the next one.
#[derive(Debug)]
pub(crate) struct Admitted(#[expect(dead_code, reason = "held for its drop")] OwnedSemaphorePermit);

/// Counts a large reply that is not written yet, until it is dropped.
#[derive(Debug)]
pub(crate) struct Sending(Arc<Admission>);

impl Admission {
    /// `longest` bounds every wait.
    pub(crate) fn new(longest: Duration) -> Arc<Self> {
        Arc::new(Self {
            admitted: Arc::new(Semaphore::new(1)),
            num_sending: watch::Sender::new(0),
            rests_until: Mutex::new(None),
            longest,
        })
    }

    /// Waits until a call with this many numbers is admitted. Returns `None` if the call needs no admission,
    /// or if its wait has ended without success.
    pub(super) async fn admit(&self, num_numbers: usize) -> Option<Admitted> {
        if num_numbers < LARGE {
            return None;
        }
        let limit = self.limit(num_numbers);
        let wait = async {
            // The semaphore is never closed.
            let admitted = Arc::clone(&self.admitted).acquire_owned().await.ok()?;
            let mut num_sending = self.num_sending.subscribe();
            num_sending.wait_for(|num| *num <= MAX_SENDING).await.ok()?;
            Some(Admitted(admitted))
        };
        let limit = if self.rests() { Duration::ZERO } else { limit };
        let begin = Instant::now();
        let admitted = tokio::time::timeout(limit, wait).await.ok().flatten();
        if admitted.is_none() && !limit.is_zero() {
            let until = Instant::now() + REST * begin.elapsed();
            *self.lock() = Some(until);
        }
        admitted
    }

    fn limit(&self, num_numbers: usize) -> Duration {
        let at_best = Duration::from_micros(num_numbers as u64 / FAST);
        (MAX_AHEAD * at_best).min(self.longest)
    }

    fn rests(&self) -> bool {
        self.lock().is_some_and(|until| Instant::now() < until)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        // A single value, so it is always whole.
        self.rests_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a reply with this many numbers until it is written, if it is large.
    pub(crate) fn sending(self: &Arc<Self>, num_numbers: usize) -> Option<Sending> {
        (num_numbers >= LARGE).then(|| {
            self.num_sending.send_modify(|num| *num += 1);
            Sending(Arc::clone(self))
        })
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.num_sending.send_modify(|num| *num -= 1);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const FOREVER: Duration = Duration::from_secs(3600);

    fn admission(longest: Duration) -> Arc<Admission> {
        Admission::new(longest)
    }

    /// So large that no call goes on without admission while the test runs.
    const HUGE: usize = 1 << 40;

    ///
    #[tokio::test]
    async fn large_messages_come_one_after_the_other_and_small_ones_at_any_time() {
        let admission = admission(FOREVER);
        let first = admission.admit(HUGE).await.expect("nobody is before it");
        let mut second = Box::pin(admission.admit(HUGE));
        let mut third = Box::pin(admission.admit(HUGE));
        assert!(second.as_mut().now_or_never().is_none());
        assert!(third.as_mut().now_or_never().is_none());
        let small = admission.admit(LARGE - 1).now_or_never();
        assert!(small.expect("it does not wait").is_none());
        drop(first);
        let admitted = second.await.expect("first come, first served");
        assert!(third.as_mut().now_or_never().is_none());
        drop(admitted);
        assert!(third.await.is_some());
    }

    ///
    #[tokio::test]
    async fn nothing_large_is_read_while_two_large_replies_are_to_be_written() {
        let admission = admission(FOREVER);
        let first = admission.sending(LARGE).expect("it is large");
        assert!(admission.sending(LARGE - 1).is_none());
        drop(
            admission
                .admit(HUGE)
                .await
                .expect("one reply is no hindrance"),
        );
        let second = admission.sending(LARGE).expect("it is large");
        let mut admitted = Box::pin(admission.admit(HUGE));
        assert!(admitted.as_mut().now_or_never().is_none());
        drop(first);
        assert!(admitted.await.is_some());
        drop(second);
    }

    ///
    #[tokio::test(start_paused = true)]
    async fn a_stalled_sender_holds_the_others_up_once_and_not_for_long() {
        let longest = Duration::from_millis(20);
        let admission = admission(longest);
        let stalled = admission.admit(HUGE).await;
        assert!(stalled.is_some());
        let begin = Instant::now();
        assert!(admission.admit(HUGE).await.is_none(), "it goes on without");
        assert_eq!(begin.elapsed().as_millis(), longest.as_millis());
        for _ in 0..10 {
            assert!(admission.admit(HUGE).await.is_none());
        }
        assert_eq!(begin.elapsed().as_millis(), longest.as_millis());
        tokio::time::advance(REST * longest).await;
        assert!(admission.admit(HUGE).await.is_none(), "it waits again");
        assert!(begin.elapsed() >= (REST + 2) * longest);
        drop(stalled);
        assert!(admission.admit(HUGE).await.is_some());
    }

    ///
    #[test]
    fn a_wait_is_as_long_as_a_few_messages_take_on_a_fast_link() {
        let admission = admission(Duration::from_secs(1));
        assert_eq!(admission.limit(25_000_000), Duration::from_millis(800));
        assert_eq!(admission.limit(HUGE), Duration::from_secs(1));
    }
}
