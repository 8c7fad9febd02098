//! What comes in: which gradients are new, who may push them, and which are refused.

use super::super::consistency::Reduction;
use super::super::ledger::{Entry, Ledger, Outcome};
use super::super::protocol::{Effect, MAX_PENDING, MAX_WORKERS, Refusal, Stamp, Ticket};
use super::{Coordinator, PendingPush, Waiter};
use crate::ids::{GradientId, Incarnation, WorkerId};

impl Coordinator {
    pub(super) fn push(
        &mut self,
        ticket: Ticket,
        stamp: Stamp,
        then_start: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let id = stamp.id;
        let worker = id.worker;
        let waiter = Waiter { ticket, then_start };
        self.check_member(worker, id.incarnation)?;
        match self.entry(id) {
            Entry::Settled(outcome) => {
                if then_start {
                    self.check_room_to_hold(worker)?;
                }
                self.stat(worker).num_duplicates += 1;
                effects.push(Effect::Discard(id));
                self.answer(waiter, id, outcome, effects);
                return Ok(());
            }
            Entry::Forgotten => return Err(Refusal::Forgotten { id }),
            Entry::New => {}
        }
        if let Some(pending) = self.pending.iter_mut().find(|push| push.stamp.id == id) {
            if pending.waiters.len() >= MAX_PENDING {
                return Err(Refusal::TooManyPending { worker });
            }
            pending.waiters.push(waiter);
            self.stat(worker).num_duplicates += 1;
            return Ok(());
        }
        self.check_version(&stamp)?;
        if self
            .pending
            .iter()
            .filter(|push| push.stamp.id.worker == worker)
            .count()
            >= MAX_PENDING
        {
            return Err(Refusal::TooManyPending { worker });
        }
        let push = PendingPush {
            stamp,
            waiters: vec![waiter],
        };
        match self.norm_outcome(&stamp) {
            Some(refused) => {
                effects.push(Effect::Discard(id));
                self.settle(push, refused, effects);
            }
            None => self.pending.push(push),
        }
        Ok(())
    }

    /// Whether a worker takes part in this life.
    ///
    /// # Errors
    /// When it does not; says in which life it may.
    pub fn check_member(&self, worker: WorkerId, incarnation: Incarnation) -> Result<(), Refusal> {
        match self.incarnation(worker) {
            Some(current) if current == incarnation => Ok(()),
            Some(current) if current > incarnation => Err(Refusal::Fenced {
                worker,
                got: incarnation,
                least: current,
            }),
            _ => {
                let ledger = self.ledgers.get(&worker);
                let latest = ledger.map_or(Incarnation(0), |ledger| ledger.incarnation);
                let least = latest.next();
                Err(Refusal::NotMember { worker, least })
            }
        }
    }

    pub(super) fn apply(
        &mut self,
        stamps: &[Stamp],
        reduction: Reduction,
        effects: &mut Vec<Effect>,
    ) -> Result<Outcome, Refusal> {
        let mut settled = Vec::new();
        for (i, stamp) in stamps.iter().enumerate() {
            let id = stamp.id;
            self.admit(id)?;
            self.check_version(stamp)?;
            match self.entry(id) {
                Entry::Settled(outcome) => settled.push((id, outcome)),
                Entry::Forgotten => return Err(Refusal::Forgotten { id }),
                Entry::New => {}
            }
            if self.is_pending(id) || stamps[..i].iter().any(|earlier| earlier.id == id) {
                return Err(Refusal::AlreadyPushed { id });
            }
        }
        if settled.len() == stamps.len() {
            // The same call once more gets the same answer.
            for (id, _) in &settled {
                self.stat(id.worker).num_duplicates += 1;
            }
            let latest = settled
                .into_iter()
                .map(|(_, outcome)| outcome)
                .max_by_key(Outcome::version);
            return latest.ok_or(Refusal::Empty);
        }
        if let Some(&(id, _)) = settled.first() {
            return Err(Refusal::AlreadyPushed { id });
        }
        for stamp in stamps {
            // One bad gradient spoils the call; the others may be applied again without it.
            if let Some(refused) = self.norm_outcome(stamp) {
                let push = PendingPush {
                    stamp: *stamp,
                    waiters: Vec::new(),
                };
                self.settle(push, refused, effects);
                return Ok(refused);
            }
        }
        let pushes = stamps
            .iter()
            .map(|&stamp| PendingPush {
                stamp,
                waiters: Vec::new(),
            })
            .collect();
        Ok(self.update(pushes, reduction, effects))
    }

    /// Lets a gradient in that needs no membership, and fences earlier lives of its worker.
    fn admit(&mut self, id: GradientId) -> Result<(), Refusal> {
        let GradientId {
            worker,
            incarnation,
            ..
        } = id;
        self.check_room(worker)?;
        let ledger = self
            .ledgers
            .entry(worker)
            .or_insert_with(|| Ledger::new(incarnation));
        if incarnation < ledger.incarnation
            || (incarnation > ledger.incarnation && self.members.contains_key(&worker))
        {
            let least = ledger.incarnation;
            return Err(Refusal::Fenced {
                worker,
                got: incarnation,
                least,
            });
        }
        if incarnation > ledger.incarnation {
            // A worker that never joins counts its clocks from 0 in every life.
            *ledger = Ledger::new(incarnation);
        }
        Ok(())
    }

    /// Bounds the memory that made-up worker numbers could take.
    pub(super) fn check_room(&self, worker: WorkerId) -> Result<(), Refusal> {
        if self.ledgers.len() >= MAX_WORKERS && !self.ledgers.contains_key(&worker) {
            return Err(Refusal::TooManyWorkers { worker });
        }
        Ok(())
    }

    /// Whether a push was accepted and waits to be applied.
    pub(in crate::server) fn is_pending(&self, id: GradientId) -> bool {
        self.pending.iter().any(|push| push.stamp.id == id)
    }

    /// Frees what was staged for a call that changed nothing, or is applied already.
    pub(super) fn discard_unless_pending(&self, id: GradientId, effects: &mut Vec<Effect>) {
        if !self.is_pending(id) {
            effects.push(Effect::Discard(id));
        }
    }

    fn entry(&self, id: GradientId) -> Entry {
        self.ledgers
            .get(&id.worker)
            .map_or(Entry::New, |ledger| ledger.entry(id.clock))
    }

    fn check_version(&self, stamp: &Stamp) -> Result<(), Refusal> {
        if stamp.computed_on > self.version {
            let (claimed, version) = (stamp.computed_on, self.version);
            return Err(Refusal::FromTheFuture {
                id: stamp.id,
                claimed,
                version,
            });
        }
        Ok(())
    }

    fn norm_outcome(&self, stamp: &Stamp) -> Option<Outcome> {
        let (norm, limit, version) = (stamp.norm, self.max_norm, self.version);
        (!norm.is_finite() || norm > limit).then_some(Outcome::RefusedNorm {
            version,
            norm,
            limit,
        })
    }
}
