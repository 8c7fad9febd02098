//! Servers for workers in any language: they join, pull and push over HTTP (docs/http-api.md).
//!
//! ```text
//! cargo run --release --example http_server -- --num-workers 2 --dashboard
//! curl http://127.0.0.1:8265/v1/status
//! python examples/python/torch_worker.py --data-dir DIR --worker 0 --num-workers 2
//! python examples/python/torch_worker.py --data-dir DIR --worker 1 --num-workers 2
//! ```
//!
//! The workers compute gradients of `ConvNet`, here with PyTorch. Prints the accuracy on the test set
//! about every 50 updates, says every five seconds for whom it waits if it does, and ends when all
//! workers have come and left, or with an error when nothing can be learned any more. The flags of
//! "What is shown" work as in the other examples, but nobody knows how the workers spend their time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use ps::actors::cluster::{Cluster, ClusterConfig, Hosts};
use ps::actors::http::{Api, HttpConfig};
use ps::actors::net::Token;
use ps::actors::server::{CoordinatorStatus, GroupError};
use ps::actors::worker::MAX_REFUSED;
use ps::cli::{self, CheckpointArgs, DeviceArgs, ShowArgs, say};
use ps::controls::LoopControls;
use ps::observe::{Observers, Settings, Visitors};
use ps::prelude::*;

/// A parameter server for workers that speak HTTP.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// Where to listen. Other hosts need a token: at least 16 characters in $PS_TOKEN.
    #[arg(long, default_value = "127.0.0.1:8265")]
    listen: SocketAddr,
    /// When gradients are applied: bsp, asp, ssp:BOUND or k-of-n:K.
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
    /// How many workers must have joined before the first synchronous round closes.
    #[arg(long, default_value_t = 1)]
    num_workers: usize,
    /// How long a worker may be silent, in seconds, before the others go on without it.
    #[arg(long, default_value_t = 10.0)]
    worker_lease: f64,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-2)]
    learning_rate: f64,
    /// Directory with the four MNIST files, as in the other examples.
    #[arg(long)]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    #[command(flatten)]
    show: ShowArgs,
}

const EXAMPLES: &str = "Examples:
  http_server --num-workers 2             wait for two workers, then train in rounds
  http_server --consistency asp --checkpoint-dir runs/one
  http_server --dashboard                 the page is at http://127.0.0.1:8266/
  PS_TOKEN=... http_server --listen 0.0.0.0:8265    workers of other hosts need the token
  python examples/python/torch_worker.py --data-dir DIR --worker 0 --num-workers 2";

fn main() -> ExitCode {
    cli::main(serve)
}

