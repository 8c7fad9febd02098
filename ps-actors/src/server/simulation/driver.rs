//! What the driver of a simulated run does: it starts the group, saves checkpoints, and starts the group again
//! when a server has ended. It is killed only together with everything else, when the power is lost.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::disk::{Record, Recovered};
use super::first::First;
use super::follower::FollowingServer;
use super::messages::{
    Action, Address, CallId, Calls, Input, Micros, Reply, Request, Response, Timer,
};
use super::settings::{Mistake, Saving, micros};
use super::states::State;
use super::truth::Loss;
use super::worker::Group;
use super::world::{Event, Kind, World};
use crate::chaos::Fault;
use crate::checkpoint::{Checkpoint, Start};
use crate::ids::{Clock, Version, WorkerId};
use crate::server::ServerState;
use crate::server::partition::partition;
use crate::server::replay::LogEntry;

/// How long a checkpoint is written.
const WRITING: (Micros, Micros) = (1_000, 30_000);

/// How long it takes until servers that were lost are started again.
const RESTARTING: (Micros, Micros) = (5_000, 100_000);

/// A checkpoint that is being taken.
#[derive(Debug)]
struct Taking {
    states: Vec<Option<ServerState>>,
    calls: BTreeMap<CallId, (usize, Request)>,
}

#[derive(Debug)]
pub(super) struct Driver {
    calls: Calls,
    taking: Option<Taking>,
    is_writing: bool,
    /// Counts losses of power, each of which ends what was being written.
    power: u32,
    loses_power: bool,
    loss: Loss,
    /// The group that was lost, until a new one is started.
    lost: Option<Group>,
    num_generations: u32,
}

impl Default for Driver {
    fn default() -> Self {
        Self {
            calls: Calls::new(Address::Driver, 0),
            taking: None,
            is_writing: false,
            power: 0,
            loses_power: false,
            loss: Loss::Process,
            lost: None,
            num_generations: 0,
        }
    }
}

impl World {
    pub(super) fn start_periodic(&mut self) {
        let saving = self.settings.saving;
        if saving.has_checkpoints() {
            let every = micros(self.settings.checkpoint_every);
            self.after(every, Event::Timer(Address::Driver, 0, Timer::Checkpoint));
        }
        if let Saving::Log { sync_every } = saving {
            self.after(micros(sync_every), Event::SyncLog);
        }
    }

    pub(super) fn sync_log(&mut self) {
        self.disk.sync();
        self.start_sync();
    }

    fn start_sync(&mut self) {
        if let Saving::Log { sync_every } = self.settings.saving {
            self.after(micros(sync_every), Event::SyncLog);
        }
    }

    /// Starts a group that goes on from what was saved, or from the beginning.
    pub(super) fn start_group(&mut self, recovered: Option<&Recovered>) -> Result<(), String> {
        let settings = Arc::clone(&self.settings);
        let before = self.group.as_ref().map(|group| group.ranges.len());
        let num_servers = match before {
            Some(_) if settings.reshards => self.dice.within(1..=4) as usize,
            Some(before) => before,
            None => settings.num_servers,
        };
        if let Some(before) = before {
            if num_servers < before {
                self.coverage.count(State::FewerServers);
            } else if num_servers > before {
                self.coverage.count(State::MoreServers);
            }
        }
        let initial = settings.initial();
        let checkpoint = recovered.and_then(|recovered| recovered.checkpoint.as_ref());
        let start = checkpoint.map_or(Start::from(&initial), Start::from);
        let ranges = partition(initial.len(), num_servers);
        let generation = self.driver.num_generations;
        self.driver.num_generations += 1;
        let group = Group { generation, ranges };
        for (index, range) in group.ranges.iter().enumerate().skip(1) {
            let follower = FollowingServer::new(&settings, start, range.clone());
            self.insert(group.server(index), Kind::Follower(Box::new(follower)));
        }
        let num_awaited = self.num_awaited(checkpoint);
        let (range, num_followers) = (group.ranges[0].clone(), num_servers - 1);
        let address = group.server(0);
        let mut first = First::new(&settings, address, start, range, num_followers, num_awaited);
        let version = first.version();
        if settings.saving.has_log() {
            self.start_log(&first, version, checkpoint.is_none());
        }
        let mut turn = super::messages::Turn::new(self.now, &mut self.dice);
        first.start(&mut turn);
        let actions = turn.actions;
        self.insert(address, Kind::First(Box::new(first)));
        self.trace
            .add(self.now, [5, u64::from(generation), version.0], || {
                format!("{num_servers} servers start at {version} as generation {generation}")
            });
        self.group = Some(group);
        self.done(address, actions, Vec::new())?;
        for worker in 0..settings.num_workers {
            if self.processes.contains_key(&Address::Worker(worker)) {
                let after = self.dice.within(100..=30_000);
                self.change_after(after, Event::Meets(worker, generation));
            }
        }
        Ok(())
    }

