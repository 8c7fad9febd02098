//! burn's `Learner` on several processes and machines (feature `burn-train`).
//!
//! [`ClusterStrategy`] is a training strategy for burn's `SupervisedTraining`. The learner, metrics, renderers,
//! loggers, checkpointers, schedulers, early stopping and interrupter are burn's, and work as in a training on one
//! device. Only the steps of an epoch are taken by workers, in any number of processes, in any
//! [consistency mode](ClusterStrategy::consistency).
//!
//! ```
//! # mod model {
//! #     use burn::train::{InferenceStep, RegressionOutput, TrainOutput, TrainStep};
//! #     use ps::model::burn;
//! #     use ps::model::burn::data::dataloader::batcher::Batcher;
//! #     use ps::model::burn::module::{Module, Param};
//! #     use ps::model::burn::tensor::{Device, Tensor, TensorData};
//! #     #[derive(Module, Debug)]
//! #     pub struct Line { pub slope: Param<Tensor<2>> }
//! #     #[derive(Clone, Debug)]
//! #     pub struct Points { x: Tensor<2>, y: Tensor<2> }
//! #     #[derive(Clone)]
//! #     pub struct PointBatcher;
//! #     impl Batcher<f32, Points> for PointBatcher {
//! #         fn batch(&self, xs: Vec<f32>, device: &Device) -> Points {
//! #             let shape = [xs.len(), 1];
//! #             let x = Tensor::from_data(TensorData::new(xs, shape), device);
//! #             Points { y: x.clone() * 3.0, x }
//! #         }
//! #     }
//! #     impl Line {
//! #         fn output(&self, points: Points) -> RegressionOutput {
//! #             let y = points.x.matmul(self.slope.val());
//! #             RegressionOutput::new((y.clone() - points.y.clone()).square().mean(), y, points.y)
//! #         }
//! #     }
//! #     impl TrainStep for Line {
//! #         type Input = Points;
//! #         type Output = RegressionOutput;
//! #         fn step(&self, points: Points) -> TrainOutput<RegressionOutput> {
//! #             let output = self.output(points);
//! #             TrainOutput::new(self, output.loss.backward(), output)
//! #         }
//! #     }
//! #     impl InferenceStep for Line {
//! #         type Input = Points;
//! #         type Output = RegressionOutput;
//! #         fn step(&self, points: Points) -> RegressionOutput { self.output(points) }
//! #     }
//! # }
//! # use model::{Line, PointBatcher};
//! use burn::train::metric::LossMetric;
//! use burn::train::{Learner, SupervisedTraining};
//! use ps::learner::{ClusterStrategy, SavedEpochs};
//! use ps::model::burn::data::dataloader::DataLoaderBuilder;
//! use ps::model::burn::data::dataset::InMemDataset;
//! use ps::model::burn::optim::SgdConfig;
//! # use ps::model::burn::module::Param;
//! # use ps::model::burn::tensor::Tensor;
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?.autodiff();
//! let points = |num| InMemDataset::new((0..num).map(|i| (i % 7) as f32 / 7.0).collect());
//! let train = DataLoaderBuilder::new(PointBatcher).batch_size(8).shuffle(1).build(points(320));
//! let valid = DataLoaderBuilder::new(PointBatcher).batch_size(8).build(points(32));
//! let line = Line { slope: Param::from_tensor(Tensor::zeros([1, 1], &device)) };
//! let learner = Learner::new(line, SgdConfig::new().init(), 0.5);
//!
//! // In place of burn's strategy. With `Cluster::launch`, or `ps::cli`, the cluster has other processes.
//! let strategy = ClusterStrategy::new(&learner, &train, &device)?.workers(2);
//! let cluster = Cluster::alone(strategy.hosts(Hosts::new()));
//! # let directory = std::env::temp_dir().join(format!("ps-learner-{}", std::process::id()));
//! // With `true`, the same program goes on where a process was killed that trained in this directory.
//! let saved = SavedEpochs::open(&directory, &learner, false)?;
//! let training = SupervisedTraining::new(&directory, train, valid)
//!     .metric_valid_numeric(LossMetric::new())
//!     .num_epochs(3)
//!     .with_application_logger(None)
//!     .with_default_checkpointers()
//!     .with_training_strategy(strategy.on(&cluster));
//! # let for_later = learner.clone();
//! let result = match saved.newest() {
//!     Some(epoch) => training.checkpoint(epoch).launch(learner),
//!     None => training.launch(learner),
//! };
//! assert!(result.error.is_none());
//! let slope: f32 = result.model.slope.val().into_scalar();
//! assert!((slope - 3.0).abs() < 0.1, "{slope}");
//! # drop((result.renderer, saved));
//! # assert_eq!(SavedEpochs::open(&directory, &for_later, true)?.newest(), Some(3));
//! # std::fs::remove_dir_all(&directory)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is where
//!
//! All processes run the same program. Each makes the same learner and the same data loaders, and a strategy of
//! them. Then it launches the cluster. In a node, the launch returns when the work is over, so a node never reaches
//! burn's training. The driver does, with the renderer, the files and the checkpoints.
//!
//! The driver has the only server, and **the server's update rule is the learner**: each update is a step of its
//! scheduler and a step of its optimizer. So schedules count updates, any optimizer works, also one that is not
//! elementwise, and so do groups of parameters and `TrainStep::optimize`. What `optimize` changes besides trained
//! parameters, the workers do not see. The optimizer's clipping applies to the combined gradient. A worker computes
//! `TrainStep::step` on the batches of its share.
//!
//! - **Examples.** Each worker has a slice of the examples, and takes the batches of the loader for this slice. So
//!   each epoch covers every example once. In the mean of an update, each batch counts by its number of examples. In
//!   [`Consistency::Bsp`], without accumulated gradients, `n` workers with batches of `b` examples compute what one
//!   process computes with batches of `n·b` examples: those of all workers, joined.
//! - **Metrics.** Those of the training set are computed from the outputs of the steps of the workers *in the
//!   driver's process*. Without other processes, that is all of them. With `p` processes it is about one `p`-th, and
//!   the progress assumes that the others are as far. Those of the validation set are computed in the driver, from
//!   the whole set and the servers' weights at the end of the epoch. Early stopping and checkpoints by metric use
//!   these numbers.
//! - **An interrupted run** (burn's interrupter, SIGTERM, or Ctrl-C) ends after the current steps, in at most 10 s, or
//!   after the current batch of the validation set. The other processes end with the driver's.
//! - **A lost worker** is started again on another node, and goes on with the first batch whose gradient was not
//!   settled. If the loader uses several threads (`num_workers` above 1), the order of its batches depends on time, so
//!   in this epoch some batches may be taken twice, and others not at all.
//! - **A lost driver.** The training is lost up to the last of burn's checkpoints. [`SavedEpochs`] finds the last one that
//!   is complete, and burn's `checkpoint(epoch)` goes on from there. In [`Consistency::Bsp`], the weights at the end
//!   have the same bits as if nothing had happened, under these conditions: learner and loader are made in the same way
//!   again, with the same number of workers. Nothing depends on time: neither the order of the examples (several threads
//!   of a loader) nor the random numbers of layers (several workers in one process). Nodes are started again, too, if the
//!   loader has no threads of its own. And burn's early stopping is not used: what it remembers is not in a checkpoint.
//!
//! # What must be the same in all processes
//!
//! A node with another model, or with another number of examples, cannot join. What a data loader does cannot be
//! compared: it must be made in the same way, with the same seed, and must not be used before. So a strategy is good
//! for one training. Several trainings of one program can share a cluster, each with its own strategy and
//! [name](ClusterStrategy::name).
//!
//! A node may outlive its driver, and take part in the training of the next one. If its loader shuffles without threads
//! of its own (`num_workers` of 0), the order of its examples is then another one than in a new process. So if a worker
//! moves to this node or from it in the middle of an epoch, some batches may be taken twice in this epoch, and others
//! not at all. If that matters, start the node again, too.
//!
//! # What is different from burn's own strategies
//!
//! - A parameter that the loss does not depend on has a gradient of zero instead of no gradient, so weight decay
//!   changes it.
//! - Parameters of `f16` or `bf16` have no master weights in `f32`: the learner's optimizer updates them in their own
//!   type, as in burn, so small updates are rounded away. A [`Trainer`](crate::Trainer) has such weights (M-1).
//! - A gradient with NaN or infinity is refused. If more than half of the gradients of an epoch are refused, or if the
//!   weights are not finite at its end, the training ends with an error.
//! - A parameter in several fields stays one parameter (M-7). burn's optimizers change only the first of these fields.
//! - In `Bsp`, running statistics are the mean of the workers', as with [`Trainer`](crate::Trainer) (S-20). Batches whose
//!   gradients are accumulated change them one after the other.
//! - A training that goes on from a checkpoint takes the examples of each epoch in the order in which an uninterrupted
//!   training does. burn's strategies begin with the order of the first epoch again.
//! - An epoch ends with an error if the data loader ends before its progress is complete. In burn's loader this is a
//!   thread that panicked.
//! - For gradient checkpointing, give [`ClusterStrategy::new`] a device with it. burn does not tell a strategy of
//!   `SupervisedTraining::gradient_checkpointing`.
//! - burn's layers that draw random numbers, such as `Dropout`, draw different numbers in each worker. The same
//!   [seed](ClusterStrategy::seed) gives the same numbers again only if each process has one worker.
//! - burn's crate for training switches on threads inside of the operations of the backend `flex`. Without the feature
//!   `burn-train`, each worker computes on one thread. With several workers on one machine, set the environment variable
//!   `RAYON_NUM_THREADS` to each one's part of the cores.
//! - The observers, the dashboard and the checkpoints of [`Trainer`](crate::Trainer) are not used.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use burn::train::{Learner, LearnerModel, TrainLoader, TrainingStrategy};
use ps_actors::actor::Spawn;
use ps_actors::cluster::{Cluster, Hosts};
use ps_actors::server::{Consistency, Reduction, ServerConfig};
use ps_actors::worker::DataWorker;
use ps_model::LocalModel;
use ps_model::burn::tensor::Device;

