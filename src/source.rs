//! Joins a burn model with data: as the [`GradientSource`] of a worker, and in an [`Evaluator`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ps_actors::actor::{ActorRef, Spawn, SpawnError, error_chain};
use ps_actors::buffer::BufferPool;
use ps_actors::cluster::{Hosted, Hosts};
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::weights::{Gradient, Layout, LayoutError, Parameter, Precision, Weights};
use ps_actors::worker::{DataWorker, GradientSource, HostedSource, LocalGradient, SourceError};
use ps_data::{BatchError, Batches, Cursor, SamplerConfig, SamplerError};
use ps_model::burn::module::Module;
use ps_model::burn::tensor::{DType, Device};
use ps_model::{Evaluation, LocalModel, Model, ModelError, Numbers, ParameterSpec, StepSeed};
use serde::{Deserialize, Serialize};

use crate::agreement::Facts;
use crate::data::{Examples, MicroBatch, WorkerBatches};
use crate::trainer::Seat;

/// How many examples an [`Evaluator`] evaluates at a time.
const EVALUATION_BATCH: usize = 256;

/// An odd number that makes the seeds of the parts of a batch differ in all their bits (2⁶⁴ divided by the
/// golden ratio, as in SplitMix64).
const PART_SEED: u64 = 0x9E37_79B9_7F4A_7C15;

