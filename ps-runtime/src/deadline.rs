//! The time by which a handler must have begun.

use std::time::{Duration, Instant};

/// A time limit, and the time of this process's clock at which it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    /// The limit, for errors.
    after: Duration,
    at: Instant,
}

impl Deadline {
    /// Returns `None` when the clock cannot represent the end of the limit. Then there is no limit.
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

    /// The time that is left of the limit.
    pub(crate) fn remaining(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }
}

/// Returns `from + after`. If the clock cannot represent that time, it returns a time decades later.
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
