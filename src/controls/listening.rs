//! The side of the training: carries out what the [`Controls`] ask, in order, beside the workers.

use std::collections::BTreeSet;
use std::convert::Infallible;

use ps_actors::checkpoint::SaveNow;
use ps_actors::group::ServerGroup;
use ps_actors::ids::WorkerId;
use ps_actors::server::{Consistency, GroupError, ServerConfig};
use ps_model::Model;

use super::inbox::{Inbox, Pause};
use super::{Ask, Asked, Can, ControlError, Controls};
use crate::observe::{Change, Controlled, Event, Observers};
use crate::source::ModelSource;
use crate::trainer::Ending;
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
    /// Whether the training ends before all steps are taken: its workers finish their last step.
    pub(crate) is_ending: &'a dyn Fn() -> bool,
    /// Ends it.
    pub(crate) ending: &'a Ending,
    pub(crate) observers: &'a Observers,
}

impl Listening {
    /// From now on the controls are those of this training.
    pub(crate) fn begin(controls: &Controls, saves_checkpoints: bool) -> Self {
        let can = Can {
            save_checkpoints: saves_checkpoints,
            change_consistency: true,
            remove_workers: true,
            end: true,
        };
        Self {
            inbox: Inbox::open(controls, can),
            learning_rate: None,
            consistency: None,
            removed: BTreeSet::new(),
        }
    }

    /// Returns a handle that says whether the training is paused.
    pub(crate) fn pause(&self) -> Pause {
        self.inbox.pause.clone()
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
        match self.inbox.pause.is_on() {
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
        // Another training listens now, so nobody could end a pause of this one.
        end_pause(&self.inbox.pause, running.servers, running.observers).await;
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
            is_ending,
            ending,
            observers,
        } = running;
        let change = match ask {
            Ask::Pause(true) => {
                if is_ending() {
                    return Err(ControlError::Ending);
                }
                servers.set_paused(true).await?;
                if is_ending() {
                    // The end has begun meanwhile, and saw no pause that it had to end.
                    servers.set_paused(false).await?;
                    return Err(ControlError::Ending);
                }
                self.inbox.pause.set(true);
                Change::Paused
            }
            Ask::Pause(false) => {
                servers.set_paused(false).await?;
                self.inbox.pause.set(false);
                Change::Resumed
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
            Ask::End => {
                ending.ask();
                Change::EndAsked
            }
        };
        tracing::info!(?change, "as asked");
        observers.tell_with(|time| Event::Controlled(Controlled { time, change }));
        Ok(())
    }
}

/// Ends a pause that nobody has ended: the training ends and its workers wait for their last step, or nobody can
/// control it any more.
pub(crate) async fn end_pause(pause: &Pause, servers: &ServerGroup, observers: &Observers) {
    if pause.set(false) {
        // Before the servers are asked: the workers may end before their answer comes, and then nobody waits for it.
        observers.tell_with(|time| {
            let change = Change::Resumed;
            Event::Controlled(Controlled { time, change })
        });
        // If they cannot be reached, the training ends without it.
        let _ = servers.set_paused(false).await;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::mpsc::channel;

    use ps_actors::actor::run;
    use ps_actors::checkpoint::Checkpoints;
    use ps_actors::rule::Sgd;
    use ps_actors::weights::{Layout, Weights};
    use ps_model::ConvNet;

    use super::*;

    fn servers() -> ServerGroup {
        let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
        let config = ServerConfig::default();
        ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new())).unwrap()
    }

    fn are_paused(servers: &ServerGroup) -> bool {
        let status = run(servers.status()).unwrap();
        status[0].coordinator.as_ref().unwrap().is_paused
    }

    #[test]
    fn a_pause_that_the_end_of_the_training_overtakes_is_refused_and_holds_nothing() {
        let (servers, controls, observers) = (servers(), Controls::new(), Observers::none());
        let save_now = Checkpoints::off().save_now();
        let mut listening = Listening::begin(&controls, false);
        for num_before in 0..3 {
            // The end begins after it was asked for so often.
            let num_asked = Cell::new(0);
            let is_ending = || num_asked.replace(num_asked.get() + 1) >= num_before;
            let running = Running::<ConvNet> {
                servers: &servers,
                workers: &[],
                save_now: &save_now,
                is_ending: &is_ending,
                ending: &Ending::default(),
                observers: &observers,
            };
            let done = run(listening.carry_out(Ask::Pause(true), &running));
            let is_paused = num_before == 2;
            match is_paused {
                true => done.unwrap(),
                false => assert!(matches!(done, Err(ControlError::Ending)), "{done:?}"),
            }
            assert_eq!(controls.is_paused(), is_paused);
            assert_eq!(are_paused(&servers), is_paused);
        }
    }

    #[test]
    fn the_end_of_a_pause_by_a_signal_is_told_once() {
        let (servers, controls) = (servers(), Controls::new());
        let (sender, events) = channel();
        let told = move |event: &Event| sender.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(told)]);
        let listening = Listening::begin(&controls, false);
        let pause = listening.pause();
        run(servers.set_paused(true)).unwrap();
        pause.set(true);
        assert!(controls.is_paused());
        for _ in 0..2 {
            run(end_pause(&pause, &servers, &observers));
            assert!(!controls.is_paused() && !are_paused(&servers));
        }
        observers.finish();
        let changes = events.iter().map(|event| match event {
            Event::Controlled(controlled) => controlled.change,
            other => panic!("{other:?}"),
        });
        assert_eq!(changes.collect::<Vec<_>>(), [Change::Resumed]);
    }
}
