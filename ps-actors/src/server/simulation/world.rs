//! The scheduler of a simulated run: processes, virtual time, faults.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::sync::Arc;

use super::dice::Dice;
use super::disk::Disk;
use super::driver::Driver;
use super::first::First;
use super::follower::FollowingServer;
use super::messages::{Action, Address, Input, Micros, Note, Timer, Turn};
use super::network::{Arrival, Network};
use super::outcome::{Failure, Outcome};
use super::settings::Settings;
use super::states::{Coverage, State};
use super::trace::Trace;
use super::truth::Truth;
use super::worker::{Group, Worker};
use crate::chaos::Report;
use crate::ids::Clock;

/// A run in which nothing is decided for so long, in virtual time, waits for ever.
const TIME_LIMIT: Micros = 120_000_000;

#[derive(Debug)]
pub(super) enum Kind {
    Worker(Box<Worker>),
    First(Box<First>),
    Follower(Box<FollowingServer>),
}

#[derive(Debug)]
pub(super) struct Process {
    pub(super) kind: Kind,
    /// Tells this process from an earlier one at the same address.
    instance: u64,
    stopped_until: Option<Micros>,
    busy_until: Micros,
    backlog: VecDeque<Input>,
    /// It is killed in the middle of what it does next.
    pub(super) is_doomed: bool,
}

#[derive(Debug)]
pub(super) enum Event {
    Arrives(Address, Input),
    Timer(Address, u64, Timer),
    /// A stopped or busy process goes on.
    GoesOn(Address, u64),
    /// A doomed process that did nothing meanwhile is killed.
    Dies(Address, u64),
    WorkerStarts(u32),
    /// A worker learns of the group of this generation.
    Meets(u32, u32),
    ReportsLost(u32),
    GroupStarts,
    CheckpointWritten(u32),
    SyncLog,
}

struct Entry {
    at: Micros,
    number: u64,
    event: Event,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

pub(super) struct World {
    pub(super) settings: Arc<Settings>,
    pub(super) dice: Dice,
    pub(super) now: Micros,
    queue: BinaryHeap<Reverse<Entry>>,
    num_events: u64,
    pub(super) processes: BTreeMap<Address, Process>,
    num_instances: u64,
    /// How often each worker's process has been started.
    num_starts: Vec<u32>,
    slowness: Vec<f64>,
    pub(super) group: Option<Group>,
    pub(super) network: Network,
    pub(super) disk: Disk,
    pub(super) driver: Driver,
    pub(super) truth: Truth,
    pub(super) coverage: Coverage,
    pub(super) report: Report,
    pub(super) trace: Trace,
    /// Faults of the plan that have not happened.
    pub(super) faults: Vec<crate::chaos::Fault>,
    /// When the servers were lost that nobody has recovered from.
    pub(super) broken_since: Option<Micros>,
    /// Events that are still to come and that are not periodic.
    num_pending_changes: usize,
    /// The times that workers spent computing, and the time of the run.
    pub(super) compute_time: Micros,
    last_decided: Micros,
    pub(super) target: Option<f64>,
    pub(super) reached_target_at: Option<Micros>,
    pub(super) push_time: std::time::Duration,
    pub(super) num_pushes: u64,
}

impl World {
    pub(super) fn new(settings: Settings, keeps_trace: bool) -> Self {
        let settings = Arc::new(settings);
        let mut dice = Dice::new(settings.seed);
        let (share, factor) = settings.times.stragglers;
        let slowness = (0..settings.num_workers)
            .map(|_| if dice.chance(share) { factor } else { 1.0 })
            .collect();
        let mut report = Report::default();
        for fault in &settings.plan.faults {
            report.plan(fault.kind());
        }
        Self {
            dice,
            now: 0,
            queue: BinaryHeap::new(),
            num_events: 0,
            processes: BTreeMap::new(),
            num_instances: 0,
            num_starts: vec![0; settings.num_workers as usize],
            slowness,
            group: None,
            network: Network::new(&settings),
            disk: Disk::default(),
            driver: Driver::default(),
            truth: Truth::new(Arc::clone(&settings)),
            coverage: Coverage::default(),
            report,
            trace: Trace::new(keeps_trace),
            faults: settings.plan.faults.clone(),
            broken_since: None,
            num_pending_changes: 0,
            compute_time: 0,
            last_decided: 0,
            target: match settings.problem {
                super::settings::Problem::Quadratic { target, .. } => Some(target),
                super::settings::Problem::Counting => None,
            },
            reached_target_at: None,
            push_time: std::time::Duration::ZERO,
            num_pushes: 0,
            settings,
        }
    }

