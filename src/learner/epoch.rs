//! One epoch: a server and workers that take all steps of their shares. The server goes on from the state of the one
//! before it. So steps and versions are counted since the process of the driver began to train, and no step of this
//! process has the number of an earlier one.

use std::pin::pin;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use burn::train::{Learner, LearnerModel};
use futures_util::FutureExt;
use futures_util::future::{Either, join, select, try_join_all};
use ps_actors::actor::{self, ActorRef};
use ps_actors::checkpoint::Checkpoint;
use ps_actors::cluster::{Cluster, Hosts, Placement, SpawnOn};
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::server::{PullVersion, ServerConfig};
use ps_actors::weights::Segment;
use ps_actors::worker::{DataWorker, RunReport};
use ps_model::{FlatView, ModelError};
use tokio::sync::oneshot;

use super::rule::LearnerRule;
use super::source::{EpochConfig, Input, LearnerSource, Output, Shared, lock};
use crate::observe::{Collector, Observers};
use crate::source::{SetupError, initial_weights};
use crate::trainer::TrainError;
use crate::workers::{Worker, WorkerRun, able, balance, last_steps};

/// How many outputs of steps wait for burn's metrics. Then the workers of the driver's process wait.
const MAX_WAITING: usize = 2;

/// How often the driver looks whether it must stop, while no step ends in its process.
const LOOK: Duration = Duration::from_millis(50);

/// What all epochs of a training have in common.
pub(super) struct Epochs<'a, M: LearnerModel> {
    pub(super) shared: &'a Arc<Shared<M>>,
    pub(super) cluster: &'a Cluster,
    pub(super) hosts: &'a Hosts,
    pub(super) variant: &'a str,
    /// A random number, by which processes tell trainings apart.
    pub(super) training: u64,
    pub(super) config: ServerConfig,
    pub(super) num_workers: u32,
    pub(super) num_accumulated: u32,
    pub(super) learner: &'a Arc<Mutex<Learner<M>>>,
    /// What the server had at the end of the epoch before. `None`: there was none.
    pub(super) before: Mutex<Option<Checkpoint>>,
}

