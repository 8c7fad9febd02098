//! A worker for a driver's own loop that is started again if its process is lost.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use ps_actors::actor::{ActorRef, CallError, Reply};
use ps_actors::checkpoint::Checkpoint;
use ps_actors::cluster::{Cluster, NodeId, SpawnOn, SpawnOnError};
use ps_actors::ids::{Clock, Incarnation};
use ps_actors::weights::{GradientUpdate, Weights};
use ps_actors::worker::{ComputeGradients, GoOnAt, WorkerError};
use ps_model::Model;

use crate::observe::{Event, LoopCall, Observers, WorkerJoined, WorkerLost};
use crate::source::{ModelWorker, WorkerConfig};
use crate::trainer::TrainError;
use crate::workers::MAX_LOSSES;

/// A [`ModelWorker`] of a cluster. If its process is lost, it is started again, on another node if
/// necessary. It then goes on with the batch that it was computing.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let train = Mnist::bundled_sample().train;
/// let model = ConvNet::init(1, &device);
/// let cluster = Cluster::alone(host_workers(Hosts::new(), &model, &device, &train));
/// let config = WorkerConfig { worker: WorkerId(0), num_workers: 1, batch_size: 64, seed: 1 };
///
/// let mut worker = LastingWorker::<ConvNet>::spawn(&cluster, config)?;
/// let weights = initial_weights(&model, &device)?;
/// let reply = worker.compute(&weights); // begins at once
/// let gradients = worker.finish(reply, &weights)?;
/// assert_eq!((gradients.num_examples, worker.clock()), (64, Clock(1)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LastingWorker<M: Model> {
    cluster: Cluster,
    spawn: SpawnOn,
    config: WorkerConfig,
    actor: ActorRef<ModelWorker<M>>,
    clock: Clock,
    /// The incarnation that computed the latest gradient.
    incarnation: Incarnation,
    /// How often the worker was lost since the latest gradient.
    num_losses: u32,
    observers: Observers,
    /// The call under way. `None` if nobody follows each gradient.
    call: Mutex<Option<LoopCall>>,
}

/// The answer of a worker, or why there is none.
type Answer = Result<Result<GradientUpdate, WorkerError>, CallError>;

impl<M: Model> LastingWorker<M> {
    /// Starts a worker on the next node, or in this process if it is alone.
    ///
    /// # Errors
    /// If no process can make the worker.
    pub fn spawn(cluster: &Cluster, config: WorkerConfig) -> Result<Self, SpawnOnError> {
        Self::spawn_with(cluster, SpawnOn::new(), config)
    }

    /// Starts a worker at the place that the options name. It is started again with the same options.
    ///
    /// # Errors
    /// If no process can make the worker.
    pub fn spawn_with(
        cluster: &Cluster,
        spawn: SpawnOn,
        config: WorkerConfig,
    ) -> Result<Self, SpawnOnError> {
        let actor = cluster.spawn_with(spawn.clone(), config).wait()?;
        Ok(Self {
            cluster: cluster.clone(),
            spawn,
            config,
            actor,
            clock: Clock(0),
            incarnation: Incarnation(0),
            num_losses: 0,
            observers: Observers::none(),
            call: Mutex::default(),
        })
    }

    /// Tells these observers where the worker is, and from now on when it is lost and goes on, and of its gradients
    /// ([`LoopCall::computed`]). Call it when they know that the run has [started](Observers::run_started), and after [`go_on`](Self::go_on).
    pub fn observed_by(&mut self, observers: &Observers) {
        self.observers = observers.clone();
        self.tell_joined();
    }

    fn node(&self) -> NodeId {
        self.actor.node().unwrap_or(NodeId::DRIVER)
    }

    fn tell_joined(&self) {
        self.observers.tell_with(|time| {
            Event::WorkerJoined(WorkerJoined {
                time,
                worker: self.config.worker,
                node: Some(self.node()),
                next_clock: self.clock,
            })
        });
    }

    /// Returns the clock of the next gradient.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Lets the worker go on at its first step that is not settled in this checkpoint. Call it before the
    /// first [`compute`](Self::compute).
    pub fn go_on(&mut self, from: &Checkpoint) {
        let GoOnAt { clock, after } = from.go_on_at(self.config.worker);
        (self.clock, self.incarnation) = (clock, after);
        self.tell_clock();
    }

    fn tell_clock(&self) {
        // This arrives before any call, because messages of one sender keep their order.
        let (clock, after, worker) = (self.clock, self.incarnation, self.config.worker);
        if let Err(error) = self.actor.tell(GoOnAt { clock, after }) {
            tracing::warn!(%worker, %error, "it is lost again");
        }
    }

    /// Computes the gradient of the next batch at these weights. Give the answer to
    /// [`settle`](Self::settle) or [`finish`](Self::finish) before the next call.
    pub fn compute(&self, weights: &Weights) -> Reply<Result<GradientUpdate, WorkerError>> {
        if self.observers.follow_gradients() {
            let mut call = self.call.lock().unwrap_or_else(PoisonError::into_inner);
            *call = Some(self.observers.call_begins());
        }
        self.actor.ask(ComputeGradients(weights.clone()))
    }

    /// Takes the answer of a [`compute`](Self::compute). Returns the gradient, or `None` if the worker was
    /// lost. It has then been started again, and can be asked for the same gradient.
    ///
    /// # Errors
    /// If the worker's model or data fail, if it cannot be started again, or if it was lost 21 times
    /// without a gradient in between.
    pub fn settle(&mut self, answer: Answer) -> Result<Option<GradientUpdate>, TrainError> {
        let worker = self.config.worker;
        let lost = match answer {
            Ok(gradients) => {
                self.num_losses = 0;
                // Who goes on after an error goes on with the same batch.
                let gradients = gradients?;
                self.clock = self.clock.next();
                self.incarnation = gradients.id.incarnation;
                let call = self.call.get_mut().unwrap_or_else(PoisonError::into_inner);
                if let Some(call) = call.take() {
                    call.computed(&gradients);
                }
                return Ok(Some(gradients));
            }
            Err(lost) => lost,
        };
        self.observers.tell_with(|time| {
            Event::WorkerLost(WorkerLost {
                time,
                worker,
                node: Some(self.node()),
                reason: lost.to_string(),
            })
        });
        self.num_losses += 1;
        if self.num_losses > MAX_LOSSES {
            let source = lost;
            return Err(TrainError::WorkerLost { worker, source });
        }
        tracing::warn!(%worker, %lost, "a worker is lost; it goes on");
        // If it is still alive, it must not go on beside the new one.
        self.actor.kill();
        self.actor = self
            .cluster
            .spawn_with(self.spawn.clone(), self.config)
            .wait()?;
        self.tell_clock();
        self.tell_joined();
        Ok(None)
    }

    /// Waits for the gradient. If the worker is lost, it computes the gradient again.
    ///
    /// # Errors
    /// As [`settle`](Self::settle).
    pub fn finish(
        &mut self,
        reply: Reply<Result<GradientUpdate, WorkerError>>,
        weights: &Weights,
    ) -> Result<GradientUpdate, TrainError> {
        let mut answer = reply.wait();
        loop {
            match self.settle(answer)? {
                Some(gradients) => return Ok(gradients),
                None => answer = self.compute(weights).wait(),
            }
        }
    }
}

impl<M: Model> fmt::Debug for LastingWorker<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LastingWorker")
            .field("config", &self.config)
            .field("clock", &self.clock)
            .finish_non_exhaustive()
    }
}