    /// Runs until all workers have taken their steps.
    pub(super) fn run(mut self) -> Result<Outcome, Box<Failure>> {
        match self.try_run() {
            Ok(()) => Ok(self.outcome()),
            Err(reason) => Err(Box::new(Failure {
                settings: Settings::clone(&self.settings),
                reason,
                at: self.now,
                trace: self.trace.into_lines(),
            })),
        }
    }

    fn try_run(&mut self) -> Result<(), String> {
        self.start_group(None)?;
        let num_workers = self.settings.num_workers;
        for worker in 0..num_workers {
            let is_late = self.settings.has_late_worker && worker + 1 == num_workers;
            let step = super::settings::micros(self.settings.times.step);
            let after = match is_late {
                true => step * self.settings.num_steps,
                false => self.dice.below(2_000),
            };
            self.change_after(after, Event::WorkerStarts(worker));
            if is_late && num_workers > 1 {
                self.coverage.count(State::LateJoin);
            }
        }
        self.start_periodic();
        while let Some(Reverse(entry)) = self.queue.pop() {
            self.now = entry.at;
            self.happens(entry.event)?;
            if self.is_over() {
                return self.check_end();
            }
            if self
                .settings
                .run_for
                .is_some_and(|time| self.now >= super::settings::micros(time))
            {
                return Ok(());
            }
            if self.now > self.last_decided + TIME_LIMIT {
                return Err(self.why_it_waits());
            }
        }
        Err(self.why_it_waits())
    }

    fn is_over(&self) -> bool {
        if self.num_pending_changes > 0 || self.group.is_none() || self.network.num_open() > 0 {
            return false;
        }
        self.processes.values().all(|process| match &process.kind {
            Kind::Worker(worker) => worker.is_done(),
            Kind::First(first) => !first.is_telling(),
            Kind::Follower(_) => true,
        })
    }

    fn why_it_waits(&self) -> String {
        let mut text = "the run waits for ever:".to_owned();
        for (address, process) in &self.processes {
            match &process.kind {
                Kind::Worker(worker) if !worker.is_done() => {
                    text += &format!("\n  {address} at {}: {}", worker.clock(), worker.phase());
                }
                Kind::First(first) => {
                    let waited = first.coordinator().awaited();
                    text += &format!("\n  {address} at {}, waits for {waited}", first.version());
                }
                _ => {}
            }
        }
        text
    }

    pub(super) fn after(&mut self, after: Micros, event: Event) {
        self.at(self.now + after, event);
    }

    /// Like [`after`](Self::after), for something that the end of the run waits for.
    pub(super) fn change_after(&mut self, after: Micros, event: Event) {
        self.num_pending_changes += 1;
        self.after(after, event);
    }

    fn at(&mut self, at: Micros, event: Event) {
        self.num_events += 1;
        let number = self.num_events;
        self.queue.push(Reverse(Entry { at, number, event }));
    }

    pub(super) fn arrive(&mut self, arrivals: Vec<Arrival>) {
        for Arrival { at, to, input } in arrivals {
            self.at(at, Event::Arrives(to, input));
        }
    }

    pub(super) fn insert(&mut self, address: Address, kind: Kind) {
        self.num_instances += 1;
        let process = Process {
            kind,
            instance: self.num_instances,
            stopped_until: None,
            busy_until: 0,
            backlog: VecDeque::new(),
            is_doomed: false,
        };
        self.processes.insert(address, process);
    }

