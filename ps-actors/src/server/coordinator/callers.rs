//! Who waits: callers that wait for answers, and workers that the run waits for.

use std::collections::BTreeSet;

use super::super::consistency::Consistency;
use super::super::protocol::{MAX_PENDING, Refusal, Ticket};
use super::super::status::Awaited;
use super::Coordinator;
use crate::ids::{Incarnation, WorkerId};

impl Coordinator {
    /// Returns the incarnation in which a worker is a member.
    #[must_use]
    pub(crate) fn incarnation(&self, worker: WorkerId) -> Option<Incarnation> {
        self.members.get(worker).map(|member| member.incarnation)
    }

    /// Forgets these tickets, because their callers have gone. The pushes of these callers stay pending.
    pub(crate) fn forget_callers(&mut self, tickets: &BTreeSet<Ticket>) {
        self.pending.forget_callers(tickets);
        self.looked_at_held.forget();
        self.held_answers.forget(tickets);
    }

    /// Returns how many pushes wait to be applied, or for their worker's next step.
    #[must_use]
    pub(crate) fn num_held_up(&self) -> usize {
        self.pending.len() + self.held_answers.len()
    }

    /// Returns the workers that the waiting pushes wait for.
    #[must_use]
    pub(crate) fn awaited(&self) -> Awaited {
        let waits_for_rounds = matches!(
            self.consistency,
            Consistency::Bsp | Consistency::KofN { .. }
        );
        let workers = match self.consistency {
            // Nobody could end a pause by pushing.
            _ if self.is_paused || self.num_held_up() == 0 => Vec::new(),
            Consistency::Asp => Vec::new(),
            Consistency::Bsp | Consistency::KofN { .. } => {
                let members = self.members.iter().map(|(worker, _)| worker);
                members
                    .filter(|&worker| self.pending.num_of(worker) == 0)
                    .collect()
            }
            Consistency::Ssp { .. } => {
                let slowest = self.members.slowest();
                let members = self.members.iter();
                members
                    .filter(|(_, member)| Some(member.current_progress()) == slowest)
                    .map(|(worker, _)| worker)
                    .collect()
            }
        };
        Awaited {
            num_to_join: if waits_for_rounds && !self.is_paused {
                self.num_awaited
            } else {
                0
            },
            workers,
        }
    }

    /// Limits the number of callers that wait until their worker may start its next step.
    pub(super) fn check_room_to_hold(&self, worker: WorkerId) -> Result<(), Refusal> {
        match self.held_answers.num_of(worker) {
            MAX_PENDING.. => Err(Refusal::TooManyPending { worker }),
            _ => Ok(()),
        }
    }
}
