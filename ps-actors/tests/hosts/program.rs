//! What this program does when a test starts it on a host: it trains, as driver or as node.
//!
//! Gradients are whole numbers, and few steps are taken, so every sum is exact in `f32`: weights
//! are as expected or they are wrong.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::fmt::Debug;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::exit;
use std::thread;
use std::time::Duration;

use futures_util::future::{Either, join_all, select};
use ps_actors::cluster::{
    Cluster, ClusterConfig, Hosts, Placement, SpawnOn, StartError, Transport,
};
use ps_actors::group::{ServerArgs, ServerGroup};
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::launch::{self, LaunchOptions};
use ps_actors::net::tls::DEFAULT_NAME;
use ps_actors::net::{NetConfig, Tls, TlsFiles};
use ps_actors::rule::Sgd;
use ps_actors::server::{
    Consistency, CoordinatorStatus, PullVersion, Reduction, ServerConfig, WorkerStatus,
};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{
    DataWorker, GradientSource, HostedSource, LocalGradient, RunSteps, SourceError, StopSteps,
};
use ps_actors::{ActorRef, RestartPolicy, Spawn, actor};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

/// The variable that has the [`Plan`], as JSON.
pub(crate) const PLAN: &str = "PS_HOSTS_TEST_PLAN";

/// The files of a plan's certificates.
pub(crate) const AUTHORITY: &str = "authority.pem";
pub(crate) const CERTIFICATE: &str = "certificate.pem";
pub(crate) const KEY: &str = "key.pem";

/// Worker `n` is on the node of rank `n + 1`.
const NUM_WORKERS: u32 = 2;

/// What a step computes for, so that a few workers leave time for others on the same machine.
const COMPUTE: Duration = Duration::from_millis(1);

/// How often the driver looks whether there is something new to say.
const GLANCE: Duration = Duration::from_millis(10);

/// What is to be done; the same for driver and nodes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) consistency: Consistency,
    pub(crate) len: usize,
    /// Of each worker; without end if the driver is to be told to stop.
    pub(crate) num_steps: u64,
    /// On which ranks the servers are.
    pub(crate) servers: Vec<u32>,
    pub(crate) lease: Duration,
    /// Nodes that are more patient than the driver.
    pub(crate) node_lease: Duration,
    /// A directory with the certificates that all use, if they do.
    pub(crate) certificates: Option<PathBuf>,
}

/// Plays the part that the launch variables say; returns the exit code.
pub(crate) fn play(plan: &Plan) -> u8 {
    tracing::subscriber::set_global_default(Log).unwrap();
    let (sender, commands) = mpsc::unbounded_channel();
    thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            // The driver may have no need of commands any more.
            let _ = sender.send(line);
        }
        // The test is gone.
        exit(1);
    });
    match launch(plan) {
        Ok(Some(cluster)) => actor::run(drive(cluster, plan, commands)),
        Ok(None) => launch::EXIT_OK,
        Err(error) => {
            let code = error.exit_code();
            say(&format!("could not start: {}", chain(&error)));
            code
        }
    }
}

fn launch(plan: &Plan) -> Result<Option<Cluster>, StartError> {
    let place = launch::from_env(launch::env::read)?.expect("the test sets the variables");
    let is_driver = place.is_driver();
    let lease = if is_driver {
        plan.lease
    } else {
        plan.node_lease
    };
    let mut net = NetConfig::default().with_process_lease(lease);
    // Whoever is more patient must still be heard by the other.
    net.heartbeat = plan.lease / 5;
    let tls = plan.certificates.as_ref().map(|directory| {
        let files = TlsFiles {
            authority: directory.join(AUTHORITY),
            certificate: directory.join(CERTIFICATE),
            key: directory.join(KEY),
            name: DEFAULT_NAME.to_owned(),
            mutual: true,
        };
        Tls::from_files(&files).unwrap()
    });
    let config = ClusterConfig {
        tls,
        // A Unix socket would be found from every host: they share their file system.
        transport: Transport::Tcp,
        net,
        ..ClusterConfig::default()
    };
    let hosts = Hosts::new()
        .host(|args: SourceArgs| Ok(DataWorker::new(WorkerId(args.worker), Source(args))))
        .host_with(
            Spawn::new().restart(RestartPolicy::NEVER),
            |args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?),
        );
    Cluster::launch(&LaunchOptions::default(), config, hosts)
}