fn serve(mut args: Args) -> Result<ExitCode> {
    // Both have the same port if nobody chooses another one.
    let page = args.show.dashboard.dashboard.as_mut();
    if let Some(page) = page.filter(|page| **page == args.listen && page.port() != 0) {
        page.set_port(page.port().wrapping_add(1));
    }
    let device = args.device.device()?;
    let model = ConvNet::init(0, &device);
    let mnist = Mnist::load(&MnistOptions {
        directory: args.data_dir.clone(),
        shows_progress: !args.show.quiet,
        ..MnistOptions::default()
    })?;
    let evaluator = Evaluator::new(&model, &device, &mnist.test)?;

    let config = ServerConfig {
        consistency: args.consistency,
        learning_rate: args.learning_rate,
        worker_lease: Some(
            Duration::try_from_secs_f64(args.worker_lease).context("--worker-lease")?,
        ),
        wait_for_workers: args.num_workers,
        ..ServerConfig::default()
    };
    let initial = initial_weights(&model, &device)?;
    let (mut checkpoints, found) = args.checkpoints.open(&initial, Sgd::new())?;
    let start = found.as_ref().map_or(Start::from(&initial), Start::from);
    let server = ParameterServer::new(start, Sgd::new(), config)?.spawn()?;
    checkpoints.start_log(&server, start)?;
    let servers = ServerGroup::from(server.clone());
    let observers = Observers::start(args.show.observers());
    observers.run_started(args.settings(&initial), start.weights().version());
    let visitors = Visitors::new(&observers, &servers, &run(servers.status())?);
    let (checkpoints, told) = (observers.see_checkpoints(checkpoints), visitors.clone());
    let controls = (args.show.controls).in_loop(servers.clone(), &observers, &checkpoints);
    let token = std::env::var("PS_TOKEN").ok().map(Token::new).transpose()?;
    let cluster = ClusterConfig {
        token,
        ..ClusterConfig::default()
    };
    let api = Api::watched(HttpConfig::default(), move |seen| told.tell(seen));
    api.open(servers.clone());
    let routes = api.routes().merge(args.show.routes());
    let cluster = Cluster::listen_with(cluster, args.listen, Hosts::new(), routes)?;
    let address = cluster.address().context("it listens on TCP")?;
    say!("Waiting for workers: http://{address}/v1/status");

    let mut running = Running {
        num_workers: args.num_workers,
        worker_lease: args.worker_lease,
        servers,
        evaluator,
        checkpoints,
        visitors,
        controls: controls.servers_decide(),
        observers: observers.clone(),
    };
    let mut ended = running.until_the_end();
    if ended.is_ok() {
        let weights = run(running.servers.pull(PullVersion::Latest));
        let exported = weights
            .map_err(anyhow::Error::from)
            .and_then(|weights| Ok((args.checkpoints).export(&model, &device, &weights)?));
        ended = exported.and(ended);
    }
    api.close();
    // What was settled for requests that were not answered any more. If the servers cannot say it, nobody can.
    if let Ok(status) = run(running.servers.status()) {
        running.visitors.last_look(&status);
    }
    match &ended {
        Ok(_) => observers.run_ended(),
        Err(error) => observers.run_failed(error.as_ref()),
    }
    ended
}

impl Args {
    fn settings(&self, initial: &Weights) -> Settings {
        let mut settings = Settings::default();
        settings.model = std::any::type_name::<ConvNet>().to_owned();
        settings.num_weights = initial.len();
        settings.num_workers = self.num_workers;
        settings.num_servers = 1;
        settings.learning_rate = self.learning_rate;
        settings.consistency = self.consistency.to_string();
        settings.optimizer = format!("{:?}", Sgd::new());
        settings
    }
}

/// What the program looks after while workers come, push and leave.
struct Running {
    num_workers: usize,
    worker_lease: f64,
    servers: ServerGroup,
    evaluator: Evaluator<ConvNet>,
    checkpoints: Checkpoints,
    visitors: Visitors,
    controls: LoopControls,
    observers: Observers,
}

