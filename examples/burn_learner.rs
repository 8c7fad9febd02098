//! burn's own training loop on several processes: the MNIST model of burn's guide, trained with burn's `Learner`.
//!
//! The program is that of the guide (<https://burn.dev/books/burn/basic-workflow/>), with a strategy that makes workers of
//! all processes. Metrics, checkpoints and the rest are burn's. `--resume` goes on from a checkpoint, and `--chaos` lets faults
//! happen.
//!
//! ```text
//! cargo run --release --features burn-train --example burn_learner
//! cargo run --release --features burn-train --example burn_learner -- --processes 3
//! cargo run --release --features burn-train --example burn_learner -- --artifact-dir runs/one --resume
//! ```
//!
//! Ends with burn's summary, and with the accuracy of the final model on the test images.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use burn::data::dataloader::DataLoaderBuilder;
use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig};
use burn::nn::{Dropout, DropoutConfig, Linear, LinearConfig, Relu};
use burn::optim::AdamConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn::train::metric::{AccuracyMetric, LossMetric};
use burn::train::{
    ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
};
use clap::Parser;
use ps::actors::launch::{StopSignal, exit_code};
use ps::chaos::Done;
use ps::cli::{self, ChaosArgs, ClusterArgs, DataArgs, say};
use ps::dataset::ImageItem;
use ps::learner::{ClusterStrategy, SavedEpochs};
use ps::prelude::*;

/// Training with burn's Learner, on any number of processes.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// How often to go through the training images.
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    /// The number of workers [default: one in each process].
    #[arg(long)]
    num_workers: Option<u16>,
    /// The number of images in each worker's batch.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    #[arg(long, default_value_t = 1e-3)]
    learning_rate: f64,
    /// When gradients are applied: bsp, asp, ssp:BOUND or k-of-n:K.
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
    #[arg(long, default_value_t = 42)]
    seed: u64,
    /// The probability that dropout sets a number to zero.
    #[arg(long, default_value_t = 0.5)]
    dropout: f64,
    /// Where burn writes checkpoints and metrics [default: a new directory in that for temporary files;
    /// nobody removes it].
    #[arg(long, value_name = "DIR")]
    artifact_dir: Option<PathBuf>,
    /// Go on from the newest usable checkpoint in the directory. If there is none yet, start from the
    /// beginning.
    #[arg(long, requires = "artifact_dir")]
    resume: bool,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    chaos: ChaosArgs,
}

const EXAMPLES: &str = "Examples:
  burn_learner                            one worker in this process
  burn_learner --processes 3              three workers in processes of their own
  burn_learner --processes 3 --consistency ssp:3
  burn_learner --artifact-dir runs/one --resume   go on after an interruption";

fn main() -> ExitCode {
    cli::main(train)
}

fn train(args: Args) -> Result<ExitCode> {
    let device = args.data.device()?.autodiff();
    device.seed(args.seed);
    let mnist = args.data.mnist()?;
    let loader = || DataLoaderBuilder::new(MnistBatcher).batch_size(args.batch_size);
    // With one thread, the order is the same in each run.
    let train = loader()
        .shuffle(args.seed)
        .num_workers(1)
        .build(mnist.train);
    let test = loader().num_workers(1).build(mnist.test);
    let learner = Learner::new(
        Classifier::new(args.dropout, &device),
        AdamConfig::new().init(),
        args.learning_rate,
    );

    // What makes many processes of one.
    let one_each = || u16::try_from(args.cluster.world_size()).unwrap_or(u16::MAX);
    let num_workers = args.num_workers.unwrap_or_else(one_each);
    let strategy = ClusterStrategy::new(&learner, &train, &device)?
        .seed(args.seed)
        .workers(num_workers)
        .consistency(args.consistency);
    let mut chaos = (args.chaos).begin_learner(num_workers.into(), &args.cluster)?;
    let hosts = chaos.hosts(strategy.hosts(Hosts::new()));
    // In the others, this returns `None` when their work is over.
    let Some(cluster) = args.cluster.launch(hosts) else {
        return Ok(ExitCode::SUCCESS);
    };
    chaos.start(&cluster)?;
    let counts = strategy.counts();
    let num_examples = train.num_items();

    let stop = StopSignal::heed()?;
    let directory = match args.artifact_dir.clone() {
        Some(directory) => directory,
        None => tempfile::Builder::new()
            .prefix("ps-burn-learner-")
            .tempdir()?
            .keep(),
    };
    say!("Writing to {}.", directory.display());
    let saved = SavedEpochs::open(&directory, &learner, args.resume)?;
    let training = SupervisedTraining::new(&directory, train, test.clone())
        .metrics((AccuracyMetric::new(), LossMetric::new()))
        .with_default_checkpointers()
        .num_epochs(args.epochs)
        .with_application_logger(None)
        .with_training_strategy(strategy.on(&cluster))
        .summary();
    let training = match saved.newest() {
        Some(epoch) => {
            say!("Going on after epoch {epoch}.");
            training.checkpoint(epoch)
        }
        None => training,
    };
    let result = training.launch(learner);
    if let Some(error) = result.error {
        bail!("the training failed: {error}");
    }
    let num_epochs = args.epochs.saturating_sub(saved.newest().unwrap_or(0));
    let per_epoch = num_batches(num_examples, num_workers.into(), args.batch_size);
    let done = Done {
        num_expected: (result.interrupted.is_none()).then_some((num_epochs * per_epoch) as u64),
        num_settled: counts.num_settled(),
        num_applied: counts.num_applied(),
        num_applied_before: 0,
        weights: initial_weights(&result.model, &device)?,
        // burn's own dropout has other random numbers if workers share a process, as they do when one is lost.
        is_repeatable: args.consistency == Consistency::Bsp && args.dropout == 0.0,
    };
    if let Some(interrupted) = result.interrupted {
        let reason = interrupted.reason.unwrap_or_default();
        say!("Interrupted: {reason}.");
        if args.artifact_dir.is_some() {
            cli::say_how_to_go_on();
        }
        // 143 or 130 after a signal: the epoch under way is not in a checkpoint.
        let code = match stop.received() {
            Some(signal) => exit_code(Some(signal)),
            None => ExitCode::FAILURE,
        };
        return Ok(chaos.conclude(Some(&done), code)?);
    }

    let (mut num_right, mut num_all) = (0, 0);
    let test = test.to_device(&device.inner());
    for batch in test.iter() {
        let batch = batch?;
        let classes = result.model.forward(batch.images).argmax(1).flatten(0, 1);
        num_all += batch.labels.dims()[0];
        num_right += classes.equal(batch.labels).int().sum().into_scalar::<i64>();
    }
    let accuracy = 100.0 * num_right as f64 / num_all as f64;
    say!("Final accuracy is {accuracy:.1}.");
    Ok(chaos.conclude(Some(&done), ExitCode::SUCCESS)?)
}

