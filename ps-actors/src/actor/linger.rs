//! Staying awake for a moment, because what a thread waits for often comes at once.
//!
//! Waking a thread that sleeps on an idle core costs more than all the work of a small call. So who
//! waits for a reply, or for the next frame after a small one, looks again and again for some ten
//! microseconds, and offers the processor to everybody else in between. Where others
//! compute, such an offer costs a turn: the thread then goes to sleep at once for a while, so that what
//! it loses is a small part of its time. Nobody lingers without having had traffic just before.

use std::cell::RefCell;
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

/// How long to stay awake: somewhat longer than a small call to another process takes.
const AWAKE: Duration = Duration::from_micros(50);

/// Who gets the processor back only after this long has met somebody that computes.
const CROWDED: Duration = Duration::from_micros(250);

/// How many times as long as it was kept from the processor a thread then does not linger.
const REST: u32 = 16;

thread_local! {
    static PATIENCE: RefCell<Patience> = const { RefCell::new(Patience { rests_until: None }) };
}

/// Whether a thread may linger.
struct Patience {
    rests_until: Option<Instant>,
}

impl Patience {
    fn may_linger(&self, now: Instant) -> bool {
        self.rests_until.is_none_or(|until| now >= until)
    }

    /// Notes how long it took to get the processor back after it was offered to others.
    fn note(&mut self, offered: Instant, back: Instant) {
        let away = back - offered;
        if away > CROWDED {
            self.rests_until = Some(back + REST * away);
        }
    }
}

/// One wait, before it becomes a sleep.
pub(crate) struct Lingering {
    until: Instant,
}

impl Lingering {
    pub(crate) fn begin() -> Self {
        Self {
            until: Instant::now() + AWAKE,
        }
    }

    /// Offers the processor to others and returns true, or false when it is time to sleep.
    pub(crate) fn goes_on(&self) -> bool {
        // With one core, what is waited for could not be made meanwhile.
        static HAS_CORES: LazyLock<bool> =
            LazyLock::new(|| thread::available_parallelism().is_ok_and(|cores| cores.get() > 1));

        let now = Instant::now();
        let may_linger = || PATIENCE.with_borrow(|patience| patience.may_linger(now));
        if now >= self.until || !*HAS_CORES || !may_linger() {
            return false;
        }
        thread::yield_now();
        PATIENCE.with_borrow_mut(|patience| patience.note(now, Instant::now()));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_was_kept_from_the_processor_does_not_linger_for_a_while() {
        let mut patience = Patience { rests_until: None };
        let start = Instant::now();
        let at = |micros| start + Duration::from_micros(micros);
        patience.note(at(0), at(100));
        assert!(
            patience.may_linger(at(100)),
            "the other side of the call had the processor"
        );
        patience.note(at(100), at(3_100));
        assert!(!patience.may_linger(at(3_100)));
        assert!(!patience.may_linger(at(3_100 + 16 * 3_000 - 1)));
        assert!(patience.may_linger(at(3_100 + 16 * 3_000)));
    }

    #[test]
    fn lingering_ends() {
        let lingering = Lingering::begin();
        while lingering.goes_on() {}
        let over = Lingering {
            until: Instant::now(),
        };
        assert!(!over.goes_on());
    }
}
