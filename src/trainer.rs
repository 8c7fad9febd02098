//! Trains a model in one call: servers, workers, evaluation, report.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{Either, select, try_join_all};
use ps_actors::actor::{self, CallError, RestartPolicy, Spawn};
use ps_actors::cluster::{
    Cluster, ClusterConfig, Hosts, Placement, SpawnOn, SpawnOnError, StartError,
};
use ps_actors::group::{GroupSpawnError, ServerArgs, ServerGroup};
use ps_actors::ids::{Version, WorkerId};
use ps_actors::launch::{LaunchOptions, StopSignal};
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::{
    Consistency, ConsistencyError, GroupError, Histogram, PullVersion, Reduction, ServerConfig,
    WorkerStatus,
};
use ps_actors::weights::Weights;
use ps_actors::worker::WorkerError;
use ps_model::burn::optim::Optimizer;
use ps_model::burn::tensor::Device;
use ps_model::{
    DeviceError, ElementwiseConfig, Model, ModelError, RuleError, default_device_name,
    select_device,
};

use crate::agreement::Facts;
use crate::data::Examples;
use crate::report::{CurvePoint, Report};
use crate::rule::OptimizerRule;
use crate::source::{
    Evaluator, ModelSource, ModelWorker, SetupError, WORKERS, WorkerConfig, host_variant,
    initial_weights,
};
use crate::workers::{Worker, WorkerRun};

/// How long workers may take to finish the current step when the training is interrupted.
const LAST_STEP: Duration = Duration::from_secs(10);

type MakeRule = Arc<dyn Fn(&Device) -> Result<Box<dyn UpdateRule>, RuleError> + Send + Sync>;
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
pub struct Trainer<M: Model, E> {
    model: M,
    train: E,
    test: Option<E>,
    device: Option<Device>,
    num_workers: usize,
    num_servers: usize,
    server: ServerConfig,
    make_rule: MakeRule,
    /// Returns a text that describes the optimizer and its settings.
    describe_rule: Arc<dyn Fn() -> String + Send + Sync>,
    name: Option<String>,
    servers_on_nodes: bool,
    batch_size: usize,
    length: Length,
    seed: u64,
    evaluate_every: u64,
    on_evaluation: OnEvaluation,
    heeds_signals: bool,
}

#[derive(Clone, Copy, Debug)]
enum Length {
    Iterations(u64),
    Epochs(u64),
}