// The gradients.

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct SourceArgs {
    worker: u32,
    len: usize,
}

/// Says when it ends, which is when its actor does.
#[derive(Debug)]
struct Source(SourceArgs);

impl GradientSource for Source {
    fn gradient(&mut self, clock: Clock, _: &Weights) -> Result<LocalGradient, SourceError> {
        let SourceArgs { worker, len } = self.0;
        let mut values = vec![0.0; len];
        add_gradient(&mut values, worker, clock, 1.0);
        // Stands for the computation itself; nothing waits for this time to have passed.
        thread::sleep(COMPUTE);
        Ok(LocalGradient {
            gradient: Gradient::new(values),
            loss: 0.0,
            num_examples: 1,
        })
    }
}

impl HostedSource for Source {
    type Args = SourceArgs;
}

impl Drop for Source {
    fn drop(&mut self) {
        say(&format!("worker {} has ended", self.0.worker));
    }
}

/// No two of the first few gradients are the same, and all parts of the vector are used.
fn add_gradient(values: &mut [f32], worker: u32, clock: Clock, factor: f32) {
    let len = values.len();
    let step = clock.0 as usize;
    values[step * 7919 % len] += factor * (1 + step % 16) as f32;
    values[len - 1 - step % len] += factor * (1 + worker) as f32;
}

// The driver.

async fn drive(cluster: Cluster, plan: &Plan, mut commands: mpsc::UnboundedReceiver<String>) -> u8 {
    let initial = Weights::initial(Layout::flat(plan.len), vec![0.0; plan.len]);
    let config = ServerConfig {
        consistency: plan.consistency,
        reduction: Reduction::Sum,
        learning_rate: 1.0,
        wait_for_workers: NUM_WORKERS as usize,
        ..ServerConfig::default()
    };
    let places = plan.servers.iter().copied().map(Placement::Rank);
    let servers = ServerGroup::spawn_on(&cluster, places, &initial, config).await;
    let training = Training {
        cluster,
        plan,
        servers: servers.unwrap(),
        is_stopping: Cell::new(false),
        workers: (0..NUM_WORKERS).map(|_| RefCell::default()).collect(),
    };
    {
        let workers = join_all((0..NUM_WORKERS).map(|worker| training.run(worker)));
        let stop = async {
            while let Some(command) = commands.recv().await {
                assert_eq!(command, "stop");
                training.stop();
            }
        };
        let beside = async { tokio::join!(training.tell_news(), stop) };
        let (workers, beside) = (std::pin::pin!(workers), std::pin::pin!(beside));
        match select(workers, beside).await {
            Either::Left(_) => {}
            Either::Right(((never, ()), _)) => match never {},
        }
    }
    training.check().await;
    launch::EXIT_OK
}

struct Training<'a> {
    cluster: Cluster,
    plan: &'a Plan,
    servers: ServerGroup,
    is_stopping: Cell<bool>,
    workers: Vec<RefCell<Option<ActorRef<DataWorker<Source>>>>>,
}

