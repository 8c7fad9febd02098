//! Every order of events of a small group: 2 workers with one step each, and 2 servers.
//!
//! The processes are those of the simulator, and so is the observer. Here no dice decide what happens next:
//! [`stateright`] tries everything, within bounds: until a crash, messages arrive in every order, and one is
//! lost or comes twice. Each process is killed at every point of every such order without losses, also between
//! any two of its actions; in `Bsp` also when a message has come twice. What follows a crash happens in two
//! orders.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex};

use stateright::{Checker, Model, Property};

use super::dice::Dice;
use super::disk::{Disk, Record};
use super::first::First;
use super::follower::FollowingServer;
use super::messages::{Action, Address, CallId, Input, Note, Request, Timer, Turn};
use super::outcome::check_end;
use super::settings::{Mistake, Saving, Settings};
use super::states::State;
use super::truth::{Loss, Truth};
use super::worker::{Group, Worker};
use crate::checkpoint::{Checkpoint, Start};
use crate::ids::{Clock, WorkerId};
use crate::server::Consistency;
use crate::server::partition::partition;
use crate::server::replay::LogEntry;

const NUM_WORKERS: u32 = 2;
const NUM_SERVERS: usize = 2;

/// How many actions one turn has at most.
const MAX_ACTIONS: usize = 8;

/// How many steps follow a crash at most.
const MAX_STEPS: usize = 2_000;

#[derive(Clone, Debug)]
enum Process {
    Worker(Box<Worker>),
    First(Box<First>),
    Follower(Box<FollowingServer>),
}

/// What has not happened yet.
#[derive(Clone, Debug)]
enum Coming {
    Input(Address, Input),
    /// A worker learns of the new group.
    Meets(u32),
}

/// How many faults there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Budget {
    crashes: u8,
    losses: u8,
    doubles: u8,
}

/// What may happen next.
#[derive(Clone, Debug, PartialEq)]
enum Choice {
    Happens(usize),
    /// The process that gets this is killed after so many of its actions.
    HappensAndDies(usize, usize, Then),
    HappensTwice(usize),
    IsLost(usize),
    Dies(Address, Then),
}

/// The order of everything after a crash. All orders would be too many, so there are two, which are far from
/// each other.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    First,
    Last,
}

#[derive(Clone)]
struct World {
    settings: Arc<Settings>,
    processes: BTreeMap<Address, Process>,
    /// In an order that does not depend on how the world came to be.
    coming: Vec<(String, Coming)>,
    open: BTreeMap<CallId, Address>,
    disk: Disk,
    truth: Truth,
    generation: u32,
    group: Option<Group>,
    /// How often each worker's process has been started.
    num_starts: [u32; NUM_WORKERS as usize],
    /// Dead workers that nobody has reported.
    unreported: Vec<u32>,
    budget: Budget,
    error: Option<String>,
    crashed_after_log: bool,
    num_reports: u64,
}

impl World {
    fn new(consistency: Consistency, budget: Budget, mistake: Option<Mistake>) -> Self {
        let mut settings = Settings::new(NUM_WORKERS, NUM_SERVERS, consistency);
        settings.num_steps = 1;
        settings.saving = Saving::SyncedLog;
        settings.mistake = mistake;
        let settings = Arc::new(settings);
        let mut world = Self {
            truth: Truth::new(Arc::clone(&settings)),
            settings,
            processes: BTreeMap::new(),
            coming: Vec::new(),
            open: BTreeMap::new(),
            disk: Disk::default(),
            generation: 0,
            group: None,
            num_starts: [0; NUM_WORKERS as usize],
            unreported: Vec::new(),
            budget,
            error: None,
            crashed_after_log: false,
            num_reports: 0,
        };
        world.start_group(None);
        (0..NUM_WORKERS).for_each(|worker| world.start_worker(worker));
        // Until both workers compute, there is only one order.
        let is_computed =
            |coming: &Coming| matches!(coming, Coming::Input(_, Input::Timer(Timer::Computed(_))));
        while let Some(index) = world.coming.iter().position(|(_, what)| !is_computed(what)) {
            world.happens(index, None);
        }
        world
    }