    fn happens(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Arrives(Address::Driver, input) => self.driver_takes(input),
            Event::Arrives(address, input) => self.give(address, input)?,
            Event::Timer(address, instance, timer) => {
                if self.is_same(address, instance) {
                    self.give(address, Input::Timer(timer))?;
                } else if address == Address::Driver {
                    self.take_checkpoint();
                }
            }
            Event::GoesOn(address, instance) => {
                if self.is_same(address, instance) {
                    self.go_on(address)?;
                }
            }
            Event::Dies(address, instance) => {
                self.num_pending_changes -= 1;
                let is_doomed = self.processes.get(&address).is_some_and(|p| p.is_doomed);
                if is_doomed && self.is_same(address, instance) {
                    self.kill(address);
                }
            }
            Event::WorkerStarts(worker) => {
                self.num_pending_changes -= 1;
                self.start_worker(worker)?;
            }
            Event::Meets(worker, generation) => {
                self.num_pending_changes -= 1;
                self.meet(worker, generation)?;
            }
            Event::ReportsLost(worker) => {
                self.num_pending_changes -= 1;
                self.report_lost(worker);
            }
            Event::GroupStarts => {
                self.num_pending_changes -= 1;
                self.recover()?;
            }
            Event::CheckpointWritten(power) => self.checkpoint_written(power),
            Event::SyncLog => self.sync_log(),
        }
        Ok(())
    }

    fn is_same(&self, address: Address, instance: u64) -> bool {
        let process = self.processes.get(&address);
        process.is_some_and(|process| process.instance == instance)
    }

    /// Gives an input to a process, or keeps it until the process goes on.
    fn give(&mut self, address: Address, input: Input) -> Result<(), String> {
        let now = self.now;
        let Some(process) = self.processes.get_mut(&address) else {
            if let Input::Called(call, _) = input {
                let ended = self.network.no_callee(now, call, &mut self.dice);
                self.arrive(ended.into_iter().collect());
            }
            return Ok(());
        };
        let is_stopped = process.stopped_until.is_some_and(|until| until > now);
        if is_stopped || process.busy_until > now || !process.backlog.is_empty() {
            process.backlog.push_back(input);
            return Ok(());
        }
        self.turn(address, input)
    }

    fn go_on(&mut self, address: Address) -> Result<(), String> {
        loop {
            let now = self.now;
            let Some(process) = self.processes.get_mut(&address) else {
                return Ok(());
            };
            if process.stopped_until.is_some_and(|until| until > now) || process.busy_until > now {
                return Ok(());
            }
            process.stopped_until = None;
            let Some(input) = process.backlog.pop_front() else {
                return Ok(());
            };
            self.turn(address, input)?;
        }
    }

    /// Lets a process handle an input, and performs what it does.
    fn turn(&mut self, address: Address, input: Input) -> Result<(), String> {
        self.note_input(address, &input);
        let service = super::settings::micros(self.settings.times.service);
        let is_push = matches!(
            &input,
            Input::Called(_, super::messages::Request::PushPull(_))
        );
        let process = self.processes.get_mut(&address).expect("the caller looked");
        let mut turn = Turn::new(self.now, &mut self.dice);
        let started = is_push.then(std::time::Instant::now);
        match &mut process.kind {
            Kind::Worker(worker) => worker.handle(input, &mut turn),
            Kind::First(first) => first.handle(input, &mut turn),
            Kind::Follower(follower) => follower.handle(input, &mut turn),
        }
        if let Some(started) = started {
            self.push_time += started.elapsed();
            self.num_pushes += 1;
            if service > 0 {
                process.busy_until = self.now + service;
                let instance = process.instance;
                let Turn { actions, notes, .. } = turn;
                self.after(service, Event::GoesOn(address, instance));
                return self.done(address, actions, notes);
            }
        }
        let Turn { actions, notes, .. } = turn;
        self.done(address, actions, notes)
    }