impl Training<'_> {
    /// Lets a worker take all its steps, and replaces it when it is lost.
    async fn run(&self, worker: u32) {
        while let Some(actor) = self.start(worker).await {
            let settled = self.status().await.workers.get(&WorkerId(worker)).cloned();
            let num_settled = settled.map_or(0, |worker| worker.num_settled());
            let run = RunSteps {
                servers: self.servers.clone(),
                num_steps: self.plan.num_steps.saturating_sub(num_settled),
            };
            say(&format!("worker {worker} begins after {num_settled}"));
            self.workers[worker as usize].replace(Some(actor.clone()));
            let run = actor.ask(run);
            if self.is_stopping.get() {
                self.stop();
            }
            let why = match run.await {
                Ok(Ok(_)) => return,
                Ok(Err(error)) => chain(&error),
                Err(error) => chain(&error),
            };
            say(&format!("worker {worker} is lost: {why}"));
            self.servers.report_lost(WorkerId(worker)).await.unwrap();
            // If it lives after all, it must not go on beside the new one.
            actor.kill();
        }
    }

    /// Starts a worker's actor when its node is there; `None` when training is to stop.
    async fn start(&self, worker: u32) -> Option<ActorRef<DataWorker<Source>>> {
        while !self.is_stopping.get() {
            let args = SourceArgs {
                worker,
                len: self.plan.len,
            };
            let place = SpawnOn::new().place(Placement::Rank(worker + 1));
            match self.cluster.spawn_with(place, args).await {
                Ok(actor) => return Some(actor),
                Err(error) => tracing::info!(worker, error = chain(&error), "not started"),
            }
            tokio::time::sleep(GLANCE).await;
        }
        None
    }

    fn stop(&self) {
        self.is_stopping.set(true);
        for worker in &self.workers {
            if let Some(actor) = &*worker.borrow() {
                // One that is lost takes no more steps anyway.
                let _ = actor.tell(StopSteps);
            }
        }
    }

    async fn status(&self) -> CoordinatorStatus {
        let status = self.servers.status().await.unwrap();
        let mut coordinators = status.into_iter().filter_map(|status| status.coordinator);
        coordinators.next().expect("the first server coordinates")
    }

    /// Says who is there and how many gradients were applied, whenever that changes.
    async fn tell_news(&self) -> Infallible {
        let mut said = [String::new(), String::new()];
        loop {
            let nodes = self.cluster.nodes().into_iter();
            let nodes = nodes.map(|info| format!(" {}.{}", info.node.rank, info.node.incarnation));
            let status = self.status().await;
            let applied = (0..NUM_WORKERS).map(|worker| {
                let worker = status.workers.get(&WorkerId(worker));
                format!(" {}", worker.map_or(0, |worker| worker.num_applied))
            });
            let news = [
                format!("nodes{}", nodes.collect::<String>()),
                format!("applied{}", applied.collect::<String>()),
            ];
            for (said, new) in said.iter_mut().zip(news) {
                if *said != new {
                    say(&new);
                    *said = new;
                }
            }
            tokio::time::sleep(GLANCE).await;
        }
    }

    /// Compares the weights with the sum of the gradients that were applied, each once.
    async fn check(&self) {
        let status = self.status().await;
        let weights = self.servers.pull(PullVersion::Latest).await.unwrap();
        let mut expected = vec![0.0; self.plan.len];
        for worker in 0..NUM_WORKERS {
            let WorkerStatus {
                num_applied,
                num_dropped_late,
                num_refused,
                ..
            } = status.workers[&WorkerId(worker)];
            assert_eq!((num_dropped_late, num_refused), (0, 0));
            let is_all = self.is_stopping.get() || num_applied == self.plan.num_steps;
            assert!(is_all, "{num_applied} of {} steps", self.plan.num_steps);
            for clock in (0..num_applied).map(Clock) {
                add_gradient(&mut expected, worker, clock, -1.0);
            }
        }
        let verdict = match weights.to_vec() == expected {
            true => "exact",
            false => "wrong",
        };
        say(&format!("{verdict}: {status:?}"));
    }
}

// What the test gets to read.

/// Says a line to the test; marked, because the test harness writes to the same place.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    // Whoever should read it may be gone.
    let _ = out.write_all(format!("\n@{line}\n").as_bytes());
    let _ = out.flush();
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Writes what this crate logs to standard error, for tests that fail, and some that wait for it.
struct Log;

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0 += &format!(" {field}={value:?}");
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let is_ours = ["ps_actors", "ps_runtime"]
            .iter()
            .any(|name| metadata.target().starts_with(name));
        is_ours && *metadata.level() <= Level::DEBUG
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(event.metadata().level().to_string());
        event.record(&mut line);
        let _ = writeln!(io::stderr(), "{}", line.0);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}