use crate::agreement::Facts;
use crate::source::{SetupError, WORKERS};

mod counts;
mod epoch;
mod feed;
mod fit;
mod progress;
mod rule;
mod saved;
mod source;

pub use counts::GradientCounts;
pub use saved::{SavedEpochs, SavedEpochsError};

use feed::Shares;
use fit::OnCluster;
use source::{Input, LearnerSource, Shared};

/// A strategy for burn's `SupervisedTraining`, which trains with the workers of a cluster.
///
/// The [module](self) has an example, and says what happens where.
pub struct ClusterStrategy<M: LearnerModel> {
    shared: Arc<Shared<M>>,
    model_facts: Facts,
    /// Those about the model, and all others that distinguish this training's workers.
    facts: Facts,
    config: ServerConfig,
    num_workers: Option<u32>,
    heeds_signals: bool,
}

impl<M: LearnerModel> ClusterStrategy<M>
where
    Input<M>: Clone,
{
    /// Takes the learner and the loader of the training set that the training will be launched with, and the
    /// device that this process computes on. The defaults are: one worker for each process,
    /// [`Consistency::Bsp`], and [`Reduction::Mean`].
    ///
    /// # Errors
    /// If the model cannot be trained, if it has one parameter in several fields, or if the device fails.
    pub fn new(
        learner: &Learner<M>,
        dataloader_train: &TrainLoader<M>,
        device: &Device,
    ) -> Result<Self, SetupError> {
        let (device, model) = (device.clone().autodiff(), learner.model());
        LocalModel::new(model.clone(), &device)?;
        let model_facts = Facts::default().model(&model, &device);
        let facts = model_facts.clone().state(
            "the number of training examples",
            dataloader_train.num_items(),
        );
        let shares = Shares::new(Arc::clone(dataloader_train), device.clone());
        Ok(Self {
            shared: Arc::new(Shared {
                model: Mutex::new(model),
                device,
                shares,
                seed: AtomicU64::new(0),
                outputs: Mutex::default(),
                counts: GradientCounts::default(),
            }),
            model_facts,
            facts,
            config: ServerConfig::default(),
            num_workers: None,
            heeds_signals: true,
        })
    }

    /// Sets the number of workers in all processes together. The driver's process has its part of them. `None` is
    /// the default.
    #[must_use]
    pub fn workers(mut self, num_workers: impl Into<Option<u16>>) -> Self {
        self.num_workers = num_workers.into().map(u32::from);
        self
    }

    /// Gives the training a name, which must be the same in all processes.
    ///
    /// Trainings of one cluster with the same model and number of examples need names. Without, the nodes cannot
    /// tell them apart, and use the data loader of the one that was [hosted](Self::hosts) last.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.facts = self.facts.state("the name of the training", name.into());
        self
    }

    /// Sets the consistency mode, which decides when gradients are applied. In all modes, the workers wait for
    /// each other at the end of an epoch, because burn validates there.
    #[must_use]
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.config.consistency = consistency;
        self
    }

    /// Sets how the gradients of one update are combined.
    #[must_use]
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.config.reduction = reduction;
        self
    }

    /// Sets the seed for burn's layers that draw random numbers, such as `Dropout`. The default is 0. The order of
    /// the examples follows from the seed of the data loader.
    #[must_use]
    pub fn seed(self, seed: u64) -> Self {
        self.shared.seed.store(seed, Ordering::Relaxed);
        self
    }

    /// Whether SIGTERM and Ctrl-C interrupt the training, as burn's interrupter does. They do by default; see
    /// [`StopSignal`](ps_actors::launch::StopSignal). Otherwise they end the process at once.
    #[must_use]
    pub fn heed_signals(mut self, heeds_signals: bool) -> Self {
        self.heeds_signals = heeds_signals;
        self
    }

    /// Returns a handle that says what became of the gradients, also when burn has the strategy. It counts those of the
    /// epochs that this process of the driver has finished. In a node, it counts nothing.
    ///
    /// ```ignore
    /// let strategy = ClusterStrategy::new(&learner, &train, &device)?;
    /// let counts = strategy.counts();
    /// let result = training.with_training_strategy(strategy.on(&cluster)).launch(learner);
    /// let num_new_epochs = num_epochs - saved.newest().unwrap_or(0);
    /// assert_eq!(counts.num_applied(), num_workers * num_new_epochs * steps_per_epoch);
    /// ```
    #[must_use]
    pub fn counts(&self) -> GradientCounts {
        self.shared.counts.clone()
    }

    /// Adds what a process must host to take part in this training, and what it must have in common with the
    /// others.
    #[must_use]
    pub fn hosts(&self, hosts: Hosts) -> Hosts {
        let seed = self.shared.seed.load(Ordering::Relaxed);
        let hosts = Facts::default().state("the seed", seed).must_agree(hosts);
        self.host(self.facts.must_agree(hosts))
    }

    /// Makes burn's strategy of it. The nodes of the cluster must have the [hosts](Self::hosts) of the same
    /// strategy.
    #[must_use]
    pub fn on(self, cluster: &Cluster) -> TrainingStrategy<M> {
        TrainingStrategy::Custom(Arc::new(OnCluster {
            cluster: cluster.clone(),
            hosts: self.host(Hosts::new()),
            variant: self.variant(),
            model: self.model_facts,
            shared: self.shared,
            config: self.config,
            num_workers: self.num_workers,
            heeds_signals: self.heeds_signals,
            is_used: AtomicBool::new(false),
        }))
    }

    /// Launches the cluster, and makes burn's strategy of it. `launch` is given the hosts, and returns `None` in a
    /// node, when its work is over. The program should then end.
    ///
    /// ```ignore
    /// let strategy = ClusterStrategy::new(&learner, &train, &device)?;
    /// let Some(strategy) = strategy.launch(|hosts| args.cluster.launch(hosts)) else {
    ///     return Ok(ExitCode::SUCCESS);
    /// };
    /// ```
    pub fn launch(
        self,
        launch: impl FnOnce(Hosts) -> Option<Cluster>,
    ) -> Option<TrainingStrategy<M>> {
        let cluster = launch(self.hosts(Hosts::new()))?;
        Some(self.on(&cluster))
    }

    fn variant(&self) -> String {
        self.facts.variant(WORKERS)
    }

    fn host(&self, hosts: Hosts) -> Hosts {
        let shared = Arc::clone(&self.shared);
        hosts.host_variant(self.variant(), Spawn::new(), move |config| {
            let source = LearnerSource::new(&shared, config)?;
            Ok(DataWorker::new(config.worker, source))
        })
    }
}

impl<M: LearnerModel> fmt::Debug for ClusterStrategy<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterStrategy")
            .field("config", &self.config)
            .field("num_workers", &self.num_workers)
            .finish_non_exhaustive()
    }
}
