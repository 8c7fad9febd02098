//! A small network as a user of burn's `Learner` writes it, and its data.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::{Dataset, InMemDataset};
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::Module;
use burn::nn::{BatchNorm, BatchNormConfig, Linear, LinearConfig};
use burn::optim::ModuleOptimizer;
use burn::tensor::activation::tanh;
use burn::tensor::{Device, Tensor, TensorData};
use burn::train::metric::LossMetric;
use burn::train::{
    InferenceStep, Learner, LearningResult, RegressionOutput, SupervisedTraining, TrainOutput,
    TrainStep, TrainingStrategy,
};
use ps::model::FlatView;
use ps::prelude::*;

type Hook = dyn Fn(&[usize]) + Send + Sync;

/// Called with the ids of the examples of each training step.
#[derive(Clone)]
pub(super) struct OnStep(pub(super) Arc<Hook>);

impl fmt::Debug for OnStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnStep")
    }
}

impl OnStep {
    pub(super) fn nothing() -> Self {
        Self(Arc::new(|_| {}))
    }
}

/// The number of an example whose target is NaN.
pub(super) const NOT_A_NUMBER: usize = usize::MAX;

#[derive(Clone, Debug)]
pub(super) struct Batch {
    ids: Vec<usize>,
    inputs: Tensor<2>,
    targets: Tensor<2>,
    on_step: OnStep,
}

/// Makes the examples from their numbers.
#[derive(Clone)]
struct Points(OnStep);

impl Batcher<usize, Batch> for Points {
    fn batch(&self, ids: Vec<usize>, device: &Device) -> Batch {
        let inputs = ids.iter().flat_map(|&id| {
            [0.754_877_7, 0.569_840_3, 0.316_624_8].map(|step| (id as f32 * step).fract() - 0.5)
        });
        let targets = ids.iter().map(|&id| match id {
            NOT_A_NUMBER => f32::NAN,
            _ => (id as f32).sin(),
        });
        let (inputs, targets): (Vec<f32>, Vec<f32>) = (inputs.collect(), targets.collect());
        Batch {
            inputs: Tensor::from_data(TensorData::new(inputs, [ids.len(), 3]), device),
            targets: Tensor::from_data(TensorData::new(targets, [ids.len(), 1]), device),
            ids,
            on_step: self.0.clone(),
        }
    }
}

#[derive(Module, Debug)]
pub(super) struct Net {
    first: Linear,
    norm: Option<BatchNorm>,
    second: Linear,
    /// Whether the first layer's bias takes the place of the factors of `norm`.
    uses_bias_twice: bool,
}

impl Net {
    /// With a layer that keeps running statistics.
    pub(super) fn normalized(device: &Device) -> Self {
        Self {
            norm: Some(BatchNormConfig::new(8).init(device)),
            ..Self::new(device)
        }
    }

    /// With a parameter in two fields.
    pub(super) fn tied(device: &Device) -> Self {
        let mut net = Self::normalized(device);
        let bias = net.first.bias.clone().unwrap();
        if let Some(norm) = &mut net.norm {
            norm.gamma = bias;
        }
        net
    }

    /// Computes the same as `tied`, in burn's own strategies too. The factors of its `norm` are not used.
    pub(super) fn with_bias_used_twice(device: &Device) -> Self {
        Self {
            uses_bias_twice: true,
            ..Self::normalized(device)
        }
    }

    /// The numbers of the first layer's bias and of the factors of `norm`.
    pub(super) fn bias_and_factors(&self) -> [Vec<f32>; 2] {
        let bias = self.first.bias.as_ref().unwrap().val();
        let factors = self.norm.as_ref().unwrap().gamma.val();
        [bias, factors].map(|numbers| numbers.into_data().to_vec().unwrap())
    }

    /// With a layer that is not trained. Its weights are multiplied by `factor`.
    pub(super) fn with_frozen_layer(factor: f32, device: &Device) -> Self {
        let mut net = Self::new(device);
        net.first.weight = net.first.weight.map(|weight| weight * factor);
        net.first = net.first.freeze();
        net
    }

