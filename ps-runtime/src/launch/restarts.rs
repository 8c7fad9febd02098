//! Decides how often, and how soon, a process that has failed is started again. It does no input or output:
//! the caller passes the time.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// How many starts one rank gets within [`WINDOW`].
const MAX_IN_WINDOW: usize = 10;

/// How long a start counts.
const WINDOW: Duration = Duration::from_secs(600);

/// If a process fails within this time of its start, the failure is quick and the next pause is longer.
const QUICK: Duration = Duration::from_secs(10);

/// The pause after the second quick failure in a row. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// The restarts of all ranks. All times count from the same moment, which the caller chooses.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    ranks: BTreeMap<u32, Rank>,
}

#[derive(Debug, Default)]
struct Rank {
    /// The times at which the rank was started again, oldest first.
    starts: VecDeque<Duration>,
    latest: Duration,
    num_quick: u32,
}

impl Restarts {
    /// Records that a rank failed `now`. Returns the pause after which to start it again, or `None` if it
    /// has been started again 10 times in the last 10 minutes.
    pub(crate) fn after_failure(&mut self, rank: u32, now: Duration) -> Option<Duration> {
        let rank = self.ranks.entry(rank).or_default();
        while rank
            .starts
            .front()
            .is_some_and(|&start| now.saturating_sub(start) >= WINDOW)
        {
            rank.starts.pop_front();
        }
        if rank.starts.len() >= MAX_IN_WINDOW {
            return None;
        }
        let was_quick = now.saturating_sub(rank.latest) < QUICK;
        rank.num_quick = if was_quick { rank.num_quick + 1 } else { 0 };
        let pause = match rank.num_quick {
            // After a single failure the process is started again at once.
            0 | 1 => Duration::ZERO,
            more => {
                let doubled = FIRST_PAUSE.saturating_mul(1 << (more - 2).min(16));
                doubled.min(MAX_PAUSE)
            }
        };
        rank.latest = now.saturating_add(pause);
        rank.starts.push_back(rank.latest);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_process_that_fails_at_once_waits_longer_each_time_and_is_then_given_up() {
        let mut restarts = Restarts::default();
        let mut now = Duration::ZERO;
        let mut pauses = Vec::new();
        while let Some(pause) = restarts.after_failure(1, now) {
            pauses.push(pause.as_millis());
            now += pause;
        }
        let expected = [0, 100, 200, 400, 800, 1600, 3200, 6400, 10_000, 10_000];
        assert_eq!(pauses, expected);
        // Another rank has books of its own.
        assert_eq!(restarts.after_failure(2, now), Some(Duration::ZERO));
    }

    #[test]
    fn starts_count_for_ten_minutes() {
        let mut restarts = Restarts::default();
        // As often as is allowed, for days.
        for failure in 0..10_000 {
            let pause = restarts.after_failure(1, seconds(60 * failure));
            assert_eq!(pause, Some(Duration::ZERO), "failure {failure}");
        }
        let mut restarts = Restarts::default();
        let given_up = (0..100).find(|&failure| {
            let pause = restarts.after_failure(1, seconds(50 * failure));
            pause.is_none()
        });
        assert_eq!(given_up, Some(10));
        assert!(restarts.after_failure(1, seconds(610)).is_some());
    }

    #[test]
    fn a_long_run_between_two_failures_ends_the_pauses() {
        let mut restarts = Restarts::default();
        for _ in 0..4 {
            restarts.after_failure(1, seconds(0));
        }
        assert_eq!(restarts.after_failure(1, seconds(60)), Some(Duration::ZERO));
    }
}
