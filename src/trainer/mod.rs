//! Trains a model in one call: servers, workers, evaluation, report.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ps_actors::checkpoint::CheckpointConfig;
use ps_actors::cluster::{Cluster, ClusterConfig, Hosts};
use ps_actors::group::GroupSpawnError;
use ps_actors::launch::LaunchOptions;
use ps_actors::learning_rate::LearningRateSchedule;
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::{Clipping, Consistency, Reduction, ServerConfig};
use ps_model::burn::lr_scheduler::LrSchedulerConfig;
use ps_model::burn::tensor::Device;
use ps_model::{Model, OptimizerConfig, RuleError};

use crate::controls::Controls;
use crate::data::Examples;
use crate::learning_rate::{BurnSchedule, ScheduleError};
use crate::observe::Observer;
use crate::report::{CurvePoint, Report};
use crate::rule::OptimizerRule;
use crate::source::Metrics;

mod devices;
mod error;
mod evaluations;
mod groups;
mod hosting;
mod replay;
mod rules;
mod run;
mod stopping;

pub(crate) use devices::Seat;
pub use error::TrainError;
pub use replay::{Replay, ReplayError};
pub use stopping::EarlyStopping;
pub(crate) use stopping::Ending;

use groups::Group;
use stopping::StopWhen;

type MakeRule = Arc<dyn Fn(&Device) -> Result<Box<dyn UpdateRule>, RuleError> + Send + Sync>;
type MakeSchedule =
    Arc<dyn Fn() -> Result<Box<dyn LearningRateSchedule>, ScheduleError> + Send + Sync>;
type OnEvaluation = Box<dyn FnMut(&CurvePoint)>;

/// The settings of a training run, and the methods that [run](Self::run) it.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let mnist = Mnist::bundled_sample();
/// let report = Trainer::new(ConvNet::init(1, &device), mnist.train)
///     .device(&device)
///     .test_data(mnist.test)
///     .workers(2)
///     .consistency(Consistency::Ssp { bound: 2 })
///     .iterations(10)
///     .run()?;
/// assert_eq!(report.num_applied, 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Settings of the gradients, of the updates and of the end:
///
/// ```
/// use ps::actors::learning_rate::LearningRateSchedule;
/// use ps::prelude::*;
///
/// /// Halves the rate after 100 updates.
/// #[derive(Debug)]
/// struct Halved(f64);
///
/// impl LearningRateSchedule for Halved {
///     fn learning_rate(&mut self, version: Version) -> f64 {
///         if version <= Version(100) { self.0 } else { self.0 / 2.0 }
///     }
/// }
///
/// let device = select_device(default_device_name())?;
/// let mnist = Mnist::bundled_sample();
/// let report = Trainer::new(ConvNet::init(1, &device), mnist.train)
///     .device(&device)
///     .test_data(mnist.test)
///     .workers(2)
///     .servers(2)
///     .servers_on_nodes(true) // `run` has no nodes, so the driver has the servers.
///     .batch_size(8)
///     .micro_batches(2) // Each batch is computed in two parts of 4 examples.
///     .max_gradient_norm(1e3) // A gradient above it is refused.
///     .reduction(Reduction::Sum)
///     .clip_value(1.0)
///     .update_rule(|| Sgd::with_momentum(0.9))
///     .learning_rate_schedule(|| Halved(0.001))
///     .epochs(1_000)
///     .evaluate_every(2)
///     .stop_when(|point| point.version >= Version(4))
///     .heed_signals(false) // Ctrl-C ends the process at once.
///     .run()?;
/// assert!(report.stopped_early >= Some(Version(4)));
/// assert_eq!(report.num_refused, 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trainer<M: Model, E> {
    model: M,
    train: E,
    test: Option<E>,
    devices: Option<Vec<Device>>,
    num_workers: usize,
    num_servers: usize,
    server: ServerConfig,
    make_rule: MakeRule,
    /// Whether the optimizer needs whole parameters.
    needs_whole: bool,
    /// Returns a text that describes the optimizer and its settings.
    describe_rule: Arc<dyn Fn() -> String + Send + Sync>,
    groups: Vec<Group>,
    schedule: Option<MakeSchedule>,
    name: Option<String>,
    servers_on_nodes: bool,
    batch_size: usize,
    num_micro_batches: usize,
    length: Length,
    seed: u64,
    evaluate_every: u64,
    on_evaluation: OnEvaluation,
    metrics: Metrics<M>,
    stop_when: Vec<StopWhen>,
    observers: Vec<Box<dyn Observer>>,
    controls: Controls,
    heeds_signals: bool,
    checkpoints: Option<CheckpointConfig>,
    /// Whether the checkpoints have an update log. Known when the training runs.
    logs_updates: bool,
    record: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug)]