/// Why a model and its data cannot be used for training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The model has no flat weights, or the device failed.
    #[error("the model cannot be trained")]
    Model(#[from] ModelError),
    /// The model's parameters do not follow one another.
    #[error("the model has no usable layout")]
    Layout(#[from] LayoutError),
    /// The data cannot be split into batches for this many workers.
    #[error("the training data cannot be split into batches for the workers")]
    Batches(#[from] SamplerError),
    /// The test data is empty.
    #[error("the test data is empty")]
    NoTestData,
    /// The actor or its thread could not be started.
    #[error("could not start an actor")]
    Spawn(#[from] SpawnError),
}

/// Returns the trainable weights of a model and its buffers, as the first version for a server.
///
/// # Errors
/// If the model has no flat weights, or if the device fails.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let weights = initial_weights(&ConvNet::init(0, &device), &device)?;
/// assert_eq!((weights.len(), weights.version()), (1_960, Version(0)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn initial_weights<M: Module>(model: &M, device: &Device) -> Result<Weights, SetupError> {
    let model = LocalModel::new(model.clone(), device)?;
    Ok(Weights::initial(layout(&model)?, model.weights()?))
}

pub(crate) fn layout<M: Module>(model: &LocalModel<M>) -> Result<Layout, LayoutError> {
    let parameters = model.layout().iter().cloned().map(
        |ParameterSpec {
             name, shape, range, ..
         }| { Parameter { name, shape, range } },
    );
    Layout::with_buffers(parameters.collect(), model.buffers().len())
}

/// A model that loads its weights from a server's snapshots.
pub(crate) struct Loadable<M: Module> {
    pub(crate) model: LocalModel<M>,
    /// The layout of the snapshot loaded last, or the model's own layout, which is equal.
    layout: Arc<Layout>,
}

impl<M: Module> Loadable<M> {
    pub(crate) fn new(model: &M, device: &Device) -> Result<Self, ModelError> {
        let model = LocalModel::new(model.clone(), device)?;
        let layout = layout(&model).expect("the places in a flat view follow one another");
        let layout = Arc::new(layout);
        Ok(Self { model, layout })
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The type to which the model rounds all weights that it loads.
    pub(crate) fn precision(&self) -> Precision {
        // A step on a short batch computes with the servers' own statistics.
        let has_buffers = !self.model.buffers().is_empty();
        match self.model.common_dtype().filter(|_| !has_buffers) {
            Some(DType::BF16) => Precision::Bf16,
            Some(DType::F16) => Precision::F16,
            _ => Precision::F32,
        }
    }

    /// Loads a snapshot without first joining its segments.
    pub(crate) fn load(&mut self, weights: &Weights) -> Result<(), ModelError> {
        // Most snapshots share one layout. Then this check costs nothing.
        if !Arc::ptr_eq(&self.layout, weights.layout()) {
            check_layout(&self.layout, weights.layout())?;
            self.layout = Arc::clone(weights.layout());
        }
        let (expected, got) = (self.model.num_weights(), weights.len());
        if expected != got {
            return Err(ModelError::WeightCount { expected, got });
        }
        // A snapshot never changes, so the model's tensors may use its memory.
        self.model
            .load_with(|range| match weights.share(range.clone()) {
                Some(shared) => Numbers::shared(shared),
                None => weights.read(range).into_owned().into(),
            })
    }
}

/// Compares the names and shapes of all parameters, and which of them are buffers.
fn check_layout(expected: &Layout, got: &Layout) -> Result<(), ModelError> {
    fn at(layout: &Layout, index: usize) -> Option<(&str, &[usize], bool)> {
        let Parameter { name, shape, .. } = layout.parameters().get(index)?;
        let is_buffer = index >= layout.parameters().len() - layout.num_buffers();
        Some((&name[..], &shape[..], is_buffer))
    }

    // A peer has chosen one of them, so the search has an end whatever differs.
    let len = expected.parameters().len().max(got.parameters().len());
    let Some(index) = (0..len).find(|&index| at(expected, index) != at(got, index)) else {
        return Ok(());
    };
    let show = |layout| match at(layout, index) {
        Some((name, shape, false)) => format!("`{name}` {shape:?}"),
        Some((name, shape, true)) => format!("the running statistic `{name}` {shape:?}"),
        None => "missing".to_owned(),
    };
    Err(ModelError::OtherModel {
        index,
        expected: show(expected),
        got: show(got),
    })
}

/// Returns `model` with these weights, on `device` and ready for inference. The result is an ordinary burn
/// module, which burn can save, run or export. Everything that is not trainable is as in `model`.
///
/// ```
/// use ps::model::burn::tensor::Tensor;
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let model = ConvNet::init(1, &device);
/// let weights = initial_weights(&ConvNet::init(2, &device), &device)?;
/// let trained = model_with_weights(&model, &device, &weights)?;
/// let output = trained.forward(Tensor::ones([4, 1, 28, 28], &device));
/// assert_eq!(output.dims(), [4, 10]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If the weights are of another model, or if the device fails.
pub fn model_with_weights<M: Module>(
    model: &M,
    device: &Device,
    weights: &Weights,
) -> Result<M, ModelError> {
    let mut loadable = Loadable::new(model, device)?;
    loadable.load(weights)?;
    Ok(loadable.model.model().valid())
}

/// Settings of a worker, which decide the batches that it computes.
///
/// For an example, see [`spawn_worker`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerConfig {
    /// The worker's rank, below `num_workers`.
    pub worker: WorkerId,
    /// How many workers share each epoch's examples.
    pub num_workers: usize,
    /// The number of examples per batch.
    pub batch_size: usize,
    /// The seed of the order of examples and of dropout. It must be the same for all workers of a run.
    pub seed: u64,
}

/// A burn model with a worker's share of the data.
///
/// The batch of a step depends only on the seed, the worker and the clock. So does dropout, in models that
/// take their random numbers from [`Step`](ps_model::Step).
pub struct ModelSource<M: Model> {
    loadable: Loadable<M>,
    /// The parts of each batch, whose gradients are computed one after the other.
    batches: WorkerBatches<Vec<MicroBatch<M::Batch>>>,
    config: WorkerConfig,
    gradients: BufferPool,
    /// How long the latest batch was waited for.
    data_time: Duration,
    /// The device, and whose it is.
    seat: Seat,
}

impl<M: Model> ModelSource<M> {
    /// Puts a copy of `model` on `device`, and makes the worker's share of `data`.
    ///
    /// # Errors
    /// If the model has no flat weights, or if `config` does not fit the data.
    pub fn new<E>(
        model: &M,
        device: &Device,
        data: &E,
        config: WorkerConfig,
    ) -> Result<Self, SetupError>
    where
        E: Examples<Batch = M::Batch>,
    {
        Self::in_micro_batches(model, device, data, config, 1)
    }

    /// Does the same, but computes the gradient of each batch in `num_parts` parts, one after the other, and
    /// accumulates them. So the device needs the memory for one part only. The gradient is that of the whole
    /// batch, up to rounding, if the model's loss is a mean over the examples. Each part draws other random
    /// numbers, for example for dropout.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn in_micro_batches<E>(
        model: &M,
        device: &Device,
        data: &E,
        config: WorkerConfig,
        num_parts: usize,
    ) -> Result<Self, SetupError>
    where
        E: Examples<Batch = M::Batch>,
    {
        Ok(Self {
            loadable: Loadable::new(model, device)?,
            batches: WorkerBatches::in_parts(data, config, num_parts)?,
            config,
            // One buffer is being pushed, one is being computed, and one is spare. Parts of a batch need one
            // more.
            gradients: BufferPool::new(if num_parts > 1 { 4 } else { 3 }),
            data_time: Duration::ZERO,
            seat: Seat::on(device.clone()),
        })
    }

    /// Returns how many steps the worker takes per epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.batches.steps_per_epoch()
    }
}

