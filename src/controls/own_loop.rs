//! The side of a driver's own loop: carries out what the [`Controls`] ask, each time that the loop comes to it.

use std::fmt;
use std::pin::pin;

use futures_util::future::{Either, select};
use ps_actors::actor::try_run;
use ps_actors::checkpoint::Checkpoints;
use ps_actors::group::ServerGroup;
use ps_actors::launch::StopSignal;

use super::inbox::Inbox;
use super::{Ask, Asked, Can, ControlError, Controls};
use crate::observe::{Change, Controlled, Event, Observers};

/// The controls of a driver's own loop, made by [`Controls::in_loop`].
///
/// ```
/// use ps::controls::Controls;
/// use ps::observe::Observers;
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let model = ConvNet::init(0, &device);
/// let initial = initial_weights(&model, &device)?;
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let config = WorkerConfig { worker: WorkerId(0), num_workers: 1, batch_size: 8, seed: 0 };
/// let worker = spawn_worker(&model, &device, &Mnist::bundled_sample().train, config)?;
///
/// let (controls, observers) = (Controls::new(), Observers::none());
/// let (mut checkpoints, stop) = (Checkpoints::off(), StopSignal::heed()?);
/// let mut heeding = controls.in_loop(server.clone(), &observers, &checkpoints);
/// # let later = controls.set_learning_rate(0.5);
/// let mut weights = server.ask(GetWeights).wait()?;
/// for _ in 0..3 {
///     // Waits here as long as somebody has paused the training.
///     heeding.heed(&stop, &mut checkpoints);
///     let gradient = worker.ask(ComputeGradients(weights)).flatten().wait()?;
///     weights = server.ask(ApplyGradients::sum([gradient])).flatten().wait()?;
/// }
/// # later.wait()?;
/// # assert_eq!(server.ask(GetStatus).wait()?.learning_rate, 0.5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use = "the controls do nothing when it is dropped"]
pub struct LoopControls {
    inbox: Inbox,
    servers: ServerGroup,
    observers: Observers,
    /// Whether the servers, and not the loop, decide when gradients are applied.
    servers_decide: bool,
}

impl Controls {
    /// Lets a driver's own loop carry out what is asked, and returns what the loop
    /// [calls](LoopControls::heed). Checkpoints can be asked for if `checkpoints` are on.
    pub fn in_loop(
        &self,
        servers: impl Into<ServerGroup>,
        observers: &Observers,
        checkpoints: &Checkpoints,
    ) -> LoopControls {
        let can = Can {
            save_checkpoints: !checkpoints.is_off(),
            change_consistency: false,
            remove_workers: false,
            end: false,
        };
        LoopControls {
            inbox: Inbox::open(self, can),
            servers: servers.into(),
            observers: observers.clone(),
            servers_decide: false,
        }
    }
}

impl LoopControls {
    /// Says that workers push to the servers by themselves, so that the servers decide when gradients are applied. Then a
    /// pause holds the servers and not the loop, and the consistency mode can be changed.
    pub fn servers_decide(mut self) -> Self {
        self.inbox.can_change_consistency();
        self.servers_decide = true;
        self
    }

    /// Carries out what was asked since the last call. While somebody has paused a loop, waits until it is resumed or
    /// a signal comes, and carries out what is asked meanwhile.
    ///
    /// Call it before each update. A request that is refused does not end the loop. The caller of the
    /// control gets the error.
    ///
    /// # Panics
    /// When it is called from asynchronous code.
    pub fn heed(&mut self, stop: &StopSignal, checkpoints: &mut Checkpoints) {
        while let Some(Asked { ask, answer }) = self.next(stop) {
            let result = self.carry_out(ask, stop, checkpoints);
            if let Err(error) = &result {
                tracing::debug!(?ask, %error, "not done");
            }
            // Whoever asked may have gone.
            let _ = answer.send(result);
        }
    }

    /// Returns what was asked. `None` if the loop is to go on.
    fn next(&mut self, stop: &StopSignal) -> Option<Asked> {
        if let Some(asked) = self.inbox.next_that_waits() {
            return Some(asked);
        }
        if self.servers_decide || !self.inbox.pause.is_on() {
            return None;
        }
        let waited = try_run(async {
            match select(pin!(self.inbox.next()), pin!(stop.wait())).await {
                Either::Left((asked, _)) => asked,
                Either::Right(_) => None,
            }
        });
        let asked = waited.unwrap_or_else(|error| {
            tracing::warn!(%error, "no event loop to wait in: the training goes on");
            None
        });
        if asked.is_none() && self.inbox.pause.set(false) {
            self.tell(Change::Resumed);
        }
        asked
    }

    fn carry_out(
        &self,
        ask: Ask,
        stop: &StopSignal,
        checkpoints: &mut Checkpoints,
    ) -> Result<(), ControlError> {
        let servers = &self.servers;
        let change = match ask {
            Ask::Pause(is_paused) => {
                if is_paused && stop.received().is_some() {
                    return Err(ControlError::Ending);
                }
                if self.servers_decide {
                    try_run(servers.set_paused(is_paused))??;
                }
                self.inbox.pause.set(is_paused);
                match is_paused {
                    true => Change::Paused,
                    false => Change::Resumed,
                }
            }
            Ask::Checkpoint => {
                if checkpoints.is_off() {
                    return Err(ControlError::NoCheckpoints);
                }
                try_run(checkpoints.save_unless_taken(servers))?;
                Change::CheckpointAsked
            }
            Ask::LearningRate(learning_rate) => {
                try_run(servers.set_learning_rate(learning_rate))??;
                Change::LearningRate { learning_rate }
            }
            Ask::Consistency(_) if !self.servers_decide => {
                return Err(ControlError::OwnLoop("when gradients are applied"));
            }
            Ask::Consistency(consistency) => {
                let num_workers = try_run(num_members(servers))??;
                consistency.check(num_workers)?;
                try_run(servers.set_consistency(consistency))??;
                let consistency = consistency.to_string();
                Change::Consistency { consistency }
            }
            Ask::RemoveWorker(_) => {
                return Err(ControlError::OwnLoop("which workers there are"));
            }
            Ask::End => return Err(ControlError::OwnLoop("when it ends")),
        };
        tracing::info!(?change, "as asked");
        self.tell(change);
        Ok(())
    }

    fn tell(&self, change: Change) {
        let observers = &self.observers;
        observers.tell_with(|time| Event::Controlled(Controlled { time, change }));
    }
}

/// Returns how many workers are members now, and at least 1.
async fn num_members(servers: &ServerGroup) -> Result<usize, ps_actors::server::GroupError> {
    let status = servers.status().await?;
    let coordinator = status.iter().find_map(|status| status.coordinator.as_ref());
    let workers = coordinator
        .into_iter()
        .flat_map(|first| first.workers.values());
    Ok(workers.filter(|worker| worker.is_member).count().max(1))
}

impl fmt::Debug for LoopControls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoopControls")
            .field("servers_decide", &self.servers_decide)
            .finish_non_exhaustive()
    }
}
