//! Decides which gradients make which update, as a pure state machine.
//!
//! `step(state, event) → effects`: no clock, randomness, input, output or actor in here, and
//! no weights either. The coordinator sees a gradient's [`Stamp`] only; the numbers wait in
//! the [`Shard`](super::shard::Shard)s, which follow the coordinator's [`Update`]s in order.
//! So the weights of all shards pass through the same versions, made of the same gradients,
//! in every consistency mode: any number of servers computes the same bits as one (PS-3), and
//! a version means the same everywhere (PS-5).
//!
//! A push is *new*, then *pending* (it waits for its round, or for slower workers), then
//! *settled* with an [`Outcome`] in the worker's ledger (PS-2). Everything that may happen
//! next is decided in `Coordinator::advance`, after every event.

use std::collections::BTreeMap;

use super::consistency::{Consistency, Reduction};
use super::ledger::{Entry, Ledger, Outcome};
use super::protocol::{
    Answer, Effect, Event, MAX_PENDING, MAX_WORKERS, Membership, Refusal, Stamp, Ticket, Update,
};
use super::status::{CoordinatorStatus, WorkerStatus};
use crate::ids::{Clock, Epoch, GradientId, Incarnation, Version, WorkerId};

#[derive(Clone, Debug)]
struct Member {
    incarnation: Incarnation,
    /// The clock of its first step, and the progress that this step counts as.
    first_clock: Clock,
    first_progress: u64,
    /// The clock that it works on: after the latest settled one.
    next_clock: Clock,
}

impl Member {
    /// Steps done before `clock`, comparable between workers that joined at different times.
    fn progress(&self, clock: Clock) -> u64 {
        self.first_progress + clock.0.saturating_sub(self.first_clock.0)
    }
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    ticket: Ticket,
    then_start: bool,
}

#[derive(Clone, Debug)]
struct PendingPush {
    stamp: Stamp,
    waiters: Vec<Waiter>,
}

/// A settled push whose worker may not start its next step yet.
#[derive(Clone, Debug)]
struct HeldAnswer {
    ticket: Ticket,
    worker: WorkerId,
    next_clock: Clock,
    outcome: Outcome,
}

/// The state machine. See the module's text.
#[derive(Clone, Debug)]
pub struct Coordinator {
    consistency: Consistency,
    reduction: Reduction,
    max_norm: f64,
    /// How many workers more must have come before the first round closes.
    num_awaited: usize,
    version: Version,
    epoch: Epoch,
    members: BTreeMap<WorkerId, Member>,
    ledgers: BTreeMap<WorkerId, Ledger>,
    /// In order of arrival.
    pending: Vec<PendingPush>,
    held_answers: Vec<HeldAnswer>,
    stats: BTreeMap<WorkerId, WorkerStatus>,
}

impl Coordinator {
    /// Starts at version 0 with no members. Gradients with a norm above `max_norm` are refused
    /// (infinity: only those that are not finite).
    #[must_use]
    pub fn new(consistency: Consistency, reduction: Reduction, max_norm: f64) -> Self {
        Self {
            consistency,
            reduction,
            max_norm,
            num_awaited: 0,
            version: Version(0),
            epoch: Epoch(0),
            members: BTreeMap::new(),
            ledgers: BTreeMap::new(),
            pending: Vec::new(),
            held_answers: Vec::new(),
            stats: BTreeMap::new(),
        }
    }

    /// Lets no round of [`Consistency::Bsp`] or [`Consistency::KofN`] close before this many
    /// different workers have joined, or were declared lost without ever coming.
    #[must_use]
    pub fn wait_for_workers(mut self, num_workers: usize) -> Self {
        self.num_awaited = num_workers;
        self
    }

