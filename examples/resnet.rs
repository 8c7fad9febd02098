//! A residual network with batch normalization, trained on several processes.
//!
//! The servers keep the running statistics of the normalizations beside the weights, in `Bsp` as the mean of those of
//! the workers (S-20 in docs/semantics/parameter-server.md). So the model that comes back is ready for inference.
//!
//! ```text
//! cargo run --release --example resnet -- --processes 3
//! ```
//!
//! On the bundled sample, with the default settings, 91.1 % of the test images are right after 200 updates, which take half a
//! minute on two cores. A test checks that three processes get more than 60 % of them right after 120 updates with batches of
//! 16, with the bits of one process.

use std::process::ExitCode;

use anyhow::Result;
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig};
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig, PaddingConfig2d};
use burn::optim::SgdConfig;
use burn::optim::momentum::MomentumConfig;
use burn::tensor::activation::{log_softmax, relu};
use burn::tensor::{Device, Tensor};
use clap::Parser;
use ps::cli::{
    self, ChaosArgs, CheckpointArgs, ClusterArgs, DataArgs, ServerPlaces, ShowArgs, TrainArgs, say,
};
use ps::model::nll_loss;
use ps::prelude::*;

/// Training a residual network with batch normalization.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// When gradients are applied: bsp, asp, ssp:BOUND or k-of-n:K.
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
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
  resnet                               two workers in this process
  resnet --processes 3                 two workers in processes of their own
  resnet --consistency asp --num-workers 4
  resnet --export resnet.safetensors   the trained model, with its running statistics";

fn main() -> ExitCode {
    cli::main(train)
}

fn train(args: Args) -> Result<ExitCode> {
    let (device, mnist) = (args.data.device()?, args.data.mnist()?);
    device.seed(args.train.seed); // Initial weights of burn's own layers.
    let model = ResNet::new(&device);
    let momentum = SgdConfig::new().with_momentum(Some(MomentumConfig::new().with_momentum(0.9)));
    let trainer = Trainer::new(model.clone(), mnist.train)
        .test_data(mnist.test)
        .device(&device)
        .workers(args.train.num_workers)
        .consistency(args.consistency)
        .optimizer(momentum)
        .learning_rate(args.train.learning_rate)
        .batch_size(args.train.batch_size)
        .iterations(args.train.iterations)
        .seed(args.train.seed)
        .checkpoints(args.checkpoints.config())
        .observe_all(args.show.observers())
        .controls(&args.show.controls)
        .evaluate_every(50)
        .on_evaluation(|point| {
            let accuracy = 100.0 * point.evaluation.accuracy().unwrap_or(f64::NAN);
            say!("Iter {}: \taccuracy is {accuracy:.1}", point.version.0);
        });
    let (saving, one) = (&args.checkpoints, ServerPlaces::ONE);
    let mut chaos = (args.chaos).begin(args.train.num_workers, &args.cluster, saving, one)?;
    let hosts = chaos.hosts(trainer.hosts(Hosts::new())?);
    let Some(cluster) = args.cluster.launch(hosts) else {
        return Ok(ExitCode::SUCCESS);
    };
    chaos.start(&cluster)?;
    let report = trainer.run_on(&cluster)?;
    let accuracy = 100.0 * report.final_accuracy().unwrap_or(f64::NAN);
    say!("Final accuracy is {accuracy:.1}.\n{report}");
    saving.export(&model, &device, &report.weights)?;
    let code = cli::end_of_training(report.interrupted, report.saved_all().is_some());
    let done = report.done(args.train.iterations);
    Ok(chaos.conclude(Some(&done), code)?)
}

/// A convolution without a bias, and a batch normalization.
#[derive(Module, Debug)]
struct NormalizedConv {
    conv: Conv2d,
    norm: BatchNorm,
}

impl NormalizedConv {
    fn new([inputs, outputs]: [usize; 2], size: usize, stride: usize, device: &Device) -> Self {
        let around = size / 2;
        let conv = Conv2dConfig::new([inputs, outputs], [size, size])
            .with_stride([stride, stride])
            .with_padding(PaddingConfig2d::Explicit(around, around, around, around))
            .with_bias(false);
        Self {
            conv: conv.init(device),
            norm: BatchNormConfig::new(outputs).init(device),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.norm.forward(self.conv.forward(x))
    }
}

/// Two convolutions of size 3, and the input beside them.
#[derive(Module, Debug)]
struct Block {
    first: NormalizedConv,
    second: NormalizedConv,
    /// For an input of another shape than the output: a convolution of size 1.
    shortcut: Option<NormalizedConv>,
}

impl Block {
    fn new([inputs, outputs]: [usize; 2], stride: usize, device: &Device) -> Self {
        let changes_shape = inputs != outputs || stride != 1;
        Self {
            first: NormalizedConv::new([inputs, outputs], 3, stride, device),
            second: NormalizedConv::new([outputs, outputs], 3, 1, device),
            shortcut: changes_shape
                .then(|| NormalizedConv::new([inputs, outputs], 1, stride, device)),
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = self.second.forward(relu(self.first.forward(x.clone())));
        let x = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x),
            None => x,
        };
        relu(x + y)
    }
}

/// `images: [batch, 1, 28, 28]` → log probabilities `[batch, 10]`.
#[derive(Module, Debug)]
struct ResNet {
    first: NormalizedConv,
    blocks: Vec<Block>,
    pool: AdaptiveAvgPool2d,
    output: Linear,
}

const NUM_CLASSES: usize = 10;

impl ResNet {
    fn new(device: &Device) -> Self {
        let blocks = [([8, 8], 1), ([8, 16], 2), ([16, 32], 2)];
        Self {
            // A stride of 2 leaves 14×14.
            first: NormalizedConv::new([1, 8], 3, 2, device),
            blocks: blocks
                .map(|(channels, stride)| Block::new(channels, stride, device))
                .into(),
            pool: AdaptiveAvgPool2dConfig::new([1, 1]).init(),
            output: LinearConfig::new(32, NUM_CLASSES).init(device),
        }
    }

    fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let mut x = relu(self.first.forward(images));
        for block in &self.blocks {
            x = block.forward(x);
        }
        log_softmax(self.output.forward(self.pool.forward(x).flatten(1, 3)), 1)
    }
}

impl Model for ResNet {
    type Batch = ImageBatch;

    fn loss(&self, batch: &ImageBatch, step: &mut Step) -> Tensor<1> {
        let images = batch.images_on(step.device());
        nll_loss(self.forward(images), batch.labels_on(step.device()))
    }

    fn num_examples(batch: &ImageBatch) -> usize {
        batch.num_examples()
    }

    fn evaluate(&self, batch: &ImageBatch, device: &Device) -> Evaluation {
        Evaluation::of_classifier(
            self.forward(batch.images_on(device)),
            batch.labels_on(device),
        )
    }
}