impl<M: LearnerModel> Epochs<'_, M>
where
    Input<M>: Clone,
{
    /// Takes all steps of one epoch. Afterwards the learner has the servers' weights. Calls `on_output` with what
    /// each step of a worker in this process returned, once the step's gradient is settled. Asks `must_stop` at
    /// least every 50 ms while it waits. When that returns `true`, the epoch ends after the current steps.
    pub(super) fn train(
        &self,
        epoch: u64,
        mut on_output: impl FnMut(Output<M>),
        mut must_stop: impl FnMut() -> bool,
    ) -> Result<(), TrainError> {
        let (sender, outputs) = sync_channel(MAX_WAITING);
        let (stop, stopped) = oneshot::channel();
        thread::scope(|scope| {
            let taking = Taking::begin(self.shared, sender);
            let training = scope.spawn(move || {
                let result = self.take_steps(epoch, stopped);
                drop(taking);
                result
            });
            // A panic in `on_output` or `must_stop` drops both. Then the workers do not wait for this thread, and
            // end after the current steps.
            let outputs = outputs;
            let mut stop = Some(stop);
            while let Some(output) = next(&outputs) {
                output.into_iter().for_each(&mut on_output);
                if must_stop()
                    && let Some(stop) = stop.take()
                {
                    // If nobody hears it, the steps have just ended.
                    let _ = stop.send(());
                }
            }
            match training.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn take_steps(&self, epoch: u64, stopped: oneshot::Receiver<()>) -> Result<(), TrainError> {
        let model = lock(self.learner).model();
        let view = FlatView::new(&model).map_err(ModelError::from);
        let view = view.map_err(SetupError::from)?;
        let rule = |_| -> Box<dyn ps_actors::rule::UpdateRule> {
            Box::new(LearnerRule::new(self.learner, view.clone()))
        };
        let before = lock(&self.before).take();
        let (servers, first_clock) = match before {
            // Its weights are those of the learner's model.
            Some(before) => {
                let first_clock = self.next_clock(&before);
                let before = before.restart_workers_at(first_clock);
                let servers = ServerGroup::spawn(&before, 1, self.config, rule)?;
                (servers, first_clock)
            }
            None => {
                let initial = initial_weights(&model, &self.shared.device)?;
                let servers = ServerGroup::spawn(&initial, 1, self.config, rule)?;
                (servers, Clock(0))
            }
        };
        drop(model);
        let workers = self.spawn_workers(epoch, first_clock)?;
        let result = actor::try_run(async {
            let runs = drive(&servers, &workers, first_clock, stopped).await?;
            self.shared.counts.take(&servers.status().await?);
            check_refused(&runs)?;
            self.take_results(&servers, &view).await?;
            let state = servers.checkpoint().await?;
            *lock(&self.before) = Some(state);
            Ok::<(), TrainError>(())
        });
        // Nobody goes on in the background.
        workers.iter().for_each(Worker::kill);
        servers.servers().for_each(ActorRef::kill);
        result.map_err(TrainError::EventLoop)?
    }

    /// Returns the first step that no worker has taken. Some shares have one step less than others.
    fn next_clock(&self, state: &Checkpoint) -> Clock {
        let clocks = (0..self.num_workers).map(|rank| state.next_clock(WorkerId(rank)));
        clocks.max().unwrap_or_default()
    }

    /// Checks the weights. Copies the running statistics from the servers to the learner, if there are any. No
    /// optimizer knows of them.
    async fn take_results(&self, servers: &ServerGroup, view: &FlatView) -> Result<(), TrainError> {
        let weights = servers.pull(PullVersion::Latest).await?;
        let mut numbers = weights.segments().iter().flat_map(Segment::data);
        if !numbers.all(|weight| weight.is_finite()) {
            let what = "the weights are not finite".to_owned();
            return Err(TrainError::Diverged { what });
        }
        if view.buffers().is_empty() {
            return Ok(());
        }
        // Clones of a burn module share their statistics, so this changes those of the learner's model. Its
        // parameters are the server's already.
        let read = |range| weights.read(range).into_owned();
        let written = view.write_weights(lock(self.learner).model(), read);
        written.map_err(|error| SetupError::from(ModelError::from(error)))?;
        Ok(())
    }

    /// Starts the first worker in this process, so that burn's metrics have something to show, and the others
    /// on the nodes and here in turn. As long as the nodes stay the same, a rank is in the same process in every
    /// epoch, because that process already reads the rank's share.
    fn spawn_workers(
        &self,
        epoch: u64,
        first_clock: Clock,
    ) -> Result<Vec<Worker<LearnerSource<M>>>, TrainError> {
        let mut nodes = able(&self.cluster.nodes());
        nodes.sort_unstable();
        let spawn = SpawnOn::new().variant(self.variant);
        let spawn = spawn.here(self.hosts.clone());
        let start = |config: EpochConfig, place: Placement| {
            let spawn = spawn.clone().place(place);
            (self.cluster).spawn_with::<DataWorker<LearnerSource<M>>>(spawn, config)
        };
        let started = (0..self.num_workers).map(|rank| {
            let config = self.epoch_config(rank, epoch, first_clock);
            let place = match (rank as usize % (1 + nodes.len())).checked_sub(1) {
                None => Placement::Driver,
                Some(index) => Placement::Node(nodes[index]),
            };
            (config, place.clone(), start(config, place))
        });
        // All are being started before the first is waited for.
        let started: Vec<_> = started.collect();
        let started = started.into_iter().map(|(config, place, actor)| {
            let actor = match (actor.wait(), place) {
                // The node has just been lost, or leaves.
                (Err(_), Placement::Node(_)) => start(config, Placement::RoundRobin).wait()?,
                (actor, _) => actor?,
            };
            Ok((config.worker, config, actor))
        });
        let started = started.collect::<Result<_, TrainError>>()?;
        let consistency = self.config.consistency;
        Ok(Worker::all(started, self.cluster, &spawn, consistency))
    }

    fn epoch_config(&self, rank: u32, epoch: u64, first_clock: Clock) -> EpochConfig {
        EpochConfig {
            training: self.training,
            worker: WorkerId(rank),
            num_workers: self.num_workers,
            epoch,
            first_clock,
            num_accumulated: self.num_accumulated,
        }
    }
}

/// Waits for an output, but not for long. `None` when there will be no more.
fn next<M: LearnerModel>(outputs: &Receiver<Output<M>>) -> Option<Option<Output<M>>> {
    match outputs.recv_timeout(LOOK) {
        Ok(output) => Some(Some(output)),
        Err(RecvTimeoutError::Timeout) => Some(None),
        Err(RecvTimeoutError::Disconnected) => None,
    }
}

/// As long as it exists, the workers of this process pass on their outputs.
struct Taking<M: LearnerModel>(Arc<Shared<M>>);

impl<M: LearnerModel> Taking<M> {
    fn begin(shared: &Arc<Shared<M>>, sender: SyncSender<Output<M>>) -> Self {
        *lock(&shared.outputs) = Some(sender);
        Self(Arc::clone(shared))
    }
}

impl<M: LearnerModel> Drop for Taking<M> {
    fn drop(&mut self) {
        *lock(&self.0.outputs) = None;
    }
}

/// Refused gradients change nothing. An epoch may be too short for any worker to notice that most are refused.
fn check_refused(runs: &[WorkerRun]) -> Result<(), TrainError> {
    // The numbers may come from a peer, so adding them must not overflow.
    let sum = |number: fn(&RunReport) -> u64| {
        let numbers = runs.iter().map(|run| number(&run.report));
        numbers.fold(0, u64::saturating_add)
    };
    let num_refused = sum(|report| report.num_refused);
    let num_others = sum(|report| report.num_applied.saturating_add(report.num_dropped_late));
    let num_all = num_refused.saturating_add(num_others);
    let is_cut_short = runs.iter().any(|run| run.is_cut_short);
    if is_cut_short || num_refused <= num_all / 2 {
        return Ok(());
    }
    let what = format!(
        "{num_refused} of the {num_all} gradients of an epoch were refused, because they are not finite"
    );
    Err(TrainError::Diverged { what })
}

/// Lets all workers take their steps, until they have taken them or are stopped, or until nobody is left who could
/// stop them. Returns what each of them has done.
async fn drive<M: LearnerModel>(
    servers: &ServerGroup,
    workers: &[Worker<LearnerSource<M>>],
    first_clock: Clock,
    stopped: oneshot::Receiver<()>,
) -> Result<Vec<WorkerRun>, TrainError>
where
    Input<M>: Clone,
{
    let collector = Collector::new(&Observers::start(Vec::new()));
    let given_up = async {
        // It fails if the thread that hands on the outputs has panicked.
        let _ = stopped.await;
        workers.iter().for_each(Worker::stop);
        last_steps(servers, workers).await;
    };
    let given_up = given_up.shared();
    let first = first_clock.0;
    let runs = workers
        .iter()
        .map(|worker| worker.run(servers, &collector, first, u64::MAX, given_up.clone()));
    let runs = pin!(try_join_all(runs));
    let beside = pin!(async {
        let (never, ()) = join(balance(workers), given_up.clone()).await;
        match never {}
    });
    match select(runs, beside).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right((never, _)) => never,
    }
}