    fn come(&mut self, what: Coming) {
        let key = format!("{what:?}");
        let index = self.coming.partition_point(|(other, _)| *other <= key);
        self.coming.insert(index, (key, what));
    }

    fn start_group(&mut self, checkpoint: Option<&Checkpoint>) {
        let initial = self.settings.initial();
        let start = checkpoint.map_or(Start::from(&initial), Start::from);
        let ranges = partition(initial.len(), NUM_SERVERS);
        let generation = self.generation;
        let group = Group { generation, ranges };
        let follower = FollowingServer::new(&self.settings, start, group.ranges[1].clone());
        let num_awaited = match checkpoint {
            None => NUM_WORKERS as usize,
            Some(checkpoint) => {
                let workers = (0..NUM_WORKERS).map(WorkerId);
                workers
                    .filter(|&w| checkpoint.next_clock(w) < Clock(1))
                    .count()
            }
        };
        let (address, range) = (group.server(0), group.ranges[0].clone());
        let first = First::new(&self.settings, address, start, range, 1, num_awaited);
        if checkpoint.is_none() {
            let initial = Checkpoint::initial(initial.clone(), first.state());
            self.disk.begin(initial.expect("the first server's state"));
            self.disk.complete();
        }
        self.disk.rotate(first.version());
        let entry = LogEntry::Began {
            facts: BTreeMap::new(),
            restarted_at: None,
        };
        let numbers = Vec::new();
        self.disk.append(Record { entry, numbers });
        self.processes
            .insert(address, Process::First(Box::new(first)));
        self.processes
            .insert(group.server(1), Process::Follower(Box::new(follower)));
        self.group = Some(group);
        let workers: Vec<u32> = self.live_workers().collect();
        workers
            .into_iter()
            .for_each(|worker| self.come(Coming::Meets(worker)));
    }

