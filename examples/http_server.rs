//! Servers for workers in any language: they join, pull and push over HTTP (docs/http-api.md).
//!
//! ```text
//! cargo run --release --example http_server -- --num-workers 2
//! curl http://127.0.0.1:8265/v1/status
//! python examples/python/torch_worker.py --data-dir DIR --worker 0 --num-workers 2
//! python examples/python/torch_worker.py --data-dir DIR --worker 1 --num-workers 2
//! ```
//!
//! The workers compute gradients of `ConvNet`, here with PyTorch. Prints the accuracy on the test set
//! about every 50 updates, says every five seconds for whom it waits if it does, and ends when all
//! workers have come and left, or with an error when nothing can be learned any more.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use ps::actors::cluster::{Cluster, ClusterConfig, Hosts};
use ps::actors::http;
use ps::actors::net::Token;
use ps::actors::server::{CoordinatorStatus, GroupError};
use ps::actors::worker::MAX_REFUSED;
use ps::cli::{self, CheckpointArgs, say};
use ps::prelude::*;

/// A parameter server for workers that speak HTTP.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// Where to listen. Other hosts need a token: at least 16 characters in $PS_TOKEN.
    #[arg(long, default_value = "127.0.0.1:8265")]
    listen: SocketAddr,
    /// When gradients are applied: bsp, asp, ssp:N or k-of-n:K.
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
    checkpoints: CheckpointArgs,
}

const EXAMPLES: &str = "Examples:
  http_server --num-workers 2             wait for two workers, then train in rounds
  http_server --consistency asp --checkpoint-dir runs/one
  PS_TOKEN=... http_server --listen 0.0.0.0:8265    workers of other hosts need the token
  python examples/python/torch_worker.py --data-dir DIR --worker 0 --num-workers 2";

fn main() -> ExitCode {
    cli::main(serve)
}

fn serve(args: Args) -> Result<ExitCode> {
    let device = select_device(default_device_name())?;
    let model = ConvNet::init(0, &device);
    let mnist = Mnist::load(&MnistOptions {
        directory: args.data_dir,
        ..MnistOptions::default()
    })?;
    let mut evaluator = Evaluator::new(&model, &device, &mnist.test)?;

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
    let token = std::env::var("PS_TOKEN").ok().map(Token::new).transpose()?;
    let cluster = ClusterConfig {
        token,
        ..ClusterConfig::default()
    };
    let routes = http::routes(servers.clone());
    let cluster = Cluster::listen_with(cluster, args.listen, Hosts::new(), routes)?;
    let address = cluster.address().context("it listens on TCP")?;
    say!("Waiting for workers: http://{address}/v1/status");

    let mut next_update = 0;
    let mut waits = Waits::default();
    // SIGTERM and Ctrl-C end the loop, not the process.
    let stop = StopSignal::heed()?;
    let mut refused = Refused::default();
    loop {
        let interrupted = stop.received();
        // The workers need no driver: looking at them now and then is all there is to do here.
        std::thread::sleep(Duration::from_millis(100));
        let group = servers.clone();
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
        let status = status[0].coordinator.as_ref().context("it decides")?;
        let workers = &status.workers;
        // Of workers that came before a restart, only the gradients count.
        let num_seen = workers.values().filter(|w| w.num_joins > 0).count();
        let have_all_left =
            num_seen >= args.num_workers.max(1) && workers.values().all(|w| !w.is_member);
        let update = weights.version().0;
        let what = refused.find_divergence(status, have_all_left);
        if let Some(what) = what.or_else(|| check_weights(&weights)) {
            return Err(TrainError::Diverged { what }.into());
        }
        if update >= next_update || have_all_left || interrupted.is_some() {
            let accuracy = evaluator.accuracy_percent(&weights)?;
            say!("Update {update}: \taccuracy is {accuracy:.1}");
            next_update = update / 50 * 50 + 50;
        }
        if have_all_left || interrupted.is_some() {
            if let Some(signal) = interrupted {
                say!("Interrupted by {signal}.");
            }
            checkpoints.save(&server);
            let is_saved = checkpoints.finish().has(weights.version());
            return Ok(cli::end_of_training(interrupted, is_saved));
        }
        if checkpoints.is_due(weights.version()) {
            checkpoints.save(&server);
        }
        if waits.are_to_be_named(update) {
            let num_members = workers.values().filter(|w| w.is_member).count();
            let num_workers = args.num_workers;
            say!(
                "Update {update}: \twaiting for {}; {num_seen} of {num_workers} workers have come, \
                 {num_members} are here (a silent one is lost after {} s)",
                status.awaited,
                args.worker_lease
            );
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