    /// Takes the notes of a turn, and performs its actions, or only some of them if the process dies meanwhile.
    pub(super) fn done(
        &mut self,
        address: Address,
        mut actions: Vec<Action>,
        notes: Vec<Note>,
    ) -> Result<(), String> {
        for note in &notes {
            self.take_note(address, note)?;
        }
        let process = self.processes.get(&address);
        let is_doomed = process.is_some_and(|process| process.is_doomed);
        let dies = is_doomed || self.is_losing_power();
        if dies && !actions.is_empty() {
            let num_done = self.dice.index(actions.len() + 1);
            self.note_crash(address, &actions, num_done);
            actions.truncate(num_done);
        }
        self.perform(address, actions);
        if self.is_losing_power() {
            self.power_is_lost();
        } else if dies {
            self.kill(address);
        }
        Ok(())
    }

    fn take_note(&mut self, address: Address, note: &Note) -> Result<(), String> {
        self.truth.note(note, self.now)?;
        match note {
            Note::Reached(state) => self.coverage.count(*state),
            Note::Decided(update) => {
                let version = update.version.0;
                self.last_decided = self.now;
                self.trace.add(
                    self.now,
                    [1, version, update.gradients.len() as u64],
                    || {
                        let names = update.gradients.iter().map(|one| one.id.to_string());
                        let names: Vec<String> = names.collect();
                        format!("{address} decides {}: {}", update.version, names.join("; "))
                    },
                );
                if let Some(since) = self.broken_since.take() {
                    let time = std::time::Duration::from_micros(self.now - since);
                    self.report.recoveries.push(time);
                }
                self.faults_at_version(version);
            }
            Note::Begins(worker, _, clock) => self.faults_at_step(worker.0, *clock),
            Note::Pulled(_, weights) => {
                if let Some(target) = self.target {
                    // It counts when the loss stays below.
                    self.reached_target_at = match Settings::loss(weights) < target {
                        true => self.reached_target_at.or(Some(self.now)),
                        false => None,
                    };
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn perform(&mut self, address: Address, actions: Vec<Action>) {
        let mut arrivals = Vec::new();
        let now = self.now;
        for action in actions {
            match action {
                Action::Call(to, id, request) => {
                    let (network, dice) = (&mut self.network, &mut self.dice);
                    network.call(now, id, to, request, dice, &mut arrivals);
                }
                Action::Reply(id, reply) => {
                    let (network, dice) = (&mut self.network, &mut self.dice);
                    network.reply(now, id, reply, dice, &mut arrivals);
                }
                Action::Append(record) => self.disk.append(record),
                Action::Sync => self.disk.sync(),
                Action::Rotate(version) => self.disk.rotate(version),
                Action::Timer(after, timer) | Action::Compute(after, timer) => {
                    if let Timer::Computed(_) = timer {
                        // Only what is computed until the end of the run counts.
                        let end = self
                            .settings
                            .run_for
                            .map_or(u64::MAX, super::settings::micros);
                        self.compute_time += after.min(end.saturating_sub(now));
                    }
                    let instance = self.processes.get(&address).map_or(0, |p| p.instance);
                    self.after(after, Event::Timer(address, instance, timer));
                }
            }
        }
        self.arrive(arrivals);
    }

    pub(super) fn stop(&mut self, address: Address, pause: Micros) {
        let now = self.now;
        let Some(process) = self.processes.get_mut(&address) else {
            return;
        };
        process.stopped_until = Some(now + pause);
        if let Kind::Worker(worker) = &mut process.kind {
            worker.was_stopped();
        } else {
            self.coverage.count(State::ServerStopped);
        }
        let instance = process.instance;
        self.trace.add(now, [2, pause, 0], || {
            format!("{address} is stopped for {pause} µs")
        });
        self.after(pause, Event::GoesOn(address, instance));
    }

    /// Kills a process in the middle of what it does next, or a little later if it does nothing.
    pub(super) fn doom(&mut self, address: Address) {
        let Some(process) = self.processes.get_mut(&address) else {
            return;
        };
        process.is_doomed = true;
        let instance = process.instance;
        let after = self.dice.below(20_000);
        self.change_after(after, Event::Dies(address, instance));
    }

    pub(super) fn kill(&mut self, address: Address) {
        let Some(process) = self.processes.remove(&address) else {
            return;
        };
        self.trace
            .add(self.now, [3, 0, 0], || format!("{address} is killed"));
        let mut arrivals = Vec::new();
        self.network
            .ended(self.now, address, &mut self.dice, &mut arrivals);
        self.arrive(arrivals);
        match process.kind {
            Kind::Worker(worker) => self.worker_ended(address, &worker),
            Kind::First(first) => self.first_ended(&first),
            Kind::Follower(follower) => self.follower_ended(&follower),
        }
    }

    fn worker_ended(&mut self, address: Address, worker: &Worker) {
        let Address::Worker(number) = address else {
            return;
        };
        if worker.has_staged_only() {
            self.coverage.count(State::StagedNeverPushed);
        }
        if worker.waits_for_answer() {
            self.coverage.count(State::WorkerKilledBeforeAnswer);
        }
        // Who sees the end of the process reports it, or nobody does and the lease ends.
        if self.settings.worker_lease.is_none() || self.dice.chance(50.0) {
            let after = self.dice.within(500..=20_000);
            self.change_after(after, Event::ReportsLost(number));
        }
        let after = self.dice.within(1_000..=300_000);
        self.change_after(after, Event::WorkerStarts(number));
    }

    fn start_worker(&mut self, number: u32) -> Result<(), String> {
        let address = Address::Worker(number);
        let index = number as usize;
        let num_starts = self.num_starts[index];
        self.num_starts[index] += 1;
        let settings = Arc::clone(&self.settings);
        let id = crate::ids::WorkerId(number);
        let worker = Worker::new(id, settings, num_starts, self.slowness[index]);
        self.insert(address, Kind::Worker(Box::new(worker)));
        self.trace.add(self.now, [4, u64::from(number), 0], || {
            format!("{address} starts")
        });
        match &self.group {
            Some(group) => self.meet(number, group.generation),
            None => Ok(()),
        }
    }

    pub(super) fn meet(&mut self, number: u32, generation: u32) -> Result<(), String> {
        let Some(group) = self
            .group
            .clone()
            .filter(|group| group.generation == generation)
        else {
            return Ok(());
        };
        let Some(first) = self.processes.get(&group.server(0)) else {
            return Ok(());
        };
        let id = crate::ids::WorkerId(number);
        let next = match &first.kind {
            Kind::First(first) => first.coordinator().save().next_clock(id),
            _ => Clock(0),
        };
        let address = Address::Worker(number);
        let Some(process) = self.processes.get_mut(&address) else {
            return Ok(());
        };
        let now = self.now;
        if let Some(until) = process.stopped_until.filter(|&until| until > now) {
            self.change_after(until - now + 1, Event::Meets(number, generation));
            return Ok(());
        }
        let Kind::Worker(worker) = &mut process.kind else {
            return Ok(());
        };
        let mut turn = Turn::new(now, &mut self.dice);
        worker.meet(group, next, &mut turn);
        let Turn { actions, notes, .. } = turn;
        self.done(address, actions, notes)
    }

    fn note_input(&mut self, address: Address, input: &Input) {
        let numbers = |a: u64, b: u64| [a, b, 0];
        let numbers = match input {
            Input::Called(call, _) => numbers(10, call.number),
            Input::CallerGone(call) => numbers(11, call.number),
            Input::Answered(call, _) => numbers(12, call.number),
            Input::Lost(call) => numbers(13, call.number),
            Input::Ended(call) => numbers(14, call.number),
            Input::Timer(_) => numbers(15, 0),
        };
        self.trace.add(self.now, numbers, || match input {
            Input::Called(call, request) => {
                format!("{address} <- {}: {}", call.caller, request.describe())
            }
            Input::CallerGone(call) => format!("{address}: {} has gone", call.caller),
            Input::Answered(call, reply) => {
                format!(
                    "{address} gets answer {}: {}",
                    call.number & 0xffff,
                    super::messages::describe(reply)
                )
            }
            Input::Lost(call) => format!("{address}: call {} is lost", call.number & 0xffff),
            Input::Ended(call) => {
                format!("{address}: callee of {} has ended", call.number & 0xffff)
            }
            Input::Timer(timer) => format!("{address}: {timer:?}"),
        });
    }
}
