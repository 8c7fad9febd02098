//! The first server of a simulated group: the coordinator, its shard, and what it tells the others.
//!
//! This is what `server/actor.rs` and `server/handlers.rs` do, in the same order, without actors and tasks.
//! The decisions themselves are made by the same code: `coordinator`, `shard`, `followers`, `leases` and
//! `replay`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::disk::Record;
use super::messages::{
    Action, Address, CallId, Calls, Input, Micros, Note, Reply, Request, Response, Timer, Turn,
};
use super::settings::{Mistake, Saving, Settings, micros};
use super::states::State;
use crate::checkpoint::{Rest, Start};
use crate::ids::{Version, WorkerId};
use crate::server::coordinator::Coordinator;
use crate::server::followers::{Follower, GroupSecret};
use crate::server::leases::Leases;
use crate::server::ledger::Outcome;
use crate::server::messages::{Decision, ServerError};
use crate::server::protocol::{Answer, Effect, Event, Refusal, Stamp, Ticket};
use crate::server::replay::{LogEntry, entries, restore};
use crate::server::shard::{Shard, ShardAnswer, ShardError};
use crate::server::{PullVersion, Reduction, ServerState};
use crate::weights::{Gradient, GradientUpdate};

/// The pause before a follower is told again.
const PAUSE: Micros = 20_000;

/// How many versions each server of a group keeps.
pub(super) const NUM_KEPT: usize = 4;

/// Makes a server's shard.
pub(super) fn shard(
    settings: &Settings,
    start: Start<'_>,
    range: std::ops::Range<usize>,
    is_first: bool,
) -> (Shard, Rest) {
    let mut rest = start.rest(range.clone(), is_first);
    let mut rule = settings.rule();
    let saved = std::mem::take(&mut rest.rule);
    restore(&mut rule, saved, range.len()).expect("the rule is the same");
    let (rule, rate) = (Box::new(rule), settings.learning_rate());
    (
        Shard::new(start.weights(), range, rule, rate, NUM_KEPT),
        rest,
    )
}

/// Makes virtual time comparable with the times that [`Leases`] keeps.
#[derive(Clone, Copy, Debug)]
struct Epoch(Instant);

impl Epoch {
    fn at(self, now: Micros) -> Instant {
        self.0 + Duration::from_micros(now)
    }
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    call: CallId,
    worker: Option<WorkerId>,
}

#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub(super) struct First {
    address: Address,
    calls: Calls,
    coordinator: Coordinator,
    shard: Shard,
    /// The other servers, each with the call that tells it something.
    followers: Vec<(Follower<()>, Option<CallId>)>,
    secret: GroupSecret,
    leases: Leases,
    lease: Option<Micros>,
    epoch: Epoch,
    waiting: BTreeMap<Ticket, Waiter>,
    next_ticket: u64,
    saving: Saving,
    mistake: Option<Mistake>,
}

impl First {
    pub(super) fn new(
        settings: &Settings,
        address: Address,
        start: Start<'_>,
        range: std::ops::Range<usize>,
        num_followers: usize,
        num_awaited: usize,
    ) -> Self {
        let (shard, rest) = shard(settings, start, range, true);
        // Sums of whole numbers are exact.
        let (mode, reduction) = (settings.consistency, Reduction::Sum);
        let mut coordinator =
            Coordinator::new(mode, reduction, f64::INFINITY).wait_for_workers(num_awaited);
        let forgets = settings.mistake == Some(Mistake::ForgetsLedger);
        if let Some(mut state) = rest.coordinator {
            if forgets {
                let version = state.version;
                state = Coordinator::new(mode, reduction, f64::INFINITY).save();
                state.version = version;
            }
            coordinator = coordinator.restore(state);
        }
        Self {
            address,
            calls: Calls::new(address, 0),
            coordinator,
            shard,
            followers: (0..num_followers)
                .map(|_| (Follower::new(()), None))
                .collect(),
            secret: GroupSecret::made_of(settings.seed),
            leases: Leases::new(settings.worker_lease),
            lease: settings.worker_lease.map(micros),
            epoch: Epoch(Instant::now()),
            waiting: BTreeMap::new(),
            next_ticket: 0,
            saving: settings.saving,
            mistake: settings.mistake,
        }
    }

    pub(super) fn version(&self) -> Version {
        self.coordinator.version()
    }

    pub(super) fn shard(&self) -> &Shard {
        &self.shard
    }

    pub(super) fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// Describes everything that decides what the server does next.
    #[cfg(test)]
    pub(super) fn description(&self) -> String {
        format!(
            "{} {} {:?} {:?}",
            self.coordinator.description(),
            self.shard.description(),
            self.followers,
            self.waiting
        )
    }