enum Length {
    Iterations(u64),
    Epochs(u64),
}

impl<M, E> Trainer<M, E>
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    /// Starts from the weights of `model`, and trains on `train`. The defaults are: 1 worker, 1 server,
    /// batches of 32 examples, 1 epoch, plain SGD with learning rate 0.01, [`Consistency::Bsp`],
    /// [`Reduction::Mean`], seed 0, and the default device.
    #[must_use]
    pub fn new(model: M, train: E) -> Self {
        Self {
            model,
            train,
            test: None,
            devices: None,
            num_workers: 1,
            num_servers: 1,
            server: ServerConfig::default(),
            make_rule: Arc::new(|_| Ok(Box::new(Sgd::new()))),
            needs_whole: false,
            describe_rule: Arc::new(|| format!("{:?}", Sgd::new())),
            groups: Vec::new(),
            schedule: None,
            name: None,
            servers_on_nodes: false,
            batch_size: 32,
            num_micro_batches: 1,
            length: Length::Epochs(1),
            seed: 0,
            evaluate_every: 0,
            on_evaluation: Box::new(|_| {}),
            metrics: Metrics::<M>::new(),
            stop_when: Vec::new(),
            observers: Vec::new(),
            controls: Controls::new(),
            heeds_signals: true,
            checkpoints: None,
            logs_updates: false,
            record: None,
        }
    }

    /// Sets the data to evaluate on. The final weights are evaluated, and the weights during the run if
    /// [`evaluate_every`](Self::evaluate_every) is set. An evaluation makes one batch of 256 examples after the other,
    /// so the data need not fit into memory.
    #[must_use]
    pub fn test_data(mut self, test: E) -> Self {
        self.test = Some(test);
        self
    }

    /// Sets the number of workers. Each computes on a thread of its own.
    #[must_use]
    pub fn workers(mut self, num_workers: usize) -> Self {
        self.num_workers = num_workers;
        self
    }

    /// Sets the number of servers that the weights are split over. It does not change the result.
    #[must_use]
    pub fn servers(mut self, num_servers: usize) -> Self {
        self.num_servers = num_servers;
        self
    }

    /// Puts the servers on the nodes of a cluster, in turn. By default they are in the driver. The first one
    /// stays there if it writes files: an update log, or the schedule of [`record`](Self::record). For an example, see
    /// [`Trainer`].
    #[must_use]
    pub fn servers_on_nodes(mut self, on_nodes: bool) -> Self {
        self.servers_on_nodes = on_nodes;
        self
    }

    /// Sets the consistency mode, which decides when gradients are applied.
    #[must_use]
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.server.consistency = consistency;
        self
    }

    /// Lets each worker compute its next gradient while the one before is on its way to the servers, in
    /// [`Consistency::Asp`] and [`Consistency::Ssp`] (S-24). A gradient is then computed on weights without the worker's
    /// own last update. This pays on a network where the transfer takes a large part of a step. In other modes it
    /// is an error of the run.
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let report = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
    ///     .device(&device)
    ///     .consistency(Consistency::Asp)
    ///     .overlap(true)
    ///     .iterations(10)
    ///     .run()?;
    /// // Its only worker is one update behind itself, but for its first two gradients.
    /// assert_eq!((report.num_applied, report.staleness.mean()), (10, 0.8));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn overlap(mut self, overlap: bool) -> Self {
        self.server.overlap = overlap;
        self
    }

    /// Sets how the gradients of one update are combined. For an example, see [`Trainer`].
    #[must_use]
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.server.reduction = reduction;
        self
    }

    /// Sets the learning rate, which is then the same for all updates.
    #[must_use]
    pub fn learning_rate(mut self, learning_rate: f64) -> Self {
        self.server.learning_rate = learning_rate;
        self.schedule = None;
        self
    }

    /// Changes the learning rate during the run, as one of burn's schedulers says. It is stepped once for
    /// each *update*: in [`Consistency::Bsp`] that is once for each step that all workers take, and in
    /// [`Consistency::Asp`] once for each step of each worker. This replaces
    /// [`learning_rate`](Self::learning_rate). For a warm-up, see
    /// [`BurnSchedule`].
    ///
    /// All servers use the same rates. So does a run that goes on from a checkpoint, unless it has another
    /// schedule.
    ///
    /// ```
    /// use ps::model::burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let report = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
    ///     .device(&device)
    ///     .workers(2)
    ///     .lr_scheduler(CosineAnnealingLrSchedulerConfig::new(0.05, 10))
    ///     .iterations(10)
    ///     .run()?;
    /// assert_eq!(report.num_updates, 10);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn lr_scheduler(self, config: impl Into<LrSchedulerConfig>) -> Self {
        let config = config.into();
        self.schedule_with(move || Ok(Box::new(BurnSchedule::new(config.clone())?)))
    }

    /// Changes the learning rate during the run by a schedule of your own, as
    /// [`lr_scheduler`](Self::lr_scheduler) does by one of burn's. `schedule` is called once per server, and
    /// to check the rates before the run. Processes compare the text that the schedule's `Debug` prints, so
    /// it should contain its settings. For an example, see [`Trainer`].
    #[must_use]
    pub fn learning_rate_schedule<S: LearningRateSchedule>(
        self,
        schedule: impl Fn() -> S + Send + Sync + 'static,
    ) -> Self {
        self.schedule_with(move || Ok(Box::new(schedule())))
    }

    fn schedule_with(
        mut self,
        schedule: impl Fn() -> Result<Box<dyn LearningRateSchedule>, ScheduleError>
        + Send
        + Sync
        + 'static,
    ) -> Self {
        self.schedule = Some(Arc::new(schedule));
        self
    }

    /// Refuses gradients with a Euclidean norm above `max_norm`. To scale a large gradient down instead, see
    /// [`clip_norm`](Self::clip_norm). For an example, see [`Trainer`].
    #[must_use]
    pub fn max_gradient_norm(mut self, max_norm: f64) -> Self {
        self.server.max_norm = max_norm;
        self
    }

    /// Clips the combined gradient of each update by its norm. If its Euclidean norm over all weights is above
    /// `limit`, it is multiplied by one factor, so that its norm is `limit`. The number of servers does not
    /// change the result. Only one kind of clipping is used: the one that was set last.
    #[must_use]
    pub fn clip_norm(mut self, limit: f64) -> Self {
        self.server.clipping = Clipping::Norm(limit);
        self
    }

    /// Clips the combined gradient of each update by value: each of its numbers is limited to the range from
    /// `-limit` to `limit`. For an example, see [`Trainer`].
    #[must_use]
    pub fn clip_value(mut self, limit: f32) -> Self {
        self.server.clipping = Clipping::Value(limit);
        self
    }

    /// Declares a worker lost if it was silent for longer than `lease`, which must be at least 10 ms. The
    /// others go on without it, and it may join again. Workers send heartbeats while they compute, so a
    /// step may take longer than the lease. By default there is no lease.
    #[must_use]
    pub fn worker_lease(mut self, lease: Duration) -> Self {
        self.server.worker_lease = Some(lease);
        self
    }

    /// Uses a burn optimizer, such as `AdamConfig::new()`, instead of plain SGD. LAMB and Muon need whole parameters: then
    /// the weights are split over the servers between parameters ([`Cut::BetweenParameters`](ps_actors::server::Cut)).
    #[must_use]
    pub fn optimizer<C>(mut self, config: C) -> Self
    where
        C: OptimizerConfig + Debug + Send + Sync + 'static,
    {
        self.needs_whole = C::NEEDS_WHOLE_PARAMETERS;
        let config = Arc::new(config);
        let described = Arc::clone(&config);
        self.make_rule =
            Arc::new(move |device| Ok(Box::new(OptimizerRule::new(&*config, device)?)));
        self.describe_rule = Arc::new(move || format!("{described:?}"));
        self
    }

    /// Uses an update rule of your own, or [`Sgd::with_momentum`]. `rule` is called once per server.
    /// Processes compare the text that the rule's `Debug` prints, so it should contain the rule's settings. For an
    /// example, see [`Trainer`].
    #[must_use]
    pub fn update_rule<R: UpdateRule>(
        mut self,
        rule: impl Fn() -> R + Send + Sync + 'static,
    ) -> Self {
        let rule = Arc::new(rule);
        let described = Arc::clone(&rule);
        self.needs_whole = false;
        self.make_rule = Arc::new(move |_| Ok(Box::new(rule())));
        self.describe_rule = Arc::new(move || format!("{:?}", described()));
        self
    }

    /// Gives the training a name, which must be the same in all processes.
    ///
    /// A name is needed if a program runs several trainings on one cluster that differ only in something
    /// that cannot be compared: the rate of a dropout layer, the loss function, or the content of a data
    /// set without a [fingerprint](Examples::fingerprint).
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Sets the number of examples in each batch of a worker.
    #[must_use]
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }

    /// Computes the gradient of each batch in `num_parts` parts, one after the other, and accumulates them
    /// (gradient accumulation). So a batch that is too large for the device's memory can be used. The result
    /// is that of the whole batch, up to rounding, if the model's loss is a mean over the examples. The
    /// default is 1. For an example, see [`Trainer`].
    #[must_use]
    pub fn micro_batches(mut self, num_parts: usize) -> Self {
        self.num_micro_batches = num_parts;
        self
    }

    /// Sets how many steps each worker takes.
    #[must_use]
    pub fn iterations(mut self, num_iterations: u64) -> Self {
        self.length = Length::Iterations(num_iterations);
        self
    }

    /// Sets how many times the workers together go through the data. The order changes from epoch to epoch. In the last
    /// step of an epoch, the workers share the examples that do not fill a batch of each. If these are not enough for one
    /// example of each worker, they are left out.
    #[must_use]
    pub fn epochs(mut self, num_epochs: u64) -> Self {
        self.length = Length::Epochs(num_epochs);
        self
    }

    /// Sets the seed of the order of examples and of dropout. (The initial weights come from the model.)
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Evaluates the weights on the whole test set each time that `num_updates` more updates have been
    /// applied, while the workers go on. 0, the default, means only at the end. If updates come faster than
    /// evaluations, some are skipped.
    #[must_use]
    pub fn evaluate_every(mut self, num_updates: u64) -> Self {
        self.evaluate_every = num_updates;
        self
    }

    /// Computes one more number in each evaluation, such as the share of answers that are nearly right. `compute` gets the
    /// model, a batch of the test data, and the device to evaluate on. It returns the mean of the examples of the
    /// batch. The metric is the mean of all examples: see [`CurvePoint::metrics`] and [`Report::final_metrics`]. Observers
    /// get it, too, so it is in the events of a run directory, and in TensorBoard as `metrics/` with its name.
    ///
    /// A second metric of the same name replaces the first one.
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let mnist = Mnist::bundled_sample();
    /// let report = Trainer::new(ConvNet::init(1, &device), mnist.train)
    ///     .device(&device)
    ///     .test_data(mnist.test)
    ///     .metric("share of wrong answers", |model, batch, device| {
    ///         let right = model.evaluate(batch, device).accuracy();
    ///         right.map_or(f64::NAN, |right| 1.0 - right)
    ///     })
    ///     .iterations(2)
    ///     .run()?;
    /// assert!((0.0..=1.0).contains(&report.final_metrics["share of wrong answers"]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn metric(
        mut self,
        name: impl Into<String>,
        compute: impl Fn(&M, &M::Batch, &Device) -> f64 + Send + 'static,
    ) -> Self {
        self.metrics.insert(name.into(), Box::new(compute));
        self
    }

    /// Calls `on_evaluation` after each evaluation during the run. For an example, see [`Report`].
    #[must_use]
    pub fn on_evaluation(mut self, on_evaluation: impl FnMut(&CurvePoint) + 'static) -> Self {
        self.on_evaluation = Box::new(on_evaluation);
        self
    }

    /// Ends the training in an orderly way when `is_met` returns `true` for an evaluation during the run. The
    /// workers finish their current step, as after a signal. The result has the last weights, not the best
    /// ones, and says that it was [stopped early](Report::stopped_early). It may be called several times: then
    /// any of the conditions ends the training. It needs [`test_data`](Self::test_data) and
    /// [`evaluate_every`](Self::evaluate_every). For an example, see [`Trainer`].
    #[must_use]
    pub fn stop_when(mut self, is_met: impl FnMut(&CurvePoint) -> bool + 'static) -> Self {
        self.stop_when.push(Box::new(is_met));
        self
    }

    /// Ends the training when the loss on the test data has stopped falling. See
    /// [`stop_when`](Self::stop_when). A program that goes on from a checkpoint begins to count anew.
    ///
    /// ```
    /// use ps::prelude::*;
    /// use ps::trainer::EarlyStopping;
    ///
    /// let device = select_device(default_device_name())?;
    /// let mnist = Mnist::bundled_sample();
    /// let report = Trainer::new(ConvNet::init(1, &device), mnist.train)
    ///     .device(&device)
    ///     .test_data(mnist.test)
    ///     .learning_rate(0.0) // So the loss never falls.
    ///     .epochs(1_000)
    ///     .evaluate_every(1)
    ///     .early_stopping(EarlyStopping::new(3))
    ///     .run()?;
    /// assert!(report.stopped_early.is_some());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn early_stopping(self, mut stopping: EarlyStopping) -> Self {
        self.stop_when(move |point| stopping.must_stop(point.evaluation.mean_loss()))
    }

    /// Gives the events of the training to an [`Observer`]: to a closure, a progress display, files. It may be
    /// called several times. For an example, see [`observe`](crate::observe).
    #[must_use]
    pub fn observe(mut self, observer: impl Observer) -> Self {
        self.observers.push(Box::new(observer));
        self
    }

    /// Does the same as [`observe`](Self::observe) for each of these observers.
    #[must_use]
    pub fn observe_all(mut self, observers: Vec<Box<dyn Observer>>) -> Self {
        self.observers.extend(observers);
        self
    }

    /// Lets this handle control the training while it runs: pause it, save a checkpoint, change the learning
    /// rate. See [`controls`](crate::controls).
    #[must_use]
    pub fn controls(mut self, controls: &Controls) -> Self {
        self.controls = controls.clone();
        self
    }

    /// Describes the training in this directory: settings, events, report and pictures. See
    /// [`runs`](crate::runs), also for what happens if the directory has a run already.
    #[cfg(feature = "runs")]
    #[must_use]
    pub fn run_dir(self, directory: impl Into<PathBuf>) -> Self {
        self.observe(crate::runs::RunDir::new(directory))
    }

    /// Sets whether SIGTERM and Ctrl-C end the training in an orderly way; see
    /// [`StopSignal`](ps_actors::launch::StopSignal). The default
    /// is `true`. Use `false` in a program with its own signal handlers. For an example, see [`Trainer`].
    #[must_use]
    pub fn heed_signals(mut self, heeds_signals: bool) -> Self {
        self.heeds_signals = heeds_signals;
        self
    }

    /// Saves checkpoints during the training and at its end, and goes on from the newest one if
    /// [`resume`](CheckpointConfig::resume) is set. By default there are none.
    ///
    /// A training that goes on has the same result as one that was never interrupted: the same bits for
    /// [`Consistency::Bsp`]. Model, optimizer, data, batch size and seed must be the same. The learning
    /// rate, the consistency mode, the number of servers and the number of steps may differ. So may the
    /// number of workers: then some examples of the epoch under way may come twice.
    ///
    /// A checkpoint that cannot be written is logged and counted, and the training goes on.
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// # let temporary = tempfile::tempdir()?;
    /// # let directory = temporary.path();
    /// let trainer = |num_iterations| {
    ///     Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
    ///         .device(&device)
    ///         .iterations(num_iterations)
    ///         .checkpoints(CheckpointConfig { resume: true, ..CheckpointConfig::new(directory) })
    /// };
    /// let first = trainer(3).run()?;
    /// let second = trainer(5).run()?; // Takes steps 4 and 5.
    /// assert_eq!((second.losses[0].len(), second.num_updates), (2, 5));
    /// # assert_eq!(first.resumed, None);
    /// # assert_eq!(second.resumed.map(|resumed| resumed.version), Some(Version(3)));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn checkpoints(mut self, config: impl Into<Option<CheckpointConfig>>) -> Self {
        self.checkpoints = config.into();
        self
    }

    /// Records the schedule of the training in this file: which gradient was computed on which weights, and
    /// which gradients made which update. So [`replay`](Self::replay) can compute the same weights again,
    /// although an asynchronous training depends on time. The first server is then in
    /// the driver's process, also with [`servers_on_nodes`](Self::servers_on_nodes).
    ///
    /// A few dozen bytes are written per gradient. A file that exists is an error, unless the training goes
    /// on from a checkpoint: then its own schedule is continued. If the file cannot be written later on, that
    /// is logged, and the training goes on.
    #[must_use]
    pub fn record(mut self, file: impl Into<Option<PathBuf>>) -> Self {
        self.record = file.into();
        self
    }

    /// Trains until all steps are taken, on this thread and on those of the workers and servers.
    ///
    /// SIGTERM and Ctrl-C end the training earlier. The workers then have 10 s to finish the current step,
    /// the weights are evaluated, and the report says that it was [interrupted](Report::interrupted). A
    /// second signal, more than 500 ms later, ends the process at once. The process also ends if it still runs 30 s
    /// after the first.
    ///
    /// # Errors
    /// - If a setting cannot work, or the model does not accept the test data. This is found before
    ///   anything is started.
    /// - If a worker or server fails and cannot be replaced.
    /// - If most gradients were refused because of their norm.
    /// - If the training diverges: more than [100](ps_actors::worker::MAX_REFUSED) of a worker's gradients
    ///   are refused in a row while no worker's gradient is applied, or the result is not finite.
    ///
    /// The error contains the weights that were trained until then; see [`TrainError::report`].
    ///
    /// # Panics
    /// If it is called from asynchronous code, or if the operating system starts no threads.
    pub fn run(self) -> Result<Report, TrainError> {
        self.run_on(&Cluster::alone(Hosts::new()))
    }

    /// Trains with all processes that the command line and the environment name.
    ///
    /// Every copy of the program calls this, with the same settings. The driver waits for the other
    /// processes up to `config.join_timeout`, trains, and returns the report. A node returns `None` when
    /// its work is over. See [`Cluster::launch`].
    ///
    /// ```no_run
    /// use ps::prelude::*;
    ///
    /// # fn options() -> LaunchOptions { LaunchOptions::default() }
    /// let device = select_device(default_device_name())?;
    /// let mnist = Mnist::bundled_sample();
    /// let trainer = Trainer::new(ConvNet::init(1, &device), mnist.train).device(&device).workers(4);
    /// let options: LaunchOptions = options(); // For example from the command line.
    /// if let Some(report) = trainer.launch(&options, ClusterConfig::default())? {
    ///     println!("{report}");
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`run`](Self::run), and if the processes do not find each other.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn launch(
        self,
        options: &LaunchOptions,
        config: ClusterConfig,
    ) -> Result<Option<Report>, TrainError> {
        // Every process checks its settings, so a wrong one ends all processes before anything is started.
        self.check()?;
        let hosts = self.hosts(Hosts::new())?;
        match Cluster::launch(options, config, hosts)? {
            Some(cluster) => Ok(Some(self.run_on(&cluster)?)),
            None => Ok(None),
        }
    }

    fn check(&self) -> Result<(), TrainError> {
        if self.num_workers == 0 {
            return Err(TrainError::NoWorkers);
        }
        if self.num_workers > usize::from(u16::MAX) {
            return Err(TrainError::TooManyWorkers(self.num_workers));
        }
        let parts = self.num_micro_batches;
        if parts == 0 || parts > self.batch_size.max(1) {
            let batch_size = self.batch_size;
            return Err(TrainError::MicroBatches { parts, batch_size });
        }
        if self.num_servers == 0 {
            return Err(GroupSpawnError::NoServers.into());
        }
        if self.test.is_none()
            && let Some(name) = self.metrics.keys().next()
        {
            return Err(TrainError::MetricWithoutData(name.clone()));
        }
        if !self.stop_when.is_empty() && (self.test.is_none() || self.evaluate_every == 0) {
            return Err(TrainError::NoEvaluations);
        }
        self.server.consistency.check(self.num_workers)?;
        if self.server.overlap && !self.server.consistency.may_overlap() {
            return Err(TrainError::Overlap(self.server.consistency));
        }
        self.server.check().map_err(GroupSpawnError::Config)?;
        self.make_schedule()?;
        Ok(())
    }
}

impl<M: Model, E> std::fmt::Debug for Trainer<M, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trainer")
            .field("num_workers", &self.num_workers)
            .field("num_servers", &self.num_servers)
            .field("server", &self.server)
            .field("batch_size", &self.batch_size)
            .field("length", &self.length)
            .field("seed", &self.seed)
            .finish_non_exhaustive()
    }
}
