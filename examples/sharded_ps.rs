//! The weights split over several servers, workers that drive themselves, any consistency mode.
//!
//! Workers pull, compute and push on their own; this program only watches. The number of servers
//! does not change the result.
//!
//! ```text
//! cargo run --release --example sharded_ps -- --num-servers 3 --consistency ssp:3
//! ```
//!
//! Prints the accuracy on the way, `Final accuracy is …` on the whole test set, and how stale the
//! gradients were.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use ps::cli::{
    self, ChaosArgs, CheckpointArgs, ClusterArgs, DataArgs, RecordArgs, ScheduleArgs, ServerPlaces,
    ShowArgs, TrainArgs, say,
};
use ps::prelude::*;

/// Training on MNIST with the weights split over several servers, in any consistency mode.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    #[command(flatten)]
    train: TrainArgs,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    #[command(flatten)]
    record: RecordArgs,
    #[command(flatten)]
    show: ShowArgs,
    #[command(flatten)]
    chaos: ChaosArgs,
}

const EXAMPLES: &str = "Examples:
  sharded_ps --num-servers 3 --consistency ssp:3
  sharded_ps --processes 4 --num-workers 3 --consistency asp
  sharded_ps --processes 3 --servers-on-nodes --net
  sharded_ps --checkpoint-dir runs/one --resume   go on after an interruption
  sharded_ps --lr-schedule cosine --warmup 20 --clip-norm 1
  sharded_ps --run-dir runs/one   curves and events of the run
  sharded_ps --dashboard          a page that shows it: http://127.0.0.1:8265/
  sharded_ps --processes 3 --consistency asp --overlap   for slow networks
  sharded_ps --consistency asp --record run.schedule
  sharded_ps --consistency asp --replay run.schedule   the same bits again";

// No doc comment: `--help` would take it for the program's.
#[derive(clap::Args)]
#[command(next_help_heading = "Servers and model")]
struct ServerArgs {
    /// Number of servers that the weights are split over.
    #[arg(long, default_value_t = 2)]
    num_servers: usize,
    /// When gradients are applied: bsp, asp, ssp:BOUND or k-of-n:K.
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
    /// In asp and ssp: let workers compute the next gradient while they push the one before.
    #[arg(long)]
    overlap: bool,
    /// How the gradients of one round become one: mean or sum.
    #[arg(long, default_value = "sum")]
    reduction: Reduction,
    /// Put the servers into other processes, as the workers.
    #[arg(long)]
    servers_on_nodes: bool,
    /// Train `net`, of 1.2 million weights, in place of `convnet`, of 2 thousand.
    #[arg(long)]
    net: bool,
}

fn main() -> ExitCode {
    cli::main(|args: Args| {
        let device = args.data.device()?;
        let mnist = args.data.mnist()?;
        let seed = args.train.seed;
        match args.servers.net {
            true => train(Net::init(seed, &device), mnist, &args),
            false => train(ConvNet::init(seed, &device), mnist, &args),
        }
    })
}

fn train<M: Model<Batch = ImageBatch>>(model: M, mnist: Mnist, args: &Args) -> Result<ExitCode> {
    let device = args.data.device()?;
    let trainer = Trainer::new(model.clone(), mnist.train)
        .test_data(mnist.test)
        .device(&device)
        .workers(args.train.num_workers)
        .servers(args.servers.num_servers)
        .servers_on_nodes(args.servers.servers_on_nodes)
        .consistency(args.servers.consistency)
        .overlap(args.servers.overlap)
        .reduction(args.servers.reduction)
        .batch_size(args.train.batch_size)
        .iterations(args.train.iterations)
        .seed(args.train.seed)
        .checkpoints(args.checkpoints.config())
        .record(args.record.record.clone())
        .observe_all(args.show.observers())
        .controls(&args.show.controls)
        .evaluate_every(10)
        .on_evaluation(|point| {
            let accuracy = 100.0 * point.evaluation.accuracy().unwrap_or(f64::NAN);
            say!("Iter {}: \taccuracy is {accuracy:.1}", point.version.0);
        });
    let rate = args.train.learning_rate;
    // The schedule must not end before the run.
    let (iterations, num_workers) = (args.train.iterations, args.train.num_workers);
    let num_updates = (args.servers.consistency).most_updates(iterations, num_workers);
    let trainer = args.schedule.apply(trainer, rate, num_updates)?;
    if let Some(file) = &args.record.replay {
        let replay = trainer.replay(file)?;
        let accuracy = replay.final_evaluation.and_then(|result| result.accuracy());
        let accuracy = 100.0 * accuracy.unwrap_or(f64::NAN);
        say!("Final accuracy is {accuracy:.1}.\n{replay}");
        args.checkpoints.export(&model, &device, &replay.weights)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut chaos = args.chaos.begin(
        args.train.num_workers,
        &args.cluster,
        &args.checkpoints,
        places(args),
    )?;
    // `None`: this process was the home of a worker or server, and the training is over.
    let hosts = chaos.hosts(trainer.hosts(Hosts::new())?);
    let Some(cluster) = args.cluster.launch(hosts) else {
        return Ok(ExitCode::SUCCESS);
    };
    chaos.start(&cluster)?;
    let report = trainer.run_on(&cluster)?;
    let accuracy = 100.0 * report.final_accuracy().unwrap_or(f64::NAN);
    say!("Final accuracy is {accuracy:.1}.\n{report}");
    args.checkpoints.export(&model, &device, &report.weights)?;
    let code = cli::end_of_training(report.interrupted, report.saved_all().is_some());
    let done = report.done(args.train.iterations);
    Ok(chaos.conclude(Some(&done), code)?)
}

/// The first server is in this process if it writes files, or if there is nothing about nodes.
fn places(args: &Args) -> ServerPlaces {
    let writes = args.checkpoints.update_log.is_some() || args.record.record.is_some();
    ServerPlaces {
        num_servers: args.servers.num_servers,
        num_in_driver: match args.servers.servers_on_nodes {
            true => usize::from(writes),
            false => args.servers.num_servers,
        },
        workers_call: true,
    }
}
