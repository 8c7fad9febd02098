//! What became of each gradient: the memory that makes pushes exactly-once (PS-2).
//!
//! Per worker it keeps the outcome of the latest [`WINDOW`] clocks, so that a push that
//! arrives again gets the answer that the first one got. Below the window it only knows
//! that the clock is over. Clocks may arrive in any order and with gaps. What waits to be settled is
//! the coordinator's to know: it may be settled here also when the window has passed it meanwhile.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ids::{Clock, Incarnation, JoinRequest, Version};

/// How many outcomes are remembered per worker: far more than a worker has in flight.
pub(super) const WINDOW: usize = 1024;

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
    /// The clock with which that life began: those below were over before it.
    first_clock: Clock,
    /// All clocks below are over or pending; the outcomes of most of them are forgotten.
    floor: Clock,
    settled: BTreeMap<Clock, Outcome>,
    /// Which request began which of the latest lives.
    joins: VecDeque<(JoinRequest, Incarnation)>,
}

/// How many requests to join are remembered per worker: one that was delayed is no new one.
const MAX_JOINS: usize = 8;

/// What the ledger knows of a clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Entry {
    /// Never settled.
    New,
    /// Settled like this.
    Settled(Outcome),
    /// So long ago, or in an earlier life, that only this is known: it must not be applied now.
    Forgotten,
}

impl Ledger {
    /// Begins a life that counts its clocks from the beginning.
    pub(crate) fn begin(&mut self, incarnation: Incarnation) {
        *self = Self {
            incarnation,
            joins: std::mem::take(&mut self.joins),
            ..Self::default()
        };
    }

    /// Begins the life that a request asks for: the one after the latest. It goes on at the clock after
    /// the latest settled one, and none of its gradients can be a step that an earlier life took.
    pub(crate) fn join(&mut self, request: JoinRequest) {
        self.incarnation = self.incarnation.next();
        self.first_clock = self.next_clock();
        self.joins.push_back((request, self.incarnation));
        if self.joins.len() > MAX_JOINS {
            self.joins.pop_front();
        }
    }

    /// Returns the life that a request began, if it is one of the latest.
    pub(crate) fn life_of(&self, request: JoinRequest) -> Option<Incarnation> {
        let known = self.joins.iter().find(|(known, _)| *known == request);
        known.map(|&(_, incarnation)| incarnation)
    }

    pub(crate) fn first_clock(&self) -> Clock {
        self.first_clock
    }

    pub(crate) fn entry(&self, clock: Clock) -> Entry {
        match self.settled.get(&clock) {
            _ if clock < self.first_clock => Entry::Forgotten,
            Some(&outcome) => Entry::Settled(outcome),
            None if clock < self.floor => Entry::Forgotten,
            None => Entry::New,
        }
    }

    /// Records the outcome of a clock that is new or was new when it began to wait. When there are too
    /// many, the lowest clock's is forgotten; never the one that comes now, since whoever sent it may
    /// have to ask once more.
    pub(crate) fn settle(&mut self, clock: Clock, outcome: Outcome) {
        let before = self.settled.insert(clock, outcome);
        assert!(before.is_none(), "a gradient is settled once (PS-2)");
        if self.settled.len() > WINDOW {
            let mut lowest = self.settled.keys().filter(|&&settled| settled != clock);
            let lowest = *lowest.next().expect("the window is more than one");
            self.settled.remove(&lowest);
            self.floor = self.floor.max(lowest.next());
        }
    }

    /// The clock after the latest settled one: where the worker's next life goes on.
    pub(crate) fn next_clock(&self) -> Clock {
        let after_latest = self.settled.last_key_value().map(|(clock, _)| clock.next());
        after_latest.unwrap_or_default().max(self.floor)
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
    fn a_clock_that_the_window_passed_while_it_waited_is_settled_and_answered() {
        let mut ledger = Ledger::default();
        (1..=2 * WINDOW as u64).for_each(|clock| ledger.settle(Clock(clock), applied(clock)));
        ledger.settle(Clock(0), applied(9));
        assert_eq!(ledger.entry(Clock(0)), Entry::Settled(applied(9)));
        assert_eq!(ledger.settled.len(), WINDOW);
        let next = 2 * WINDOW as u64 + 1;
        assert_eq!(ledger.next_clock(), Clock(next));
        ledger.settle(Clock(next), applied(next));
        assert_eq!(ledger.entry(Clock(0)), Entry::Forgotten);
        assert_eq!(ledger.entry(Clock(1)), Entry::Forgotten);
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
