//! What happens next: which pending gradients make an update now, and which callers are answered.

use std::collections::BTreeMap;

use super::super::consistency::{Consistency, Reduction};
use super::super::ledger::Outcome;
use super::super::protocol::{Answer, Effect, Update};
use super::{Coordinator, HeldAnswer, PendingPush, Waiter};
use crate::ids::{Clock, GradientId, WorkerId};

impl Coordinator {
    /// Does everything that can be done now. Afterwards, every pending push waits for another event.
    pub(super) fn advance(&mut self, effects: &mut Vec<Effect>) {
        loop {
            let progress = match self.consistency {
                Consistency::Asp => self.apply_first_pending(effects, |_, _| true),
                Consistency::Ssp { bound } => self.apply_first_pending(effects, |state, push| {
                    state.may_start(push.stamp.id.worker, push.stamp.id.clock, bound)
                }),
                Consistency::Bsp => self.close_round(self.members.len(), effects),
                Consistency::KofN { k } => {
                    self.drop_late(effects);
                    self.close_round(k.clamp(1, self.members.len().max(1)), effects)
                }
            };
            if !progress {
                break;
            }
        }
        self.release_answers(effects);
    }

    /// Applies the earliest pending push that is `allowed` as an update of its own.
    fn apply_first_pending(
        &mut self,
        effects: &mut Vec<Effect>,
        allowed: impl Fn(&Self, &PendingPush) -> bool,
    ) -> bool {
        let Some(index) = self.pending.iter().position(|push| allowed(self, push)) else {
            return false;
        };
        let push = self.pending.remove(index);
        self.update(vec![push], self.reduction, effects);
        true
    }

    /// Closes the open round if `quorum` distinct workers have a push pending.
    fn close_round(&mut self, quorum: usize, effects: &mut Vec<Effect>) -> bool {
        if self.num_awaited > 0 {
            return false;
        }
        if self.pending.len() < quorum {
            // With thousands of workers, most pushes end here.
            return false;
        }
        let mut round: BTreeMap<WorkerId, GradientId> = BTreeMap::new();
        for push in &self.pending {
            // A worker's second push waits for the next round. It never counts for another worker (S-1).
            let id = push.stamp.id;
            round.entry(id.worker).or_insert(id);
            if round.len() == quorum {
                break;
            }
        }
        if round.is_empty() || round.len() < quorum {
            return false;
        }
        let is_in =
            |push: &mut PendingPush| round.get(&push.stamp.id.worker) == Some(&push.stamp.id);
        let pushes = self.pending.extract_if(.., is_in).collect();
        self.update(pushes, self.reduction, effects);
        true
    }

    fn drop_late(&mut self, effects: &mut Vec<Effect>) {
        let version = self.version;
        let late: Vec<_> = self
            .pending
            .extract_if(.., |push| push.stamp.computed_on < version)
            .collect();
        for push in late {
            let staleness = push.stamp.staleness(version);
            effects.push(Effect::Discard(push.stamp.id));
            self.settle(push, Outcome::DroppedLate { version, staleness }, effects);
        }
    }

    /// Makes one update of `pushes` and settles them.
    pub(super) fn update(
        &mut self,
        mut pushes: Vec<PendingPush>,
        reduction: Reduction,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        pushes.sort_by_key(|push| push.stamp.id);
        let before = self.version;
        self.version = before.next();
        let gradients = pushes.iter().map(|push| push.stamp.summand()).collect();
        effects.push(Effect::Update(Update {
            version: self.version,
            gradients,
            reduction,
        }));
        let mut latest = Outcome::Applied {
            version: self.version,
            staleness: 0,
        };
        for push in pushes {
            let staleness = push.stamp.staleness(before);
            latest = Outcome::Applied {
                version: self.version,
                staleness,
            };
            self.settle(push, latest, effects);
        }
        latest
    }

    pub(super) fn settle(
        &mut self,
        push: PendingPush,
        outcome: Outcome,
        effects: &mut Vec<Effect>,
    ) {
        let id = push.stamp.id;
        if !matches!(outcome, Outcome::Applied { .. }) {
            effects.push(Effect::Settled { id, outcome });
        }
        self.ledgers
            .entry(id.worker)
            .or_default()
            .settle(id.clock, outcome);
        self.stat(id.worker).count(outcome);
        if let Some(member) = self.members.get_mut(&id.worker) {
            member.next_clock = member.next_clock.max(id.clock.next());
        }
        for waiter in push.waiters {
            self.answer(waiter, id, outcome, effects);
        }
    }

    pub(super) fn answer(
        &mut self,
        waiter: Waiter,
        id: GradientId,
        outcome: Outcome,
        effects: &mut Vec<Effect>,
    ) {
        let Waiter { ticket, then_start } = waiter;
        if then_start {
            // `release_answers` decides when to answer, at the end of this same step.
            let (worker, clock) = (id.worker, id.clock);
            self.held_answers.push(HeldAnswer {
                ticket,
                worker,
                clock,
                outcome,
            });
        } else {
            effects.push(Effect::Answer {
                ticket,
                answer: Ok(Answer::Settled(outcome)),
            });
        }
    }

    /// Answers the workers that may start their next step now.
    fn release_answers(&mut self, effects: &mut Vec<Effect>) {
        let held = std::mem::take(&mut self.held_answers);
        for answer in held {
            let may_start = match self.consistency {
                Consistency::Ssp { bound } => {
                    self.may_start(answer.worker, answer.clock.next(), bound)
                }
                Consistency::Bsp | Consistency::Asp | Consistency::KofN { .. } => true,
            };
            if may_start {
                let HeldAnswer {
                    ticket, outcome, ..
                } = answer;
                effects.push(Effect::Answer {
                    ticket,
                    answer: Ok(Answer::Settled(outcome)),
                });
            } else {
                self.held_answers.push(answer);
            }
        }
    }

    /// Whether a worker's step is within the bound of the slowest live member (PS-4).
    fn may_start(&self, worker: WorkerId, clock: Clock, bound: u64) -> bool {
        match (self.members.get(&worker), self.slowest_progress()) {
            (Some(member), Some(slowest)) => {
                member.progress(clock) <= slowest.saturating_add(bound)
            }
            // A worker that is no longer a member gets the outcome of its push at once.
            _ => true,
        }
    }

    pub(super) fn slowest_progress(&self) -> Option<u64> {
        self.members
            .values()
            .map(|member| member.progress(member.next_clock))
            .min()
    }
}
