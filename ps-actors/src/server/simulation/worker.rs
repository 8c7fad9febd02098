//! A simulated worker: the loop of `worker/run.rs` over a group's client (`group/mod.rs`), without actors
//! and tasks.
//!
//! It stages the parts of a gradient on the followers, pushes the whole gradient to the first server, and
//! pulls the others' parts of exactly the version that it got. A call whose connection is lost is made again.
//! If its membership is over, it joins again. If a server has ended, it waits until there is a new group.

use std::collections::BTreeMap;
use std::ops::Range;

use super::messages::{
    Address, CallId, Calls, Input, Micros, Note, Reply, Request, Response, Timer, Turn, group_error,
};
use super::settings::{Mistake, Settings, micros};
use super::states::State;
use crate::group::is_version_gone;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, WorkerId};
use crate::server::PullVersion;
use crate::server::messages::ServerError;
use crate::session::may_rejoin;
use crate::weights::{GradientUpdate, Weights};

/// The pause before a push that the servers could not take for now.
const PAUSE: Micros = 100_000;

/// The servers, as a worker knows them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) generation: u32,
    pub(super) ranges: Vec<Range<usize>>,
}

impl Group {
    pub(super) fn server(&self, index: usize) -> Address {
        Address::Server {
            generation: self.generation,
            index: index as u32,
        }
    }
}

#[derive(Clone, Debug)]
enum Phase {
    /// There are no servers, or they are lost.
    Waiting,
    Joining,
    /// Pulls the latest weights, to begin a step.
    Pulling,
    /// Has the first server's part, and pulls the others' parts of that version.
    PullingRest(Vec<Option<Weights>>),
    Computing(Weights),
    Staging(GradientUpdate),
    Pushing(GradientUpdate),
    Pausing(GradientUpdate),
    Leaving,
    Done,
}

#[derive(Clone, Debug)]
pub(super) struct Worker {
    id: WorkerId,
    settings: std::sync::Arc<Settings>,
    group: Option<Group>,
    calls: Calls,
    /// How often the process was started before.
    num_starts: u32,
    num_joins: u64,
    phase: Phase,
    /// Counts the phases, so that an old timer does nothing.
    phase_number: u64,
    incarnation: Incarnation,
    clock: Clock,
    /// The calls under way, with the index of the server.
    open: BTreeMap<CallId, (usize, Request)>,
    beat: Option<CallId>,
    is_beating: bool,
    slowness: f64,
    /// Whether it was stopped for a while since its last answer.
    was_stopped: bool,
}

impl Worker {
    pub(super) fn new(
        id: WorkerId,
        settings: std::sync::Arc<Settings>,
        num_starts: u32,
        slowness: f64,
    ) -> Self {
        Self {
            id,
            settings,
            group: None,
            calls: Calls::new(Address::Worker(id.0), num_starts),
            num_starts,
            num_joins: 0,
            phase: Phase::Waiting,
            phase_number: 0,
            incarnation: Incarnation(0),
            clock: Clock(0),
            open: BTreeMap::new(),
            beat: None,
            is_beating: false,
            slowness,
            was_stopped: false,
        }
    }

    #[cfg(test)]
    pub(super) fn id(&self) -> WorkerId {
        self.id
    }

    /// Describes everything that decides what the worker does next.
    #[cfg(test)]
    pub(super) fn description(&self) -> String {
        format!(
            "{:?} {:?} {:?} {:?} {:?} {:?}",
            self.group, self.phase, self.phase_number, self.incarnation, self.clock, self.open
        )
    }

    pub(super) fn is_done(&self) -> bool {
        matches!(self.phase, Phase::Done)
    }

    pub(super) fn clock(&self) -> Clock {
        self.clock
    }

    pub(super) fn has_staged_only(&self) -> bool {
        matches!(self.phase, Phase::Staging(_))
    }

    pub(super) fn waits_for_answer(&self) -> bool {
        matches!(self.phase, Phase::Pushing(_))
    }

    pub(super) fn was_stopped(&mut self) {
        self.was_stopped = true;
    }

    /// Learns of a group. `next_clock` is the clock of its first step that the servers do not know.
    pub(super) fn meet(&mut self, group: Group, next_clock: Clock, turn: &mut Turn<'_>) {
        let is_over = self.is_done() && next_clock.0 >= self.settings.num_steps;
        self.group = Some(group);
        if !is_over {
            self.join(turn);
        }
    }

