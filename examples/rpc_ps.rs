//! The model lives on the parameter server; trainers send it images and get gradients of it applied.
//!
//! The program of PyTorch's RPC guide, for any number of trainers: remote forward, distributed
//! autograd, a distributed optimizer. Rank 0 is the server, the others are trainers.
//!
//! ```text
//! cargo run --release --example rpc_ps -- --processes 3
//! ```
//!
//! or, in three terminals (or on three hosts, with `--master-addr`),
//!
//! ```text
//! cargo run --release --example rpc_ps -- --world-size 3 --rank 0
//! cargo run --release --example rpc_ps -- --world-size 3 --rank 1
//! cargo run --release --example rpc_ps -- --world-size 3 --rank 2
//! ```
//!
//! Each trainer prints its loss every 5 batches, `Training complete!`, and the accuracy that the
//! model on the server has then on the test set: about 93 % after 200 batches of two trainers.

use std::pin::pin;
use std::process::ExitCode;

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use futures_util::future::{Either, select, try_join_all};
use ps::actors::server::Outcome;
use ps::actors::worker::MAX_REFUSED;
use ps::cli::{self, ChaosArgs, CheckpointArgs, ClusterArgs, DataArgs, ServerPlaces, say};
use ps::prelude::*;
use ps::served::{DistributedOptimizer, PartConfig, PartServer, infer, serve_part};
use serde::{Deserialize, Serialize};

/// Training a model that lives on the parameter server.
#[derive(Clone, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    #[command(flatten)]
    train: TrainerArgs,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
    #[command(flatten)]
    chaos: ChaosArgs,
}

const EXAMPLES: &str = "Examples:
  rpc_ps --processes 3                  a server and two trainers
  rpc_ps --world-size 3 --rank 0        the same, started by hand; then ranks 1 and 2";

// No doc comment: `--help` would take it for the program's.
#[derive(Clone, clap::Args)]
#[command(next_help_heading = "Training")]
struct TrainerArgs {
    /// Batches of each trainer.
    #[arg(long, default_value_t = 200)]
    iterations: u64,
    /// Examples per batch.
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 0.03)]
    learning_rate: f64,
    /// Seed of the initial weights, the order of examples, and dropout.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> ExitCode {
    cli::main(serve)
}

fn serve(args: Args) -> Result<ExitCode> {
    let mnist = args.data.mnist()?;
    let device = args.data.device()?;
    let net = Net::init(args.train.seed, &device);
    let num_examples = mnist.train.len();
    let num_trainers = args.cluster.world_size().max(2) as usize - 1;
    // Trainers send what they have to the model, so no gradient and no weights travel to or from the server.
    let (saving, driven) = (&args.checkpoints, ServerPlaces::DRIVEN);
    let mut chaos = (args.chaos).begin(num_trainers, &args.cluster, saving, driven)?;
    let hosts = {
        // A process with other data, another model or other flags is not let in.
        let hosts = agree_on_model(Hosts::new(), &net, &device);
        let hosts = agree_on_data(hosts, &mnist.train)
            .must_agree(
                "the test data",
                mnist.test.fingerprint().unwrap_or_default(),
            )
            .must_agree("--iterations", args.train.iterations)
            .must_agree("--batch-size", args.train.batch_size)
            .must_agree("--learning-rate", args.train.learning_rate)
            .must_agree("--seed", args.train.seed);
        let (args, mnist) = (args.clone(), mnist);
        hosts.host(move |place: Place| {
            let (args, mnist) = (args.clone(), mnist.clone());
            Ok(Trainer { args, mnist, place })
        })
    };
    // `None`: this process was the home of a trainer, and the training is over.
    let Some(cluster) = args.cluster.launch(chaos.hosts(hosts)) else {
        return Ok(ExitCode::SUCCESS);
    };

    // Every gradient is applied as soon as it comes.
    let config = ServerConfig {
        consistency: Consistency::Asp,
        learning_rate: args.train.learning_rate,
        ..ServerConfig::default()
    };
    let initial = initial_weights(&net, &device)?;
    let facts = [
        ("the number of training examples", num_examples.to_string()),
        ("the batch size", args.train.batch_size.to_string()),
        ("the seed", args.train.seed.to_string()),
    ];
    let opened = (args.checkpoints).open_with(&initial, Sgd::new(), facts);
    let (mut checkpoints, found) = opened?;
    let start = found.as_ref().map_or(Start::from(&initial), Start::from);
    let server = ParameterServer::new(start, Sgd::new(), config)?.spawn()?;
    checkpoints.start_log(&server, start)?;
    chaos.start_loop(&cluster, &server)?;
    let servers = ServerGroup::from(server.clone());
    // One for each trainer, so that they need not wait for each other; the weights are the same.
    let trainers = (0..num_trainers).map(|index| {
        let part = serve_part(&net, &device, &servers, PartConfig::default())?;
        let place = Place {
            part,
            index,
            num_trainers,
        };
        Ok(supervise(&cluster, &servers, place))
    });
    let trainers = trainers.collect::<Result<Vec<_>>>()?;
    // SIGTERM and Ctrl-C end the training, not the process.
    let stop = StopSignal::heed()?;
    let trained = run(async {
        let saving = pin!(checkpoints.save_when_due(&servers));
        let stopped = pin!(stop.wait());
        let interrupted = pin!(select(stopped, saving));
        match select(try_join_all(trainers), interrupted).await {
            Either::Left((trained, _)) => trained.map(|_| None),
            Either::Right((Either::Left((signal, _)), _)) => Ok(Some(signal)),
            Either::Right((Either::Right((never, _)), _)) => match never {},
        }
    });
    let interrupted = trained?;
    let weights = run(servers.pull(PullVersion::Latest))?;
    let version = weights.version();
    if let Some(signal) = interrupted {
        say!("Interrupted by {signal}.");
    }
    say!("{} updates by {num_trainers} trainers.", version.0);
    checkpoints.save(&server);
    let is_saved = checkpoints.finish().has(version);
    args.checkpoints.export(&net, &device, &weights)?;
    let num_gradients = (args.train.iterations).saturating_mul(num_trainers as u64);
    let status = server.ask(GetStatus).wait()?.coordinator;
    // If a run goes on with fewer trainers, nobody takes the steps of the others.
    let is_same = status.is_some_and(|status| status.workers.len() <= num_trainers);
    let num_expected = (is_same && interrupted.is_none()).then_some(num_gradients);
    let done = chaos.done_in_loop(&server, num_expected, false)?;
    let code = cli::end_of_training(interrupted, is_saved);
    Ok(chaos.conclude(done.as_ref(), code)?)
}

