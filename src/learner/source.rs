//! A worker's source of gradients: burn's `TrainStep` on the batches of the worker's share.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use burn::train::{LearnerModel, TrainStep};
use ps_actors::buffer::BufferPool;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::weights::{Gradient, Precision, Weights};
use ps_actors::worker::{GradientSource, HostedSource, LocalGradient, SourceError};
use ps_model::StepSeed;
use ps_model::burn::data::dataloader::Progress;
use ps_model::burn::tensor::Device;
use serde::{Deserialize, Serialize};

use super::counts::GradientCounts;
use super::feed::{Feed, Shares};
use crate::source::Loadable;

/// The batch of a step of a training, as burn's `TrainStep` takes it.
pub(super) type Input<M> = <M as TrainStep>::Input;

/// What one process has for the workers that are made in it.
pub(super) struct Shared<M: LearnerModel> {
    pub(super) model: Mutex<M>,
    pub(super) device: Device,
    pub(super) shares: Shares<Input<M>>,
    /// For burn's layers that draw random numbers.
    pub(super) seed: AtomicU64,
    /// Where the outputs of the steps go. Only in the driver, while it trains an epoch.
    pub(super) outputs: Mutex<Option<SyncSender<Output<M>>>>,
    /// What became of the gradients. Only in the driver.
    pub(super) counts: GradientCounts,
}

/// What a step of a worker in the driver's process has returned.
pub(super) struct Output<M: LearnerModel> {
    pub(super) worker: WorkerId,
    pub(super) item: <M as TrainStep>::Output,
    /// How far the worker's share of the epoch is.
    pub(super) progress: Progress,
}

/// What a process makes a worker for one epoch from.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct EpochConfig {
    /// A random number for each training. A process that outlives its driver may take part in several.
    pub(super) training: u64,
    pub(super) worker: WorkerId,
    pub(super) num_workers: u32,
    /// The number of the epoch, from 0. A training that goes on from a checkpoint does not begin with 0.
    pub(super) epoch: u64,
    /// The clock of the first step of the epoch. Clocks are counted since the process of the
    /// driver began to train.
    pub(super) first_clock: Clock,
    /// How many batches are in one step.
    pub(super) num_accumulated: u32,
}

pub(super) struct LearnerSource<M: LearnerModel> {
    loadable: Loadable<M>,
    shared: Arc<Shared<M>>,
    feed: Arc<Mutex<Feed<Input<M>>>>,
    config: EpochConfig,
    gradients: BufferPool,
    /// How long the latest batches were waited for.
    data_time: Duration,
    /// The outputs of the latest step, whose gradient may not have been settled.
    unsettled: Vec<Output<M>>,
}

impl<M: LearnerModel> LearnerSource<M>
where
    Input<M>: Clone,
{
    pub(super) fn new(shared: &Arc<Shared<M>>, config: EpochConfig) -> Result<Self, SourceError> {
        let model = lock(&shared.model).clone();
        let (rank, num_workers) = (config.worker.0 as usize, config.num_workers as usize);
        Ok(Self {
            loadable: Loadable::new(&model, &shared.device)?,
            feed: shared.shares.of(config.training, rank, num_workers)?,
            shared: Arc::clone(shared),
            config,
            // One is being pushed, one is being computed, and one is spare.
            gradients: BufferPool::new(3),
            data_time: Duration::ZERO,
            unsettled: Vec::new(),
        })
    }

    fn num_accumulated(&self) -> u64 {
        self.config.num_accumulated.into()
    }

    /// Returns the number of the first batch of a step, and how many batches to keep so that the step can be taken
    /// again: its own, and the one that it looked for after the last.
    fn first_and_keep(&self, clock: Clock) -> (u64, usize) {
        let step = clock.0.saturating_sub(self.config.first_clock.0);
        let keep = usize::try_from(self.num_accumulated()).unwrap_or(usize::MAX);
        let first = step.saturating_mul(self.num_accumulated());
        (first, keep.saturating_add(1))
    }

    fn step_seed(&self, index: u64) -> StepSeed {
        // An epoch has far fewer batches.
        let clock = (self.config.epoch << 40).wrapping_add(index);
        StepSeed {
            seed: self.shared.seed.load(Ordering::Relaxed),
            worker: self.config.worker.0.into(),
            clock,
        }
    }

    /// The gradient of the latest step is settled. Passes on what the step has returned, if somebody wants it.
    fn pass_on(&mut self) {
        let Some(outputs) = lock(&self.shared.outputs).clone() else {
            return self.unsettled.clear();
        };
        for output in self.unsettled.drain(..) {
            // If nobody receives it, the training has ended.
            let _ = outputs.send(output);
        }
    }
}

impl<M: LearnerModel> GradientSource for LearnerSource<M>
where
    Input<M>: Clone,
{
    fn has_step(&mut self, clock: Clock) -> bool {
        self.pass_on();
        let (first, keep) = self.first_and_keep(clock);
        let has_batch = lock(&self.feed).has_batch(self.config.epoch, first, keep);
        // The step meets the error, too.
        has_batch.unwrap_or(true)
    }

    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        // A step that is taken again has the outputs of the last time.
        self.unsettled.clear();
        self.data_time = Duration::ZERO;
        self.loadable.load(weights)?;
        let (first, keep) = self.first_and_keep(clock);
        let mut gradient = self.gradients.take(weights.len());
        self.loadable.model.begin_sum(&mut gradient);
        let wants_outputs = lock(&self.shared.outputs).is_some();
        let mut num_examples = 0;
        for index in first..first + self.num_accumulated() {
            let started = Instant::now();
            let fed = lock(&self.feed).batch(self.config.epoch, index, keep)?;
            self.data_time += started.elapsed();
            let Some(fed) = fed else { break };
            let seed = self.step_seed(index);
            let item = (self.loadable.model).add_gradient_of(seed, &mut gradient, |model| {
                let output = TrainStep::step(model, fed.batch);
                (output.grads, output.item)
            })?;
            num_examples += fed.num_examples;
            if wants_outputs {
                self.unsettled.push(Output {
                    worker: self.config.worker,
                    item,
                    progress: fed.progress,
                });
            }
        }
        let num_trainable = self.loadable.model.num_trainable();
        Ok(LocalGradient {
            gradient: Gradient::with_buffers(gradient, num_trainable),
            // The output of a step has a type of the user's. burn's metrics know what to do with it.
            loss: f32::NAN,
            num_examples,
        })
    }

    fn data_time(&self) -> Duration {
        self.data_time
    }

    fn precision(&self) -> Precision {
        self.loadable.precision()
    }
}

impl<M: LearnerModel> HostedSource for LearnerSource<M>
where
    Input<M>: Clone,
{
    type Args = EpochConfig;
}

impl<M: LearnerModel> fmt::Debug for LearnerSource<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LearnerSource")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Locks what a panic cannot leave half changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
