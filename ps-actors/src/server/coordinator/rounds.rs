//! What happens next: which pending gradients make an update now, and which callers are answered.

use std::collections::BTreeMap;

use super::super::consistency::{Consistency, Reduction};
use super::super::ledger::Outcome;
use super::super::protocol::{Answer, Clip, Effect, Update};
use super::held::HeldAnswer;
use super::pending::{Arrival, PendingPush};
use super::{Coordinator, Pace, Waiter};
use crate::ids::{Clock, GradientId, WorkerId};

impl Coordinator {
    /// Does everything that can be done now. Afterwards, every pending push waits for another event.
    pub(super) fn advance(&mut self, effects: &mut Vec<Effect>) {
        if self.is_paused {
            return;
        }
        loop {
            let progress = match self.consistency {
                Consistency::Asp => self.apply_first_pending(effects),
                Consistency::Ssp { bound } => self.apply_first_allowed(bound, effects),
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

    /// Applies the earliest pending push as an update of its own.
    fn apply_first_pending(&mut self, effects: &mut Vec<Effect>) -> bool {
        let first = self.pending.since(0).next().map(|(arrival, _)| arrival);
        self.apply_pending(first, effects)
    }

    /// Applies the earliest pending push whose worker may start its step.
    fn apply_first_allowed(&mut self, bound: u64, effects: &mut Vec<Effect>) -> bool {
        let pace = self.pace();
        let looked_at = self.looked_at_pending.until(&pace);
        let mut pushes = self.pending.since(looked_at);
        let may_start =
            |push: &PendingPush| self.may_start(push.stamp.id.worker, push.stamp.id.clock, bound);
        let first = pushes.find(|(_, push)| may_start(push));
        let first = first.map(|(arrival, _)| arrival);
        drop(pushes);
        let until = first.unwrap_or(self.pending.next());
        self.looked_at_pending.note(pace, until);
        self.apply_pending(first, effects)
    }

    fn apply_pending(&mut self, first: Option<Arrival>, effects: &mut Vec<Effect>) -> bool {
        let Some(push) = first.and_then(|arrival| self.pending.take(arrival)) else {
            return false;
        };
        self.update(vec![push], self.reduction, effects);
        true
    }

    /// Closes the open round if `quorum` distinct workers have a push pending.
    fn close_round(&mut self, quorum: usize, effects: &mut Vec<Effect>) -> bool {
        if self.num_awaited > 0 {
            return false;
        }
        if self.pending.num_workers() < quorum.max(1) {
            // With thousands of workers, most pushes end here.
            return false;
        }
        let mut round: BTreeMap<WorkerId, Arrival> = BTreeMap::new();
        for (arrival, push) in self.pending.since(0) {
            // A worker's second push waits for the next round. It never counts for another worker (S-1).
            round.entry(push.stamp.id.worker).or_insert(arrival);
            if round.len() == quorum {
                break;
            }
        }
        let arrivals = round.into_values();
        let pushes: Vec<PendingPush> = arrivals
            .filter_map(|arrival| self.pending.take(arrival))
            .collect();
        self.update(pushes, self.reduction, effects);
        true
    }

    fn drop_late(&mut self, effects: &mut Vec<Effect>) {
        let version = self.version;
        let pushes = self.pending.since(self.looked_at_late.until(&version));
        let late: Vec<Arrival> = pushes
            .filter(|(_, push)| push.stamp.computed_on < version)
            .map(|(arrival, _)| arrival)
            .collect();
        self.looked_at_late.note(version, self.pending.next());
        let late: Vec<PendingPush> = late
            .into_iter()
            .filter_map(|arrival| self.pending.take(arrival))
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
            clip: Clip::None,
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
        self.members.settled(id.worker, id.clock);
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
        let pace = self.pace();
        let looked_at = self.looked_at_held.until(&pace) as usize;
        let held = self.held_answers.take_since(looked_at);
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
        let num_held = self.held_answers.len() as u64;
        self.looked_at_held.note(pace, num_held);
    }

    fn pace(&self) -> Pace {
        (self.consistency, self.members.slowest(), self.epoch)
    }

    /// Whether a worker's step is within the bound of the slowest live member (PS-4).
    fn may_start(&self, worker: WorkerId, clock: Clock, bound: u64) -> bool {
        match (self.members.get(worker), self.members.slowest()) {
            (Some(member), Some(slowest)) => {
                member.progress(clock) <= slowest.saturating_add(bound)
            }
            // A worker that is no longer a member gets the outcome of its push at once.
            _ => true,
        }
    }
}