    fn live_workers(&self) -> impl Iterator<Item = u32> + '_ {
        let is_alive = |&worker: &u32| self.processes.contains_key(&Address::Worker(worker));
        (0..NUM_WORKERS).filter(is_alive)
    }

    fn start_worker(&mut self, worker: u32) {
        let num_starts = self.num_starts[worker as usize];
        self.num_starts[worker as usize] += 1;
        let settings = Arc::clone(&self.settings);
        let process = Worker::new(WorkerId(worker), settings, num_starts, 1.0);
        self.processes
            .insert(Address::Worker(worker), Process::Worker(Box::new(process)));
        if self.group.is_some() {
            self.come(Coming::Meets(worker));
        }
    }

    /// Lets something happen. The process dies after so many actions, if a number is given. Returns `false` if
    /// it has not so many.
    fn happens(&mut self, index: usize, dies_after: Option<usize>) -> bool {
        let (_, what) = self.coming.remove(index);
        self.take(what, dies_after)
    }

    fn take(&mut self, what: Coming, dies_after: Option<usize>) -> bool {
        let address = match &what {
            Coming::Input(address, _) => *address,
            Coming::Meets(worker) => Address::Worker(*worker),
        };
        let Some(mut process) = self.processes.remove(&address) else {
            return dies_after.is_none();
        };
        let mut dice = Dice::new(0);
        let mut turn = Turn::new(0, &mut dice);
        match (&mut process, what) {
            (Process::Worker(worker), Coming::Meets(_)) => self.meet(worker, &mut turn),
            (Process::Worker(worker), Coming::Input(_, input)) => worker.handle(input, &mut turn),
            (Process::First(first), Coming::Input(_, input)) => first.handle(input, &mut turn),
            (Process::Follower(one), Coming::Input(_, input)) => one.handle(input, &mut turn),
            (_, Coming::Meets(_)) => {}
        }
        let is_first = matches!(process, Process::First(_));
        self.processes.insert(address, process);
        let Turn {
            mut actions, notes, ..
        } = turn;
        for note in &notes {
            if let Note::Reached(State::VersionGone) = note {
                continue;
            }
            if let Err(error) = self.truth.note(note, 0) {
                self.error.get_or_insert(error);
            }
        }
        if let Some(num_done) = dies_after {
            if num_done >= actions.len() {
                return false;
            }
            let (done, left) = actions.split_at(num_done);
            let logs = |action: &Action| matches!(action, Action::Append(_));
            let replies = |action: &Action| matches!(action, Action::Reply(..));
            self.crashed_after_log |= is_first && done.iter().any(logs) && left.iter().any(replies);
            actions.truncate(num_done);
        }
        actions
            .into_iter()
            .for_each(|action| self.perform(address, action));
        if dies_after.is_some() {
            self.die(address);
        }
        true
    }

    fn meet(&self, worker: &mut Worker, turn: &mut Turn<'_>) {
        let Some(group) = &self.group else { return };
        let WorkerId(number) = worker.id();
        let next = match self.processes.get(&group.server(0)) {
            Some(Process::First(first)) => first.coordinator().save().next_clock(WorkerId(number)),
            _ => Clock(0),
        };
        worker.meet(group.clone(), next, turn);
    }

    fn perform(&mut self, address: Address, action: Action) {
        match action {
            Action::Call(to, id, request) => {
                if self.processes.contains_key(&to) || to == address {
                    self.open.insert(id, to);
                    self.come(Coming::Input(to, Input::Called(id, request)));
                } else {
                    self.come(Coming::Input(address, Input::Ended(id)));
                }
            }
            Action::Reply(id, reply) => {
                if self.open.remove(&id).is_some() {
                    self.come(Coming::Input(id.caller, Input::Answered(id, reply)));
                }
            }
            Action::Append(record) => self.disk.append(record),
            Action::Sync | Action::Rotate(_) => {}
            Action::Timer(_, timer) | Action::Compute(_, timer) => {
                self.come(Coming::Input(address, Input::Timer(timer)));
            }
        }
    }

    fn die(&mut self, address: Address) {
        self.processes.remove(&address);
        self.coming.retain(|(_, what)| match what {
            Coming::Input(to, _) => *to != address,
            Coming::Meets(worker) => Address::Worker(*worker) != address,
        });
        let over: Vec<(CallId, Address)> = self
            .open
            .extract_if(.., |id, callee| id.caller == address || *callee == address)
            .collect();
        for (id, callee) in over {
            let (to, input) = match id.caller == address {
                true => (callee, Input::CallerGone(id)),
                false => (id.caller, Input::Ended(id)),
            };
            if self.processes.contains_key(&to) {
                self.come(Coming::Input(to, input));
            }
        }
        match address {
            Address::Worker(worker) => self.unreported.push(worker),
            _ => self.group = None,
        }
    }

    fn recover(&mut self) {
        let servers: Vec<Address> = self.processes.keys().copied().collect();
        for address in servers {
            if let Address::Server { .. } = address {
                self.die(address);
            }
        }
        self.generation += 1;
        let recovered = self.disk.recover(&self.settings);
        let generation = self.generation;
        if let Err(error) = self
            .truth
            .recovered(&recovered, Loss::Process, 0, generation)
        {
            self.error.get_or_insert(error);
        }
        self.start_group(recovered.checkpoint.as_ref());
    }

    fn report(&mut self, worker: u32) {
        self.unreported.retain(|other| *other != worker);
        if let Some(group) = &self.group {
            self.num_reports += 1;
            let call = CallId {
                caller: Address::Driver,
                number: self.num_reports,
            };
            let request = Request::ReportLost(WorkerId(worker));
            let to = group.server(0);
            self.come(Coming::Input(to, Input::Called(call, request)));
        }
    }

    /// Nothing more will happen by itself.
    fn is_quiet(&self) -> bool {
        self.coming.is_empty()
            && self.group.is_some()
            && self.live_workers().count() == NUM_WORKERS as usize
    }

    fn check_quiet(&self) -> Result<(), String> {
        let Some(group) = &self.group else {
            return Ok(());
        };
        for (address, process) in &self.processes {
            if let Process::Worker(worker) = process
                && !worker.is_done()
            {
                return Err(format!("{address} {} for ever", worker.phase()));
            }
        }
        let mut shards = Vec::new();
        for index in 0..NUM_SERVERS {
            match self.processes.get(&group.server(index)) {
                Some(Process::First(first)) => shards.push(first.shard()),
                Some(Process::Follower(follower)) => shards.push(follower.shard()),
                _ => {}
            }
        }
        check_end(&shards, &self.truth)
    }

    fn choices(&self, choices: &mut Vec<Choice>) {
        let Budget {
            crashes,
            losses,
            doubles,
        } = self.budget;
        for (index, (key, what)) in self.coming.iter().enumerate() {
            // Two that are the same lead to the same.
            if index > 0 && self.coming[index - 1].0 == *key {
                continue;
            }
            choices.push(Choice::Happens(index));
            let Coming::Input(to, input) = what else {
                continue;
            };
            let is_call = matches!(input, Input::Called(..));
            if doubles > 0 && is_call {
                choices.push(Choice::HappensTwice(index));
            }
            if losses > 0 && (is_call || matches!(input, Input::Answered(..))) {
                choices.push(Choice::IsLost(index));
            }
            if crashes > 0 && *to != Address::Driver {
                for num_done in 0..MAX_ACTIONS {
                    choices.push(Choice::HappensAndDies(index, num_done, Then::First));
                    choices.push(Choice::HappensAndDies(index, num_done, Then::Last));
                }
            }
        }
        if crashes > 0 {
            for &address in self.processes.keys() {
                choices.push(Choice::Dies(address, Then::First));
                choices.push(Choice::Dies(address, Then::Last));
            }
        }
    }

    /// Lets everything happen that is left after a crash, in one order.
    fn run_on(&mut self, then: Then) {
        for _ in 0..MAX_STEPS {
            let dead = |w: &u32| !self.processes.contains_key(&Address::Worker(*w));
            let next = match then {
                Then::First => 0,
                Then::Last => self.coming.len().saturating_sub(1),
            };
            if !self.coming.is_empty() {
                self.happens(next, None);
            } else if self.group.is_none() {
                self.recover();
            } else if let Some(&worker) = self.unreported.first() {
                self.report(worker);
            } else if let Some(worker) = (0..NUM_WORKERS).find(dead) {
                self.start_worker(worker);
            } else {
                return;
            }
        }
        self.error
            .get_or_insert("the run goes on for ever".to_owned());
    }

    /// Returns `false` if there is no such choice.
    fn choose(&mut self, choice: &Choice) -> bool {
        match *choice {
            Choice::Happens(index) => self.happens(index, None),
            Choice::HappensAndDies(index, num_done, then) => {
                self.budget.crashes -= 1;
                let dies = self.happens(index, Some(num_done));
                if dies {
                    self.run_on(then);
                }
                dies
            }
            Choice::HappensTwice(index) => {
                self.budget.doubles -= 1;
                let what = self.coming[index].1.clone();
                self.take(what, None)
            }
            Choice::IsLost(index) => {
                self.budget.losses -= 1;
                let (_, what) = self.coming.remove(index);
                let Coming::Input(_, Input::Called(id, _) | Input::Answered(id, _)) = what else {
                    return false;
                };
                self.open.remove(&id);
                if self.processes.contains_key(&id.caller) {
                    self.come(Coming::Input(id.caller, Input::Lost(id)));
                }
                true
            }
            Choice::Dies(address, then) => {
                self.budget.crashes -= 1;
                self.die(address);
                self.run_on(then);
                true
            }
        }
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (address, process) in &self.processes {
            address.hash(&mut hasher);
            match process {
                Process::Worker(worker) => worker.description().hash(&mut hasher),
                Process::First(first) => first.description().hash(&mut hasher),
                Process::Follower(follower) => follower.description().hash(&mut hasher),
            }
        }
        self.coming
            .iter()
            .for_each(|(key, _)| key.hash(&mut hasher));
        self.open.hash(&mut hasher);
        self.disk.description().hash(&mut hasher);
        self.truth.description().hash(&mut hasher);
        (
            self.generation,
            self.num_starts,
            &self.unreported,
            self.budget,
        )
            .hash(&mut hasher);
        (&self.error, self.crashed_after_log).hash(&mut hasher);
        hasher.finish()
    }
}

