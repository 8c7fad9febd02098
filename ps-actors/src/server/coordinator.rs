//! Decides which gradients make which update, as a pure state machine.
//!
//! `step(state, event) → effects`: this module uses no clock, randomness, input, output or actor, and holds
//! no weights. The coordinator sees only a gradient's [`Stamp`]. The numbers wait in the
//! [`Shard`](super::shard::Shard)s, which follow the coordinator's decisions in order. So the weights of
//! all shards pass through the same versions, made of the same gradients, in every consistency mode. Any
//! number of servers computes the same bits as one (PS-3), and a version means the same everywhere (PS-5).
//!
//! A push is *new*, then *pending* (it waits for its round, or for slower workers), then *settled* with an
//! [`Outcome`](super::ledger::Outcome) in the worker's ledger (PS-2). After every event, `rounds` decides everything that may
//! happen next.

use std::collections::{BTreeMap, BTreeSet};

use super::consistency::{Consistency, Reduction};
use super::ledger::Ledger;
use super::protocol::{Answer, Effect, Event, Membership, Refusal, Ticket};
use super::status::{CoordinatorStatus, WorkerStatus};
use crate::ids::{Clock, Epoch, Incarnation, JoinRequest, Version, WorkerId};

mod admission;
mod callers;
pub(super) mod cost;
mod held;
mod members;
mod pending;
mod rounds;
mod state;

use held::Held;
use members::{Member, Members};
use pending::{Looked, Pending};
pub(crate) use state::{CoordinatorState, beside_header};

#[derive(Clone, Copy, Debug)]
struct Waiter {
    ticket: Ticket,
    then_start: bool,
}

/// What decides which workers may start a step: the mode, the slowest member, and who the members are.
type Pace = (Consistency, Option<u64>, Epoch);

/// The state machine; see the module's text.
#[derive(Clone, Debug)]
pub(super) struct Coordinator {
    consistency: Consistency,
    reduction: Reduction,
    max_norm: f64,
    /// Whether pushes wait until somebody lets the updates go on.
    is_paused: bool,
    /// How many more workers must join, or be declared lost, before the first round closes.
    num_awaited: usize,
    /// The workers that have already been subtracted from the number that was awaited.
    arrived: BTreeSet<WorkerId>,
    version: Version,
    epoch: Epoch,
    members: Members,
    ledgers: BTreeMap<WorkerId, Ledger>,
    pending: Pending,
    /// The pending pushes that do not have to be looked at.
    looked_at_pending: Looked<Pace>,
    looked_at_late: Looked<Version>,
    held_answers: Held,
    looked_at_held: Looked<Pace>,
    stats: BTreeMap<WorkerId, WorkerStatus>,
    /// No worker that joins begins at an earlier clock.
    least_clock: Clock,
}

impl Coordinator {
    /// Starts at version 0 with no members. Gradients with a norm above `max_norm` are refused. If
    /// `max_norm` is infinite, only gradients whose norm is not finite are refused.
    #[must_use]
    pub(super) fn new(consistency: Consistency, reduction: Reduction, max_norm: f64) -> Self {
        Self {
            consistency,
            reduction,
            max_norm,
            is_paused: false,
            num_awaited: 0,
            arrived: BTreeSet::new(),
            version: Version(0),
            epoch: Epoch(0),
            members: Members::default(),
            ledgers: BTreeMap::new(),
            pending: Pending::default(),
            looked_at_pending: Looked::default(),
            looked_at_late: Looked::default(),
            held_answers: Held::default(),
            looked_at_held: Looked::default(),
            stats: BTreeMap::new(),
            least_clock: Clock(0),
        }
    }

    pub(super) fn consistency(&self) -> Consistency {
        self.consistency
    }

    /// Goes on from the state of a checkpoint, without members. The settings stay those of this
    /// coordinator.
    #[must_use]
    pub(super) fn restore(self, state: CoordinatorState) -> Self {
        let CoordinatorState {
            version,
            epoch,
            consistency: _,
            ledgers,
            mut stats,
            least_clock,
        } = state;
        stats.values_mut().for_each(|worker| worker.num_joins = 0);
        Self {
            version,
            epoch,
            ledgers,
            stats,
            least_clock,
            ..self
        }
    }

    /// Returns the state for a checkpoint. It belongs to the weights of the current version.
    #[must_use]
    pub(super) fn save(&self) -> CoordinatorState {
        CoordinatorState {
            version: self.version,
            epoch: self.epoch,
            consistency: self.consistency,
            ledgers: self.ledgers.clone(),
            stats: self.stats.clone(),
            least_clock: self.least_clock,
        }
    }

    /// Lets no round of [`Consistency::Bsp`] or [`Consistency::KofN`] close before this many different
    /// workers have joined, or have been declared lost without ever joining.
    #[must_use]
    pub(super) fn wait_for_workers(mut self, num_workers: usize) -> Self {
        self.num_awaited = num_workers;
        self
    }

    /// Takes one event and returns what the server must do.
    pub(super) fn step(&mut self, event: Event) -> Vec<Effect> {
        let mut effects = Vec::new();
        match event {
            Event::Join {
                ticket,
                worker,
                request,
            } => {
                let answer = self.join(worker, request, &mut effects);
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
                    .get(worker)
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
                    // A push that will be repeated needs its staged numbers. A follower might be told to
                    // forget them after they have been staged again, and would then wait for them for ever.
                    if !matches!(refusal, Refusal::TooManyPending { .. }) {
                        self.discard_unless_pending(stamp.id, &mut effects);
                    }
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
                newest,
            } => {
                let answer = self.apply(&stamps, reduction, newest, &mut effects);
                for stamp in &stamps {
                    self.discard_unless_pending(stamp.id, &mut effects);
                }
                effects.push(Effect::Answer {
                    ticket,
                    answer: answer.map(Answer::Settled),
                });
            }
            Event::SetConsistency(consistency) => self.consistency = consistency,
            Event::SetPaused(is_paused) => self.is_paused = is_paused,
        }
        self.advance(&mut effects);
        effects
    }