    pub(super) fn handle(&mut self, input: Input, turn: &mut Turn<'_>) {
        match input {
            Input::Answered(call, reply) => {
                if self.beat == Some(call) {
                    self.beat = None;
                } else if let Some((index, request)) = self.open.remove(&call) {
                    self.answered(index, &request, reply, turn);
                }
            }
            Input::Lost(call) => {
                if let Some((index, request)) = self.open.remove(&call) {
                    self.call(index, request, turn);
                }
            }
            Input::Ended(call) => {
                if self.open.remove(&call).is_some() {
                    self.enter(Phase::Waiting);
                }
            }
            Input::Timer(Timer::Computed(phase)) if phase == self.phase_number => {
                if let Phase::Computing(weights) = &self.phase {
                    let gradients = self.gradients(weights);
                    self.stage(gradients, turn);
                }
            }
            Input::Timer(Timer::PushAgain(phase)) if phase == self.phase_number => {
                if let Phase::Pausing(gradients) = &self.phase {
                    let gradients = gradients.clone();
                    self.stage(gradients, turn);
                }
            }
            Input::Timer(Timer::Beat) => self.beat(turn),
            Input::Timer(_) | Input::Called(..) | Input::CallerGone(_) => {}
        }
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.phase_number += 1;
        self.open.clear();
    }

    fn call(&mut self, index: usize, request: Request, turn: &mut Turn<'_>) {
        let Some(group) = &self.group else { return };
        let id = self.calls.call(group.server(index), request.clone(), turn);
        self.open.insert(id, (index, request));
    }

    fn join(&mut self, turn: &mut Turn<'_>) {
        self.enter(Phase::Joining);
        self.num_joins += 1;
        let request =
            u64::from(self.id.0) << 48 | u64::from(self.num_starts) << 32 | self.num_joins;
        self.call(0, Request::Join(self.id, JoinRequest(request)), turn);
        if let (Some(lease), false) = (self.settings.worker_lease, self.is_beating) {
            self.is_beating = true;
            turn.timer(micros(lease) / 4, Timer::Beat);
        }
    }

    fn beat(&mut self, turn: &mut Turn<'_>) {
        let (Some(lease), Some(group)) = (self.settings.worker_lease, &self.group) else {
            return;
        };
        if self.is_done() {
            self.is_beating = false;
            return;
        }
        let request = Request::Heartbeat(self.id, self.incarnation);
        self.beat = Some(self.calls.call(group.server(0), request, turn));
        turn.timer(micros(lease) / 4, Timer::Beat);
    }

    fn gradients(&self, weights: &Weights) -> GradientUpdate {
        GradientUpdate {
            id: GradientId {
                worker: self.id,
                incarnation: self.incarnation,
                clock: self.clock,
            },
            computed_on: weights.version(),
            loss: 0.0,
            num_examples: 1,
            gradient: self.settings.gradient(self.id, self.clock, weights),
        }
    }

    fn stage(&mut self, gradients: GradientUpdate, turn: &mut Turn<'_>) {
        let ranges = match &self.group {
            Some(group) if group.ranges.len() > 1 => group.ranges.clone(),
            _ => return self.push(gradients, turn),
        };
        let (id, gradient) = (gradients.id, gradients.gradient.clone());
        self.enter(Phase::Staging(gradients));
        for (index, range) in ranges.into_iter().enumerate().skip(1) {
            if !turn.dice.chance(self.settings.unstaged_percent) {
                self.call(index, Request::Stage(id, gradient.slice(range)), turn);
            }
        }
        self.push_if_staged(turn);
    }

    fn push_if_staged(&mut self, turn: &mut Turn<'_>) {
        if let (Phase::Staging(gradients), true) = (&self.phase, self.open.is_empty()) {
            let gradients = gradients.clone();
            self.push(gradients, turn);
        }
    }

    fn push(&mut self, gradients: GradientUpdate, turn: &mut Turn<'_>) {
        self.enter(Phase::Pushing(gradients.clone()));
        self.call(0, Request::PushPull(gradients), turn);
    }

    fn answered(&mut self, index: usize, request: &Request, reply: Reply, turn: &mut Turn<'_>) {
        match reply {
            Ok(response) => self.proceed(index, response, turn),
            Err(error) => self.failed(index, request, error, turn),
        }
    }

