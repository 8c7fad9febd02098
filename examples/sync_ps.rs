//! Synchronous parameter-server training, driven from here: Ray's `sync` example, typed.
//!
//! In each iteration all workers compute a gradient on the same weights, and the server applies
//! their *sum* (as Ray's example does; with n workers an n times longer step than their mean).
//!
//! ```text
//! cargo run --release --example sync_ps
//! cargo run --release --example sync_ps -- --processes 3
//! ```
//!
//! The second line runs the two workers in processes of their own.
//!
//! Prints `Iter 0:  accuracy is …` every 10 updates and ends with `Final accuracy is …`, the
//! percentage of right answers on the whole test set: about 88 after 200 iterations on all of
//! MNIST.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use ps::cli::{
    self, ChaosArgs, CheckpointArgs, ClusterArgs, DataArgs, ServerPlaces, ShowArgs, TrainArgs, say,
};
use ps::observe::Observers;
use ps::prelude::*;

/// Synchronous parameter-server training on MNIST, driven by this program.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    #[command(flatten)]
    show: ShowArgs,
    #[command(flatten)]
    chaos: ChaosArgs,
}

const EXAMPLES: &str = "Examples:
  sync_ps                                two workers in this process
  sync_ps --processes 3                  two workers in processes of their own
  sync_ps --num-workers 4 --iterations 500 --learning-rate 0.005
  sync_ps --checkpoint-dir runs/one --resume   go on after an interruption";

fn main() -> ExitCode {
    cli::main(train)
}

fn train(
    Args {
        train: args,
        data,
        cluster,
        checkpoints: saving,
        show,
        chaos,
    }: Args,
) -> Result<ExitCode> {
    ensure!(args.num_workers > 0, "--num-workers must be at least 1");
    let device = data.device()?;
    let mnist = data.mnist()?;
    let model = ConvNet::init(args.seed, &device);
    let mut chaos = chaos.begin(args.num_workers, &cluster, &saving, ServerPlaces::DRIVEN)?;
    let hosts = chaos.hosts(host_workers(Hosts::new(), &model, &device, &mnist.train));
    // `None`: this process was a worker's home, and the training is over.
    let Some(cluster) = cluster.launch(hosts) else {
        return Ok(ExitCode::SUCCESS);
    };

    let config = ServerConfig {
        learning_rate: args.learning_rate,
        ..ServerConfig::default()
    };
    let initial = initial_weights(&model, &device)?;
    let num_examples = mnist.train.len();
    let (mut checkpoints, found) = saving.open_for(&initial, Sgd::new(), &args, num_examples)?;
    let start = found.as_ref().map_or(Start::from(&initial), Start::from);
    let server = ParameterServer::new(start, Sgd::new(), config)?.spawn()?;
    checkpoints.start_log(&server, start)?;
    chaos.start_loop(&cluster, &server)?;
    // A worker whose process is lost is started again, on another one if need be.
    let mut workers = (0..args.num_workers as u32)
        .map(|number| LastingWorker::<ConvNet>::spawn(&cluster, args.worker(number)))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(found) = &found {
        workers.iter_mut().for_each(|worker| worker.go_on(found));
    }
    let mut evaluator = Evaluator::new(&model, &device, &mnist.test)?;

    say!("Running synchronous parameter server training.");
    let mut weights = server.ask(GetWeights).wait()?;
    let observers = Observers::start(show.observers());
    observers.run_started(args.settings("sync"), weights.version());
    (workers.iter_mut()).for_each(|worker| worker.observed_by(&observers));
    // SIGTERM and Ctrl-C end the loop, not the process.
    let stop = StopSignal::heed()?;
    let mut checkpoints = observers.see_checkpoints(checkpoints);
    let mut controls = (show.controls).in_loop(server.clone(), &observers, &checkpoints);
    for i in weights.version().0..args.iterations {
        // Does what the dashboard asks for; waits here while somebody has paused the training.
        controls.heed(&stop, &mut checkpoints);
        if let Some(signal) = stop.received() {
            say!("Interrupted by {signal} after {i} updates.");
            break;
        }
        // Every call starts at once, so the workers compute side by side.
        let replies: Vec<_> = workers
            .iter()
            .map(|worker| worker.compute(&weights))
            .collect();
        let mut gradients = Vec::new();
        for (worker, reply) in workers.iter_mut().zip(replies) {
            gradients.push(worker.finish(reply, &weights)?);
        }
        let update = observers.call_begins();
        weights = server
            .ask(ApplyGradients::sum(gradients.clone()))
            .flatten()
            .wait()?;
        update.applied(&gradients, weights.version());

        if checkpoints.is_due(weights.version()) {
            checkpoints.save(&server);
        }
        if i % 10 == 0 {
            say!(
                "Iter {i}: \taccuracy is {:.1}",
                observers.accuracy_percent(&mut evaluator, &weights)?
            );
        }
    }
    say!(
        "Final accuracy is {:.1}.",
        observers.accuracy_percent(&mut evaluator, &weights)?
    );
    checkpoints.save(&server);
    let is_saved = checkpoints.finish().has(weights.version());
    observers.run_ended();
    saving.export(&model, &device, &weights)?;
    let num_gradients = args.iterations.saturating_mul(args.num_workers as u64);
    let num_expected = stop.received().is_none().then_some(num_gradients);
    let done = chaos.done_in_loop(&server, num_expected, true)?;
    let code = cli::end_of_training(stop.received(), is_saved);
    Ok(chaos.conclude(done.as_ref(), code)?)
}
