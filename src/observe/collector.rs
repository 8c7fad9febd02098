//! Fetches the records of workers and servers, and looks at servers and nodes, on a thread of its own. So an
//! evaluation in the driver's thread does not hold it up.
//!
//! For each worker it knows the clock of the next step that the observers do not know. A batch of records may
//! come twice: as the answer to a question, and in the report of the worker's run. A gap in the clocks is
//! made of steps whose records are lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use futures_util::future::{AbortHandle, Abortable, Either, join, join4, select};
use ps_actors::actor::{ActorRef, Pending, Reply, try_run};
use ps_actors::cluster::{Cluster, NodeId};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::server::{AppliedParts, CoordinatorStatus, GetAppliedParts, ServerStatus};
use ps_actors::worker::{DataWorker, GetSteps, GradientSource, StepRecord, Steps};

use super::Observers;
use super::event::{
    Event, NodeJoined, NodeLost, PartApplied, ServerSeen, ServersSeen, SettledStep, StepsMissed,
    WorkerJoined, WorkerLeft, WorkerLost, WorkerMoved,
};
use super::parts::Parts;

/// How often workers and servers are asked for their records.
const EVERY: Duration = Duration::from_millis(250);

/// How often servers are asked for their state.
const LOOK_AT_SERVERS: Duration = Duration::from_secs(1);

/// How long the end of a failed run waits for the last records.
const LAST_RECORDS: Duration = Duration::from_secs(1);

/// How long a run whose servers answer waits for what they tell of each gradient. A busy machine may take seconds.
const FOLLOWING: Duration = Duration::from_secs(5);

/// Fetches what the observers of a run do not learn from the driver. Does nothing if nobody observes.
pub(crate) struct Collector {
    shared: Arc<Shared>,
    collecting: Option<(AbortHandle, JoinHandle<()>)>,
    /// Where the nodes are looked for.
    cluster: Option<Cluster>,
}

struct Shared {
    observers: Observers,
    workers: Mutex<BTreeMap<WorkerId, Watched>>,
    nodes: Mutex<BTreeSet<NodeId>>,
    /// What the servers tell of each gradient. Nothing if nobody follows them.
    parts: Mutex<Parts>,
}

/// A server that follows the first one: its index, and where it is.
type Follower = (usize, NodeId);

type Ask = Arc<dyn Fn(Clock) -> Reply<Steps> + Send + Sync>;

/// A worker whose records are fetched.
struct Watched {
    /// Asks the worker's actor of now.
    ask: Option<Ask>,
    /// The first step that the observers do not know.
    next: Clock,
    /// When the step before it ended, in seconds since the run started.
    latest: f64,
    /// Whether it was watched with these servers.
    is_current: bool,
}

impl Collector {
    /// Makes a collector that does nothing before [`begin`](Self::begin).
    pub(crate) fn new(observers: &Observers) -> Self {
        let shared = Shared {
            observers: observers.clone(),
            workers: Mutex::default(),
            nodes: Mutex::default(),
            parts: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
            collecting: None,
            cluster: None,
        }
    }

    pub(crate) fn observers(&self) -> &Observers {
        &self.shared.observers
    }

    /// Begins to look at these servers and nodes. Then say which workers there [are](Self::watch).
    pub(crate) fn begin(&mut self, cluster: &Cluster, servers: &ServerGroup) {
        self.end();
        if self.observers().is_nobody() {
            return;
        }
        self.shared.look_at_nodes(cluster);
        self.cluster = Some(cluster.clone());
        *self.shared.lock_parts() = Parts::of(servers.servers().len());
        let (shared, cluster, servers) =
            (Arc::clone(&self.shared), cluster.clone(), servers.clone());
        let (abort, registration) = AbortHandle::new_pair();
        let thread = std::thread::Builder::new().name("collector".to_owned());
        let thread = thread.spawn(move || {
            let collecting = async {
                let parts = fetch_parts(&shared, &servers);
                let servers = look_at_servers(&shared, &servers);
                let nodes = look_at_nodes(&shared, &cluster);
                join4(fetch(&shared), parts, servers, nodes).await
            };
            if let Err(error) = try_run(Abortable::new(collecting, registration)) {
                tracing::warn!(%error, "no event loop for observers: they see steps only at their end");
            }
        });
        match thread {
            Ok(thread) => self.collecting = Some((abort, thread)),
            Err(error) => {
                tracing::warn!(%error, "no thread for observers: they see steps only at their end");
            }
        }
    }