    fn start_log(&mut self, first: &First, version: Version, is_new: bool) {
        if is_new {
            let initial = Checkpoint::initial(self.settings.initial(), first.state());
            self.disk.begin(initial.expect("the first server's state"));
            self.disk.complete();
        }
        if is_new || self.settings.mistake != Some(Mistake::WritesBehindTornEnd) {
            self.disk.rotate(version);
        }
        let entry = LogEntry::Began {
            facts: BTreeMap::new(),
            restarted_at: None,
        };
        let numbers = Vec::new();
        self.disk.append(Record { entry, numbers });
        if self.settings.saving == Saving::SyncedLog {
            self.disk.sync();
        }
    }

    /// Returns how many workers will join a group.
    fn num_awaited(&self, checkpoint: Option<&Checkpoint>) -> usize {
        let num_late = usize::from(self.settings.has_late_worker);
        let num_workers = self.settings.num_workers as usize;
        let Some(checkpoint) = checkpoint else {
            return num_workers - num_late;
        };
        let workers = (0..self.settings.num_workers)
            .take(num_workers - num_late)
            .map(WorkerId);
        let goes_on = |worker| checkpoint.next_clock(worker) < Clock(self.settings.num_steps);
        workers.filter(|&worker| goes_on(worker)).count()
    }

    pub(super) fn first_ended(&mut self, first: &First) {
        let (num_pulls, num_pushes) = first.num_waiting();
        if num_pulls > 0 {
            self.coverage.count(State::RestartWithPullsWaiting);
        }
        if num_pushes > 0 {
            self.coverage.count(State::RestartWithPushesWaiting);
        }
        self.servers_lost(Loss::Process);
    }

    pub(super) fn follower_ended(&mut self, follower: &FollowingServer) {
        self.coverage.count(State::FollowerKilled);
        if follower.num_waiting() > 0 {
            self.coverage.count(State::RestartWithPullsWaiting);
        }
        self.servers_lost(Loss::Process);
    }

    fn servers_lost(&mut self, loss: Loss) {
        if self.broken_since.is_none() || loss == Loss::Power {
            self.broken_since.get_or_insert(self.now);
            self.driver.loss = loss;
        }
        if let Some(group) = self.group.take() {
            self.driver.lost = Some(group);
            let after = self.dice.within(RESTARTING.0..=RESTARTING.1);
            self.change_after(after, Event::GroupStarts);
        }
    }

    /// Ends the servers that are left, and starts a new group.
    pub(super) fn recover(&mut self) -> Result<(), String> {
        let Some(lost) = self.driver.lost.take() else {
            return Ok(());
        };
        for index in 0..lost.ranges.len() {
            let address = lost.server(index);
            if self.processes.remove(&address).is_some() {
                let mut arrivals = Vec::new();
                self.network
                    .ended(self.now, address, &mut self.dice, &mut arrivals);
                self.arrive(arrivals);
            }
        }
        if std::mem::take(&mut self.driver.is_writing) {
            // It waits for the checkpoint that is being written.
            self.disk.complete();
        }
        self.driver.taking = None;
        let recovered = self.disk.recover(&self.settings);
        self.count_recovery(&recovered);
        let (loss, lost_at) = (self.driver.loss, self.broken_since.unwrap_or(self.now));
        let num_lost = self.truth.num_lost;
        let generation = self.driver.num_generations;
        self.truth
            .recovered(&recovered, loss, lost_at, generation)?;
        if self.truth.num_lost > num_lost {
            self.coverage.count(State::AcknowledgedLost);
        }
        self.group = Some(lost);
        self.start_group(Some(&recovered))
    }

