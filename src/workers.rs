//! Keeps the workers of a run going if they panic, and if their processes are lost or leave.

use std::cell::{Cell, RefCell};
use std::pin::pin;

use futures_util::future::{Either, select};
use ps_actors::actor::{ActorRef, CallError};
use ps_actors::cluster::{Cluster, SpawnOn, SpawnOnError};
use ps_actors::group::ServerGroup;
use ps_actors::ids::WorkerId;
use ps_actors::server::GroupError;
use ps_actors::worker::{RunReport, RunSteps, StopSteps, WorkerError};
use ps_model::Model;

use crate::source::{ModelWorker, WorkerConfig};
use crate::trainer::TrainError;

/// How often in a row a worker is started again after its process was lost, without a settled gradient in
/// between.
pub(crate) const MAX_LOSSES: u32 = 20;

/// A worker of a run. It can be replaced by another one.
pub(crate) struct Worker<M: Model> {
    config: WorkerConfig,
    /// Replaced by another one when its process was lost or has left.
    actor: RefCell<ActorRef<ModelWorker<M>>>,
    cluster: Cluster,
    spawn: SpawnOn,
    /// Whether the worker must take no more steps.
    is_stopped: Cell<bool>,
}

/// What a worker has done, in all its incarnations.
#[derive(Default)]
pub(crate) struct WorkerRun {
    /// The reports of the incarnations that could make one. The losses of the others are NaN.
    pub(crate) report: RunReport,
    /// How many gradients these incarnations reported.
    pub(crate) num_told: u64,
    pub(crate) num_restarts: u32,
    /// Whether it was stopped before all steps were taken.
    pub(crate) is_cut_short: bool,
}

impl<M: Model> Worker<M> {
    pub(crate) fn new(
        config: WorkerConfig,
        actor: ActorRef<ModelWorker<M>>,
        cluster: &Cluster,
        spawn: &SpawnOn,
    ) -> Self {
        Self {
            config,
            actor: RefCell::new(actor),
            cluster: cluster.clone(),
            spawn: spawn.clone(),
            is_stopped: Cell::new(false),
        }
    }

    pub(crate) fn id(&self) -> WorkerId {
        self.config.worker
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

    /// Takes all steps. The worker may panic, be lost with its process, or be stopped because its process
    /// leaves. It then goes on with the first step that is not settled, as long as its actor is restarted
    /// or another node makes one. After [`stop`](Self::stop) it ends with what it has done until then. When
    /// `given_up` is ready after that, it ends without waiting for the current step. The steps are those from
    /// `first_step` to `num_steps`.
    pub(crate) async fn run(
        &self,
        servers: &ServerGroup,
        first_step: u64,
        num_steps: u64,
        given_up: impl Future<Output = ()> + Clone,
    ) -> Result<WorkerRun, TrainError> {
        let worker = self.config.worker;
        let mut told = WorkerRun::default();
        let (mut num_losses, mut step_at_loss) = (0, first_step);
        let mut next_step = first_step;
        loop {
            if self.is_stopped.get() {
                told.is_cut_short = true;
                return Ok(told);
            }
            let num_steps = num_steps.saturating_sub(next_step);
            let run = RunSteps {
                servers: servers.clone(),
                num_steps,
            };
            let actor = self.actor.borrow().clone();
            let answer = match select(actor.ask(run), pin!(given_up.clone())).await {
                Either::Left((answer, _)) => answer,
                Either::Right(_) => {
                    actor.kill();
                    continue;
                }
            };
            let is_panic = matches!(answer, Err(CallError::Failed { .. }));
            let lost = match answer {
                Ok(Ok(part)) => {
                    told.num_told += part.losses.len() as u64;
                    told.report.append(part);
                    if !told.report.was_stopped {
                        return Ok(told);
                    }
                    if self.is_stopped.get() {
                        continue;
                    }
                    tracing::info!(%worker, "a worker's node leaves; it goes on elsewhere");
                    None
                }
                // Its node was cut off from the servers, but not from this process.
                Ok(Err(WorkerError::Servers {
                    source: GroupError::Call { source, .. },
                    ..
                })) if !actor.is_local() => Some(source),
                Ok(Err(error)) => return Err(error.into()),
                // Its process ends at the same time as this one.
                Err(_) if self.is_stopped.get() => continue,
                Err(lost) => Some(lost),
            };
            if let Some(lost) = &lost {
                tracing::warn!(%worker, %lost, "a worker is lost; it goes on");
                servers.report_lost(worker).await?;
            }
            told.num_restarts += 1;
            next_step = step_after_settled(servers, worker).await?.max(first_step);
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
        }
    }

    /// Starts the worker on another node, or on its own node if that has joined again.
    async fn respawn(&self, lost: &ActorRef<ModelWorker<M>>) -> Result<(), SpawnOnError> {
        // If it is still alive, it must not go on beside the new one.
        lost.kill();
        let spawn = self.spawn.clone();
        let actor = self.cluster.spawn_with(spawn, self.config).await?;
        self.actor.replace(actor);
        Ok(())
    }
}

/// Returns the first step of a worker that is not settled.
async fn step_after_settled(servers: &ServerGroup, worker: WorkerId) -> Result<u64, GroupError> {
    let status = servers.status().await?;
    let status = status.into_iter().find_map(|status| status.coordinator);
    let status = status.expect("the first server of a group coordinates");
    Ok(status
        .workers
        .get(&worker)
        .map_or(0, |worker| worker.next_clock.0))
}
