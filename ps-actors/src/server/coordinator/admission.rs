//! Admission: which gradients are new, which workers may push them, and which are refused.

use std::collections::{BTreeMap, BTreeSet};

use super::super::consistency::Reduction;
use super::super::ledger::{Entry, Ledger, Outcome};
use super::super::protocol::{
    Effect, MAX_CLOCKS_AHEAD, MAX_EXAMPLES, MAX_PENDING, MAX_WORKERS, Refusal, Stamp, Ticket,
};
use super::pending::PendingPush;
use super::{Coordinator, Waiter};
use crate::ids::{Clock, GradientId, Incarnation, WorkerId};

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
        // Pending pushes are looked up before the ledger, because its window may have moved past a pending
        // push.
        if let Some(pending) = self.pending.get_mut(id) {
            if pending.waiters.len() >= MAX_PENDING {
                return Err(Refusal::TooManyPending { worker });
            }
            pending.waiters.push(waiter);
            self.stat(worker).num_duplicates += 1;
            return Ok(());
        }
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
        self.check_version(&stamp)?;
        self.check_clock(id)?;
        check_examples(&stamp)?;
        if self.pending.num_of(worker) >= MAX_PENDING {
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

    /// Checks that a worker is a member in this incarnation.
    ///
    /// # Errors
    /// If it is not.
    pub(crate) fn check_member(
        &self,
        worker: WorkerId,
        incarnation: Incarnation,
    ) -> Result<(), Refusal> {
        match self.incarnation(worker) {
            Some(current) if current == incarnation => Ok(()),
            Some(current) if current > incarnation => Err(Refusal::Fenced {
                worker,
                got: incarnation,
                least: current,
            }),
            _ => Err(Refusal::NotMember { worker }),
        }
    }

    pub(super) fn apply(
        &mut self,
        stamps: &[Stamp],
        reduction: Reduction,
        newest: Incarnation,
        effects: &mut Vec<Effect>,
    ) -> Result<Outcome, Refusal> {
        let settled = self.check_all(stamps, newest)?;
        if settled.len() == stamps.len() {
            // The same call again gets the same answer.
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
            self.begin_incarnation(stamp.id, effects);
        }
        for stamp in stamps {
            // One bad gradient makes the whole call fail. The caller may apply the others again without it.
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

    /// Checks gradients that need no membership. All are checked before anything changes. Returns the
    /// outcomes of those that are already settled.
    fn check_all(
        &self,
        stamps: &[Stamp],
        newest: Incarnation,
    ) -> Result<Vec<(GradientId, Outcome)>, Refusal> {
        let mut incarnations: BTreeMap<WorkerId, Incarnation> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        let mut num_new_workers = 0;
        let mut settled = Vec::new();
        for stamp in stamps {
            let id = stamp.id;
            let (worker, got) = (id.worker, id.incarnation);
            let known = self.ledgers.get(&worker).map(|ledger| ledger.incarnation);
            if let Some(least) = known.filter(|&known| got < known) {
                return Err(Refusal::Fenced { worker, got, least });
            }
            // A known incarnation is accepted in any case, because the servers themselves may have assigned
            // it.
            if got > newest.max(known.unwrap_or_default()) {
                return Err(Refusal::IncarnationAhead {
                    worker,
                    got,
                    newest,
                });
            }
            // A member's gradients count only in the incarnation in which it joined, until its membership
            // is over.
            let member = self.members.get(worker).map(|member| member.incarnation);
            let is_new = known.is_none() && !incarnations.contains_key(&worker);
            num_new_workers += usize::from(is_new);
            if is_new && self.ledgers.len() + num_new_workers > MAX_WORKERS {
                return Err(Refusal::TooManyWorkers { worker });
            }
            let incarnation = *incarnations.entry(worker).or_insert(member.unwrap_or(got));
            if incarnation != got {
                let (one, other) = (incarnation.min(got), incarnation.max(got));
                return Err(Refusal::TwoIncarnations { worker, one, other });
            }
            if !seen.insert(id) || self.is_pending(id) {
                return Err(Refusal::AlreadyPushed { id });
            }
            self.check_version(stamp)?;
            self.check_clock(id)?;
            check_examples(stamp)?;
            match self.entry(id) {
                Entry::Settled(outcome) => settled.push((id, outcome)),
                Entry::Forgotten => return Err(Refusal::Forgotten { id }),
                Entry::New => {}
            }
        }
        Ok(settled)
    }

    /// Begins the record of an incarnation that was checked, and fences earlier incarnations of its worker.
    fn begin_incarnation(&mut self, id: GradientId, effects: &mut Vec<Effect>) {
        let GradientId {
            worker,
            incarnation,
            ..
        } = id;
        let is_new = !self.ledgers.contains_key(&worker);
        let ledger = self.ledgers.entry(worker).or_default();
        if is_new || ledger.incarnation < incarnation {
            // The clocks of a worker that never joins start at 0 in every incarnation.
            ledger.begin(incarnation);
            let below = incarnation;
            effects.push(Effect::Fence { worker, below });
        }
    }

    /// Limits the memory that made-up worker numbers could take.
    pub(super) fn check_room(&self, worker: WorkerId) -> Result<(), Refusal> {
        if self.ledgers.len() >= MAX_WORKERS && !self.ledgers.contains_key(&worker) {
            return Err(Refusal::TooManyWorkers { worker });
        }
        Ok(())
    }

    /// Whether a push with this id was accepted and waits to be applied.
    pub(in crate::server) fn is_pending(&self, id: GradientId) -> bool {
        self.pending.contains(id)
    }

    /// Frees what was staged for a call that changed nothing, or whose gradient has already been applied.
    pub(super) fn discard_unless_pending(&self, id: GradientId, effects: &mut Vec<Effect>) {
        if !self.is_pending(id) {
            effects.push(Effect::Discard(id));
        }
    }

    /// Returns what is known of a gradient. Nothing is known of a gradient of a later incarnation than any
    /// before.
    fn entry(&self, id: GradientId) -> Entry {
        let ledger = self.ledgers.get(&id.worker);
        let ledger = ledger.filter(|ledger| ledger.incarnation == id.incarnation);
        ledger.map_or(Entry::New, |ledger| ledger.entry(id.clock))
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

    fn check_clock(&self, id: GradientId) -> Result<(), Refusal> {
        let ledger = self.ledgers.get(&id.worker);
        let ledger = ledger.filter(|ledger| ledger.incarnation == id.incarnation);
        let next = ledger.map_or(Clock(0), Ledger::next_clock);
        let most = Clock(next.0.saturating_add(MAX_CLOCKS_AHEAD));
        match id.clock <= most {
            true => Ok(()),
            false => Err(Refusal::ClockAhead { id, most }),
        }
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

fn check_examples(stamp: &Stamp) -> Result<(), Refusal> {
    let (id, claimed) = (stamp.id, stamp.num_examples);
    match claimed <= MAX_EXAMPLES {
        true => Ok(()),
        false => Err(Refusal::TooManyExamples { id, claimed }),
    }
}