    /// Ends looking, after a last look at the nodes. References to actors are dropped. Parts wait for no step any more.
    pub(crate) fn end(&mut self) {
        if let Some(cluster) = self.cluster.take() {
            self.shared.look_at_nodes(&cluster);
        }
        if let Some((abort, thread)) = self.collecting.take() {
            abort.abort();
            // If it panicked, that was logged.
            let _ = thread.join();
        }
        self.shared.tell_parts(|_| true);
        for watched in self.shared.lock().values_mut() {
            (watched.ask, watched.is_current) = (None, false);
        }
    }

    /// From now on fetches the records of this worker from this actor, which learns that it must record its
    /// steps. `first` is the worker's first step with these servers. If it took later ones with servers that
    /// are lost, they come again.
    pub(crate) fn watch<S: GradientSource>(
        &self,
        worker: WorkerId,
        actor: &ActorRef<DataWorker<S>>,
        first: Clock,
    ) {
        if self.observers().is_nobody() {
            return;
        }
        let mut workers = self.shared.lock();
        let watched = workers.entry(worker).or_insert_with(|| Watched {
            ask: None,
            next: first,
            latest: 0.0,
            is_current: true,
        });
        if !watched.is_current {
            let now = self.observers().seconds();
            self.observers().tell_all(miss(worker, watched, first, now));
            (watched.next, watched.is_current) = (first, true);
        }
        // If this message is lost, so is the one that starts the worker's run.
        let _ = actor.tell(GetSteps { from: watched.next });
        let actor = actor.clone();
        watched.ask = Some(Arc::new(move |from| actor.ask(GetSteps { from })));
    }

    /// Takes the records that came with the report of a worker's run.
    pub(crate) fn take(&self, worker: WorkerId, steps: Steps) {
        if !self.observers().is_nobody() {
            self.shared.take(worker, steps);
        }
    }

    /// All steps of this worker before `next` are settled. Those whose records have not arrived are missed.
    pub(crate) fn settled_until(&self, worker: WorkerId, next: Clock) {
        if !self.observers().is_nobody() {
            self.shared.miss_until(worker, next);
        }
    }

    /// Says that the worker has been started, and which step it takes next.
    pub(crate) fn joined(&self, worker: WorkerId, node: NodeId, next_clock: Clock) {
        self.observers().tell_with(|time| {
            Event::WorkerJoined(WorkerJoined {
                time,
                worker,
                node: Some(node),
                next_clock,
            })
        });
    }

    /// Says that the worker is lost.
    pub(crate) fn lost(&self, worker: WorkerId, node: NodeId, reason: impl fmt::Display) {
        let observers = self.observers();
        observers.tell_with(|time| {
            Event::WorkerLost(WorkerLost {
                time,
                worker,
                node: Some(node),
                reason: reason.to_string(),
            })
        });
    }

    /// Says that the worker has ended after a step, before all steps were taken.
    pub(crate) fn left(&self, worker: WorkerId) {
        self.observers()
            .tell_with(|time| Event::WorkerLeft(WorkerLeft { time, worker }));
    }

    /// Says that the worker goes on elsewhere.
    pub(crate) fn moved(&self, worker: WorkerId, from: NodeId, to: NodeId) {
        let observers = self.observers();
        observers.tell_with(|time| {
            Event::WorkerMoved(WorkerMoved {
                time,
                worker,
                from,
                to,
            })
        });
    }

    /// If somebody follows each gradient, says where the servers are, and lets them record their parts of gradients. Call it
    /// before the workers begin. Waits up to 5 s.
    pub(crate) async fn follow_gradients(&self, servers: &ServerGroup) {
        if self.observers().follow_gradients() {
            let looking = look_at_servers_once(&self.shared, servers);
            let prepared = pin!(join(looking, self.shared.fetch_parts(servers)));
            select(prepared, pin!(actix::clock::sleep(FOLLOWING))).await;
        }
    }

    /// Asks the servers for their last parts of gradients, if somebody follows each gradient. Waits up to 5 s.
    pub(crate) async fn fetch_last_parts(&self, servers: &ServerGroup) {
        let fetched = pin!(self.shared.fetch_parts(servers));
        select(fetched, pin!(actix::clock::sleep(FOLLOWING))).await;
    }

