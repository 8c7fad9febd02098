//! How long the latest updates took, so that the answer to a push can say what its update cost.

use std::collections::VecDeque;
use std::time::Duration;

use crate::ids::Version;

/// How many updates are remembered. The answer to a push may come some updates after the push's own one.
const MAX_UPDATES: usize = 256;

/// How long this server took for its latest updates.
#[derive(Debug, Default)]
pub(super) struct UpdateTimes(VecDeque<(Version, Duration)>);

impl UpdateTimes {
    pub(super) fn note(&mut self, version: Version, took: Duration) {
        if self.0.len() == MAX_UPDATES {
            self.0.pop_front();
        }
        self.0.push_back((version, took));
    }

    /// Returns how long the update took that made this version. Zero if it is forgotten, or was none of this
    /// server's.
    pub(super) fn of(&self, version: Version) -> Duration {
        // Usually it is the latest one.
        let found = self.0.iter().rev().find(|(made, _)| *made == version);
        found.map_or(Duration::ZERO, |&(_, took)| took)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_updates_are_remembered_and_their_number_is_bounded() {
        let mut times = UpdateTimes::default();
        let num_updates = 3 * MAX_UPDATES as u64;
        for version in 1..=num_updates {
            times.note(Version(version), Duration::from_micros(version));
        }
        assert_eq!(times.0.len(), MAX_UPDATES);
        for (version, expected) in [
            (num_updates, num_updates),
            (num_updates - 5, num_updates - 5),
            (1, 0),
            (num_updates + 1, 0),
        ] {
            let expected = Duration::from_micros(expected);
            assert_eq!(times.of(Version(version)), expected, "{version}");
        }
    }
}
