//! The part of a coordinator's state that outlives its server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::consistency::Consistency;
use super::super::ledger::{Entry, Ledger, Outcome};
use super::super::protocol::Update;
use super::super::status::WorkerStatus;
use crate::ids::{Clock, Epoch, GradientId, Incarnation, JoinRequest, Version, WorkerId};

/// The part of a coordinator's state that a checkpoint has. Members and their pending pushes are not part
/// of it: no pending push was answered, so after a restart its worker joins again and repeats the step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct CoordinatorState {
    /// The version of the weights that the state belongs to.
    pub(crate) version: Version,
    pub(super) epoch: Epoch,
    pub(crate) consistency: Consistency,
    pub(super) ledgers: BTreeMap<WorkerId, Ledger>,
    pub(super) stats: BTreeMap<WorkerId, WorkerStatus>,
    pub(super) least_clock: Clock,
}

/// Sends the state beside the header of a message, because the record of many workers is long.
pub(crate) mod beside_header {
    use ps_runtime::codec::BulkValue;
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::CoordinatorState;

    type Encoded = Option<BulkValue<CoordinatorState>>;

    pub(crate) fn serialize<S: Serializer>(
        state: &Option<CoordinatorState>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        let encoded: Encoded = match state {
            Some(state) => Some(BulkValue::new(state).map_err(S::Error::custom)?),
            None => None,
        };
        encoded.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<CoordinatorState>, D::Error> {
        let encoded = Encoded::deserialize(deserializer)?;
        let state = encoded.map(BulkValue::read).transpose();
        state.map_err(D::Error::custom)
    }
}

impl CoordinatorState {
    /// Returns the clock of the first step that is not settled, for each worker that had a gradient
    /// settled or has joined.
    pub(crate) fn next_clocks(&self) -> impl Iterator<Item = (WorkerId, Clock)> + '_ {
        let ledgers = self.ledgers.iter();
        ledgers.map(|(&worker, ledger)| (worker, ledger.next_clock().max(self.least_clock)))
    }

    /// Returns the clock of the first step of a worker that is not settled.
    pub(crate) fn next_clock(&self, worker: WorkerId) -> Clock {
        let ledger = self.ledgers.get(&worker);
        let settled = ledger.map_or(Clock(0), Ledger::next_clock);
        settled.max(self.least_clock)
    }

    /// Returns the latest incarnation of a worker that is known.
    pub(crate) fn incarnation(&self, worker: WorkerId) -> Incarnation {
        let ledger = self.ledgers.get(&worker);
        ledger.map_or(Incarnation(0), |ledger| ledger.incarnation)
    }

    /// Notes that a worker joined. A request that is known already changes nothing.
    pub(crate) fn follow_join(&mut self, worker: WorkerId, request: JoinRequest) {
        let ledger = self.ledgers.entry(worker).or_default();
        if ledger.incarnation_of(request).is_none() {
            ledger.join(request, self.least_clock);
            self.epoch = self.epoch.next();
        }
    }

    /// Notes the outcome of a gradient. One that is known already changes nothing.
    pub(crate) fn follow_outcome(&mut self, id: GradientId, outcome: Outcome) {
        let is_new = !self.ledgers.contains_key(&id.worker);
        let ledger = self.ledgers.entry(id.worker).or_default();
        if is_new || ledger.incarnation < id.incarnation {
            // A worker that never joins. One that joined is known in its incarnation.
            ledger.begin(id.incarnation);
        }
        if ledger.incarnation == id.incarnation && ledger.entry(id.clock) == Entry::New {
            ledger.settle(id.clock, outcome);
            self.stats.entry(id.worker).or_default().count(outcome);
        }
    }

    /// Notes an update and the outcomes of its gradients.
    pub(crate) fn follow_update(&mut self, update: &Update) {
        for one in &update.gradients {
            let staleness = one.staleness(self.version);
            let version = update.version;
            self.follow_outcome(one.id, Outcome::Applied { version, staleness });
        }
        self.version = update.version;
    }

    /// Whether both know the same outcomes of the same gradients, and have counted them in the same way.
    #[cfg(test)]
    pub(crate) fn has_same_outcomes(&self, other: &Self) -> bool {
        let counts = |state: &Self| -> Vec<_> {
            let stats = state
                .stats
                .iter()
                .filter(|(_, stat)| stat.num_settled() > 0);
            let count = |stat: &WorkerStatus| {
                let staleness = stat.staleness.clone();
                (
                    stat.num_applied,
                    stat.num_dropped_late,
                    stat.num_refused,
                    staleness,
                )
            };
            stats.map(|(&worker, stat)| (worker, count(stat))).collect()
        };
        let known = |state: &Self| (state.version, state.least_clock, state.ledgers.clone());
        known(self) == known(other) && counts(self) == counts(other)
    }

    /// Lets all workers go on at the same clock.
    pub(crate) fn restart_at(&mut self, clock: Clock) {
        self.least_clock = clock;
        for ledger in self.ledgers.values_mut() {
            ledger.restart_at(clock);
        }
    }
}