    /// Takes one event and returns what is to be done.
    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Join {
                ticket,
                worker,
                incarnation,
            } => {
                let answer = self.join(worker, incarnation, &mut effects);
                effects.push(Effect::Answer {
                    ticket,
                    answer: answer.map(Answer::Joined),
                });
            }
            Event::Leave {
                ticket,
                worker,
                incarnation,
            } => {
                if self
                    .members
                    .get(&worker)
                    .is_some_and(|m| m.incarnation == incarnation)
                {
                    self.remove(worker, &mut effects);
                }
                effects.push(Effect::Answer {
                    ticket,
                    answer: Ok(Answer::Left),
                });
            }
            Event::Lost { worker } => {
                self.no_longer_await(worker);
                self.remove(worker, &mut effects);
            }
            Event::Push {
                ticket,
                stamp,
                then_start,
            } => {
                if let Err(refusal) = self.push(ticket, stamp, then_start, &mut effects) {
                    self.discard_unless_pending(stamp.id, &mut effects);
                    effects.push(Effect::Answer {
                        ticket,
                        answer: Err(refusal),
                    });
                }
            }
            Event::Apply {
                ticket,
                stamps,
                reduction,
            } => {
                let answer = self.apply(&stamps, reduction, &mut effects);
                for stamp in &stamps {
                    self.discard_unless_pending(stamp.id, &mut effects);
                }
                effects.push(Effect::Answer {
                    ticket,
                    answer: answer.map(Answer::Settled),
                });
            }
            Event::SetConsistency(consistency) => self.consistency = consistency,
        }
        self.advance(&mut effects);
        effects
    }

    /// Returns the version of the weights once all updates so far are applied.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Returns the workers that take part, each with its life.
    pub fn members(&self) -> impl Iterator<Item = (WorkerId, Incarnation)> + '_ {
        self.members
            .iter()
            .map(|(&worker, member)| (worker, member.incarnation))
    }

    /// Describes the state for people and metrics.
    #[must_use]
    pub fn status(&self) -> CoordinatorStatus {
        let mut workers = self.stats.clone();
        for (worker, member) in &self.members {
            let status = workers.entry(*worker).or_default();
            status.is_member = true;
            status.next_clock = member.next_clock;
        }
        CoordinatorStatus {
            consistency: self.consistency,
            reduction: self.reduction,
            version: self.version,
            epoch: self.epoch,
            num_pending: self.pending.len(),
            workers,
        }
    }

    fn join(
        &mut self,
        worker: WorkerId,
        incarnation: Incarnation,
        effects: &mut Vec<Effect>,
    ) -> Result<Membership, Refusal> {
        if let Some(member) = self
            .members
            .get(&worker)
            .filter(|m| m.incarnation == incarnation)
        {
            // The same request once more: the same answer, and nothing changes.
            let next_clock = member.first_clock;
            return Ok(Membership {
                epoch: self.epoch,
                next_clock,
                version: self.version,
            });
        }
        if let Some(ledger) = self
            .ledgers
            .get(&worker)
            .filter(|l| incarnation <= l.incarnation)
        {
            let least = ledger.incarnation.next();
            return Err(Refusal::Fenced {
                worker,
                got: incarnation,
                least,
            });
        }
        self.check_room(worker)?;
        self.no_longer_await(worker);
        self.remove(worker, effects);
        let ledger = self.ledgers.entry(worker).or_default();
        ledger.incarnation = incarnation;
        let next_clock = ledger.next_clock();
        // A newcomer counts as being where the slowest is: it holds nobody back for steps
        // that others took before it came.
        let first_progress = self.slowest_progress().unwrap_or(0);
        let member = Member {
            incarnation,
            first_clock: next_clock,
            first_progress,
            next_clock,
        };
        self.members.insert(worker, member);
        self.epoch = self.epoch.next();
        effects.push(Effect::Fence {
            worker,
            below: incarnation,
        });
        Ok(Membership {
            epoch: self.epoch,
            next_clock,
            version: self.version,
        })
    }

    /// Counts a worker down that has come, or never will, the first time that it is heard of.
    fn no_longer_await(&mut self, worker: WorkerId) {
        if self.num_awaited > 0 && !self.ledgers.contains_key(&worker) {
            self.num_awaited -= 1;
            self.ledgers.insert(worker, Ledger::default());
        }
    }

    /// Ends a worker's membership. What it has pending is not applied, so that its next life
    /// can push it again.
    fn remove(&mut self, worker: WorkerId, effects: &mut Vec<Effect>) {
        let Some(member) = self.members.remove(&worker) else {
            return;
        };
        self.epoch = self.epoch.next();
        let least = member.incarnation.next();
        for push in self
            .pending
            .extract_if(.., |push| push.stamp.id.worker == worker)
        {
            for waiter in push.waiters {
                let refusal = Refusal::NotMember { worker, least };
                effects.push(Effect::Answer {
                    ticket: waiter.ticket,
                    answer: Err(refusal),
                });
            }
        }
        effects.push(Effect::Fence {
            worker,
            below: least,
        });
    }

    fn push(
        &mut self,
        ticket: Ticket,
        stamp: Stamp,
        then_start: bool,
        effects: &mut Vec<Effect>,
    ) -> Result<(), Refusal> {
        let id = stamp.id;
        let worker = id.worker;
        let waiter = Waiter { ticket, then_start };
        let latest = self
            .ledgers
            .get(&worker)
            .map_or(Incarnation(0), |l| l.incarnation);
        match self.members.get(&worker) {
            Some(member) if member.incarnation == id.incarnation => {}
            Some(member) if member.incarnation > id.incarnation => {
                let least = member.incarnation;
                return Err(Refusal::Fenced {
                    worker,
                    got: id.incarnation,
                    least,
                });
            }
            _ => {
                return Err(Refusal::NotMember {
                    worker,
                    least: latest.next(),
                });
            }
        }
        match self.entry(id) {
            Entry::Settled(outcome) => {
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

    fn apply(
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
            let pending = self.pending.iter().any(|push| push.stamp.id == id);
            if pending || stamps[..i].iter().any(|earlier| earlier.id == id) {
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

    /// Makes everything happen that can happen now. After it, whatever is pending waits for
    /// another event.
    fn advance(&mut self, effects: &mut Vec<Effect>) {
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
        let mut round: BTreeMap<WorkerId, usize> = BTreeMap::new();
        for (index, push) in self.pending.iter().enumerate() {
            // A worker's second push waits for the next round: it never stands in for another.
            round.entry(push.stamp.id.worker).or_insert(index);
            if round.len() == quorum {
                break;
            }
        }
        if round.is_empty() || round.len() < quorum {
            return false;
        }
        let chosen: Vec<usize> = round.into_values().collect();
        let mut pushes = Vec::with_capacity(chosen.len());
        let mut index = 0;
        self.pending.retain(|push| {
            if chosen.contains(&index) {
                pushes.push(push.clone());
            }
            index += 1;
            !chosen.contains(&(index - 1))
        });
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
            let staleness = version.0 - push.stamp.computed_on.0;
            effects.push(Effect::Discard(push.stamp.id));
            self.settle(push, Outcome::DroppedLate { version, staleness }, effects);
        }
    }

    /// Makes one update of `pushes` and settles them.
    fn update(
        &mut self,
        mut pushes: Vec<PendingPush>,
        reduction: Reduction,
        effects: &mut Vec<Effect>,
    ) -> Outcome {
        pushes.sort_by_key(|push| push.stamp.id);
        let before = self.version;
        self.version = before.next();
        let gradients = pushes.iter().map(|push| push.stamp.id).collect();
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
            let staleness = before.0 - push.stamp.computed_on.0;
            latest = Outcome::Applied {
                version: self.version,
                staleness,
            };
            self.settle(push, latest, effects);
        }
        latest
    }

    fn settle(&mut self, push: PendingPush, outcome: Outcome, effects: &mut Vec<Effect>) {
        let id = push.stamp.id;
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

    fn answer(
        &mut self,
        waiter: Waiter,
        id: GradientId,
        outcome: Outcome,
        effects: &mut Vec<Effect>,
    ) {
        let Waiter { ticket, then_start } = waiter;
        if then_start {
            // `release_answers` decides, at the end of this very step.
            let (worker, next_clock) = (id.worker, id.clock.next());
            self.held_answers.push(HeldAnswer {
                ticket,
                worker,
                next_clock,
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
                    self.may_start(answer.worker, answer.next_clock, bound)
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

    /// Says whether a worker's step is within the bound of the slowest live member (PS-4).
    fn may_start(&self, worker: WorkerId, clock: Clock, bound: u64) -> bool {
        match (self.members.get(&worker), self.slowest_progress()) {
            (Some(member), Some(slowest)) => {
                member.progress(clock) <= slowest.saturating_add(bound)
            }
            // Whoever is no member any more learns what became of its push.
            _ => true,
        }
    }

    fn slowest_progress(&self) -> Option<u64> {
        self.members
            .values()
            .map(|member| member.progress(member.next_clock))
            .min()
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
    fn check_room(&self, worker: WorkerId) -> Result<(), Refusal> {
        if self.ledgers.len() >= MAX_WORKERS && !self.ledgers.contains_key(&worker) {
            return Err(Refusal::TooManyWorkers { worker });
        }
        Ok(())
    }

    /// Frees what was staged for a call that changed nothing, or is applied already.
    fn discard_unless_pending(&self, id: GradientId, effects: &mut Vec<Effect>) {
        if !self.pending.iter().any(|push| push.stamp.id == id) {
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

    fn stat(&mut self, worker: WorkerId) -> &mut WorkerStatus {
        self.stats.entry(worker).or_default()
    }
}