impl Running {
    fn until_the_end(&mut self) -> Result<ExitCode> {
        let mut next_update = 0;
        let mut waits = Waits::default();
        // SIGTERM and Ctrl-C end the loop, not the process.
        let stop = StopSignal::heed()?;
        let mut refused = Refused::default();
        loop {
            let interrupted = stop.received();
            // The workers need no driver: looking at them now and then is all there is to do here, and what the
            // dashboard asks for.
            std::thread::sleep(Duration::from_millis(100));
            self.controls.heed(&stop, &mut self.checkpoints);
            let group = self.servers.clone();
            let looked = run(async move {
                let status = group.status().await?;
                Ok::<_, GroupError>((status, group.pull(PullVersion::Latest).await?))
            });
            let (status, weights) = match looked {
                Ok(looked) => looked,
                // The servers have too much to do to be looked at.
                Err(error) if error.is_for_now() => continue,
                Err(error) => return Err(error.into()),
            };
            self.visitors.look(&status);
            let status = status[0].coordinator.as_ref().context("it decides")?;
            let workers = &status.workers;
            // Of workers that came before a restart, only the gradients count.
            let num_seen = workers.values().filter(|w| w.num_joins > 0).count();
            let have_all_left =
                num_seen >= self.num_workers.max(1) && workers.values().all(|w| !w.is_member);
            let update = weights.version().0;
            let what = refused.find_divergence(status, have_all_left);
            if let Some(what) = what.or_else(|| check_weights(&weights)) {
                return Err(TrainError::Diverged { what }.into());
            }
            if update >= next_update || have_all_left || interrupted.is_some() {
                let (observers, evaluator) = (&self.observers, &mut self.evaluator);
                let accuracy = observers.accuracy_percent(evaluator, &weights)?;
                say!("Update {update}: \taccuracy is {accuracy:.1}");
                next_update = update / 50 * 50 + 50;
            }
            if have_all_left || interrupted.is_some() {
                if let Some(signal) = interrupted {
                    say!("Interrupted by {signal}.");
                }
                run(self.checkpoints.save_group(&self.servers));
                let is_saved = self.checkpoints.finish().has(weights.version());
                return Ok(cli::end_of_training(interrupted, is_saved));
            }
            if self.checkpoints.is_due(weights.version()) {
                run(self.checkpoints.save_group(&self.servers));
            }
            if waits.are_to_be_named(update) {
                let num_members = workers.values().filter(|w| w.is_member).count();
                let (num_workers, lease) = (self.num_workers, self.worker_lease);
                say!(
                    "Update {update}: \t{}waiting for {}; {num_seen} of {num_workers} workers have come, \
                     {num_members} are here (a silent one is lost after {lease} s)",
                    if status.is_paused { "paused; " } else { "" },
                    status.awaited,
                );
            }
        }
    }
}

fn check_weights(weights: &Weights) -> Option<String> {
    let mut numbers = weights.segments().iter().flat_map(|part| part.data());
    let is_bad = numbers.any(|weight| !weight.is_finite());
    is_bad.then(|| "the weights are not finite".to_owned())
}

/// Notices that gradients are refused and none is applied, as a Rust worker does for itself (S-11).
#[derive(Default)]
struct Refused {
    version: Version,
    /// How many of each worker were refused before.
    before: BTreeMap<WorkerId, u64>,
}

impl Refused {
    fn find_divergence(
        &mut self,
        status: &CoordinatorStatus,
        have_all_left: bool,
    ) -> Option<String> {
        let workers = || status.workers.iter();
        let num_refused: u64 = workers().map(|(_, worker)| worker.num_refused).sum();
        if have_all_left && num_refused > 0 && workers().all(|(_, w)| w.num_applied == 0) {
            return Some(format!("all {num_refused} gradients were refused"));
        }
        if self.version != status.version {
            self.version = status.version;
            self.before = workers().map(|(&id, w)| (id, w.num_refused)).collect();
        }
        let refused = |id: &WorkerId| {
            let before = self.before.get(id).copied().unwrap_or_default();
            status.workers[id].num_refused.saturating_sub(before)
        };
        let members = workers().filter(|(_, worker)| worker.is_member);
        let members: Vec<WorkerId> = members.map(|(&id, _)| id).collect();
        // Some may wait for the others: then what these do counts.
        let active = match status.awaited.workers.is_empty() {
            true => &members,
            false => &status.awaited.workers,
        };
        let least = active.iter().map(refused).min()?;
        let num_workers = active.len();
        (least > MAX_REFUSED).then(|| {
            format!(
                "{least} gradients in a row of each of {num_workers} workers were refused, and nobody's \
                 was applied"
            )
        })
    }
}

/// Notices that nothing goes on.
struct Waits {
    update: u64,
    since: Instant,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            update: 0,
            since: Instant::now(),
        }
    }
}

impl Waits {
    /// Whether there was no update for five seconds, every five seconds.
    fn are_to_be_named(&mut self, update: u64) -> bool {
        if self.update == update && self.since.elapsed() < Duration::from_secs(5) {
            return false;
        }
        let is_stuck = self.update == update;
        *self = Self {
            update,
            since: Instant::now(),
        };
        is_stuck
    }
}