    /// The weights of a network are always the same.
    pub(super) fn new(device: &Device) -> Self {
        let net = Self {
            first: LinearConfig::new(3, 8).init(device),
            norm: None,
            second: LinearConfig::new(8, 1).init(device),
            uses_bias_twice: false,
        };
        let view = FlatView::new(&net).unwrap();
        let weight = |at: usize| (at as f32 * 0.618_034).fract() - 0.5;
        let read = |range: Range<usize>| range.map(weight).collect::<Vec<f32>>();
        view.write_weights(net, read).unwrap()
    }

    pub(super) fn weights(&self) -> Vec<f32> {
        FlatView::new(self).unwrap().read_weights(self)
    }

    fn output(&self, batch: Batch) -> RegressionOutput {
        let hidden = self.first.forward(batch.inputs);
        let hidden = match self.norm.clone() {
            Some(mut norm) => {
                if self.uses_bias_twice {
                    norm.gamma = self.first.bias.clone().unwrap();
                }
                norm.forward(hidden)
            }
            None => hidden,
        };
        let output = self.second.forward(tanh(hidden));
        let loss = (output.clone() - batch.targets.clone()).square().mean();
        RegressionOutput::new(loss, output, batch.targets)
    }
}

impl TrainStep for Net {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> TrainOutput<RegressionOutput> {
        (batch.on_step.0)(&batch.ids);
        let output = self.output(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Net {
    type Input = Batch;
    type Output = RegressionOutput;

    fn step(&self, batch: Batch) -> RegressionOutput {
        self.output(batch)
    }
}

pub(super) type Loader = Arc<dyn DataLoader<Batch>>;

/// A loader of these examples, in this order or shuffled.
pub(super) fn loader(
    ids: impl IntoIterator<Item = usize>,
    batch_size: usize,
    seed: Option<u64>,
    on_step: &OnStep,
) -> Loader {
    let ids = InMemDataset::new(ids.into_iter().collect());
    loader_of(ids, batch_size, seed, on_step)
}

pub(super) fn loader_of(
    ids: impl Dataset<usize> + 'static,
    batch_size: usize,
    seed: Option<u64>,
    on_step: &OnStep,
) -> Loader {
    let builder = DataLoaderBuilder::new(Points(on_step.clone())).batch_size(batch_size);
    let builder = match seed {
        Some(seed) => builder.shuffle(seed),
        None => builder,
    };
    builder.build(ids)
}

pub(super) fn device() -> Device {
    select_device(default_device_name()).unwrap().autodiff()
}

/// A learner whose rate falls with each update.
pub(super) fn learner(optimizer: ModuleOptimizer, num_updates: usize) -> Learner<Net> {
    let schedule = CosineAnnealingLrSchedulerConfig::new(0.05, num_updates);
    Learner::new(Net::new(&device()), optimizer, schedule.init().unwrap())
}

/// A directory for the files of a training.
pub(super) struct Directory(pub(super) tempfile::TempDir);

impl Directory {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(super) fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }

    /// A training with these examples, and a few others to validate on.
    pub(super) fn training(&self, train: Loader, num_epochs: usize) -> SupervisedTraining<Net> {
        let valid = loader(1_000..1_010, 4, None, &OnStep::nothing());
        SupervisedTraining::new(self.path(), train, valid)
            .metric_train_numeric(LossMetric::new())
            .metric_valid_numeric(LossMetric::new())
            .with_application_logger(None)
            .num_epochs(num_epochs)
    }
}

/// Trains as burn does by itself, or with this strategy.
pub(super) fn train(
    learner: Learner<Net>,
    loader: Loader,
    num_epochs: usize,
    strategy: Option<TrainingStrategy<Net>>,
) -> LearningResult<Net> {
    let directory = Directory::new();
    let training = directory.training(loader, num_epochs);
    let training = match strategy {
        Some(strategy) => training.with_training_strategy(strategy),
        None => training,
    };
    training.launch(learner)
}

/// Trains without an error. Returns the weights.
pub(super) fn weights_of(result: &LearningResult<Net>) -> Vec<f32> {
    if let Some(error) = &result.error {
        panic!("{error}");
    }
    result.model.weights()
}

pub(super) fn assert_close(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(
            difference <= 1e-5,
            "{what}: weight {at}: {got} and {expected}"
        );
    }
}