impl<M: Model> GradientSource for ModelSource<M> {
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        let started = Instant::now();
        let parts = self.batches.batch(clock)?;
        self.data_time = started.elapsed();
        self.loadable.load(weights)?;
        let model = &self.loadable.model;
        let WorkerConfig {
            worker,
            batch_size,
            seed,
            ..
        } = self.config;
        let step = |part: usize| StepSeed {
            // The first part has the random numbers of a batch in one piece.
            seed: seed.wrapping_add((part as u64).wrapping_mul(PART_SEED)),
            worker: worker.0.into(),
            clock: clock.0,
        };
        let mut gradient = self.gradients.take(model.num_weights());
        let all: usize = parts.iter().map(|(len, _)| len).sum();
        let (mut loss, mut num_examples) = (0.0, 0);
        if let [(_, batch)] = &parts[..] {
            loss = model.gradient(batch, step(0), &mut gradient)?;
            num_examples = M::num_examples(batch);
        } else {
            let mut part_gradient = self.gradients.take(model.num_weights());
            gradient.fill(0.0);
            for (part, (len, batch)) in parts.iter().enumerate() {
                let share = *len as f32 / all as f32;
                loss += share * model.gradient(batch, step(part), &mut part_gradient)?;
                for (sum, slope) in gradient.iter_mut().zip(&part_gradient[..]) {
                    *sum += share * slope;
                }
                num_examples += M::num_examples(batch);
            }
        }
        if all < batch_size {
            // Statistics of few examples say little, and the variance of one is 0.
            let share = all as f32 / batch_size as f32;
            let buffers = model.num_trainable()..model.num_weights();
            let loaded = weights.read(buffers.clone());
            for (new, loaded) in gradient[buffers].iter_mut().zip(&loaded[..]) {
                *new = loaded + share * (*new - loaded);
            }
        }
        Ok(LocalGradient {
            gradient: Gradient::with_buffers(gradient, model.num_trainable()),
            loss,
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

impl<M: Model> fmt::Debug for ModelSource<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelSource")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Starts a worker on a thread of its own. It computes gradients of `model` on its share of `data`. After a
/// panic it is restarted with a fresh copy of the model.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let model = ConvNet::init(1, &device);
/// let config = WorkerConfig { worker: WorkerId(0), num_workers: 1, batch_size: 64, seed: 1 };
/// let worker = spawn_worker(&model, &device, &Mnist::bundled_sample().train, config)?;
///
/// let weights = initial_weights(&model, &device)?;
/// let update = worker.ask(ComputeGradients(weights)).wait()??;
/// assert_eq!(update.num_examples, 64);
/// assert!(update.loss.is_finite());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If the model has no flat weights, if `config` does not fit the data, or if the operating system starts
/// no thread.
#[expect(
    clippy::missing_panics_doc,
    reason = "what can go wrong shows in the caller's thread first"
)]
pub fn spawn_worker<M, E>(
    model: &M,
    device: &Device,
    data: &E,
    config: WorkerConfig,
) -> Result<ActorRef<DataWorker<ModelSource<M>>>, SetupError>
where
    // The factory takes its copies to the worker's thread.
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    // A mistake is returned here, in the caller's thread. Otherwise it would be a worker that cannot start.
    ModelSource::new(model, device, data, config)?;
    let (model, device, data) = (model.clone(), device.clone(), data.clone());
    let options = ModelWorker::<M>::options(Spawn::new());
    let worker = options.start(move || {
        let source = ModelSource::new(&model, &device, &data, config);
        DataWorker::new(
            config.worker,
            source.expect("it worked in the caller's thread"),
        )
    });
    Ok(worker?)
}

/// The worker that [`host_workers`] makes.
///
/// For an example, see [`host_workers`].
pub type ModelWorker<M> = DataWorker<ModelSource<M>>;

impl<M: Model> HostedSource for ModelSource<M> {
    type Args = WorkerConfig;
}