/// A world, with what the properties ask for.
#[derive(Clone)]
struct Node {
    // A rule is not `Sync`.
    world: Arc<Mutex<World>>,
    digest: u64,
    error: Option<String>,
    is_quiet: bool,
    crashed_after_log: bool,
}

impl Node {
    fn of(world: World) -> Self {
        let is_quiet = world.is_quiet();
        let mut error = world.error.clone();
        if is_quiet && error.is_none() {
            error = world.check_quiet().err();
        }
        Self {
            digest: world.digest(),
            error,
            is_quiet,
            crashed_after_log: world.crashed_after_log,
            world: Arc::new(Mutex::new(world)),
        }
    }

    fn world(&self) -> World {
        self.world.lock().expect("nobody panics with it").clone()
    }
}

impl Hash for Node {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.error)
    }
}

struct SmallGroup {
    consistency: Consistency,
    budget: Budget,
    mistake: Option<Mistake>,
}

impl Model for SmallGroup {
    type State = Node;
    type Action = Choice;

    fn init_states(&self) -> Vec<Node> {
        let world = World::new(self.consistency, self.budget, self.mistake);
        vec![Node::of(world)]
    }

    fn actions(&self, node: &Node, choices: &mut Vec<Choice>) {
        if node.error.is_none() {
            node.world
                .lock()
                .expect("nobody panics with it")
                .choices(choices);
        }
    }

