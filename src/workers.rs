//! Keeps the workers of a run going if they panic, if their processes are lost or leave, and if they move to
//! nodes that joined later.
//!
//! A worker that goes on elsewhere stays a member of the servers in between: the driver joins in its place,
//! which ends the membership of the lost worker in the same step. So no round closes without it, and its
//! steps have the gradients that they would have had.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};
use ps_actors::actor::{ActorRef, CallError};
use ps_actors::cluster::{Cluster, NodeId, NodeInfo, Placement, SpawnOn, SpawnOnError};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::server::{Consistency, GroupError};
use ps_actors::session::Session;
use ps_actors::worker::{
    DataWorker, GradientSource, HostedSource, KeepMembership, RunReport, RunSteps, StopSteps,
    WorkerError,
};
use tokio::sync::Notify;

use crate::balance::Places;
use crate::observe::Collector;
use crate::trainer::TrainError;

/// How often in a row a worker is started again after its process was lost, without a settled gradient in
/// between.
pub(crate) const MAX_LOSSES: u32 = 20;

/// How long workers that are stopped or removed may take to finish the current step.
const LAST_STEP: Duration = Duration::from_secs(10);

/// How long a worker that was ended may take to be gone.
const KILLED: Duration = Duration::from_secs(2);

/// The pause before workers that still wait for an update are told again that none will be made.
const END_ROUND: Duration = Duration::from_millis(20);

/// A worker of a run. It can be replaced by another one.
pub(crate) struct Worker<S: HostedSource> {
    id: WorkerId,
    /// What the worker is made from, here or elsewhere.
    args: S::Args,
    /// Replaced by another one when its process was lost or has left.
    actor: RefCell<ActorRef<DataWorker<S>>>,
    cluster: Cluster,
    spawn: SpawnOn,
    places: Rc<Places>,
    /// Where the worker goes on after its current step.
    moves_to: Cell<Option<NodeId>>,
    /// Whether every update has a gradient of each worker.
    waits_for_all: Cell<bool>,
    /// Whether the worker must leave for good.
    is_removed: Cell<bool>,
    removed: Notify,
    /// Whether the worker must take no more steps.
    is_stopped: Cell<bool>,
    /// Whether [`run`](Self::run) is over before all steps are taken.
    is_over: Cell<bool>,
    /// Whether all steps are taken.
    is_done: Cell<bool>,
}

/// What a worker has done, in all its incarnations.
#[derive(Default)]
pub(crate) struct WorkerRun {
    /// The reports of the incarnations that could make one. The losses of the others are NaN.
    pub(crate) report: RunReport,
    /// How many gradients these incarnations reported.
    pub(crate) num_told: u64,
    pub(crate) num_restarts: u32,
    pub(crate) num_moves: u32,
    /// Whether it was stopped before all steps were taken.
    pub(crate) is_cut_short: bool,
}

impl<S: HostedSource<Args: Clone>> Worker<S> {
    /// Makes the workers of a run of these actors, in the order of their ranks.
    pub(crate) fn all(
        started: Vec<(WorkerId, S::Args, ActorRef<DataWorker<S>>)>,
        cluster: &Cluster,
        spawn: &SpawnOn,
        consistency: Consistency,
    ) -> Vec<Self> {
        let places = started
            .iter()
            .map(|(_, _, actor)| place_of(actor))
            .collect();
        let places = Rc::new(Places::new(places));
        let workers = started.into_iter().map(|(id, args, actor)| Self {
            id,
            args,
            actor: RefCell::new(actor),
            cluster: cluster.clone(),
            spawn: spawn.clone(),
            places: Rc::clone(&places),
            moves_to: Cell::new(None),
            waits_for_all: Cell::new(consistency == Consistency::Bsp),
            is_removed: Cell::new(false),
            removed: Notify::new(),
            is_stopped: Cell::new(false),
            is_over: Cell::new(false),
            is_done: Cell::new(false),
        });
        workers.collect()
    }

    pub(crate) fn id(&self) -> WorkerId {
        self.id
    }

    /// Whether every update has a gradient of each worker.
    pub(crate) fn waits_for_all(&self) -> bool {
        self.waits_for_all.get()
    }

    /// The servers have another mode now.
    pub(crate) fn set_consistency(&self, consistency: Consistency) {
        self.waits_for_all.set(consistency == Consistency::Bsp);
    }

    /// Whether the worker takes steps, or will go on to.
    pub(crate) fn is_there(&self) -> bool {
        !self.is_removed.get() && !self.is_over.get() && !self.is_done.get()
    }

    /// Lets the worker leave for good after the current step, or after 10 s.
    pub(crate) fn remove(&self) {
        self.is_removed.set(true);
        self.removed.notify_one();
        // A worker that cannot be reached is lost. It is then not started again.
        let _ = self.actor.borrow().tell(StopSteps);
    }