/// Lets every process of a cluster make workers. They compute gradients of `model` on their share of
/// `data`. Each process has its own copy of both. A process with another model or other data cannot join,
/// as far as [`Examples::fingerprint`] shows the difference.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let train = Mnist::bundled_sample().train;
/// let model = ConvNet::init(1, &device);
/// let hosts = host_workers(Hosts::new(), &model, &device, &train);
/// let cluster = Cluster::alone(hosts); // Or `Cluster::listen`, and nodes with the same hosts.
///
/// let config = WorkerConfig { worker: WorkerId(0), num_workers: 1, batch_size: 64, seed: 1 };
/// let worker = cluster.spawn::<ModelWorker<ConvNet>>(config).wait()?;
/// let weights = initial_weights(&model, &device)?;
/// let update = worker.ask(ComputeGradients(weights)).wait()??;
/// assert_eq!(update.num_examples, 64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Several models or data sets can be hosted for one type of model. A spawn then names one of them, by
/// [`SpawnOn::variant`](ps_actors::cluster::SpawnOn::variant) and [`worker_variant`].
#[must_use]
pub fn host_workers<M, E>(hosts: Hosts, model: &M, device: &Device, data: &E) -> Hosts
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    let facts = Facts::default().model(model, device).data(data);
    let hosts = facts.must_agree(hosts);
    let device = device.clone();
    host_variant(
        hosts,
        facts.variant(WORKERS),
        model,
        move |_| Seat::on(device.clone()),
        data,
        1,
    )
}

/// Returns the variant of the workers that [`host_workers`] hosts for this model and data.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let (model, mnist) = (ConvNet::init(0, &device), Mnist::bundled_sample());
/// let hosts = host_workers(Hosts::new(), &model, &device, &mnist.train);
/// let hosts = host_workers(hosts, &model, &device, &mnist.test);
///
/// let cluster = Cluster::alone(hosts);
/// let on_train = SpawnOn::new().variant(worker_variant(&model, &device, &mnist.train));
/// let config = WorkerConfig { worker: WorkerId(0), num_workers: 1, batch_size: 64, seed: 1 };
/// let worker = cluster.spawn_with::<ModelWorker<ConvNet>>(on_train, config).wait()?;
/// # drop(worker);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn worker_variant<M, E>(model: &M, device: &Device, data: &E) -> String
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    let facts = Facts::default().model(model, device).data(data);
    facts.variant(WORKERS)
}

/// The name under which processes compare the variants of workers.
pub(crate) const WORKERS: &str = "model and data";

/// Hosts workers, without comparing anything with other processes. Each computes on the device of its seat.
pub(crate) fn host_variant<M, E>(
    hosts: Hosts,
    variant: String,
    model: &M,
    seat_of: impl Fn(WorkerId) -> Seat + Send + Sync + 'static,
    data: &E,
    num_micro_batches: usize,
) -> Hosts
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    // All threads that make workers share it, whether or not a model can be shared.
    let originals = Mutex::new((model.clone(), data.clone()));
    hosts.host_variant(variant, Spawn::new(), move |config: WorkerConfig| {
        let (model, data) = match originals.lock() {
            Ok(originals) => originals.clone(),
            Err(poisoned) => poisoned.into_inner().clone(),
        };
        let (seat, parts) = (seat_of(config.worker), num_micro_batches);
        let mut source = ModelSource::in_micro_batches(&model, &seat.device, &data, config, parts)?;
        source.seat = seat;
        Ok(DataWorker::new(config.worker, source))
    })
}

/// A model and a test set, to evaluate weights.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let model = ConvNet::init(1, &device);
/// let mut evaluator = Evaluator::new(&model, &device, &Mnist::bundled_sample().test)?;
/// let weights = initial_weights(&model, &device)?;
/// let accuracy = evaluator.accuracy_percent(&weights)?;
/// assert!((0.0..=100.0).contains(&accuracy));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// An evaluation makes one batch after the other, on a thread that is a few batches ahead. So the test set need not
/// fit into memory.
pub struct Evaluator<M: Model> {
    loadable: Loadable<M>,
    metrics: Metrics<M>,
    /// In the order of the examples. They begin again at the end.
    batches: Batches<M::Batch>,
}

/// Computes a metric of a batch: the mean of its examples.
type Metric<M> = Box<dyn Fn(&M, &<M as Model>::Batch, &Device) -> f64 + Send>;

/// The metrics of a user's program, by their names.
pub(crate) type Metrics<M> = BTreeMap<String, Metric<M>>;

/// The result of weights on the whole test set.
#[derive(Clone, Debug, Default)]
pub(crate) struct TestResult {
    pub(crate) evaluation: Evaluation,
    /// The means of all examples.
    pub(crate) metrics: BTreeMap<String, f64>,
}

