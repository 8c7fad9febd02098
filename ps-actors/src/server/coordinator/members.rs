//! The members, and how far each of them is. The slowest one is found without looking at all of them.

use std::collections::BTreeMap;

use super::cost::looks_at;
use crate::ids::{Clock, Incarnation, WorkerId};

#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) incarnation: Incarnation,
    /// The clock of its first step, and the progress that this step counts as.
    pub(super) first_clock: Clock,
    pub(super) first_progress: u64,
    /// The clock of the current step: the one after the latest settled clock.
    pub(super) next_clock: Clock,
}

impl Member {
    /// The number of steps before `clock`. It can be compared between workers that joined at different
    /// times.
    pub(super) fn progress(&self, clock: Clock) -> u64 {
        let steps = clock.0.saturating_sub(self.first_clock.0);
        self.first_progress.saturating_add(steps)
    }

    /// The progress of its current step.
    pub(super) fn current_progress(&self) -> u64 {
        self.progress(self.next_clock)
    }
}

/// All members.
#[derive(Clone, Debug, Default)]
pub(super) struct Members {
    members: BTreeMap<WorkerId, Member>,
    /// How many members are at each progress.
    num_at: BTreeMap<u64, usize>,
}

impl Members {
    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    pub(super) fn get(&self, worker: WorkerId) -> Option<&Member> {
        self.members.get(&worker)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (WorkerId, &Member)> + '_ {
        let members = self.members.iter().inspect(|_| looks_at(1));
        members.map(|(&worker, member)| (worker, member))
    }

    /// Returns the progress of the slowest member.
    pub(super) fn slowest(&self) -> Option<u64> {
        self.num_at.keys().next().copied()
    }

    /// Adds a member that is not there.
    pub(super) fn insert(&mut self, worker: WorkerId, member: Member) {
        *self.num_at.entry(member.current_progress()).or_default() += 1;
        let before = self.members.insert(worker, member);
        debug_assert!(before.is_none(), "an earlier membership was ended");
    }

    pub(super) fn remove(&mut self, worker: WorkerId) -> Option<Member> {
        let member = self.members.remove(&worker)?;
        self.leaves(member.current_progress());
        Some(member)
    }

    /// Notes that a member has settled the step at this clock.
    pub(super) fn settled(&mut self, worker: WorkerId, clock: Clock) {
        let Some(member) = self.members.get_mut(&worker) else {
            return;
        };
        let before = member.current_progress();
        member.next_clock = member.next_clock.max(clock.next());
        let after = member.current_progress();
        if after != before {
            *self.num_at.entry(after).or_default() += 1;
            self.leaves(before);
        }
    }

    fn leaves(&mut self, progress: u64) {
        if let Some(num) = self.num_at.get_mut(&progress) {
            *num -= 1;
            if *num == 0 {
                self.num_at.remove(&progress);
            }
        }
    }
}