    fn count_recovery(&mut self, recovered: &Recovered) {
        if recovered.skipped_damaged {
            self.coverage.count(State::DamagedCheckpoint);
        }
        self.coverage
            .count(match (recovered.saved, recovered.num_updates) {
                (None, _) => State::RecoveryFromNothing,
                (Some(_), 0) => State::RecoveryFromCheckpointAlone,
                (Some(Version(0)), _) => State::RecoveryFromLogAlone,
                (Some(_), _) => State::RecoveryFromBoth,
            });
    }

    pub(super) fn report_lost(&mut self, worker: u32) {
        if let Some(group) = &self.group {
            let request = Request::ReportLost(WorkerId(worker));
            self.driver_calls(group.server(0), request);
        }
    }

    fn driver_calls(&mut self, to: Address, request: Request) -> CallId {
        let id = self.driver.calls.next();
        let mut arrivals = Vec::new();
        let (network, dice) = (&mut self.network, &mut self.dice);
        network.call(self.now, id, to, request, dice, &mut arrivals);
        self.arrive(arrivals);
        id
    }

    pub(super) fn take_checkpoint(&mut self) {
        let every = micros(self.settings.checkpoint_every);
        self.after(every, Event::Timer(Address::Driver, 0, Timer::Checkpoint));
        if self.driver.taking.is_some() || self.driver.is_writing {
            return;
        }
        let Some(group) = self.group.clone() else {
            return;
        };
        let request = Request::TakeCheckpoint;
        let call = self.driver_calls(group.server(0), request.clone());
        self.driver.taking = Some(Taking {
            states: vec![None; group.ranges.len()],
            calls: BTreeMap::from([(call, (0, request))]),
        });
    }

    pub(super) fn driver_takes(&mut self, input: Input) {
        let (call, reply) = match input {
            Input::Answered(call, reply) => (call, Some(reply)),
            Input::Lost(call) => (call, None),
            Input::Ended(_) => return self.driver.taking = None,
            _ => return,
        };
        let Some(taking) = &mut self.driver.taking else {
            return;
        };
        let Some((index, request)) = taking.calls.remove(&call) else {
            return;
        };
        match reply {
            // It asks again.
            None => {
                if let Some(group) = self.group.clone() {
                    let call = self.driver_calls(group.server(index), request.clone());
                    if let Some(taking) = &mut self.driver.taking {
                        taking.calls.insert(call, (index, request));
                    }
                }
            }
            Some(reply) => self.part_arrived(index, reply),
        }
    }

    fn part_arrived(&mut self, index: usize, reply: Reply) {
        let (Some(taking), Some(group)) = (&mut self.driver.taking, self.group.clone()) else {
            return;
        };
        let Ok(Response::State(state)) = reply else {
            self.driver.taking = None;
            return;
        };
        let version = state.weights.version();
        taking.states[index] = Some(*state);
        if index == 0 {
            for index in 1..group.ranges.len() {
                let request = Request::GetSavedState(version);
                let call = self.driver_calls(group.server(index), request.clone());
                if let Some(taking) = &mut self.driver.taking {
                    taking.calls.insert(call, (index, request));
                }
            }
        }
        let Some(taking) = &mut self.driver.taking else {
            return;
        };
        if taking.states.iter().all(Option::is_some) {
            let states = std::mem::take(&mut taking.states);
            self.driver.taking = None;
            // Parts of different versions are refused here.
            if let Ok(checkpoint) = Checkpoint::join(states.into_iter().flatten().collect()) {
                self.write(checkpoint);
            }
        }
    }

    fn write(&mut self, checkpoint: Checkpoint) {
        let version = checkpoint.version();
        self.trace.add(self.now, [6, version.0, 0], || {
            format!("a checkpoint of {version} is written")
        });
        self.disk.begin(checkpoint);
        self.driver.is_writing = true;
        let after = self.dice.within(WRITING.0..=WRITING.1);
        self.after(after, Event::CheckpointWritten(self.driver.power));
    }

    pub(super) fn checkpoint_written(&mut self, power: u32) {
        if power == self.driver.power && std::mem::take(&mut self.driver.is_writing) {
            self.disk.complete();
        }
    }