    /// Whether a follower does not have all decisions yet.
    pub(super) fn is_telling(&self) -> bool {
        self.followers.iter().any(|(_, call)| call.is_some())
    }

    /// Returns how many pulls and how many pushes wait.
    pub(super) fn num_waiting(&self) -> (usize, usize) {
        let of_workers = self.waiting.values().filter(|w| w.worker.is_some());
        let num_pushes = of_workers.count();
        (self.waiting.len() - num_pushes, num_pushes)
    }

    /// Returns the state that a run writes as its first checkpoint.
    pub(super) fn state(&self) -> ServerState {
        let state = self.shard.state();
        ServerState {
            weights: state.weights,
            rule: state.rule,
            learning_rate: self.shard.learning_rate(),
            coordinator: Some(self.coordinator.save()),
        }
    }

    pub(super) fn start(&mut self, turn: &mut Turn<'_>) {
        if let Some(lease) = self.lease {
            turn.timer(lease / 4, Timer::CheckLeases);
        }
    }

    pub(super) fn handle(&mut self, input: Input, turn: &mut Turn<'_>) {
        match input {
            Input::Called(call, request) => self.called(call, request, turn),
            Input::CallerGone(call) => self.forget_caller(call, turn),
            Input::Answered(call, reply) => {
                if let Some(index) = self.followed_by(call) {
                    self.followed(index, reply, turn);
                }
            }
            Input::Lost(call) => {
                if let Some(index) = self.followed_by(call) {
                    turn.timer(PAUSE, Timer::TellAgain(index));
                }
            }
            Input::Ended(call) => {
                if let Some(index) = self.followed_by(call) {
                    let (follower, call) = &mut self.followers[index];
                    follower.lose(index + 1, "its process has ended".to_owned());
                    *call = None;
                }
            }
            Input::Timer(Timer::CheckLeases) => self.check_leases(turn),
            Input::Timer(Timer::TellAgain(index)) => self.tell(index, turn),
            Input::Timer(_) => {}
        }
    }

    fn called(&mut self, call: CallId, request: Request, turn: &mut Turn<'_>) {
        let ticket = self.ticket();
        match request {
            Request::Join(worker, request) => {
                let before = self.coordinator.incarnation(worker);
                self.wait(ticket, call, Some(worker));
                let event = Event::Join {
                    ticket,
                    worker,
                    request,
                };
                self.step(event, turn);
                if before.is_some() && before == self.coordinator.incarnation(worker) {
                    turn.reached(State::JoinRepeated);
                }
                self.heard(worker, turn.now);
            }
            Request::Leave(worker, incarnation) => {
                self.wait(ticket, call, Some(worker));
                let event = Event::Leave {
                    ticket,
                    worker,
                    incarnation,
                };
                self.step(event, turn);
                if self.coordinator.incarnation(worker).is_none() {
                    turn.notes.push(Note::NoMember(worker));
                }
            }
            Request::ReportLost(worker) => {
                self.lose(worker, turn);
                turn.reply(call, Ok(Response::Done));
            }
            Request::Heartbeat(worker, incarnation) => {
                let reply = match self.coordinator.check_member(worker, incarnation) {
                    Ok(()) => {
                        self.leases.heard(worker, self.epoch.at(turn.now));
                        Ok(Response::Done)
                    }
                    Err(refusal) => Err(self.leases.explain(refusal).into()),
                };
                turn.reply(call, reply);
            }
            Request::PushPull(gradients) => {
                if let Err(error) = self.push(ticket, call, gradients, turn) {
                    self.waiting.remove(&ticket);
                    turn.reply(call, Err(error));
                }
            }
            Request::Pull(wanted) => self.pull(ticket, call, wanted, turn),
            Request::TakeCheckpoint => {
                let state = self.take_checkpoint(turn);
                turn.reply(call, state.map(|state| Response::State(Box::new(state))));
            }
            Request::Stage(..) | Request::GetSavedState(_) | Request::Follow(_) => {
                turn.reply(call, Err(ServerError::NotFirst));
            }
        }
    }

