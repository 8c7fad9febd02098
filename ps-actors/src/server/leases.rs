//! When each member was last heard, and which members are lost because they were silent for too long (S-4).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::protocol::Refusal;
use crate::ids::WorkerId;

/// The record of the members and the worker lease of one server.
#[derive(Clone, Debug)]
pub(super) struct Leases {
    lease: Option<Duration>,
    last_heard: BTreeMap<WorkerId, Instant>,
    /// The workers that were lost in this way and have not joined again.
    silent: BTreeSet<WorkerId>,
}

impl Leases {
    pub(super) fn new(lease: Option<Duration>) -> Self {
        Self {
            lease,
            last_heard: BTreeMap::new(),
            silent: BTreeSet::new(),
        }
    }

    /// Returns the number of entries of the larger of the two records.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.last_heard.len().max(self.silent.len())
    }

    pub(super) fn lease(&self) -> Option<Duration> {
        self.lease
    }

    /// Notes that a member is alive.
    pub(super) fn heard(&mut self, worker: WorkerId, now: Instant) {
        self.silent.remove(&worker);
        self.last_heard.insert(worker, now);
    }

    /// Returns the members that were silent for longer than the lease. A member that waits for the server
    /// is not silent.
    pub(super) fn lost(
        &mut self,
        members: impl Iterator<Item = WorkerId>,
        waiting: &BTreeSet<WorkerId>,
        now: Instant,
    ) -> Vec<WorkerId> {
        let Some(lease) = self.lease else {
            return Vec::new();
        };
        let before = std::mem::take(&mut self.last_heard);
        let mut lost = Vec::new();
        for worker in members {
            let heard = match before.get(&worker) {
                Some(&heard) if !waiting.contains(&worker) => heard,
                _ => now,
            };
            match now.saturating_duration_since(heard) > lease {
                true => lost.push(worker),
                false => _ = self.last_heard.insert(worker, heard),
            }
        }
        self.silent.extend(&lost);
        lost
    }

    /// Replaces `NotMember` by `Silent` if the worker was lost because it was silent.
    pub(super) fn explain(&self, refusal: Refusal) -> Refusal {
        match (refusal, self.lease) {
            (Refusal::NotMember { worker }, Some(lease)) if self.silent.contains(&worker) => {
                Refusal::Silent { worker, lease }
            }
            (other, _) => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Duration = Duration::from_secs(1);

    #[test]
    fn a_member_is_lost_after_its_lease_unless_it_waits_and_is_told_why() {
        let mut leases = Leases::new(Some(LEASE));
        let start = Instant::now();
        let [silent, waits, beats] = [0, 1, 2].map(WorkerId);
        for worker in [silent, waits, beats] {
            leases.heard(worker, start);
        }
        let members = || [silent, waits, beats].into_iter();
        let waiting = BTreeSet::from([waits]);
        assert!(leases.lost(members(), &waiting, start + LEASE).is_empty());
        leases.heard(beats, start + LEASE);
        let later = start + 2 * LEASE;
        assert_eq!(leases.lost(members(), &waiting, later), [silent]);
        let explain =
            |leases: &Leases, worker| leases.explain(Refusal::NotMember { worker }).to_string();
        let why = explain(&leases, silent);
        assert!(why.contains("lease") && why.contains("1s"), "{why}");
        assert!(!explain(&leases, waits).contains("1s"));
        // It is back, and what is said of it holds no more.
        leases.heard(silent, later);
        assert!(!explain(&leases, silent).contains("1s"));
    }

    #[test]
    fn the_longest_lease_ends_never() {
        let mut leases = Leases::new(Some(Duration::MAX));
        let worker = WorkerId(0);
        let now = Instant::now();
        leases.heard(worker, now);
        let later = now + Duration::from_secs(1 << 30);
        let lost = leases.lost([worker].into_iter(), &BTreeSet::new(), later);
        assert!(lost.is_empty());
    }
}
