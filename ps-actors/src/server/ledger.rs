//! What became of each gradient: the memory that makes pushes exactly-once (PS-2).
//!
//! Per worker it keeps the outcome of the latest [`WINDOW`] clocks, so that a push that
//! arrives again gets the answer that the first one got. Below the window it only knows
//! that the clock is over. Clocks may arrive in any order and with gaps.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::{Clock, Incarnation, Version};

/// How many outcomes are remembered per worker: far more than a worker has in flight.
pub const WINDOW: usize = 1024;

/// What became of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// It is part of the update that made `version`.
    Applied {
        /// The version that the update made.
        version: Version,
        /// How many updates were applied between the weights it was computed on and it.
        staleness: u64,
    },
    /// It came after its round had closed without it ([`super::Consistency::KofN`]).
    DroppedLate {
        /// The version at that time; compute the next gradient on this or a later one.
        version: Version,
        /// How many versions too old its weights were.
        staleness: u64,
    },
    /// Its norm is NaN, infinite or above the limit; the weights stayed as they were.
    RefusedNorm {
        /// The version at that time.
        version: Version,
        /// The norm found.
        norm: f64,
        /// The largest norm that is accepted.
        limit: f64,
    },
}

impl Outcome {
    /// Returns the version of the weights when the outcome was decided, the gradient included.
    #[must_use]
    pub fn version(&self) -> Version {
        match *self {
            Self::Applied { version, .. }
            | Self::DroppedLate { version, .. }
            | Self::RefusedNorm { version, .. } => version,
        }
    }
}

/// One worker's record.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ledger {
    /// The latest life of the worker that is known.
    pub(crate) incarnation: Incarnation,
    /// All clocks below are over, and their outcomes forgotten.
    floor: Clock,
    settled: BTreeMap<Clock, Outcome>,
}

/// What the ledger knows of a clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Entry {
    /// Never settled.
    New,
    /// Settled like this.
    Settled(Outcome),
    /// So long ago that only this is known: it must not be applied now.
    Forgotten,
}

impl Ledger {
    /// Starts the record of a life that counts its clocks from the beginning.
    pub(crate) fn new(incarnation: Incarnation) -> Self {
        Self {
            incarnation,
            ..Self::default()
        }
    }

    pub(crate) fn entry(&self, clock: Clock) -> Entry {
        match self.settled.get(&clock) {
            Some(&outcome) => Entry::Settled(outcome),
            None if clock < self.floor => Entry::Forgotten,
            None => Entry::New,
        }
    }

    /// Records an outcome; the oldest one is forgotten when there are too many.
    pub(crate) fn settle(&mut self, clock: Clock, outcome: Outcome) {
        let before = self.settled.insert(clock, outcome);
        assert!(
            before.is_none() && clock >= self.floor,
            "a gradient is settled once (PS-2)"
        );
        if self.settled.len() > WINDOW {
            let (oldest, _) = self.settled.pop_first().expect("it is not empty");
            self.floor = oldest.next();
        }
    }

    /// The clock after the latest settled one: where the worker's next life goes on.
    pub(crate) fn next_clock(&self) -> Clock {
        self.settled
            .last_key_value()
            .map_or(self.floor, |(&clock, _)| clock.next())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn applied(version: u64) -> Outcome {
        Outcome::Applied {
            version: Version(version),
            staleness: 0,
        }
    }

    proptest! {
        #[test]
        fn each_clock_is_new_exactly_once_in_any_order(
            clocks in proptest::collection::vec(0u64..300, 1..900),
        ) {
            let mut ledger = Ledger::default();
            let mut seen = BTreeMap::new();
            for (i, &clock) in clocks.iter().enumerate() {
                match seen.get(&clock) {
                    None => {
                        prop_assert_eq!(ledger.entry(Clock(clock)), Entry::New);
                        ledger.settle(Clock(clock), applied(i as u64));
                        seen.insert(clock, applied(i as u64));
                    }
                    Some(&first) => {
                        prop_assert_eq!(ledger.entry(Clock(clock)), Entry::Settled(first));
                    }
                }
            }
            let latest = clocks.iter().max().expect("not empty");
            prop_assert_eq!(ledger.next_clock(), Clock(latest + 1));
        }
    }

    #[test]
    fn memory_is_bounded_and_a_forgotten_clock_is_not_new() {
        let mut ledger = Ledger::default();
        let total = 3 * WINDOW as u64;
        for clock in (0..total).filter(|clock| clock % 2 == 0) {
            ledger.settle(Clock(clock), applied(clock));
        }
        assert_eq!(ledger.settled.len(), WINDOW);
        assert_eq!(ledger.entry(Clock(0)), Entry::Forgotten);
        assert_eq!(ledger.entry(Clock(1)), Entry::Forgotten);
        assert_eq!(
            ledger.entry(Clock(total - 2)),
            Entry::Settled(applied(total - 2))
        );
        assert_eq!(ledger.entry(Clock(total - 1)), Entry::New);
    }
}