    /// Whether pushes wait until somebody lets the updates go on.
    #[must_use]
    pub(super) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Returns the version of the weights once all updates so far are applied.
    #[must_use]
    pub(super) fn version(&self) -> Version {
        self.version
    }

    /// Returns the members, each with its incarnation.
    pub(super) fn members(&self) -> impl Iterator<Item = (WorkerId, Incarnation)> + '_ {
        let members = self.members.iter();
        members.map(|(worker, member)| (worker, member.incarnation))
    }

    /// Returns the number of entries of the largest record about workers.
    #[cfg(test)]
    pub(in crate::server) fn largest_book(&self) -> usize {
        let Self {
            arrived,
            members,
            ledgers,
            stats,
            ..
        } = self;
        let books = [arrived.len(), members.len(), ledgers.len(), stats.len()];
        books.into_iter().fold(0, usize::max)
    }

    /// Describes everything that decides what the coordinator does next.
    #[cfg(test)]
    pub(in crate::server) fn description(&self) -> String {
        format!(
            "{:?} {:?} {:?} {:?} {:?} {:?} {:?} {:?}",
            self.is_paused,
            self.version,
            self.epoch,
            self.num_awaited,
            self.members,
            self.ledgers,
            self.pending,
            self.held_answers
        )
    }

    /// Describes the state for people and metrics.
    #[must_use]
    pub(super) fn status(&self) -> CoordinatorStatus {
        let mut workers = self.stats.clone();
        for (worker, status) in &mut workers {
            let settled = self.ledgers.get(worker).map(Ledger::next_clock);
            status.next_clock = settled.unwrap_or_default().max(self.least_clock);
        }
        for (worker, member) in self.members.iter() {
            let status = workers.entry(worker).or_default();
            status.is_member = true;
            status.next_clock = member.next_clock;
        }
        CoordinatorStatus {
            consistency: self.consistency,
            is_paused: self.is_paused,
            reduction: self.reduction,
            version: self.version,
            epoch: self.epoch,
            num_pending: self.pending.len(),
            awaited: self.awaited(),
            workers,
        }
    }

    fn join(
        &mut self,
        worker: WorkerId,
        request: JoinRequest,
        effects: &mut Vec<Effect>,
    ) -> Result<Membership, Refusal> {
        let ledger = self.ledgers.get(&worker);
        if let Some(got) = ledger.and_then(|ledger| ledger.incarnation_of(request)) {
            // The same request again gets the same answer, and nothing changes.
            let member = self.members.get(worker);
            return match member.filter(|member| member.incarnation == got) {
                Some(member) => Ok(self.membership(worker, member)),
                None => {
                    let least = got.next();
                    Err(Refusal::Fenced { worker, got, least })
                }
            };
        }
        self.check_room(worker)?;
        self.no_longer_await(worker);
        self.remove(worker, effects);
        let ledger = self.ledgers.entry(worker).or_default();
        ledger.join(request, self.least_clock);
        effects.push(Effect::Joined { worker, request });
        let (incarnation, first_clock) = (ledger.incarnation, ledger.first_clock());
        // A new member counts as being at the step of the slowest one. So it does not hold the others back
        // for steps that they took before it joined.
        let first_progress = self.members.slowest().unwrap_or(0);
        let member = Member {
            incarnation,
            first_clock,
            first_progress,
            next_clock: first_clock,
        };
        // The status lists the worker from now on, even if it never pushes.
        let status = self.stat(worker);
        status.num_joins = status.num_joins.saturating_add(1);
        self.epoch = self.epoch.next();
        effects.push(Effect::Fence {
            worker,
            below: incarnation,
        });
        let membership = self.membership(worker, &member);
        self.members.insert(worker, member);
        Ok(membership)
    }

    fn membership(&self, worker: WorkerId, member: &Member) -> Membership {
        let ledger = self.ledgers.get(&worker);
        Membership {
            incarnation: member.incarnation,
            epoch: self.epoch,
            next_clock: member.first_clock,
            latest_outcome: ledger.and_then(Ledger::outcome_before),
            version: self.version,
        }
    }

    /// Reduces the number of awaited workers, the first time that a worker joins or is declared lost.
    fn no_longer_await(&mut self, worker: WorkerId) {
        if self.num_awaited > 0 && self.arrived.insert(worker) {
            self.num_awaited -= 1;
        }
    }

    /// Ends a worker's membership. Its pending gradients are not applied, so its next incarnation can push
    /// them again.
    fn remove(&mut self, worker: WorkerId, effects: &mut Vec<Effect>) {
        let Some(member) = self.members.remove(worker) else {
            return;
        };
        self.epoch = self.epoch.next();
        let least = member.incarnation.next();
        for push in self.pending.take_all_of(worker) {
            for waiter in push.waiters {
                let refusal = Refusal::NotMember { worker };
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

    fn stat(&mut self, worker: WorkerId) -> &mut WorkerStatus {
        self.stats.entry(worker).or_default()
    }
}