impl<M: Model> Evaluator<M> {
    /// Puts a copy of `model` on `device`. `data` makes its batches during each evaluation.
    ///
    /// # Errors
    /// If the model has no flat weights, or if there is no data.
    pub fn new<E>(model: &M, device: &Device, data: &E) -> Result<Self, SetupError>
    where
        E: Examples<Batch = M::Batch>,
    {
        let num_examples = data.num_examples();
        if num_examples == 0 {
            return Err(SetupError::NoTestData);
        }
        let in_order = SamplerConfig {
            shuffle: false,
            ..SamplerConfig::new(num_examples, EVALUATION_BATCH)
        };
        let data = data.clone();
        Ok(Self {
            loadable: Loadable::new(model, device)?,
            metrics: Metrics::<M>::new(),
            batches: Batches::new(in_order, move |indices| data.batch(indices))?
                .pause_between_epochs(),
        })
    }

    /// Evaluates weights on all examples.
    ///
    /// # Errors
    /// If the weights are of another model, if the data set fails, or if the model panics.
    pub fn evaluate(&mut self, weights: &Weights) -> Result<Evaluation, ModelError> {
        let result = self.evaluate_in_steps(weights, |_, _| true)?;
        Ok(result.unwrap_or_default().evaluation)
    }

    /// From now on, each evaluation computes these metrics, too.
    pub(crate) fn measure(&mut self, metrics: Metrics<M>) {
        self.metrics = metrics;
    }

    /// As [`evaluate`](Self::evaluate). After each batch it says how many are done, and how many there are. If
    /// `goes_on` then returns `false`, there is no result.
    pub(crate) fn evaluate_in_steps(
        &mut self,
        weights: &Weights,
        mut goes_on: impl FnMut(usize, usize) -> bool,
    ) -> Result<Option<TestResult>, ModelError> {
        self.loadable.load(weights)?;
        self.seek_first()?;
        let num_batches = self.batches.batches_per_epoch() as usize;
        let mut result = TestResult::default();
        for num_done in 1..=num_batches {
            let batch = self.batches.next_batch().map_err(no_batch)?;
            let (evaluation, metrics) = self.measure_batch(&batch)?;
            result.evaluation += evaluation;
            for (name, value) in self.metrics.keys().zip(metrics) {
                let sum = result.metrics.entry(name.clone()).or_default();
                *sum += value * evaluation.num_examples as f64;
            }
            if !goes_on(num_done, num_batches) {
                return Ok(None);
            }
        }
        let num_examples = result.evaluation.num_examples as f64;
        result
            .metrics
            .values_mut()
            .for_each(|sum| *sum /= num_examples);
        Ok(Some(result))
    }

    fn measure_batch(&self, batch: &M::Batch) -> Result<(Evaluation, Vec<f64>), ModelError> {
        self.loadable.model.measure(|model, device| {
            let evaluation = model.evaluate(batch, device);
            let metrics = self.metrics.values();
            let metrics = metrics.map(|metric| metric(model, batch, device));
            (evaluation, metrics.collect())
        })
    }

    /// Evaluates only the first batch, to check that the model accepts this data.
    pub(crate) fn try_out(&mut self, weights: &Weights) -> Result<(), ModelError> {
        self.loadable.load(weights)?;
        self.seek_first()?;
        let first = self.batches.next_batch().map_err(no_batch)?;
        self.measure_batch(&first)?;
        // The batches that were prepared meanwhile would only take memory until the first evaluation.
        self.seek_first()
    }

    /// Moves to the first batch. After a whole evaluation that is the next one.
    fn seek_first(&mut self) -> Result<(), ModelError> {
        match self.batches.cursor().batch {
            0 => Ok(()),
            _ => (self.batches.seek(Cursor::default())).map_err(no_batch),
        }
    }

    /// Returns the percentage of right answers, from 0 to 100. NaN for a model that does not classify.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate).
    pub fn accuracy_percent(&mut self, weights: &Weights) -> Result<f64, ModelError> {
        Ok(self
            .evaluate(weights)?
            .accuracy()
            .map_or(f64::NAN, |accuracy| 100.0 * accuracy))
    }
}

fn no_batch(error: BatchError) -> ModelError {
    ModelError::NoBatch(error_chain(&error))
}

impl<M: Model> fmt::Debug for Evaluator<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Evaluator")
            .field("num_batches", &self.batches.batches_per_epoch())
            .finish_non_exhaustive()
    }
}
