//! Asynchronous parameter-server training, driven from here: Ray's `async` example, typed.
//!
//! Whenever a worker has a gradient, the server applies it, and the worker goes on with the new
//! weights; nobody waits for the others. So a gradient may have been computed on weights that
//! are a few updates old.
//!
//! ```text
//! cargo run --release --example async_ps
//! cargo run --release --example async_ps -- --processes 3
//! ```
//!
//! The second line runs the two workers in processes of their own.
//!
//! Prints `Iter 0:  accuracy is …` every 10 updates and ends with `Final accuracy is …`, the
//! percentage of right answers on the whole test set: about 88 after 200 iterations of 2 workers
//! on all of MNIST.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use ps::cli::{
    self, ChaosArgs, CheckpointArgs, ClusterArgs, DataArgs, ServerPlaces, ShowArgs, TrainArgs, say,
};
use ps::observe::Observers;
use ps::prelude::*;

/// Asynchronous parameter-server training on MNIST, driven by this program.
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
  async_ps                                two workers in this process
  async_ps --processes 3                  two workers in processes of their own
  async_ps --num-workers 4 --iterations 500 --learning-rate 0.005
  async_ps --checkpoint-dir runs/one --resume   go on after an interruption";

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

    say!("Running asynchronous parameter server training.");
    let mut weights = server.ask(GetWeights).wait()?;
    let observers = Observers::start(show.observers());
    observers.run_started(args.settings("async"), weights.version());
    (workers.iter_mut()).for_each(|worker| worker.observed_by(&observers));
    let mut gradients = Pending::new();
    for (rank, worker) in workers.iter().enumerate() {
        gradients.insert(rank, worker.compute(&weights));
    }
    // SIGTERM and Ctrl-C end the loop, not the process.
    let stop = StopSignal::heed()?;
    let mut checkpoints = observers.see_checkpoints(checkpoints);
    let mut controls = (show.controls).in_loop(server.clone(), &observers, &checkpoints);
    let mut i = weights.version().0;
    let num_gradients = args.iterations.saturating_mul(args.num_workers as u64);
    while i < num_gradients {
        // Does what the dashboard asks for; waits here while somebody has paused the training.
        controls.heed(&stop, &mut checkpoints);
        if let Some(signal) = stop.received() {
            say!("Interrupted by {signal} after {i} updates.");
            break;
        }
        let (rank, ready) = gradients
            .wait_next()
            .context("every worker has a call pending")?;
        let Some(gradient) = workers[rank].settle(ready)? else {
            // It was lost, and has been started again for the same batch.
            gradients.insert(rank, workers[rank].compute(&weights));
            continue;
        };
        let update = observers.call_begins();
        weights = server
            .ask(ApplyGradients::sum([gradient.clone()]))
            .flatten()
            .wait()?;
        update.applied(&[gradient], weights.version());
        gradients.insert(rank, workers[rank].compute(&weights));

        if checkpoints.is_due(weights.version()) {
            checkpoints.save(&server);
        }
        if i % 10 == 0 {
            say!(
                "Iter {i}: \taccuracy is {:.1}",
                observers.accuracy_percent(&mut evaluator, &weights)?
            );
        }
        i += 1;
    }
    say!(
        "Final accuracy is {:.1}.",
        observers.accuracy_percent(&mut evaluator, &weights)?
    );
    checkpoints.save(&server);
    let is_saved = checkpoints.finish().has(weights.version());
    observers.run_ended();
    saving.export(&model, &device, &weights)?;
    let num_expected = stop.received().is_none().then_some(num_gradients);
    let done = chaos.done_in_loop(&server, num_expected, false)?;
    let code = cli::end_of_training(stop.received(), is_saved);
    Ok(chaos.conclude(done.as_ref(), code)?)
}
