//! The time by which a handler must have begun.

use std::time::{Duration, Instant};

/// A time limit, and when it is over on this process's clock.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    /// What the limit was, for errors.
    after: Duration,
    at: Instant,
}

impl Deadline {
    /// `None` when the limit is beyond the end of time, which is no limit.
    pub(crate) fn within(after: Duration) -> Option<Self> {
        let at = Instant::now().checked_add(after)?;
        Some(Self { after, at })
    }

    pub(crate) fn after(&self) -> Duration {
        self.after
    }

    pub(crate) fn is_over(&self) -> bool {
        Instant::now() >= self.at
    }

    /// What is left of the limit.
    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

/// When a time is over; of the longest times, decades from now: there is no later instant than some.
pub(crate) fn latest(from: Instant, after: Duration) -> Instant {
    const DECADES: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
    from.checked_add(after).unwrap_or(from + DECADES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_time_is_over_much_later() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(latest(now, second), now + second);
        assert!(latest(now, Duration::MAX) > now + 1_000_000 * second);
    }
}
