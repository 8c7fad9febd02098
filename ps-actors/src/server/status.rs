//! What a server reports about itself to people and metrics: plain data.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::ledger::Outcome;
use crate::ids::{Clock, Epoch, Version, WorkerId};

/// The status of a run, from the coordinator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CoordinatorStatus {
    /// The current consistency mode.
    pub consistency: Consistency,
    /// Whether somebody has [paused](super::SetPaused) the updates.
    pub is_paused: bool,
    /// How the gradients of one update are combined.
    pub reduction: Reduction,
    /// The number of updates so far.
    pub version: Version,
    /// The epoch of the membership, which counts its changes.
    pub epoch: Epoch,
    /// How many pushes wait for their round, or for slower workers.
    pub num_pending: usize,
    /// The workers that the waiting pushes wait for.
    pub awaited: Awaited,
    /// The status of every worker that the server has seen.
    pub workers: BTreeMap<WorkerId, WorkerStatus>,
}

/// A server of a group that is gone, and a part of the weights with it. So the group can do nothing more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostServer {
    /// The index of the server in the group.
    pub index: usize,
    /// Why the last call to it failed.
    pub reason: String,
}

/// The workers that the other workers wait for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Awaited {
    /// How many workers must join before the first round closes.
    pub num_to_join: usize,
    /// The members whose gradients others wait for.
    pub workers: Vec<WorkerId>,
}

impl Awaited {
    /// Whether no worker is waited for.
    #[must_use]
    pub fn is_nobody(&self) -> bool {
        self.num_to_join == 0 && self.workers.is_empty()
    }
}

/// Names a few of the workers, and the number of the others.
impl fmt::Display for Awaited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NUM_NAMED: usize = 8;
        if self.is_nobody() {
            return f.write_str("nobody");
        }
        let mut parts = Vec::new();
        if self.num_to_join > 0 {
            parts.push(format!("{} more to join", self.num_to_join));
        }
        let named = self.workers.iter().take(NUM_NAMED);
        parts.extend(named.map(WorkerId::to_string));
        let num_more = self.workers.len().saturating_sub(NUM_NAMED);
        if num_more > 0 {
            parts.push(format!("{num_more} more members"));
        }
        f.write_str(&parts.join(", "))
    }
}

/// The status of one worker, with the outcomes of its gradients.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Whether the worker is a member now.
    pub is_member: bool,
    /// The clock of the step that the worker works on, if it is a member. Otherwise the clock at which it
    /// would go on if it joined.
    pub next_clock: Clock,
    /// How often the worker has joined since its servers were started, or went on from a checkpoint.
    pub num_joins: u64,
    /// How many of its gradients were applied.
    pub num_applied: u64,
    /// How many of its gradients arrived too late for their round and were dropped.
    pub num_dropped_late: u64,
    /// How many of its gradients were refused because of their norm.
    pub num_refused: u64,
    /// How many of its pushes repeated earlier pushes.
    pub num_duplicates: u64,
    /// The staleness of the applied gradients: the number of updates between the weights that a gradient
    /// was computed on and its own update.
    pub staleness: Histogram,
}

impl WorkerStatus {
    /// Returns how many of its gradients were settled: applied, dropped as late, or refused because of
    /// their norm.
    #[must_use]
    pub fn num_settled(&self) -> u64 {
        // The numbers may come from a peer, so adding them must not overflow.
        let late_or_refused = self.num_dropped_late.saturating_add(self.num_refused);
        self.num_applied.saturating_add(late_or_refused)
    }

    pub(crate) fn count(&mut self, outcome: Outcome) {
        let number = match outcome {
            Outcome::Applied { staleness, .. } => {
                self.staleness.record(staleness);
                &mut self.num_applied
            }
            Outcome::DroppedLate { .. } => &mut self.num_dropped_late,
            Outcome::RefusedNorm { .. } => &mut self.num_refused,
        };
        // The numbers may come from a file.
        *number = number.saturating_add(1);
    }
}

/// Counts of small whole numbers. All numbers from [`Histogram::LIMIT`] on are counted together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    counts: Vec<u64>,
    sum: u64,
    max: u64,
}

impl Histogram {
    /// The smallest number that is counted together with all larger ones.
    pub const LIMIT: u64 = 256;

    /// Counts one value.
    pub fn record(&mut self, value: u64) {
        let bucket = value.min(Self::LIMIT) as usize;
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] = self.counts[bucket].saturating_add(1);
        self.sum = self.sum.saturating_add(value);
        self.max = self.max.max(value);
    }

    /// Adds the counts of another histogram.
    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() < other.counts.len() {
            self.counts.resize(other.counts.len(), 0);
        }
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine = mine.saturating_add(*theirs);
        }
        self.sum = self.sum.saturating_add(other.sum);
        self.max = self.max.max(other.max);
    }

    /// Returns how many times each value was counted: item `n` is the count of value `n`. The item at index
    /// [`Histogram::LIMIT`] also counts all larger values.
    #[must_use]
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Returns how many values were counted.
    #[must_use]
    pub fn num_values(&self) -> u64 {
        // The counts may come from a peer, so adding them must not overflow.
        let add = |sum: u64, count: &u64| sum.saturating_add(*count);
        self.counts.iter().fold(0, add)
    }

    /// Returns the mean, or 0 if nothing was counted.
    #[must_use]
    pub fn mean(&self) -> f64 {
        match self.num_values() {
            0 => 0.0,
            n => self.sum as f64 / n as f64,
        }
    }

    /// Returns the largest value, or 0 if nothing was counted.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_a_peer_do_not_overflow() {
        let status = WorkerStatus {
            num_applied: u64::MAX,
            num_dropped_late: u64::MAX,
            num_refused: 1,
            ..WorkerStatus::default()
        };
        assert_eq!(status.num_settled(), u64::MAX);
    }

    #[test]
    fn merged_histograms_count_the_values_of_both() {
        let (mut a, mut b) = (Histogram::default(), Histogram::default());
        a.record(1);
        b.record(3);
        b.record(Histogram::LIMIT + 100);
        a.merge(&b);
        assert_eq!(a.num_values(), 3);
        assert_eq!(a.counts()[1], 1);
        assert_eq!(a.counts()[Histogram::LIMIT as usize], 1);
        assert_eq!(a.max(), Histogram::LIMIT + 100);
        assert_eq!(a.mean(), (1 + 3 + Histogram::LIMIT + 100) as f64 / 3.0);
        assert_eq!(Histogram::default().mean(), 0.0);
    }
}
