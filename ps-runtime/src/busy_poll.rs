//! Busy-polls for a moment before a thread sleeps, because replies and frames often come soon.
//!
//! Waking a thread that sleeps on an idle core costs more than all the work of a small call. So a
//! thread that waits for a reply, or for the next frame after a small one, polls for 100 microseconds
//! and yields the processor between two polls. If other threads compute, a yield can take long. After
//! such a yield the thread sleeps at once, without busy-polling, for 16 times as long as the yield took.
//! So it loses only a small part of its time. A thread busy-polls only if it had traffic just before.

use std::cell::{Cell, RefCell};
use std::sync::LazyLock;
use std::task::Context;
use std::thread;
use std::time::{Duration, Instant};

/// How long to busy-poll: twice the time from one small call to another process to the next. With less,
/// a server falls asleep just before the next call.
const AWAKE: Duration = Duration::from_micros(100);

/// If a yield takes longer than this, other threads compute on this processor.
const CROWDED: Duration = Duration::from_micros(250);

/// After a long yield, the thread does not busy-poll for this many times the length of the yield.
const REST: u32 = 16;

thread_local! {
    static PATIENCE: RefCell<Patience> = const { RefCell::new(Patience { rests_until: None }) };
}

/// Whether a thread may busy-poll.
struct Patience {
    rests_until: Option<Instant>,
}

impl Patience {
    fn may_busy_poll(&self, now: Instant) -> bool {
        self.rests_until.is_none_or(|until| now >= until)
    }

    /// Records how long a yield took: from `offered` to `back`.
    fn note(&mut self, offered: Instant, back: Instant) {
        let away = back - offered;
        if away > CROWDED {
            self.rests_until = Some(back + REST * away);
        }
    }
}

/// One wait, before it becomes a sleep.
#[derive(Debug)]
pub(crate) struct BusyPoll {
    until: Instant,
}

impl BusyPoll {
    pub(crate) fn begin() -> Self {
        Self {
            until: Instant::now() + AWAKE,
        }
    }

    /// Yields the processor and returns `true`, or returns `false` when it is time to sleep.
    pub(crate) fn goes_on(&self) -> bool {
        // With one core, the awaited work could not be done while this thread polls.
        static HAS_CORES: LazyLock<bool> =
            LazyLock::new(|| thread::available_parallelism().is_ok_and(|cores| cores.get() > 1));

        let now = Instant::now();
        let may_busy_poll = || PATIENCE.with_borrow(|patience| patience.may_busy_poll(now));
        if now >= self.until || !*HAS_CORES || !may_busy_poll() {
            return false;
        }
        thread::yield_now();
        PATIENCE.with_borrow_mut(|patience| patience.note(now, Instant::now()));
        true
    }
}

/// The wait of a future. The future asks to be polled again at once, and its event loop runs all other
/// tasks between two polls.
///
/// Only one future per thread busy-polls at a time: with many calls under way, the others need not.
#[derive(Debug, Default)]
pub(crate) enum Awaiting {
    #[default]
    Begins,
    BusyPolls(BusyPoll),
    Sleeps,
}

thread_local! {
    /// The time until which a future of this thread busy-polls.
    static TAKEN_UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

impl Awaiting {
    /// Must be called by each poll that found nothing.
    pub(crate) fn stay_awake(&mut self, cx: &Context<'_>) {
        if let Self::Begins = self {
            let begun = BusyPoll::begin();
            let is_taken = TAKEN_UNTIL
                .get()
                .is_some_and(|until| Instant::now() < until);
            *self = match is_taken {
                true => Self::Sleeps,
                false => {
                    TAKEN_UNTIL.set(Some(begun.until));
                    Self::BusyPolls(begun)
                }
            };
        }
        if let Self::BusyPolls(busy_polling) = self {
            match busy_polling.goes_on() {
                true => cx.waker().wake_by_ref(),
                false => *self = Self::Sleeps,
            }
        }
    }

    /// Must be called when the wait is over.
    pub(crate) fn is_over(&mut self) {
        if let Self::BusyPolls(_) = std::mem::replace(self, Self::Sleeps) {
            TAKEN_UNTIL.set(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::*;

    #[test]
    fn a_thread_that_was_kept_from_the_processor_does_not_busy_poll_for_a_while() {
        let mut patience = Patience { rests_until: None };
        let start = Instant::now();
        let at = |micros| start + Duration::from_micros(micros);
        patience.note(at(0), at(100));
        assert!(
            patience.may_busy_poll(at(100)),
            "the other side of the call had the processor"
        );
        patience.note(at(100), at(3_100));
        assert!(!patience.may_busy_poll(at(3_100)));
        assert!(!patience.may_busy_poll(at(3_100 + 16 * 3_000 - 1)));
        assert!(patience.may_busy_poll(at(3_100 + 16 * 3_000)));
    }

    #[test]
    fn busy_polling_ends() {
        let busy_polling = BusyPoll::begin();
        while busy_polling.goes_on() {}
        let over = BusyPoll {
            until: Instant::now(),
        };
        assert!(!over.goes_on());
    }

    #[derive(Default)]
    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn one_future_of_a_thread_busy_polls_at_a_time_and_none_for_ever() {
        let wakes = Arc::new(Wakes::default());
        let waker = Waker::from(Arc::clone(&wakes));
        let cx = Context::from_waker(&waker);
        let (mut first, mut second) = (Awaiting::default(), Awaiting::default());
        let mut num_polls = 0;
        while !matches!(first, Awaiting::Sleeps) {
            first.stay_awake(&cx);
            num_polls += 1;
        }
        // All but the last poll asked for another one.
        assert_eq!(wakes.0.load(Ordering::Relaxed), num_polls - 1);
        first.stay_awake(&cx);
        assert_eq!(wakes.0.load(Ordering::Relaxed), num_polls - 1);

        TAKEN_UNTIL.set(Some(Instant::now() + Duration::from_secs(3600)));
        second.stay_awake(&cx);
        assert!(matches!(second, Awaiting::Sleeps));

        let mut third = Awaiting::BusyPolls(BusyPoll::begin());
        third.is_over();
        assert_eq!(TAKEN_UNTIL.get(), None, "the next one may busy_poll");
    }
}
