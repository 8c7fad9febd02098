//! burn's `Learner` over ps, in one process with one worker, beside burn's own strategy: the model of burn's guide, Adam,
//! batches of 64. The runs come in turn: burn's own, over ps, and burn's own again, 100 times. A run over ps is compared with
//! the mean of the two around it, so a machine that becomes slower or faster does not count. The two of burn's own show the
//! noise. Runs are short, because a machine changes less in a short time. The processor time is compared, too.
//!
//! `cargo bench -p ps-bench --features burn-train --bench learner`.

mod pairs;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::{Dataset as _, InMemDataset};
use burn::module::Module;
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::pool::{AdaptiveAvgPool2d, AdaptiveAvgPool2dConfig};
use burn::nn::{Linear, LinearConfig};
use burn::optim::AdamConfig;
use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn::train::metric::LossMetric;
use burn::train::{
    ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
};
use ps::dataset::ImageItem;
use ps::learner::ClusterStrategy;
use ps::model::burn;
use ps::prelude::*;

use pairs::{processor_seconds, spread};

const NUM_ROUNDS: usize = 100;

const BATCH_SIZE: usize = 64;

/// How many images a run trains on, once.
const NUM_IMAGES: usize = 4_000;

fn main() -> Result<()> {
    let mnist = Mnist::load(&MnistOptions::default())?;
    let count = NUM_IMAGES.min(mnist.train.len());
    let device = select_device(default_device_name())?;
    // The first runs warm caches up.
    train(&mnist.train, count, &device, false)?;
    train(&mnist.train, count, &device, true)?;
    let (mut speeds, mut noises) = (Vec::new(), Vec::new());
    let (mut costs, mut noises_of_costs) = (Vec::new(), Vec::new());
    for round in 0..NUM_ROUNDS {
        let run = |over_ps| train(&mnist.train, count, &device, over_ps);
        let (own, ours, again) = (run(false)?, run(true)?, run(false)?);
        println!("round {round}: burn {own}, ps {ours}, burn again {again}");
        speeds.push((own.seconds + again.seconds) / (2.0 * ours.seconds));
        noises.push(own.seconds / again.seconds);
        costs.push(2.0 * ours.cost / (own.cost + again.cost));
        noises_of_costs.push(again.cost / own.cost);
    }
    println!("speed, ps / burn: {}", spread(&mut speeds));
    println!("speed, burn / burn: {}", spread(&mut noises));
    println!("processor time, ps / burn: {}", spread(&mut costs));
    println!(
        "processor time, burn / burn: {}",
        spread(&mut noises_of_costs)
    );
    Ok(())
}

/// What a training took.
struct Took {
    seconds: f64,
    /// Processor time, in seconds.
    cost: f64,
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} s and {:.2} s", self.seconds, self.cost)
    }
}

/// Trains, and returns what it took.
fn train(images: &ImageDataset, count: usize, device: &Device, over_ps: bool) -> Result<Took> {
    let device = device.clone().autodiff();
    device.seed(1);
    let items = |range: std::ops::Range<usize>| -> Result<Arc<dyn DataLoader<Batch>>> {
        let items = range.map(|index| images.get(index));
        let items = items.collect::<Result<Vec<_>, _>>()?;
        let builder = DataLoaderBuilder::new(Stack).batch_size(BATCH_SIZE);
        Ok(builder.build(InMemDataset::new(items)))
    };
    let (train, valid) = (items(0..count)?, items(0..BATCH_SIZE)?);
    let learner = Learner::new(Classifier::new(&device), AdamConfig::new().init(), 1e-3);
    let directory = tempfile::tempdir()?;
    let training = SupervisedTraining::new(directory.path(), train.clone(), valid)
        .metric_train_numeric(LossMetric::new())
        .with_application_logger(None)
        .num_epochs(1);
    let training = match over_ps {
        true => {
            let strategy = ClusterStrategy::new(&learner, &train, &device)?.heed_signals(false);
            training.with_training_strategy(strategy.on(&Cluster::alone(Hosts::new())))
        }
        false => training,
    };
    let (started, used) = (Instant::now(), processor_seconds()?);
    let result = training.launch(learner);
    anyhow::ensure!(result.error.is_none(), "the training failed");
    Ok(Took {
        seconds: started.elapsed().as_secs_f64(),
        cost: processor_seconds()? - used,
    })
}

#[derive(Clone, Debug)]
struct Batch {
    /// `[batch, 1, 28, 28]`
    images: Tensor<4>,
    /// `[batch]`
    labels: Tensor<1, Int>,
}

#[derive(Clone)]
struct Stack;

impl Batcher<ImageItem, Batch> for Stack {
    fn batch(&self, items: Vec<ImageItem>, device: &Device) -> Batch {
        let labels: Vec<i64> = items.iter().map(|item| item.label.into()).collect();
        let num = items.len();
        let pixels: Vec<f32> = items.into_iter().flat_map(|item| item.image).collect();
        Batch {
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
    linear1: Linear,
    linear2: Linear,
}

impl Classifier {
    fn new(device: &Device) -> Self {
        Self {
            conv1: Conv2dConfig::new([1, 8], [3, 3]).init(device),
            conv2: Conv2dConfig::new([8, 16], [3, 3]).init(device),
            pool: AdaptiveAvgPool2dConfig::new([8, 8]).init(),
            linear1: LinearConfig::new(16 * 8 * 8, 128).init(device),
            linear2: LinearConfig::new(128, 10).init(device),
        }
    }

    fn classify(&self, Batch { images, labels }: Batch) -> ClassificationOutput {
        let x = relu(self.conv2.forward(self.conv1.forward(images)));
        let x = self.pool.forward(x).flatten(1, 3);
        let scores = self.linear2.forward(relu(self.linear1.forward(x)));
        let loss = CrossEntropyLossConfig::new().init(&scores.device());
        let loss = loss.forward(scores.clone(), labels.clone());
        ClassificationOutput::new(loss, scores, labels)
    }
}

impl TrainStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let item = self.classify(batch);
        TrainOutput::new(self, item.loss.backward(), item)
    }
}

impl InferenceStep for Classifier {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        self.classify(batch)
    }
}
