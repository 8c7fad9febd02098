//! Limits the same log line to one per 5 s.
//!
//! A peer that can cause a line as often as it likes must not fill a disk with it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The least time between two lines of one kind.
const EVERY: Duration = Duration::from_secs(5);

/// One kind of log line.
#[derive(Debug)]
pub(crate) struct Quiet(Mutex<State>);

#[derive(Debug)]
struct State {
    last: Option<Instant>,
    num_suppressed: u64,
}

impl Quiet {
    pub(crate) const fn new() -> Self {
        Self(Mutex::new(State {
            last: None,
            num_suppressed: 0,
        }))
    }

    /// If another line may be logged now, returns how many lines were suppressed since the last one.
    pub(crate) fn may_speak(&self) -> Option<u64> {
        self.may_speak_at(Instant::now())
    }

    fn may_speak_at(&self, now: Instant) -> Option<u64> {
        // Each change is whole.
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_early = |last| now.saturating_duration_since(last) < EVERY;
        if state.last.is_some_and(is_early) {
            state.num_suppressed += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.num_suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_in_a_while_says_how_many_were_left_out() {
        let quiet = Quiet::new();
        let start = Instant::now();
        let at = |seconds| quiet.may_speak_at(start + Duration::from_secs(seconds));
        assert_eq!(at(0), Some(0));
        for _ in 0..6_166 {
            assert_eq!(at(4), None);
        }
        assert_eq!(at(5), Some(6_166));
        assert_eq!(at(9), None);
        assert_eq!(at(100), Some(1));
    }
}