    /// Asks all workers for their last records, and the servers for their last parts as
    /// [`fetch_last_parts`](Self::fetch_last_parts) does, after a failure. Waits up to 1 s for all of them.
    pub(crate) async fn fetch_last(&self, servers: &ServerGroup) {
        let mut asked = Pending::new();
        self.shared.ask(&mut asked);
        let answers = async {
            while let Some((worker, answer)) = asked.next().await {
                if let Ok(steps) = answer {
                    self.shared.take(worker, steps);
                }
            }
        };
        let fetched = pin!(join(answers, self.shared.fetch_parts(servers)));
        select(fetched, pin!(actix::clock::sleep(LAST_RECORDS))).await;
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<WorkerId, Watched>> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the servers that have answered the last question for their parts. Not the first one: what it knows is in its
    /// answers to the workers.
    fn ask_for_parts(&self, servers: &ServerGroup, asked: &mut Pending<Follower, AppliedParts>) {
        if !self.observers.follow_gradients() {
            return;
        }
        let waiting: Vec<Follower> = asked.keys().copied().collect();
        for (index, server) in servers.servers().enumerate().skip(1) {
            let node = server.node().unwrap_or(NodeId::DRIVER);
            if !waiting.contains(&(index, node)) {
                let from = self.lock_parts().next(index);
                asked.insert((index, node), server.ask(GetAppliedParts { from }));
            }
        }
    }

    /// Asks the servers once, and waits for their answers.
    async fn fetch_parts(&self, servers: &ServerGroup) {
        let mut asked = Pending::new();
        self.ask_for_parts(servers, &mut asked);
        while let Some((server, answer)) = asked.next().await {
            if let Ok(parts) = answer {
                self.take_parts(server, parts);
            }
        }
    }

    fn take_parts(&self, (index, node): Follower, parts: AppliedParts) {
        let now = self.observers.seconds();
        self.lock_parts().take(index, node, parts, now);
    }

    /// Tells the observers of the parts whose steps are known.
    fn tell_parts(&self, is_step_known: impl Fn(&PartApplied) -> bool) {
        let parts = self.lock_parts().take_ready(is_step_known);
        let events = parts.into_iter().map(Event::PartApplied);
        self.observers.tell_all(events);
    }

    /// Whether the observers know of the step of this part, or will never know of it. What they knew before a recovery
    /// were other steps.
    fn is_step_known(&self, part: &PartApplied) -> bool {
        let workers = self.lock();
        let watched = workers.get(&part.worker);
        watched.is_none_or(|watched| watched.is_current && part.clock < watched.next)
    }

    /// Asks the workers that have answered the last question.
    fn ask(&self, asked: &mut Pending<WorkerId, Steps>) {
        let waiting: Vec<WorkerId> = asked.keys().copied().collect();
        for (&worker, watched) in self.lock().iter() {
            if let Some(ask) = watched.ask.as_ref().filter(|_| !waiting.contains(&worker)) {
                asked.insert(worker, ask(watched.next));
            }
        }
    }

    /// Tells the observers of the steps that they do not know yet.
    fn take(&self, worker: WorkerId, steps: Steps) {
        let records = match steps.read() {
            Ok(records) => records,
            Err(error) => {
                tracing::warn!(%worker, %error, "the records of its steps cannot be read");
                return;
            }
        };
        let mut workers = self.lock();
        if let Some(watched) = workers.get_mut(&worker) {
            let now = self.observers.seconds();
            let events = records.iter().flat_map(|record| {
                let [missed, step] = take_one(worker, watched, record, now);
                missed.into_iter().chain(step)
            });
            self.observers.tell_all(events);
        }
    }

    fn miss_until(&self, worker: WorkerId, next: Clock) {
        let mut workers = self.lock();
        if let Some(watched) = workers.get_mut(&worker) {
            let now = self.observers.seconds();
            self.observers.tell_all(miss(worker, watched, next, now));
        }
    }

    /// Tells the observers which nodes came and which are gone.
    fn look_at_nodes(&self, cluster: &Cluster) {
        let mut known = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let nodes = cluster.nodes();
        let now = self.observers.seconds();
        known.retain(|&node| {
            let is_there = nodes.iter().any(|there| there.node == node);
            if !is_there {
                self.observers
                    .tell(Event::NodeLost(NodeLost { time: now, node }));
            }
            is_there
        });
        for there in nodes {
            if known.insert(there.node) {
                self.observers.tell(Event::NodeJoined(NodeJoined {
                    time: now,
                    node: there.node,
                    host: there.host,
                    pid: there.pid,
                }));
            }
        }
    }
}

/// Returns what there is to tell of a record: steps before it that are missed, and its step, unless the observers know it.
fn take_one(
    worker: WorkerId,
    watched: &mut Watched,
    record: &StepRecord,
    now: f64,
) -> [Option<Event>; 2] {
    if record.clock < watched.next {
        return [None, None];
    }
    // The answer took a while, so it may seem to be earlier than the step before.
    let time = (now - record.ago.as_secs_f64())
        .max(watched.latest)
        .min(now);
    let missed = miss(worker, watched, record.clock, time);
    (watched.next, watched.latest) = (record.clock.next(), time);
    let step = Event::Step(SettledStep::of(worker, record, time));
    [missed, Some(step)]
}

/// Returns the event that the steps before `next` that the observers do not know are missed.
fn miss(worker: WorkerId, watched: &mut Watched, next: Clock, time: f64) -> Option<Event> {
    let num_steps = next.0.saturating_sub(watched.next.0);
    if num_steps == 0 {
        return None;
    }
    let first = std::mem::replace(&mut watched.next, next);
    Some(Event::StepsMissed(StepsMissed {
        time,
        worker,
        first,
        num_steps,
    }))
}

/// Asks the workers again and again.
async fn fetch(shared: &Shared) {
    let mut asked = Pending::new();
    loop {
        shared.ask(&mut asked);
        take_until_due(&mut asked, |worker, steps| shared.take(worker, steps)).await;
    }
}

/// Asks the servers again and again, if somebody follows each gradient.
async fn fetch_parts(shared: &Shared, servers: &ServerGroup) {
    let mut asked = Pending::new();
    while shared.observers.follow_gradients() {
        shared.ask_for_parts(servers, &mut asked);
        take_until_due(&mut asked, |server, parts| shared.take_parts(server, parts)).await;
        shared.tell_parts(|part| shared.is_step_known(part));
    }
}

/// Takes answers until the next question is due.
async fn take_until_due<K, R>(asked: &mut Pending<K, R>, mut take: impl FnMut(K, R)) {
    let mut tick = pin!(actix::clock::sleep(EVERY));
    loop {
        let answer = pin!(asked.next());
        match select(answer, &mut tick).await {
            Either::Left((Some((key, Ok(answer))), _)) => take(key, answer),
            // The trainer finds out too: it waits for the worker, and the worker for the servers.
            Either::Left((Some((_, Err(_))), _)) => {}
            Either::Left((None, tick)) => {
                tick.await;
                break;
            }
            Either::Right(_) => break,
        }
    }
}

async fn look_at_nodes(shared: &Shared, cluster: &Cluster) {
    loop {
        actix::clock::sleep(EVERY).await;
        shared.look_at_nodes(cluster);
    }
}

async fn look_at_servers(shared: &Shared, servers: &ServerGroup) {
    loop {
        look_at_servers_once(shared, servers).await;
        actix::clock::sleep(LOOK_AT_SERVERS).await;
    }
}

async fn look_at_servers_once(shared: &Shared, servers: &ServerGroup) {
    // What came while the answer was on its way may not be in it.
    let asked = shared.observers.seconds();
    // The trainer finds out if they cannot be reached.
    if let Ok(status) = servers.status().await {
        let seen = seen(asked, &status, servers);
        shared.observers.tell(Event::ServersSeen(seen));
    }
}

pub(super) fn seen(time: f64, status: &[ServerStatus], servers: &ServerGroup) -> ServersSeen {
    let nodes = servers.servers().map(|server| server.node());
    let nodes = nodes.map(|node| node.unwrap_or(NodeId::DRIVER));
    let rate = status.first().map(|first| first.learning_rate);
    let log = status.iter().find_map(|status| status.log.clone());
    let coordinator = status.iter().find_map(|status| status.coordinator.as_ref());
    let members = |status: &CoordinatorStatus| {
        let workers = status.workers.iter();
        let members = workers.filter(|(_, worker)| worker.is_member);
        members.map(|(&worker, _)| worker).collect()
    };
    ServersSeen {
        time,
        learning_rate: rate.unwrap_or(f64::NAN),
        consistency: coordinator.map_or_else(String::new, |status| status.consistency.to_string()),
        num_pending: coordinator.map_or(0, |status| status.num_pending),
        awaited: coordinator.map_or_else(Vec::new, |status| status.awaited.workers.clone()),
        members: coordinator.map_or_else(Vec::new, members),
        servers: status
            .iter()
            .zip(nodes)
            .map(|(status, node)| ServerSeen {
                node,
                version: status.version,
                num_weights: status.range.len(),
                num_staged: status.num_staged,
                num_waiting: status.num_waiting,
            })
            .collect(),
        log,
    }
}