    fn proceed(&mut self, index: usize, response: Response, turn: &mut Turn<'_>) {
        match (&mut self.phase, response) {
            (Phase::Joining, Response::Joined(membership)) => {
                if membership.next_clock < self.clock {
                    turn.reached(State::StepTakenAgain);
                }
                self.incarnation = membership.incarnation;
                self.clock = membership.next_clock;
                self.was_stopped = false;
                self.begin(turn);
            }
            (Phase::Pulling, Response::Pulled(first)) => self.pull_rest(first, turn),
            (Phase::PullingRest(parts), Response::Pulled(part)) => {
                parts[index] = Some(part);
                if parts.iter().all(Option::is_some) {
                    let parts: Vec<Weights> = parts.iter().flatten().cloned().collect();
                    self.pulled(&parts, turn);
                }
            }
            (Phase::Staging(_), Response::Done) => self.push_if_staged(turn),
            (Phase::Pushing(gradients), Response::Pushed(outcome, first)) => {
                turn.notes.push(Note::Acknowledged(gradients.id, outcome));
                self.was_stopped = false;
                self.clock = self.clock.next();
                self.pull_rest(first, turn);
            }
            (Phase::Leaving, _) => self.enter(Phase::Done),
            _ => {}
        }
    }

    fn failed(&mut self, index: usize, request: &Request, error: ServerError, turn: &mut Turn<'_>) {
        let error = group_error(index, error);
        if let (true, Request::PushPull(gradients)) = (may_rejoin(&error), request) {
            if self.was_stopped {
                turn.reached(State::FencedZombie);
            }
            if self.settings.mistake == Some(Mistake::NeverRejoins) {
                let gradients = gradients.clone();
                return self.push(gradients, turn);
            }
        }
        if is_version_gone(&error) {
            turn.reached(State::VersionGone);
            self.begin(turn);
        } else if error.is_for_now() {
            if let Phase::Staging(gradients) | Phase::Pushing(gradients) = &self.phase {
                let gradients = gradients.clone();
                self.enter(Phase::Pausing(gradients));
                turn.timer(PAUSE, Timer::PushAgain(self.phase_number));
            }
        } else if may_rejoin(&error) {
            if let Request::Join(..) = request {
                turn.reached(State::JoinFenced);
            }
            self.join(turn);
        } else {
            self.enter(Phase::Waiting);
        }
    }

    /// Pulls the weights for the next step, or leaves.
    fn begin(&mut self, turn: &mut Turn<'_>) {
        if self.clock.0 >= self.settings.num_steps {
            self.enter(Phase::Leaving);
            return self.call(0, Request::Leave(self.id, self.incarnation), turn);
        }
        self.enter(Phase::Pulling);
        self.call(0, Request::Pull(PullVersion::Latest), turn);
    }

    fn pull_rest(&mut self, first: Weights, turn: &mut Turn<'_>) {
        let num_servers = self.group.as_ref().map_or(1, |group| group.ranges.len());
        if num_servers == 1 {
            return self.pulled(&[first], turn);
        }
        let version = first.version();
        let mut parts = vec![None; num_servers];
        parts[0] = Some(first);
        self.enter(Phase::PullingRest(parts));
        for index in 1..num_servers {
            self.call(index, Request::Pull(PullVersion::Exactly(version)), turn);
        }
    }

    fn pulled(&mut self, parts: &[Weights], turn: &mut Turn<'_>) {
        let weights = Weights::join(parts).expect("parts of one version");
        let generation = self.group.as_ref().map_or(0, |group| group.generation);
        turn.notes.push(Note::Pulled(generation, weights.clone()));
        if self.clock.0 >= self.settings.num_steps {
            return self.begin(turn);
        }
        turn.notes
            .push(Note::Begins(self.id, self.incarnation, self.clock));
        self.enter(Phase::Computing(weights));
        let mean = micros(self.settings.times.step) as f64 * self.slowness;
        let jitter = self.settings.times.jitter;
        let time = mean * (1.0 - jitter + jitter * turn.dice.exponential());
        turn.actions.push(super::messages::Action::Compute(
            time as Micros,
            Timer::Computed(self.phase_number),
        ));
    }

    /// Names what it is doing, for people.
    pub(super) fn phase(&self) -> &'static str {
        match self.phase {
            Phase::Waiting => "waits for servers",
            Phase::Joining => "joins",
            Phase::Pulling | Phase::PullingRest(_) => "pulls",
            Phase::Computing(_) => "computes",
            Phase::Staging(_) => "stages",
            Phase::Pushing(_) => "pushes",
            Phase::Pausing(_) => "pauses before it pushes again",
            Phase::Leaving => "leaves",
            Phase::Done => "is done",
        }
    }
}
