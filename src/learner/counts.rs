//! What became of the gradients of a training in this process of its driver, for whoever compares it with what should
//! have become of them.

use std::sync::{Arc, Mutex};

use ps_actors::server::{ServerStatus, WorkerStatus};

use super::source::lock;

/// Counts the gradients of a training; see [`ClusterStrategy::counts`](super::ClusterStrategy::counts). A clone counts the
/// same.
#[derive(Clone, Debug, Default)]
pub struct GradientCounts(Arc<Mutex<Counts>>);

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    num_applied: u64,
    num_settled: u64,
}

impl GradientCounts {
    /// Returns how many gradients of all workers were applied, in the epochs that this process has finished.
    #[must_use]
    pub fn num_applied(&self) -> u64 {
        lock(&self.0).num_applied
    }

    /// Returns how many gradients of all workers were settled, in the epochs that this process has finished: applied,
    /// dropped as late, or refused.
    #[must_use]
    pub fn num_settled(&self) -> u64 {
        lock(&self.0).num_settled
    }

    /// Takes the counts of the server. It has begun with those of the epochs before.
    pub(super) fn take(&self, status: &[ServerStatus]) {
        let workers = status.iter().filter_map(|one| one.coordinator.as_ref());
        let workers = workers.flat_map(|coordinator| coordinator.workers.values());
        let mut counts = Counts::default();
        for worker in workers {
            counts.num_applied += worker.num_applied;
            counts.num_settled += WorkerStatus::num_settled(worker);
        }
        *lock(&self.0) = counts;
    }
}