/// Why a training run could not be started, or did not finish.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The number of workers is 0.
    #[error("training needs at least one worker")]
    NoWorkers,
    /// There are more workers than can be numbered.
    #[error("{0} workers are too many: at most {max} can take part", max = u16::MAX)]
    TooManyWorkers(usize),
    /// The consistency mode does not fit the number of workers.
    #[error(transparent)]
    Consistency(#[from] ConsistencyError),
    /// The default device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model or its data cannot be used.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// The optimizer cannot be used.
    #[error("the optimizer cannot be used")]
    Rule(#[from] RuleError),
    /// The servers could not be started.
    #[error("the servers could not be started")]
    Servers(#[from] GroupSpawnError),
    /// The servers failed during the run.
    #[error("the servers failed")]
    Group(#[from] GroupError),
    /// The processes did not find each other.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A worker or server could not be started on a node.
    #[error("an actor could not be started")]
    Spawn(#[from] SpawnOnError),
    /// The system gave no event loop for the training.
    #[error("the system gives no event loop: raise the limit on open files (ulimit -n)")]
    EventLoop(#[source] std::io::Error),
    /// A worker failed.
    #[error("a worker failed")]
    Worker(#[from] WorkerError),
    /// A worker panicked more often than is allowed, or could not be reached.
    #[error("{worker} was lost")]
    WorkerLost {
        /// The worker that was lost.
        worker: WorkerId,
        /// Why its last call failed.
        #[source]
        source: CallError,
    },
    /// The model does not accept the test data. This is found before the first step.
    #[error("the model cannot evaluate the test data")]
    TestData(#[source] ModelError),
    /// The training diverged.
    #[error(
        "training has diverged: {what}; a lower learning rate helps most often, then a smaller \
         initialization or clipping in the model; data that contain NaN do the same. Where \
         `max_gradient_norm` is set, it may be too low"
    )]
    Diverged {
        /// How the result shows it.
        what: String,
    },
    /// The run failed, but there are weights that were trained until then.
    #[error("the training ended without success after {} updates", .report.num_updates)]
    Incomplete {
        /// The result until then, with the weights. Figures that only workers know may be missing.
        report: Box<Report>,
        /// Why the run failed.
        #[source]
        source: Box<Self>,
    },
    /// The weights could not be evaluated.
    #[error("the weights could not be evaluated")]
    Evaluate(#[from] ModelError),
    /// The operating system does not let this process receive signals.
    #[error(
        "could not prepare for signals that end the training; `heed_signals(false)` switches this off"
    )]
    Signals(#[source] std::io::Error),
}

impl TrainError {
    /// Returns the result until the error, if there is one.
    #[must_use]
    pub fn report(&self) -> Option<&Report> {
        match self {
            Self::Incomplete { report, .. } => Some(report),
            _ => None,
        }
    }
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
            device: None,
            num_workers: 1,
            num_servers: 1,
            server: ServerConfig::default(),
            make_rule: Arc::new(|_| Ok(Box::new(Sgd::new()))),
            describe_rule: Arc::new(|| format!("{:?}", Sgd::new())),
            name: None,
            servers_on_nodes: false,
            batch_size: 32,
            length: Length::Epochs(1),
            seed: 0,
            evaluate_every: 0,
            on_evaluation: Box::new(|_| {}),
            heeds_signals: true,
        }
    }

    /// Sets the data to evaluate on. The final weights are evaluated, and the weights during the run if
    /// [`evaluate_every`](Self::evaluate_every) is set.
    #[must_use]
    pub fn test_data(mut self, test: E) -> Self {
        self.test = Some(test);
        self
    }

    /// Sets the device to compute on.
    #[must_use]
    pub fn device(mut self, device: &Device) -> Self {
        self.device = Some(device.clone());
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

    /// Puts the servers on the nodes of a cluster, in turn. By default they are in the driver.
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

    /// Sets how the gradients of one update are combined.
    #[must_use]
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.server.reduction = reduction;
        self
    }

    /// Sets the learning rate.
    #[must_use]
    pub fn learning_rate(mut self, learning_rate: f64) -> Self {
        self.server.learning_rate = learning_rate;
        self
    }

    /// Refuses gradients with a Euclidean norm above `max_norm`.
    #[must_use]
    pub fn max_gradient_norm(mut self, max_norm: f64) -> Self {
        self.server.max_norm = max_norm;
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

    /// Uses a burn optimizer, such as `AdamConfig::new()`, instead of plain SGD.
    #[must_use]
    pub fn optimizer<C, O>(mut self, config: C) -> Self
    where
        C: ElementwiseConfig<Optimizer = O> + Debug + Send + Sync + 'static,
        O: Optimizer + Send + 'static,
        O::State<1>: Send,
    {
        let config = Arc::new(config);
        let described = Arc::clone(&config);
        self.make_rule =
            Arc::new(move |device| Ok(Box::new(OptimizerRule::new(&*config, device)?)));
        self.describe_rule = Arc::new(move || format!("{described:?}"));
        self
    }

    /// Uses an update rule of your own, or [`Sgd::with_momentum`]. `rule` is called once per server.
    /// Processes compare the text that the rule's `Debug` prints, so it should contain the rule's settings.
    #[must_use]
    pub fn update_rule<R: UpdateRule>(
        mut self,
        rule: impl Fn() -> R + Send + Sync + 'static,
    ) -> Self {
        let rule = Arc::new(rule);
        let described = Arc::clone(&rule);
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

    /// Sets how many steps each worker takes.
    #[must_use]
    pub fn iterations(mut self, num_iterations: u64) -> Self {
        self.length = Length::Iterations(num_iterations);
        self
    }

    /// Sets how many times the workers together go through the data. Examples that do not fill one batch of
    /// every worker are left out. The order changes from epoch to epoch.
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

    /// Calls `on_evaluation` after each evaluation during the run. For an example, see [`Report`].
    #[must_use]
    pub fn on_evaluation(mut self, on_evaluation: impl FnMut(&CurvePoint) + 'static) -> Self {
        self.on_evaluation = Box::new(on_evaluation);
        self
    }

    /// Sets whether SIGTERM and Ctrl-C end the training in an orderly way; see [`StopSignal`]. The default
    /// is `true`. Use `false` in a program with its own signal handlers.
    #[must_use]
    pub fn heed_signals(mut self, heeds_signals: bool) -> Self {
        self.heeds_signals = heeds_signals;
        self
    }

    /// Trains until all steps are taken, on this thread and on those of the workers and servers.
    ///
    /// SIGTERM and Ctrl-C end the training earlier. The workers then have 10 s to finish the current step,
    /// the weights are evaluated, and the report says that it was [interrupted](Report::interrupted). A
    /// second signal ends the process at once. The process also ends if it still runs 30 s after the first.
    ///
    /// # Errors
    /// - If a setting cannot work, or the model does not accept the test data. This is found before
    ///   anything is started.
    /// - If a worker or server fails and cannot be replaced.
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
        if self.num_servers == 0 {
            return Err(GroupSpawnError::NoServers.into());
        }
        self.server.consistency.check(self.num_workers)?;
        self.server.check().map_err(GroupSpawnError::Config)?;
        Ok(())
    }

    /// Adds what the processes of a cluster must host to take part in this training. Also adds what they
    /// must agree on: model, data, optimizer, batch size, seed, learning rate and number of workers. A
    /// process that is alone needs no hosts.
    ///
    /// Several trainings can be hosted at once:
    ///
    /// ```
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let train = Mnist::bundled_sample().train;
    /// let trainer = |seed| {
    ///     Trainer::new(ConvNet::init(seed, &device), train.clone()).device(&device).iterations(2)
    /// };
    /// let (first, second) = (trainer(1), trainer(2).name("with another seed"));
    /// let cluster = Cluster::alone(second.hosts(first.hosts(Hosts::new())?)?);
    /// let [one, other] = [first.run_on(&cluster)?, second.run_on(&cluster)?];
    /// assert_ne!(one.weights.to_vec(), other.weights.to_vec());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the default device cannot be used.
    pub fn hosts(&self, hosts: Hosts) -> Result<Hosts, TrainError> {
        let device = self.chosen_device()?;
        let (workers, servers) = (self.worker_facts(&device), self.server_facts());
        let hosts = servers.must_agree(workers.must_agree(hosts));
        let hosts = Facts::default()
            .state("the batch size", self.batch_size)
            .state("the seed", self.seed)
            .state("the learning rate", self.server.learning_rate)
            .state("the number of workers", self.num_workers)
            .must_agree(hosts);
        let variants = Variants::of(&workers, &servers);
        Ok(self.host(hosts, &device, &variants))
    }

    /// What distinguishes the workers of this training, besides their [`WorkerConfig`].
    fn worker_facts(&self, device: &Device) -> Facts {
        let facts = Facts::default().model(&self.model, device);
        self.named(facts.data(&self.train))
    }

    /// What distinguishes the servers of this training, besides their [`ServerArgs`].
    fn server_facts(&self) -> Facts {
        self.named(Facts::default().state("the optimizer", (self.describe_rule)()))
    }

    fn named(&self, facts: Facts) -> Facts {
        match &self.name {
            Some(name) => facts.state("the name of the training", name),
            None => facts,
        }
    }

    fn host(&self, hosts: Hosts, device: &Device, variants: &Variants) -> Hosts {
        let (make_rule, on) = (Arc::clone(&self.make_rule), device.clone());
        let hosts = hosts.host_variant(
            &variants.servers,
            // A restart would silently go back to the initial weights.
            Spawn::new().restart(RestartPolicy::NEVER),
            move |args: ServerArgs| Ok(args.into_server(make_rule(&on)?)?),
        );
        let variant = variants.workers.clone();
        host_variant(hosts, variant, &self.model, device, &self.train)
    }

    fn chosen_device(&self) -> Result<Device, DeviceError> {
        match &self.device {
            Some(device) => Ok(device.clone()),
            None => select_device(default_device_name()),
        }
    }

    /// Trains on a cluster whose nodes have the [`hosts`](Self::hosts) of this training. A node that only
    /// hosts other trainings is an error. The workers are placed on the nodes in turn. If there are no
    /// nodes, they are in this process, which then needs no `hosts`.
    ///
    /// One cluster can run any number of trainings, also at the same time.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    ///
    /// # Panics
    /// As [`run`](Self::run).
    pub fn run_on(mut self, cluster: &Cluster) -> Result<Report, TrainError> {
        self.check()?;
        let stop = match self.heeds_signals {
            true => Some(StopSignal::heed().map_err(TrainError::Signals)?),
            false => None,
        };
        self.server.wait_for_workers = self.num_workers;
        let device = self.chosen_device()?;
        let mut evaluator = match &self.test {
            Some(test) => Some(Evaluator::new(&self.model, &device, test)?),
            None => None,
        };
        // A mistake is returned here. Otherwise it would be a worker that cannot start.
        let one = ModelSource::new(&self.model, &device, &self.train, self.worker_config(0))?;
        let num_steps = match self.length {
            Length::Iterations(iterations) => iterations,
            Length::Epochs(epochs) => epochs.saturating_mul(one.steps_per_epoch()),
        };
        drop(one);
        let initial = initial_weights(&self.model, &device)?;
        if let Some(evaluator) = &mut evaluator {
            // The test data is checked now, and not after hours of training.
            evaluator.try_out(&initial).map_err(TrainError::TestData)?;
        }
        let variants = match cluster.is_alone() {
            // There are no other processes, so there is nothing to compare.
            true => Variants::here(),
            false => Variants::of(&self.worker_facts(&device), &self.server_facts()),
        };
        let here = self.host(Hosts::new(), &device, &variants);
        let servers = self.spawn_servers(cluster, &initial, &device, &variants, &here)?;
        let spawn = SpawnOn::new().variant(&variants.workers).here(here);
        let configs = (0..self.num_workers).map(|rank| self.worker_config(rank));
        let started: Vec<_> = configs
            .map(|config| {
                let actor = cluster.spawn_with::<ModelWorker<M>>(spawn.clone(), config);
                (config, actor)
            })
            .collect();
        let workers = started
            .into_iter()
            .map(|(config, actor)| Ok(Worker::new(config, actor.wait()?, cluster, &spawn)));
        let workers = workers.collect::<Result<Vec<_>, SpawnOnError>>()?;
        let driving = self.drive(servers, workers, evaluator, num_steps, stop.as_ref());
        actor::try_run(driving).map_err(TrainError::EventLoop)?
    }

    fn worker_config(&self, rank: usize) -> WorkerConfig {
        WorkerConfig {
            worker: WorkerId(u32::try_from(rank).expect("the number of workers was checked")),
            num_workers: self.num_workers,
            batch_size: self.batch_size,
            seed: self.seed,
        }
    }

    fn spawn_servers(
        &self,
        cluster: &Cluster,
        initial: &Weights,
        device: &Device,
        variants: &Variants,
        here: &Hosts,
    ) -> Result<ServerGroup, TrainError> {
        if self.servers_on_nodes {
            let place = SpawnOn::from(Placement::RoundRobin).variant(&variants.servers);
            let places = vec![place.here(here.clone()); self.num_servers];
            let spawn = ServerGroup::spawn_on(cluster, places, initial, self.server);
            return Ok(actor::try_run(spawn).map_err(TrainError::EventLoop)??);
        }
        // All rules are made first, because a server that is started must get one.
        let rules = (0..self.num_servers).map(|_| (self.make_rule)(device));
        let mut rules = rules.collect::<Result<Vec<_>, _>>()?.into_iter();
        let rule = |_: Range<usize>| rules.next().expect("one for each server");
        Ok(ServerGroup::spawn(
            initial,
            self.num_servers,
            self.server,
            rule,
        )?)
    }

    async fn drive(
        mut self,
        servers: ServerGroup,
        workers: Vec<Worker<M>>,
        mut evaluator: Option<Evaluator<M>>,
        num_steps: u64,
        stop: Option<&StopSignal>,
    ) -> Result<Report, TrainError> {
        let started = Instant::now();
        let mut curve = Vec::new();
        let outcome = {
            let given_up = stop_workers(stop, &workers).shared();
            let runs = workers
                .iter()
                .map(|worker| worker.run(&servers, num_steps, given_up.clone()));
            let runs = std::pin::pin!(try_join_all(runs));
            let every = self.evaluate_every;
            let watch = std::pin::pin!(async {
                match &mut evaluator {
                    Some(evaluator) if every > 0 => {
                        let on_evaluation = |point: CurvePoint| {
                            (self.on_evaluation)(&point);
                            curve.push(point);
                        };
                        watch(&servers, evaluator, every, started, on_evaluation).await
                    }
                    _ => std::future::pending().await,
                }
            });
            // This also works while a worker waits for something else than its steps.
            let stopping = std::pin::pin!(given_up.then(|()| std::future::pending()));
            match select(runs, select(watch, stopping)).await {
                Either::Left((outcome, _)) => outcome,
                Either::Right((Either::Left((error, _)) | Either::Right((error, _)), _)) => {
                    Err(error)
                }
            }
        };
        let elapsed = started.elapsed();
        let runs = match outcome {
            Ok(runs) => runs,
            Err(error) => {
                // The other workers must not go on in the background, or wait for the one that failed.
                workers.iter().for_each(Worker::kill);
                return Err(self.incomplete(error, &servers, curve, elapsed).await);
            }
        };
        let is_cut_short = runs.iter().any(|run| run.is_cut_short);
        let mut report = self.report(&servers, runs, curve, elapsed).await?;
        report.interrupted = stop.and_then(StopSignal::received).filter(|_| is_cut_short);
        if let Some(evaluator) = &mut evaluator {
            match evaluator.evaluate(&report.weights) {
                Ok(evaluation) => report.final_evaluation = Some(evaluation),
                Err(error) => return Err(report.incomplete(error.into())),
            }
        }
        match report.find_divergence() {
            Some(what) => Err(report.incomplete(TrainError::Diverged { what })),
            None => Ok(report),
        }
    }

    /// Adds to an error the result until then, as far as the servers still know it.
    async fn incomplete(
        &self,
        error: TrainError,
        servers: &ServerGroup,
        curve: Vec<CurvePoint>,
        elapsed: Duration,
    ) -> TrainError {
        let runs = (0..self.num_workers)
            .map(|_| WorkerRun::default())
            .collect();
        match self.report(servers, runs, curve, elapsed).await {
            Ok(report) if report.num_updates > 0 => report.incomplete(error),
            // Nothing was trained, or the weights are lost with their servers.
            _ => error,
        }
    }

    async fn report(
        &self,
        servers: &ServerGroup,
        runs: Vec<WorkerRun>,
        curve: Vec<CurvePoint>,
        elapsed: Duration,
    ) -> Result<Report, GroupError> {
        let weights = servers.pull(PullVersion::Latest).await?;
        let status = servers.status().await?;
        let status = status.into_iter().find_map(|status| status.coordinator);
        let status = status.expect("the first server of a group coordinates");
        let mut staleness = Histogram::default();
        for worker in status.workers.values() {
            staleness.merge(&worker.staleness);
        }
        let total = |count: fn(&WorkerStatus) -> u64| status.workers.values().map(count).sum();
        let num_settled: u64 = total(WorkerStatus::num_settled);
        let sum = |number: fn(&WorkerRun) -> u64| runs.iter().map(number).sum::<u64>();
        let (num_told, told_examples) =
            (sum(|run| run.num_told), sum(|run| run.report.num_examples));
        // Every batch is full, so the batches that were not reported had the same number of examples.
        let per_gradient = told_examples.checked_div(num_told);
        let per_gradient = per_gradient.unwrap_or(self.batch_size as u64);
        let num_untold = num_settled.saturating_sub(num_told);
        let time = |time: fn(&WorkerRun) -> Duration| {
            (num_untold == 0).then(|| runs.iter().map(time).sum::<Duration>())
        };
        Ok(Report {
            consistency: status.consistency,
            reduction: status.reduction,
            interrupted: None,
            num_workers: self.num_workers,
            num_servers: self.num_servers,
            weights,
            final_evaluation: None,
            curve,
            num_updates: status.version.0,
            num_applied: total(|worker| worker.num_applied),
            num_dropped_late: total(|worker| worker.num_dropped_late),
            num_refused: total(|worker| worker.num_refused),
            num_examples: told_examples + num_untold * per_gradient,
            num_untold,
            staleness,
            num_worker_restarts: runs.iter().map(|run| run.num_restarts).sum(),
            elapsed,
            compute_time: time(|run| run.report.compute_time),
            wait_time: time(|run| run.report.wait_time),
            losses: runs.into_iter().map(|run| run.report.losses).collect(),
        })
    }
}

/// The variants of workers and servers that belong to one training.
struct Variants {
    workers: String,
    servers: String,
}

impl Variants {
    fn of(workers: &Facts, servers: &Facts) -> Self {
        Self {
            workers: workers.variant(WORKERS),
            servers: servers.variant("optimizer"),
        }
    }

    fn here() -> Self {
        Self {
            workers: WORKERS.to_owned(),
            servers: "optimizer".to_owned(),
        }
    }
}

/// Stops the workers after a signal. Becomes ready when their time for the current step is over.
async fn stop_workers<M: Model>(stop: Option<&StopSignal>, workers: &[Worker<M>]) {
    let Some(stop) = stop else {
        return std::future::pending().await;
    };
    stop.wait().await;
    workers.iter().for_each(Worker::stop);
    actix::clock::sleep(LAST_STEP).await;
    tracing::warn!("ending before all steps are finished, after {LAST_STEP:?}");
}

/// Evaluates the weights every so many updates, as long as it is polled. Returns only if an evaluation
/// fails.
async fn watch<M: Model>(
    servers: &ServerGroup,
    evaluator: &mut Evaluator<M>,
    every: u64,
    started: Instant,
    mut on_evaluation: impl FnMut(CurvePoint),
) -> TrainError {
    let mut next = every;
    loop {
        let weights = match servers.pull(PullVersion::AtLeast(Version(next))).await {
            Ok(weights) => weights,
            Err(error) => return error.into(),
        };
        let (version, elapsed) = (weights.version(), started.elapsed());
        match evaluator.evaluate(&weights) {
            Ok(evaluation) => on_evaluation(CurvePoint {
                version,
                elapsed,
                evaluation,
            }),
            Err(error) => return error.into(),
        }
        next = (version.0 / every + 1) * every;
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