/// Keeps a trainer going, on whatever node there is: it goes on after its last step.
async fn supervise(cluster: &Cluster, servers: &ServerGroup, place: Place) -> Result<()> {
    const MAX_LIVES: usize = 10;
    let worker = WorkerId(place.index as u32);
    for _ in 1..MAX_LIVES {
        let trainer = cluster.spawn::<Trainer>(place.clone()).await?;
        match trainer.ask(Train).await {
            Ok(trained) => return trained.map_err(anyhow::Error::msg),
            Err(lost) => tracing::warn!(%worker, %lost, "a trainer is lost; it goes on"),
        }
        trainer.kill();
        servers.report_lost(worker).await?;
    }
    anyhow::bail!("{worker} was lost {MAX_LIVES} times")
}

/// What a trainer has to know.
#[derive(Clone, Serialize, Deserialize)]
struct Place {
    part: ActorRef<PartServer<Net>>,
    /// Which of the trainers.
    index: usize,
    num_trainers: usize,
}

/// Has data, but no model.
struct Trainer {
    args: Args,
    mnist: Mnist,
    place: Place,
}

impl Actor for Trainer {
    type Context = Context<Self>;
}

impl Remote for Trainer {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Train>();
    }
}

impl Hosted for Trainer {
    type Args = Place;
}

/// Takes all steps, and evaluates.
#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "Result<(), String>")]
struct Train;

impl Handler<Train> for Trainer {
    type Result = ResponseFuture<Result<(), String>>;

    fn handle(&mut self, _: Train, _: &mut Context<Self>) -> Self::Result {
        let trained = train(self.args.clone(), self.mnist.clone(), self.place.clone());
        Box::pin(async move { trained.await.map_err(|error| format!("{error:#}")) })
    }
}

async fn train(args: Args, mnist: Mnist, place: Place) -> Result<()> {
    let Place {
        part,
        index,
        num_trainers,
    } = place;
    let device = args.data.device()?;
    let worker = WorkerId(index as u32);
    let mut batches = WorkerBatches::new(
        &mnist.train,
        WorkerConfig {
            worker,
            num_workers: num_trainers,
            batch_size: args.train.batch_size,
            seed: args.train.seed,
        },
    )?;
    let mut optimizer = DistributedOptimizer::new(worker, args.train.seed);
    optimizer.add(&part).await?;
    let mut num_refused = 0;
    while optimizer.clock().0 < args.train.iterations {
        let clock = optimizer.clock();
        let batch = batches.batch(clock)?;
        let mut context = optimizer.begin();
        let output = context.forward(&part, batch.images_on(&device)).await?;
        let labels = batch.labels_on(&output.device());
        let loss = nll_loss(output, labels);
        context.backward(&loss).await?;
        let outcomes = optimizer.step(context).await?;
        let is_refused = |outcome: &Outcome| matches!(outcome, Outcome::RefusedNorm { .. });
        num_refused = if outcomes.iter().all(is_refused) {
            num_refused + 1
        } else {
            0
        };
        ensure!(
            num_refused < MAX_REFUSED,
            "training has diverged: {num_refused} gradients in a row were refused, being NaN or \
             infinite; try a lower --learning-rate"
        );
        if clock.0.is_multiple_of(5) {
            let (rank, loss) = (index + 1, loss.into_scalar::<f32>());
            say!("Rank {rank} training batch {} loss {loss:.4}", clock.0);
        }
    }
    optimizer.leave().await?;
    say!("Training complete!\nGetting accuracy....");
    let mut evaluation = Evaluation::default();
    let indices: Vec<usize> = (0..mnist.test.len()).collect();
    for indices in indices.chunks(256) {
        let batch = Examples::batch(&mnist.test, indices);
        let output = infer(&part, batch.images_on(&device)).await?;
        evaluation += Evaluation::of_classifier(output, batch.labels_on(&device));
    }
    let loss = evaluation.mean_loss();
    ensure!(
        loss.is_finite(),
        "training has diverged: the loss on the test data is {loss}; try a lower --learning-rate"
    );
    let accuracy = evaluation.accuracy().context("there is no test data")?;
    say!("Rank {} accuracy {:.1} %", index + 1, 100.0 * accuracy);
    Ok(())
}