    /// Becomes ready when the time for the last step of a worker that is removed is over.
    async fn must_be_gone(&self) {
        self.removed.notified().await;
        actix::clock::sleep(LAST_STEP).await;
    }

    /// Lets the worker end after the current step.
    pub(crate) fn stop(&self) {
        self.is_stopped.set(true);
        // A worker that cannot be reached is lost. It is then not started again.
        let _ = self.actor.borrow().tell(StopSteps);
    }

    /// Ends the worker at once.
    pub(crate) fn kill(&self) {
        self.actor.borrow().kill();
    }

    /// Lets the worker go on at another node after its current step.
    fn move_to(&self, node: NodeId) {
        self.moves_to.set(Some(node));
        // A worker that cannot be reached is lost. It then goes on there too.
        let _ = self.actor.borrow().tell(StopSteps);
    }

    /// Takes all steps. The worker may panic, be lost with its process, or be stopped because it moves or
    /// its process leaves. It then goes on with the first step that is not settled, as long as its actor is restarted
    /// or another node makes one. After [`stop`](Self::stop) it ends with what it has done until then. When
    /// `given_up` is ready after that, it ends without waiting for the current step. The steps are those from
    /// `first_step` to `num_steps`. `collector` learns of the steps.
    pub(crate) async fn run(
        &self,
        servers: &ServerGroup,
        collector: &Collector,
        first_step: u64,
        num_steps: u64,
        given_up: impl Future<Output = ()> + Clone,
    ) -> Result<WorkerRun, TrainError> {
        let worker = self.id;
        let mut told = WorkerRun::default();
        let (mut num_losses, mut step_at_loss) = (0, first_step);
        let mut next_step = first_step;
        if !self.is_removed.get() {
            let place = place_of(&self.actor.borrow());
            collector.joined(worker, place, Clock(first_step));
        }
        loop {
            if self.is_removed.get() {
                // Its membership ends, and with it a gradient that waits. The others go on without it.
                servers.report_lost(worker).await?;
                self.kill();
                self.is_over.set(true);
                return Ok(told);
            }
            if self.is_stopped.get() {
                told.is_cut_short = true;
                self.is_over.set(true);
                if !self.waits_for_all() {
                    // Nobody goes on in its place.
                    servers.report_lost(worker).await?;
                }
                collector.left(worker);
                return Ok(told);
            }
            let num_steps = num_steps.saturating_sub(next_step);
            let run = RunSteps {
                servers: servers.clone(),
                num_steps,
            };
            let actor = self.actor.borrow().clone();
            // If it does not arrive, the run does not either.
            let _ = actor.tell(KeepMembership);
            collector.watch(worker, &actor, Clock(first_step));
            let given_up = pin!(async {
                select(pin!(given_up.clone()), pin!(self.must_be_gone())).await;
            });
            let answer = match select(actor.ask(run), given_up).await {
                Either::Left((answer, _)) => answer,
                Either::Right(_) => {
                    actor.kill();
                    if self.is_removed.get() {
                        // It must not join again after it was reported lost.
                        let is_gone = pin!(actor.stopped());
                        select(is_gone, pin!(actix::clock::sleep(KILLED))).await;
                    }
                    continue;
                }
            };
            let is_panic = matches!(answer, Err(CallError::Failed { .. }));
            let lost = match answer {
                Ok(Ok(mut part)) => {
                    collector.take(worker, std::mem::take(&mut part.unfetched));
                    told.num_told += part.losses.len() as u64;
                    told.report.append(part);
                    if !told.report.was_stopped {
                        self.is_done.set(true);
                        return Ok(told);
                    }
                    if self.is_stopped.get() || self.is_removed.get() {
                        continue;
                    }
                    tracing::info!(%worker, "a worker goes on at another node");
                    None
                }
                // Its node was cut off from the servers, but not from this process.
                Ok(Err(WorkerError::Servers {
                    source: GroupError::Call { source, .. },
                    ..
                })) if !actor.is_local() => Some(source),
                Ok(Err(error)) => return Err(error.into()),
                // Its process ends at the same time as this one, or it would not go on in any case.
                Err(_) if self.is_stopped.get() || self.is_removed.get() => continue,
                Err(lost) => Some(lost),
            };
            match &lost {
                Some(lost) => {
                    tracing::warn!(%worker, %lost, "a worker is lost; it goes on");
                    collector.lost(worker, place_of(&actor), lost);
                    told.num_restarts += 1;
                }
                None => told.num_moves += 1,
            }
            // Perhaps it is a server that is lost, and the worker only noticed it.
            servers.status().await?;
            let session = Session::join(servers, worker).await?;
            next_step = session.next_clock().0.max(first_step);
            // The driver is a member in its place, until it joins itself. If the run ends before, nobody leaves:
            // a round without this worker must not be made, because it would be in the update log.
            session.stay();
            collector.settled_until(worker, Clock(next_step));
            let is_move = lost.is_none();
            if let Some(source) = lost.filter(|_| !is_panic) {
                // A worker that makes progress may be lost any number of times.
                if next_step > step_at_loss {
                    (num_losses, step_at_loss) = (0, next_step);
                }
                num_losses += 1;
                if actor.is_local() || num_losses > MAX_LOSSES {
                    return Err(TrainError::WorkerLost { worker, source });
                }
            }
            // The losses of steps that were not reported are not known.
            let num_settled = (next_step - first_step) as usize;
            let num_losses_known = told.report.losses.len().max(num_settled);
            told.report.losses.resize(num_losses_known, f32::NAN);
            if !is_panic {
                self.respawn(&actor).await?;
            }
            let (before, now) = (place_of(&actor), place_of(&self.actor.borrow()));
            match is_move {
                true => collector.moved(worker, before, now),
                false => collector.joined(worker, now, Clock(next_step)),
            }
        }
    }

