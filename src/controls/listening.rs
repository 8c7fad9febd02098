//! The side of the training: carries out what the [`Controls`] ask, in order, beside the workers.

use std::collections::BTreeSet;
use std::convert::Infallible;

use ps_actors::checkpoint::SaveNow;
use ps_actors::group::ServerGroup;
use ps_actors::ids::WorkerId;
use ps_actors::launch::StopSignal;
use ps_actors::server::{Consistency, GroupError, ServerConfig};
use ps_model::Model;

use super::inbox::Inbox;
use super::{Ask, Asked, Can, ControlError, Controls};
use crate::observe::{Change, Controlled, Event, Observers};
use crate::source::ModelSource;
use crate::workers::Worker;

/// What a training was asked to do. It lives as long as the training, also when servers are lost.
pub(crate) struct Listening {
    inbox: Inbox,
    learning_rate: Option<f64>,
    consistency: Option<Consistency>,
    removed: BTreeSet<WorkerId>,
}

/// The parts of a training that change.
pub(crate) struct Running<'a, M: Model> {
    pub(crate) servers: &'a ServerGroup,
    pub(crate) workers: &'a [Worker<ModelSource<M>>],
    pub(crate) save_now: &'a SaveNow,
    pub(crate) stop: Option<&'a StopSignal>,
    pub(crate) observers: &'a Observers,
}

impl Listening {
    /// From now on the controls are those of this training.
    pub(crate) fn begin(controls: &Controls, saves_checkpoints: bool) -> Self {
        let can = Can {
            save_checkpoints: saves_checkpoints,
            change_consistency: true,
            remove_workers: true,
        };
        Self {
            inbox: Inbox::open(controls, can),
            learning_rate: None,
            consistency: None,
            removed: BTreeSet::new(),
        }
    }

    /// Returns the workers that were removed.
    pub(crate) fn removed(&self) -> Vec<WorkerId> {
        self.removed.iter().copied().collect()
    }

    /// Adds what was changed to the settings of servers that are started now.
    pub(crate) fn adjust(&self, config: &mut ServerConfig) {
        config.consistency = self.consistency.unwrap_or(config.consistency);
    }

    /// Lets new servers and workers begin as the lost ones were: with the learning rate that was set, paused, and
    /// without those that were removed.
    pub(crate) async fn restore<M: Model>(
        &self,
        servers: &ServerGroup,
        workers: &[Worker<ModelSource<M>>],
    ) -> Result<(), GroupError> {
        let removed = workers
            .iter()
            .filter(|worker| self.removed.contains(&worker.id()));
        removed.for_each(Worker::remove);
        if let Some(learning_rate) = self.learning_rate {
            // Not by their settings: a schedule ends only if the rate is set while they run (S-17).
            servers.set_learning_rate(learning_rate).await?;
        }
        match self.inbox.controls.is_paused() {
            true => servers.set_paused(true).await,
            false => Ok(()),
        }
    }

    /// Carries out what is asked, as long as it is polled.
    pub(crate) async fn obey<M: Model>(&mut self, running: Running<'_, M>) -> Infallible {
        while let Some(Asked { ask, answer }) = self.inbox.next().await {
            let result = self.carry_out(ask, &running).await;
            if let Err(error) = &result {
                tracing::debug!(?ask, %error, "not done");
            }
            // Whoever asked may have gone.
            let _ = answer.send(result);
        }
        std::future::pending().await
    }

    async fn carry_out<M: Model>(
        &mut self,
        ask: Ask,
        running: &Running<'_, M>,
    ) -> Result<(), ControlError> {
        let Running {
            servers,
            workers,
            save_now,
            stop,
            observers,
        } = running;
        let change = match ask {
            Ask::Pause(is_paused) => {
                if is_paused && stop.is_some_and(|stop| stop.received().is_some()) {
                    return Err(ControlError::Ending);
                }
                servers.set_paused(is_paused).await?;
                self.inbox.set_paused(is_paused);
                match is_paused {
                    true => Change::Paused,
                    false => Change::Resumed,
                }
            }
            Ask::Checkpoint => {
                if !save_now.ask() {
                    return Err(ControlError::NoCheckpoints);
                }
                Change::CheckpointAsked
            }
            Ask::LearningRate(learning_rate) => {
                servers.set_learning_rate(learning_rate).await?;
                self.learning_rate = Some(learning_rate);
                Change::LearningRate { learning_rate }
            }
            Ask::Consistency(consistency) => {
                let num_workers = workers.iter().filter(|worker| worker.is_there()).count();
                consistency.check(num_workers)?;
                servers.set_consistency(consistency).await?;
                self.consistency = Some(consistency);
                workers
                    .iter()
                    .for_each(|worker| worker.set_consistency(consistency));
                let consistency = consistency.to_string();
                Change::Consistency { consistency }
            }
            Ask::RemoveWorker(worker) => {
                let there = || workers.iter().filter(|other| other.is_there());
                let Some(found) = there().find(|other| other.id() == worker) else {
                    return Err(ControlError::NoSuchWorker(worker));
                };
                if there().count() == 1 {
                    return Err(ControlError::LastWorker(worker));
                }
                self.removed.insert(worker);
                found.remove();
                Change::WorkerRemoved { worker }
            }
        };
        tracing::info!(?change, "as asked");
        observers.tell_with(|time| Event::Controlled(Controlled { time, change }));
        Ok(())
    }
}

/// Ends a pause, because the training ends and its workers wait for their last step.
pub(crate) async fn end_pause(controls: &Controls, servers: &ServerGroup) {
    if controls.is_paused() {
        // If they cannot be reached, the training ends without it.
        let _ = servers.set_paused(false).await;
        controls.lock().is_paused = false;
    }
}
