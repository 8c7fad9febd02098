//! Keeps the workers of a run going: through panics, and when their processes are lost or leave.

use std::cell::RefCell;

use ps_actors::actor::{ActorRef, CallError};
use ps_actors::cluster::{Cluster, SpawnOnError};
use ps_actors::group::ServerGroup;
use ps_actors::server::{GroupError, WorkerStatus};
use ps_actors::worker::{RunReport, RunSteps, WorkerError};
use ps_model::Model;

use crate::source::{ModelWorker, WorkerConfig};
use crate::trainer::TrainError;

/// How often each worker is started anew after its process was lost.
const MAX_RESPAWNS: u32 = 20;

/// A worker of a run, and how to get another one in its place.
pub(crate) struct Worker<M: Model> {
    config: WorkerConfig,
    /// Another one after its process was lost or left.
    actor: RefCell<ActorRef<ModelWorker<M>>>,
    cluster: Cluster,
}

/// What a worker has done, in all its lives.
pub(crate) struct WorkerRun {
    pub(crate) report: RunReport,
    pub(crate) num_restarts: u32,
}

impl<M: Model> Worker<M> {
    pub(crate) fn new(
        config: WorkerConfig,
        actor: ActorRef<ModelWorker<M>>,
        cluster: &Cluster,
    ) -> Self {
        Self {
            config,
            actor: RefCell::new(actor),
            cluster: cluster.clone(),
        }
    }

    /// Ends the worker, whatever it does.
    pub(crate) fn kill(&self) {
        self.actor.borrow().kill();
    }

    /// Takes all steps; a worker that panics, is lost with its process, or was stopped because that
    /// leaves, goes on with the first step that is not settled, for as long as its actor is restarted or another node makes one.
    pub(crate) async fn run(
        &self,
        servers: &ServerGroup,
        num_steps: u64,
    ) -> Result<WorkerRun, TrainError> {
        let worker = self.config.worker;
        let mut report = RunReport::default();
        let mut num_restarts = 0;
        let mut num_settled = 0;
        loop {
            let num_steps = num_steps.saturating_sub(num_settled);
            let run = RunSteps {
                servers: servers.clone(),
                num_steps,
            };
            let actor = self.actor.borrow().clone();
            let answer = actor.ask(run).await;
            let is_panic = matches!(answer, Err(CallError::Failed { .. }));
            let lost = match answer {
                Ok(Ok(part)) => {
                    report.append(part);
                    if !report.was_stopped {
                        return Ok(WorkerRun {
                            report,
                            num_restarts,
                        });
                    }
                    tracing::info!(%worker, "a worker's node leaves; it goes on elsewhere");
                    None
                }
                // Its node was cut off from the servers, though not from here.
                Ok(Err(WorkerError::Servers {
                    source: GroupError::Call { source, .. },
                    ..
                })) if !actor.is_local() => Some(source),
                Ok(Err(error)) => return Err(error.into()),
                Err(lost) => Some(lost),
            };
            if let Some(lost) = lost {
                if !is_panic && (actor.is_local() || num_restarts >= MAX_RESPAWNS) {
                    return Err(TrainError::WorkerLost {
                        worker,
                        source: lost,
                    });
                }
                tracing::warn!(%worker, %lost, "a worker is lost; it goes on");
                servers.report_lost(worker).await?;
            }
            num_restarts += 1;
            if !is_panic {
                self.respawn(&actor).await?;
            }
            let status = servers.status().await?;
            let status = status.into_iter().find_map(|status| status.coordinator);
            let status = status.expect("the first server of a group coordinates");
            num_settled = status
                .workers
                .get(&worker)
                .map_or(0, WorkerStatus::num_settled);
        }
    }

    /// Starts the worker on another node, or on its own if that has joined again.
    async fn respawn(&self, lost: &ActorRef<ModelWorker<M>>) -> Result<(), SpawnOnError> {
        // If it lives after all, it must not go on beside the new one.
        lost.kill();
        let actor = self.cluster.spawn(self.config).await?;
        self.actor.replace(actor);
        Ok(())
    }
}
