//! The outcome of each gradient. This record makes pushes exactly-once (PS-2).
//!
//! For each worker it keeps the outcomes of the latest [`WINDOW`] clocks. So a push that arrives again gets
//! the answer that the first one got. Of a clock below the window it knows only that it is over. Clocks may
//! arrive in any order and with gaps. Pending pushes are known to the coordinator only. Such a push may be
//! settled here even if the window has moved past its clock in the meantime.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ids::{Clock, Incarnation, JoinRequest, Version};

/// How many outcomes are remembered per worker. This is far more than the gradients that a worker has under
/// way.
pub(super) const WINDOW: usize = 1024;

/// The outcome of a gradient.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// The gradient is part of the update that made `version`.
    Applied {
        /// The version that the update made.
        version: Version,
        /// How many updates were applied between the weights that it was computed on and its own update.
        staleness: u64,
    },
    /// The gradient arrived after its round had closed ([`super::Consistency::KofN`]).
    DroppedLate {
        /// The version when it arrived. Compute the next gradient on this version or a later one.
        version: Version,
        /// How many versions its weights were too old.
        staleness: u64,
    },
    /// The norm of the gradient is NaN, infinite or above the limit. The weights did not change.
    RefusedNorm {
        /// The version when it was refused.
        version: Version,
        /// The norm of the gradient.
        norm: f64,
        /// The largest norm that is accepted.
        limit: f64,
    },
}

impl Outcome {
    /// Returns the version of the weights after the outcome was decided. It includes this gradient if it
    /// was applied.
    #[must_use]
    pub fn version(&self) -> Version {
        match *self {
            Self::Applied { version, .. }
            | Self::DroppedLate { version, .. }
            | Self::RefusedNorm { version, .. } => version,
        }
    }
}

/// The record of one worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ledger {
    /// The latest known incarnation of the worker.
    pub(crate) incarnation: Incarnation,
    /// The first clock of that incarnation. Clocks below it are over.
    first_clock: Clock,
    /// All clocks below this one are over or pending. The outcomes of most of them are forgotten.
    floor: Clock,
    settled: BTreeMap<Clock, Outcome>,
    /// The requests that began the latest incarnations.
    joins: VecDeque<(JoinRequest, Incarnation)>,
}

/// How many requests to join are remembered per worker. A delayed repeat of one of them is not a new
/// request.
const MAX_JOINS: usize = 8;

/// What the ledger knows of a clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Entry {
    /// Never settled.
    New,
    /// Settled like this.
    Settled(Outcome),
    /// The clock is so old, or of such an early incarnation, that only this is known: it must not be
    /// applied now.
    Forgotten,
}

impl Ledger {
    /// Begins an incarnation whose clocks start at 0.
    pub(crate) fn begin(&mut self, incarnation: Incarnation) {
        *self = Self {
            incarnation,
            joins: std::mem::take(&mut self.joins),
            ..Self::default()
        };
    }

    /// Begins the incarnation that a request asks for: the one after the latest. It goes on at the clock
    /// after the latest settled one, or at `least` if that is later. None of its gradients can be of a step
    /// that an earlier incarnation took.
    pub(crate) fn join(&mut self, request: JoinRequest, least: Clock) {
        self.incarnation = self.incarnation.next();
        self.first_clock = self.next_clock().max(least);
        self.joins.push_back((request, self.incarnation));
        if self.joins.len() > MAX_JOINS {
            self.joins.pop_front();
        }
    }

    /// Returns the incarnation that a request began, if it is one of the latest.
    pub(crate) fn incarnation_of(&self, request: JoinRequest) -> Option<Incarnation> {
        let known = self.joins.iter().find(|(known, _)| *known == request);
        known.map(|&(_, incarnation)| incarnation)
    }

    pub(crate) fn first_clock(&self) -> Clock {
        self.first_clock
    }

    /// Forgets all outcomes, and lets the next incarnation begin at `clock`. For a run that goes on with
    /// another number of workers: there the clocks stand for other batches. No gradient of an earlier
    /// incarnation is accepted any more, so none can be applied twice.
    pub(crate) fn restart_at(&mut self, clock: Clock) {
        self.settled.clear();
        self.floor = clock;
        self.first_clock = clock;
    }

    /// Returns the outcome of the last step that an earlier incarnation took, if it is remembered.
    pub(crate) fn outcome_before(&self) -> Option<Outcome> {
        let last = self.first_clock.0.checked_sub(1)?;
        self.settled.get(&Clock(last)).copied()
    }

    pub(crate) fn entry(&self, clock: Clock) -> Entry {
        match self.settled.get(&clock) {
            _ if clock < self.first_clock => Entry::Forgotten,
            Some(&outcome) => Entry::Settled(outcome),
            None if clock < self.floor => Entry::Forgotten,
            None => Entry::New,
        }
    }

    /// Records the outcome of a clock that is new, or was new when it began to wait. When there are too
    /// many outcomes, that of the lowest clock is forgotten. The one that is recorded now is never
    /// forgotten, because its sender may have to ask for it again.
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

    /// Returns the clock after the latest settled one. The worker's next incarnation goes on there.
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
