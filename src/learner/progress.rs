//! How far all workers are, as far as the workers of this process tell.

use std::collections::BTreeMap;

use ps_actors::ids::WorkerId;
use ps_model::burn::data::dataloader::Progress;

/// The progress of an epoch. The shares of workers in other processes are assumed to be as far as those of the
/// workers here, as in burn's own strategy for several processes.
pub(super) struct JointProgress {
    num_items: usize,
    num_workers: usize,
    /// Of each worker that told: how many examples of its share are done, and how many the share has.
    shares: BTreeMap<WorkerId, (usize, usize)>,
    num_steps: usize,
    /// What was told last: how many examples and steps all have done. When one more worker tells, less may be
    /// assumed of the others. burn's renderers expect that progress does not go back.
    furthest: (usize, usize),
}

impl JointProgress {
    pub(super) fn new(num_items: usize, num_workers: u32) -> Self {
        Self {
            num_items,
            num_workers: num_workers as usize,
            shares: BTreeMap::new(),
            num_steps: 0,
            furthest: (0, 0),
        }
    }

    /// Returns the progress of all after one more step of a worker, and how many steps all have taken.
    pub(super) fn after(&mut self, worker: WorkerId, share: &Progress) -> (Progress, usize) {
        self.num_steps += 1;
        let (done, all) = (share.items_processed, share.items_total);
        self.shares.insert(worker, (done, all));
        let done: usize = self.shares.values().map(|(done, _)| done).sum();
        let all: usize = self.shares.values().map(|(_, all)| all).sum();
        let num_done = (done * self.num_items).checked_div(all).unwrap_or(0);
        let num_steps = self.num_steps * self.num_workers / self.shares.len();
        let (num_done_before, num_steps_before) = self.furthest;
        self.furthest = (
            num_done.max(num_done_before),
            num_steps.max(num_steps_before),
        );
        let (items_processed, num_steps) = self.furthest;
        let progress = Progress {
            items_processed,
            items_total: self.num_items,
            unit: share.unit.clone(),
        };
        (progress, num_steps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(done: usize, all: usize) -> Progress {
        Progress::new(done, all, Some("items".to_owned()))
    }

    #[test]
    fn workers_elsewhere_count_as_if_they_were_as_far() {
        let mut progress = JointProgress::new(100, 4);
        let (joint, steps) = progress.after(WorkerId(0), &share(5, 25));
        assert_eq!(
            (joint.items_processed, joint.items_total, steps),
            (20, 100, 4)
        );
        let (joint, steps) = progress.after(WorkerId(2), &share(15, 25));
        assert_eq!(
            (joint.items_processed, joint.items_total, steps),
            (40, 100, 4)
        );
        let (joint, _) = progress.after(WorkerId(0), &share(25, 25));
        let (joint_at_end, _) = progress.after(WorkerId(2), &share(25, 25));
        assert!(!joint.is_completed() && joint_at_end.is_completed());
    }
    #[test]
    fn progress_does_not_go_back_when_a_slow_worker_tells_for_the_first_time() {
        let mut progress = JointProgress::new(100, 4);
        let mut before = (0, 0);
        for (worker, done) in [(0, 5), (0, 10), (0, 15), (2, 5), (1, 5), (2, 10), (1, 25)] {
            let (joint, steps) = progress.after(WorkerId(worker), &share(done, 25));
            let now = (joint.items_processed, steps);
            assert!(now.0 >= before.0 && now.1 >= before.1, "{before:?} {now:?}");
            before = now;
        }
    }
}
