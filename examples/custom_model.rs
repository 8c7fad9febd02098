//! Your own burn model, your own data, Adam: everything that is not MNIST.
//!
//! The data set is a burn `Dataset`, the model a burn `Module` with a loss, the optimizer burn's.
//! A small network learns the height of a landscape from points on it.
//!
//! ```text
//! cargo run --release --example custom_model
//! ```
//!
//! Ends with the mean squared error on 1,000 points that it was not trained on: below 0.01. (The
//! heights themselves are between -1 and 1.)

use std::process::ExitCode;

use anyhow::Result;
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::AdamConfig;
use burn::tensor::activation::tanh;
use burn::tensor::{Device, Tensor, TensorData};
use clap::Parser;
use ps::cli::{
    self, ChaosArgs, CheckpointArgs, ClusterArgs, DeviceArgs, ServerPlaces, ShowArgs, say,
};
use ps::prelude::*;

/// Training a model and data of your own.
#[derive(Parser)]
#[command(version, after_help = EXAMPLES)]
struct Args {
    /// Number of workers.
    #[arg(long, default_value_t = 2)]
    num_workers: usize,
    /// How often to go through the data.
    #[arg(long, default_value_t = 40)]
    epochs: u64,
    #[command(flatten)]
    device: DeviceArgs,
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
  custom_model                            two workers in this process
  custom_model --processes 3              two workers in processes of their own
  custom_model --num-workers 4 --epochs 20
  custom_model --checkpoint-dir runs/one --resume   go on after an interruption";

const NUM_POINTS: usize = 4_000;
const BATCH_SIZE: usize = 50;

fn main() -> ExitCode {
    cli::main(train)
}

fn train(args: Args) -> Result<ExitCode> {
    let device = args.device.device()?;
    device.seed(7); // Initial weights of burn's own layers.
    let model = Mlp::new(&device);
    let as_batch = |points: Vec<Point>| points;
    let test = collated(landscape(1_000, 0.5), as_batch);

    // Processes compare their data, too.
    let train =
        collated(landscape(NUM_POINTS, 0.0), as_batch).compared_by(|point| format!("{point:?}"));
    let trainer = Trainer::new(model.clone(), train)
        .test_data(test)
        .device(&device)
        .workers(args.num_workers)
        .optimizer(AdamConfig::new())
        .learning_rate(5e-3)
        .batch_size(BATCH_SIZE)
        .epochs(args.epochs)
        .checkpoints(args.checkpoints.config())
        .observe_all(args.show.observers())
        .controls(&args.show.controls);
    let (saving, one) = (&args.checkpoints, ServerPlaces::ONE);
    let mut chaos = (args.chaos).begin(args.num_workers, &args.cluster, saving, one)?;
    let hosts = chaos.hosts(trainer.hosts(Hosts::new())?);
    let Some(cluster) = args.cluster.launch(hosts) else {
        return Ok(ExitCode::SUCCESS);
    };
    chaos.start(&cluster)?;
    let report = trainer.run_on(&cluster)?;
    let error = report
        .final_evaluation
        .map_or(f64::NAN, |result| result.mean_loss());
    say!("{report}");
    say!("Final mean squared error is {error:.4}.");
    saving.export(&model, &device, &report.weights)?;
    let code = cli::end_of_training(report.interrupted, report.saved_all().is_some());
    // In the last step of an epoch, the workers share what is left, if it is enough for one point of each.
    let per_step = args.num_workers * BATCH_SIZE;
    let has_last = NUM_POINTS % per_step >= args.num_workers;
    let num_steps = args.epochs * (NUM_POINTS / per_step + usize::from(has_last)) as u64;
    Ok(chaos.conclude(Some(&report.done(num_steps)), code)?)
}

/// A point (x, y) and its height.
type Point = ([f32; 2], f32);

fn landscape(num_points: usize, offset: f32) -> InMemDataset<Point> {
    let point = |i: usize| {
        let i = i as f32 + offset;
        // Spread evenly over the square: fractions of multiples of irrational numbers.
        let [x, y] = [(i * 0.754_877_7).fract(), (i * 0.569_840_3).fract()];
        ([x, y], (6.0 * x).sin() * (4.0 * y).cos())
    };
    InMemDataset::new((0..num_points).map(point).collect())
}

#[derive(Module, Debug)]
struct Mlp {
    first: Linear,
    second: Linear,
    output: Linear,
}

impl Mlp {
    fn new(device: &Device) -> Self {
        let linear = |inputs, outputs| LinearConfig::new(inputs, outputs).init(device);
        Self {
            first: linear(2, 32),
            second: linear(32, 32),
            output: linear(32, 1),
        }
    }
}

impl Model for Mlp {
    type Batch = Vec<Point>;

    fn loss(&self, points: &Vec<Point>, step: &mut Step) -> Tensor<1> {
        let (inputs, heights): (Vec<_>, Vec<f32>) = points.iter().copied().unzip();
        let inputs = TensorData::new(inputs.concat(), [points.len(), 2]);
        let heights = TensorData::new(heights, [points.len(), 1]);
        let x: Tensor<2> = Tensor::from_data(inputs, step.device());
        let x = tanh(self.second.forward(tanh(self.first.forward(x))));
        (self.output.forward(x) - Tensor::from_data(heights, step.device()))
            .square()
            .mean()
    }

    fn num_examples(points: &Vec<Point>) -> usize {
        points.len()
    }
}
