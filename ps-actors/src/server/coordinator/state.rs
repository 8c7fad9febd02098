//! The part of a coordinator's state that outlives its server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::super::consistency::Consistency;
use super::super::ledger::Ledger;
use super::super::status::WorkerStatus;
use crate::ids::{Clock, Epoch, Incarnation, Version, WorkerId};

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

    /// Lets all workers go on at the same clock.
    pub(crate) fn restart_at(&mut self, clock: Clock) {
        self.least_clock = clock;
        for ledger in self.ledgers.values_mut() {
            ledger.restart_at(clock);
        }
    }
}