    fn push(
        &mut self,
        ticket: Ticket,
        call: CallId,
        gradients: GradientUpdate,
        turn: &mut Turn<'_>,
    ) -> Result<(), ServerError> {
        let mut followers = self.followers.iter().enumerate();
        followers.try_for_each(|(index, (follower, _))| follower.check(index + 1))?;
        let GradientUpdate {
            id, computed_on, ..
        } = gradients;
        let is_pending = self.coordinator.is_pending(id);
        if is_pending {
            turn.reached(State::DuplicateWhilePending);
        } else {
            self.shard.discard(id);
        }
        match self.shard.stage(id, &gradients.gradient) {
            Ok(answers) => self.answer_pulls(answers, turn),
            Err(ShardError::Fenced { .. } | ShardError::TooManyStrangers { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        let stamp = Stamp {
            id,
            computed_on,
            norm: gradients.gradient.norm(),
            num_examples: gradients.num_examples as u64,
        };
        self.wait(ticket, call, Some(id.worker));
        let event = Event::Push {
            ticket,
            stamp,
            then_start: true,
        };
        let before = self.coordinator.version();
        self.step(event, turn);
        let is_settled = !self.waiting.contains_key(&ticket);
        if is_settled && !is_pending && before == self.coordinator.version() {
            note_repeat(turn);
        }
        if !is_settled && !self.coordinator.is_pending(id) {
            turn.reached(State::HeldBack);
        }
        self.heard(id.worker, turn.now);
        Ok(())
    }

    fn pull(&mut self, ticket: Ticket, call: CallId, wanted: PullVersion, turn: &mut Turn<'_>) {
        match self.shard.pull(ticket, wanted) {
            Some(answer) => {
                turn.reply(
                    call,
                    answer.map(Response::Pulled).map_err(ServerError::from),
                );
            }
            None => self.wait(ticket, call, None),
        }
    }

    fn take_checkpoint(&mut self, turn: &mut Turn<'_>) -> Result<ServerState, ServerError> {
        let mut followers = self.followers.iter().enumerate();
        followers.try_for_each(|(index, (follower, _))| follower.check(index + 1))?;
        let state = self.state();
        let version = self.coordinator.version();
        if self.saving.has_log() {
            turn.actions.push(Action::Rotate(version));
        }
        for (follower, _) in &mut self.followers {
            follower.queue_save(version);
        }
        self.tell_followers(turn);
        Ok(state)
    }

    fn lose(&mut self, worker: WorkerId, turn: &mut Turn<'_>) {
        let num_pending = self.coordinator.num_held_up();
        self.step(Event::Lost { worker }, turn);
        if self.coordinator.num_held_up() < num_pending {
            turn.reached(State::LostWithPendingPush);
        }
        turn.notes.push(Note::NoMember(worker));
    }

    fn check_leases(&mut self, turn: &mut Turn<'_>) {
        let Some(lease) = self.lease else { return };
        let waiting: BTreeSet<_> = self.waiting.values().filter_map(|w| w.worker).collect();
        let members = self.coordinator.members().map(|(worker, _)| worker);
        let lost = self.leases.lost(members, &waiting, self.epoch.at(turn.now));
        for worker in lost {
            turn.reached(State::LostByLease);
            self.lose(worker, turn);
        }
        turn.timer(lease / 4, Timer::CheckLeases);
    }

    fn heard(&mut self, worker: WorkerId, now: Micros) {
        if self.coordinator.incarnation(worker).is_some() {
            self.leases.heard(worker, self.epoch.at(now));
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    fn wait(&mut self, ticket: Ticket, call: CallId, worker: Option<WorkerId>) {
        self.waiting.insert(ticket, Waiter { call, worker });
    }

    fn forget_caller(&mut self, call: CallId, turn: &mut Turn<'_>) {
        let mut found = self
            .waiting
            .iter()
            .filter(|(_, waiter)| waiter.call == call);
        let Some((&ticket, &waiter)) = found.next() else {
            return;
        };
        self.waiting.remove(&ticket);
        match waiter.worker {
            Some(_) => {
                turn.reached(State::CallerGone);
                self.coordinator.forget_callers(&BTreeSet::from([ticket]));
            }
            None => self.shard.cancel(ticket),
        }
    }

    /// Steps the coordinator, writes its decisions to the log, and performs them.
    fn step(&mut self, event: Event, turn: &mut Turn<'_>) {
        let effects = self.coordinator.step(event);
        let first_action = turn.actions.len();
        if self.saving.has_log() {
            self.log(&effects, turn);
        }
        let num_logged = turn.actions.len() - first_action;
        for effect in effects {
            self.perform(effect, turn);
        }
        if self.mistake == Some(Mistake::AnswersBeforeLog) {
            turn.actions[first_action..].rotate_left(num_logged);
        }
        self.tell_followers(turn);
    }

    fn log(&self, effects: &[Effect], turn: &mut Turn<'_>) {
        // The simulated problems have one learning rate.
        let rates = vec![self.shard.learning_rate(); effects.len()];
        for entry in entries(effects, &rates) {
            let named = match &entry {
                LogEntry::Update { update, .. } => &update.gradients[..],
                _ => &[],
            };
            let staged = named.iter().filter_map(|one| self.shard.staged(one.id));
            let numbers = staged.flat_map(Gradient::values).copied().collect();
            turn.actions.push(Action::Append(Record { entry, numbers }));
        }
        if self.saving == Saving::SyncedLog {
            turn.actions.push(Action::Sync);
        }
    }

    fn perform(&mut self, effect: Effect, turn: &mut Turn<'_>) {
        match effect {
            Effect::Answer { ticket, answer } => self.answer(ticket, answer, turn),
            Effect::Update(update) => {
                turn.notes.push(Note::Decided(update.clone()));
                let learning_rate = self.shard.learning_rate();
                let decision = Decision::Update {
                    update,
                    learning_rate,
                };
                self.decide(&decision, turn);
            }
            Effect::Settled { .. } | Effect::Joined { .. } => {}
            Effect::Discard(id) => self.decide(&Decision::Discard(id), turn),
            Effect::Fence { worker, below } => {
                self.decide(&Decision::Fence { worker, below }, turn);
            }
        }
    }

    fn decide(&mut self, decision: &Decision, turn: &mut Turn<'_>) {
        for (follower, _) in &mut self.followers {
            follower.queue(decision.clone(), &self.shard);
        }
        let answers = decision.clone().apply_to(&mut self.shard);
        let answers = answers.expect("the first server follows its own decisions");
        self.answer_pulls(answers, turn);
    }

    fn answer(&mut self, ticket: Ticket, answer: Result<Answer, Refusal>, turn: &mut Turn<'_>) {
        let Some(waiter) = self.waiting.remove(&ticket) else {
            return;
        };
        let reply: Reply = match answer {
            Ok(Answer::Joined(membership)) => {
                if let Some(worker) = waiter.worker {
                    let (incarnation, first) = (membership.incarnation, membership.next_clock);
                    turn.notes.push(Note::Joined(worker, incarnation, first));
                }
                Ok(Response::Joined(membership))
            }
            Ok(Answer::Left) => Ok(Response::Done),
            Ok(Answer::Settled(outcome)) => {
                if let Outcome::DroppedLate { .. } = outcome {
                    turn.reached(State::LateDrop);
                }
                Ok(Response::Pushed(outcome, self.shard.weights().clone()))
            }
            Err(refusal) => Err(self.leases.explain(refusal).into()),
        };
        turn.reply(waiter.call, reply);
    }

    fn answer_pulls(&mut self, answers: Vec<ShardAnswer>, turn: &mut Turn<'_>) {
        for answer in answers {
            let ShardAnswer::Pull(ticket, weights) = answer else {
                continue;
            };
            if let Some(waiter) = self.waiting.remove(&ticket) {
                let reply = weights.map(Response::Pulled).map_err(ServerError::from);
                turn.reply(waiter.call, reply);
            }
        }
    }

    fn tell_followers(&mut self, turn: &mut Turn<'_>) {
        for index in 0..self.followers.len() {
            if self.followers[index].0.take_undelivered() {
                self.tell(index, turn);
            }
        }
    }

    fn tell(&mut self, index: usize, turn: &mut Turn<'_>) {
        let Address::Server { generation, .. } = self.address else {
            return;
        };
        let follow = Request::Follow(self.followers[index].0.follow(&self.secret));
        let index_of_server = index as u32 + 1;
        let to = Address::Server {
            generation,
            index: index_of_server,
        };
        let call = self.calls.call(to, follow, turn);
        self.followers[index].1 = Some(call);
    }

    fn followed_by(&self, call: CallId) -> Option<usize> {
        let mut followers = self.followers.iter();
        followers.position(|(_, under_way)| *under_way == Some(call))
    }

    fn followed(&mut self, index: usize, reply: Reply, turn: &mut Turn<'_>) {
        let (follower, call) = &mut self.followers[index];
        *call = None;
        let taken = match reply {
            Ok(Response::Followed(lacking)) => {
                if !lacking.is_empty() {
                    turn.reached(State::FollowerLackedPart);
                }
                follower.taken(lacking)
            }
            Ok(other) => Err(format!("it answered {other:?}")),
            Err(refused) => Err(refused.to_string()),
        };
        match taken {
            Ok(()) => self.tell_followers(turn),
            Err(reason) => follower.lose(index + 1, reason),
        }
    }
}

/// Notes that a push was answered at once and without an update.
fn note_repeat(turn: &mut Turn<'_>) {
    let is_repeat = turn.actions.iter().rev().any(|action| {
        let applied =
            |reply: &Reply| matches!(reply, Ok(Response::Pushed(Outcome::Applied { .. }, _)));
        matches!(action, Action::Reply(_, reply) if applied(reply))
    });
    if is_repeat {
        turn.reached(State::RepeatAfterSettled);
    }
}