/// Returns how many batches the shares of all workers have in an epoch: the last one of a share may be smaller.
fn num_batches(num_examples: usize, num_workers: usize, batch_size: usize) -> usize {
    let begin = |rank: usize| rank * num_examples / num_workers;
    let shares = (0..num_workers).map(|rank| begin(rank + 1) - begin(rank));
    shares.map(|share| share.div_ceil(batch_size.max(1))).sum()
}

#[derive(Clone, Debug)]
struct MnistBatch {
    /// `[batch, 1, 28, 28]`
    images: Tensor<4>,
    /// `[batch]`
    labels: Tensor<1, Int>,
}

#[derive(Clone)]
struct MnistBatcher;

impl Batcher<ImageItem, MnistBatch> for MnistBatcher {
    fn batch(&self, items: Vec<ImageItem>, device: &Device) -> MnistBatch {
        let labels: Vec<i64> = items.iter().map(|item| item.label.into()).collect();
        let num = items.len();
        let pixels: Vec<f32> = items.into_iter().flat_map(|item| item.image).collect();
        MnistBatch {
            images: Tensor::from_data(TensorData::new(pixels, [num, 1, 28, 28]), device),
            labels: Tensor::from_data(TensorData::new(labels, [num]), device),
        }
    }
}

#[derive(Module, Debug)]
struct Classifier {
    conv1: Conv2d,
    conv2: Conv2d,
    pool: AdaptiveAvgPool2d,
    dropout: Dropout,
    linear1: Linear,
    linear2: Linear,
    activation: Relu,
}

impl Classifier {
    fn new(dropout: f64, device: &Device) -> Self {
        Self {
            conv1: Conv2dConfig::new([1, 8], [3, 3]).init(device),
            conv2: Conv2dConfig::new([8, 16], [3, 3]).init(device),
            pool: AdaptiveAvgPool2dConfig::new([8, 8]).init(),
            dropout: DropoutConfig::new(dropout).init(),
            linear1: LinearConfig::new(16 * 8 * 8, 128).init(device),
            linear2: LinearConfig::new(128, 10).init(device),
            activation: Relu::new(),
        }
    }

    /// Returns the scores of the classes, `[batch, 10]`.
    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let x = self.conv1.forward(images);
        let x = self.dropout.forward(x);
        let x = self.conv2.forward(x);
        let x = self.dropout.forward(x);
        let x = self.activation.forward(x);
        let x = self.pool.forward(x).flatten(1, 3);
        let x = self.linear1.forward(x);
        let x = self.dropout.forward(x);
        let x = self.activation.forward(x);
        self.linear2.forward(x)
    }

    fn classify(&self, batch: MnistBatch) -> ClassificationOutput {
        let MnistBatch { images, labels } = batch;
        let scores = self.forward(images);
        let loss = CrossEntropyLossConfig::new().init(&scores.device());
        let loss = loss.forward(scores.clone(), labels.clone());
        ClassificationOutput::new(loss, scores, labels)
    }
}

impl TrainStep for Classifier {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> TrainOutput<ClassificationOutput> {
        let item = self.classify(batch);
        TrainOutput::new(self, item.loss.backward(), item)
    }
}

impl InferenceStep for Classifier {
    type Input = MnistBatch;
    type Output = ClassificationOutput;

    fn step(&self, batch: MnistBatch) -> ClassificationOutput {
        self.classify(batch)
    }
}
