//! The pushes that wait, so that a push costs the same whatever the number of workers.

use std::collections::{BTreeMap, BTreeSet};

use super::super::protocol::{Stamp, Ticket};
use super::Waiter;
use super::cost::looks_at;
use crate::ids::{Clock, GradientId, Incarnation, WorkerId};

#[derive(Clone, Debug)]
pub(super) struct PendingPush {
    pub(super) stamp: Stamp,
    pub(super) waiters: Vec<Waiter>,
}

/// The position of a push in the order of arrival.
pub(super) type Arrival = u64;

/// The pending pushes, in order of arrival, each found by its id.
#[derive(Clone, Debug, Default)]
pub(super) struct Pending {
    pushes: BTreeMap<Arrival, PendingPush>,
    arrivals: BTreeMap<GradientId, Arrival>,
    num_workers: usize,
    next: Arrival,
}

impl Pending {
    pub(super) fn len(&self) -> usize {
        self.pushes.len()
    }

    /// Returns how many different workers have a push here.
    pub(super) fn num_workers(&self) -> usize {
        self.num_workers
    }

    /// Returns the position of the next push that arrives.
    pub(super) fn next(&self) -> Arrival {
        self.next
    }

    pub(super) fn contains(&self, id: GradientId) -> bool {
        self.arrivals.contains_key(&id)
    }

    pub(super) fn get_mut(&mut self, id: GradientId) -> Option<&mut PendingPush> {
        self.pushes.get_mut(self.arrivals.get(&id)?)
    }

    fn of_worker(&self, worker: WorkerId) -> impl Iterator<Item = (GradientId, Arrival)> + '_ {
        let id = |incarnation, clock| GradientId {
            worker,
            incarnation,
            clock,
        };
        let first = id(Incarnation(0), Clock(0));
        let last = id(Incarnation(u64::MAX), Clock(u64::MAX));
        let found = self.arrivals.range(first..=last).inspect(|_| looks_at(1));
        found.map(|(&id, &arrival)| (id, arrival))
    }

    /// Returns how many pushes of a worker are here.
    pub(super) fn num_of(&self, worker: WorkerId) -> usize {
        self.of_worker(worker).count()
    }

    pub(super) fn push(&mut self, push: PendingPush) {
        let id = push.stamp.id;
        self.num_workers += usize::from(self.num_of(id.worker) == 0);
        self.arrivals.insert(id, self.next);
        self.pushes.insert(self.next, push);
        self.next += 1;
    }

    /// Returns the pushes from this position on, in order of arrival.
    pub(super) fn since(
        &self,
        first: Arrival,
    ) -> impl Iterator<Item = (Arrival, &PendingPush)> + '_ {
        let found = self.pushes.range(first..).inspect(|_| looks_at(1));
        found.map(|(&arrival, push)| (arrival, push))
    }

    pub(super) fn take(&mut self, arrival: Arrival) -> Option<PendingPush> {
        let push = self.pushes.remove(&arrival)?;
        let id = push.stamp.id;
        self.arrivals.remove(&id);
        self.num_workers -= usize::from(self.num_of(id.worker) == 0);
        Some(push)
    }

    /// Takes all pushes of a worker, in order of arrival.
    pub(super) fn take_all_of(&mut self, worker: WorkerId) -> Vec<PendingPush> {
        let arrivals: BTreeSet<Arrival> = self.of_worker(worker).map(|(_, at)| at).collect();
        let pushes = arrivals.into_iter();
        pushes.filter_map(|arrival| self.take(arrival)).collect()
    }

    /// Forgets these callers. Their pushes stay.
    pub(super) fn forget_callers(&mut self, tickets: &BTreeSet<Ticket>) {
        looks_at(self.pushes.len());
        for push in self.pushes.values_mut() {
            push.waiters
                .retain(|waiter| !tickets.contains(&waiter.ticket));
        }
    }
}

/// How far a list was looked through. As long as nothing changes that decides, which `key` stands for, what was
/// looked at once does not have to be looked at again.
#[derive(Clone, Debug)]
pub(super) struct Looked<K> {
    at: Option<(K, u64)>,
}

impl<K> Default for Looked<K> {
    fn default() -> Self {
        Self { at: None }
    }
}

impl<K: PartialEq> Looked<K> {
    /// Returns where to begin.
    pub(super) fn until(&self, key: &K) -> u64 {
        match &self.at {
            Some((known, until)) if known == key => *until,
            _ => 0,
        }
    }

    /// Notes that everything before `until` was looked at.
    pub(super) fn note(&mut self, key: K, until: u64) {
        self.at = Some((key, until));
    }

    pub(super) fn forget(&mut self) {
        self.at = None;
    }
}