    fn next_state(&self, node: &Node, choice: Choice) -> Option<Node> {
        let mut world = node.world();
        world.choose(&choice).then(|| Node::of(world))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        // At most once, acknowledged and then in the weights once, servers agree, nobody waits for ever.
        let mut properties = vec![
            Property::always("all guarantees hold", |_, node: &Node| node.error.is_none()),
            Property::sometimes("a run ends", |_, node: &Node| node.is_quiet),
        ];
        if self.budget.crashes > 0 {
            properties.push(Property::sometimes(
                "a run ends after a crash between log and reply",
                |_, node: &Node| node.is_quiet && node.crashed_after_log,
            ));
        }
        properties
    }
}

fn check(consistency: Consistency, budget: Budget) {
    let model = SmallGroup {
        consistency,
        budget,
        mistake: None,
    };
    let checker = model.checker().threads(2).spawn_bfs().join();
    eprintln!(
        "{consistency}, {budget:?}: {} states, {} steps deep",
        checker.unique_state_count(),
        checker.max_depth()
    );
    assert!(checker.is_done());
    checker.assert_properties();
}

fn budget(crashes: u8, losses: u8, doubles: u8) -> Budget {
    Budget {
        crashes,
        losses,
        doubles,
    }
}

/// With a bound of 0, the answer to one worker waits for the step of the other. With `k` = 1, one of the two is late.
const MODES: [Consistency; 4] = [
    Consistency::Bsp,
    Consistency::Asp,
    Consistency::Ssp { bound: 0 },
    Consistency::KofN { k: 1 },
];

#[test]
fn every_order_of_messages_of_which_one_comes_twice_or_is_lost_keeps_the_guarantees() {
    for consistency in MODES {
        check(consistency, budget(0, 1, 0));
        check(consistency, budget(0, 0, 1));
    }
}

#[test]
fn a_crash_at_any_point_keeps_the_guarantees() {
    for consistency in MODES {
        check(consistency, budget(1, 0, 0));
    }
}

#[test]
fn a_crash_after_a_message_that_came_twice_keeps_the_guarantees() {
    // In the other modes there are four times as many states.
    check(Consistency::Bsp, budget(1, 0, 1));
}

/// The model finds what it should find.
#[test]
fn the_model_finds_an_answer_before_the_log() {
    for consistency in MODES {
        let model = SmallGroup {
            consistency,
            budget: budget(1, 0, 0),
            mistake: Some(Mistake::AnswersBeforeLog),
        };
        let checker = model.checker().spawn_bfs().join();
        let found = checker
            .discovery("all guarantees hold")
            .unwrap_or_else(|| panic!("{consistency}: the mistake is not found"));
        let error = found.last_state().error.clone().unwrap_or_default();
        assert!(error.contains("acknowledged"), "{consistency}: {error}");
    }
}
