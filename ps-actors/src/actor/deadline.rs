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
