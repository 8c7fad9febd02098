//! The answers that wait until their worker may start its next step, so that a push costs the same whatever the number
//! of workers.

use std::collections::{BTreeMap, BTreeSet};

use super::super::ledger::Outcome;
use super::super::protocol::Ticket;
use super::cost::looks_at;
use crate::ids::{Clock, WorkerId};

/// A settled push whose worker may not start its next step yet.
#[derive(Clone, Debug)]
pub(super) struct HeldAnswer {
    pub(super) ticket: Ticket,
    pub(super) worker: WorkerId,
    pub(super) clock: Clock,
    pub(super) outcome: Outcome,
}

/// All of them, in order of arrival.
#[derive(Clone, Debug, Default)]
pub(super) struct Held {
    answers: Vec<HeldAnswer>,
    num_of: BTreeMap<WorkerId, usize>,
}

impl Held {
    pub(super) fn len(&self) -> usize {
        self.answers.len()
    }

    /// Returns how many answers to a worker are here.
    pub(super) fn num_of(&self, worker: WorkerId) -> usize {
        self.num_of.get(&worker).copied().unwrap_or(0)
    }

    pub(super) fn push(&mut self, answer: HeldAnswer) {
        *self.num_of.entry(answer.worker).or_default() += 1;
        self.answers.push(answer);
    }

    /// Takes all answers from this position on, in order of arrival.
    pub(super) fn take_since(&mut self, first: usize) -> Vec<HeldAnswer> {
        let taken = self.answers.split_off(first.min(self.answers.len()));
        looks_at(taken.len());
        for answer in &taken {
            if let Some(num) = self.num_of.get_mut(&answer.worker) {
                *num -= 1;
                if *num == 0 {
                    self.num_of.remove(&answer.worker);
                }
            }
        }
        taken
    }

    /// Forgets these callers.
    pub(super) fn forget(&mut self, tickets: &BTreeSet<Ticket>) {
        for answer in self.take_since(0) {
            if !tickets.contains(&answer.ticket) {
                self.push(answer);
            }
        }
    }
}