    /// Starts the worker where it is to move, or on the node that has the fewest workers.
    async fn respawn(&self, lost: &ActorRef<DataWorker<S>>) -> Result<(), SpawnOnError> {
        // If it is still alive, it must not go on beside the new one.
        lost.kill();
        let rank = self.id.0 as usize;
        let nodes = able(&self.cluster.nodes());
        let wanted = self.moves_to.take();
        let wanted = wanted.or_else(|| self.places.emptiest(&nodes, rank));
        let there = match wanted {
            Some(node) => {
                let spawn = self.spawn.clone().place(Placement::Node(node));
                self.cluster.spawn_with(spawn, self.args.clone()).await.ok()
            }
            None => None,
        };
        let actor = match there {
            Some(actor) => actor,
            None => {
                let anywhere = self.spawn.clone();
                self.cluster.spawn_with(anywhere, self.args.clone()).await?
            }
        };
        self.places.set(rank, place_of(&actor));
        self.actor.replace(actor);
        Ok(())
    }
}

/// Waits while workers that were stopped finish the current step. Becomes ready when their time for it is over.
pub(crate) async fn last_steps<S: HostedSource<Args: Clone>>(
    servers: &ServerGroup,
    workers: &[Worker<S>],
) {
    let time_is_over = pin!(actix::clock::sleep(LAST_STEP));
    let ending = pin!(async {
        match workers.iter().any(Worker::waits_for_all) {
            true => end_round(servers, workers).await,
            false => std::future::pending().await,
        }
    });
    match select(time_is_over, ending).await {
        Either::Left(_) => {}
        Either::Right((never, _)) => match never {},
    }
    tracing::warn!("ending before all steps are finished, after {LAST_STEP:?}");
}

/// Lets workers that were stopped end without another update, if every update has a gradient of each of them: as
/// soon as one has ended, no further update may be made, because it would lack that worker's gradient. So those
/// that wait for one lose their membership, which ends their step. Does not return.
async fn end_round<S: HostedSource<Args: Clone>>(
    servers: &ServerGroup,
    workers: &[Worker<S>],
) -> Infallible {
    loop {
        let is_over = |worker: &&Worker<S>| worker.is_over.get() && !worker.is_removed.get();
        if workers.iter().any(|worker| is_over(&worker)) {
            for worker in workers.iter().filter(|worker| !worker.is_over.get()) {
                match Session::join(servers, worker.id()).await {
                    Ok(session) => session.stay(),
                    // The workers find out too.
                    Err(_) => return std::future::pending().await,
                }
            }
        }
        // A worker that has not heard that it is stopped joins again, and begins the step again.
        actix::clock::sleep(END_ROUND).await;
    }
}

/// Moves workers to nodes that join, as long as it is polled, so that no node has two workers more than
/// another one.
pub(crate) async fn balance<S: HostedSource<Args: Clone>>(workers: &[Worker<S>]) -> Infallible {
    let Some(Worker {
        cluster, places, ..
    }) = workers.first()
    else {
        return std::future::pending().await;
    };
    let mut known: Vec<NodeId> = cluster.nodes().iter().map(|node| node.node).collect();
    loop {
        let nodes = cluster.nodes_other_than(&known).await;
        known = nodes.iter().map(|node| node.node).collect();
        for (worker, node) in places.moves(&able(&nodes)) {
            let worker = &workers[worker];
            tracing::info!(worker = %worker.id(), %node, "a worker moves to a node that has fewer");
            worker.move_to(node);
        }
    }
}

/// Returns the nodes that may get workers.
pub(crate) fn able(nodes: &[NodeInfo]) -> Vec<NodeId> {
    let staying = nodes.iter().filter(|node| !node.is_leaving);
    staying.map(|node| node.node).collect()
}

fn place_of<S: GradientSource>(actor: &ActorRef<DataWorker<S>>) -> NodeId {
    actor.node().unwrap_or(NodeId::DRIVER)
}