    pub(super) fn faults_at_version(&mut self, version: u64) {
        let due = |fault: &Fault| match *fault {
            Fault::KillServer { version: at, .. }
            | Fault::StopServer { version: at, .. }
            | Fault::LosePower { version: at }
            | Fault::DamageCheckpoint { version: at } => version >= at,
            _ => false,
        };
        let due: Vec<Fault> = self.faults.extract_if(.., |fault| due(fault)).collect();
        due.into_iter().for_each(|fault| self.happen(fault));
    }

    pub(super) fn faults_at_step(&mut self, number: u32, clock: Clock) {
        let due = |fault: &Fault| match *fault {
            Fault::KillWorker { worker, step } | Fault::StopWorker { worker, step, .. } => {
                worker == number && clock.0 >= step
            }
            _ => false,
        };
        let due: Vec<Fault> = self.faults.extract_if(.., |fault| due(fault)).collect();
        due.into_iter().for_each(|fault| self.happen(fault));
    }

    fn happen(&mut self, fault: Fault) {
        let server = |index: usize| {
            let group = self.group.as_ref()?;
            Some(group.server(index % group.ranges.len()))
        };
        let has_happened = match fault {
            Fault::KillWorker { worker, .. } => {
                self.doom(Address::Worker(worker));
                true
            }
            Fault::StopWorker { worker, pause, .. } => {
                self.stop(Address::Worker(worker), micros(pause));
                true
            }
            Fault::KillServer { server: index, .. } => match server(index) {
                Some(address) => {
                    self.doom(address);
                    true
                }
                None => false,
            },
            Fault::StopServer {
                server: index,
                pause,
                ..
            } => match server(index) {
                Some(address) => {
                    self.stop(address, micros(pause));
                    true
                }
                None => false,
            },
            Fault::LosePower { .. } => {
                self.lose_power();
                true
            }
            Fault::DamageCheckpoint { .. } => self.disk.damage(),
        };
        if has_happened {
            self.report.happened(fault.kind());
        } else {
            // Its turn comes later.
            self.faults.push(fault);
        }
    }

    /// All processes end. The disk keeps what was synced.
    fn lose_power(&mut self) {
        self.driver.loses_power = true;
    }

    /// The power goes in the middle of a turn: called when the process has done a part of its actions.
    pub(super) fn power_is_lost(&mut self) {
        self.driver.loses_power = false;
        self.driver.power += 1;
        self.driver.taking = None;
        self.driver.is_writing = false;
        let loss = self.disk.lose_power(&mut self.dice);
        self.trace
            .add(self.now, [7, loss.num_records_lost as u64, 0], || {
                format!(
                    "the power is lost, and {} records of the log",
                    loss.num_records_lost
                )
            });
        for (state, is_reached) in [
            (State::UnsyncedRecordsLost, loss.num_records_lost > 0),
            (State::TornLogTail, loss.is_torn),
            (State::CheckpointIncomplete, loss.checkpoint_was_incomplete),
        ] {
            if is_reached {
                self.coverage.count(state);
            }
        }
        let all: Vec<Address> = self.processes.keys().copied().collect();
        for address in all {
            self.kill(address);
        }
        self.servers_lost(Loss::Power);
    }

    pub(super) fn is_losing_power(&self) -> bool {
        self.driver.loses_power
    }

    /// Notes in the middle of what the first server is killed.
    pub(super) fn note_crash(&mut self, address: Address, actions: &[Action], num_done: usize) {
        let is_first = self
            .processes
            .get(&address)
            .is_some_and(|p| matches!(p.kind, Kind::First(_)));
        if !is_first {
            return;
        }
        let (done, left) = actions.split_at(num_done);
        let is_update = |action: &Action| matches!(action, Action::Append(record) if matches!(record.entry, LogEntry::Update { .. }));
        let replies = left
            .iter()
            .any(|action| matches!(action, Action::Reply(..)));
        let tells = left
            .iter()
            .any(|action| matches!(action, Action::Call(_, _, Request::Follow(_))));
        if left.iter().any(is_update) {
            self.coverage.count(State::CrashBeforeLog);
        } else if done.iter().any(is_update) && replies {
            self.coverage.count(State::CrashBetweenLogAndReply);
        }
        if tells && !left.iter().any(is_update) {
            self.coverage.count(State::CrashBetweenDecisionAndFollow);
        }
    }
}
