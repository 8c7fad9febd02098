//! Groups of parameters with an optimizer and a learning rate of their own (S-21).

use ps::actors::actor::error_chain;
use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::{Module, ParamGroup};
use ps::model::burn::nn::Linear;
use ps::model::burn::optim::momentum::MomentumConfig;
use ps::model::burn::optim::{AdamWConfig, GradientsParams, SgdConfig};
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{FlatView, Rng, seeded};
use ps::prelude::*;

const NUM_ROWS: usize = 16;

#[derive(Module, Debug)]
pub(crate) struct Perceptron {
    hidden: Linear,
    output: Linear,
}

impl Perceptron {
    pub(crate) fn init(device: &Device) -> Self {
        let rng = &mut Rng::new(5);
        Self {
            hidden: seeded::linear(rng, [1, 8], device),
            output: seeded::linear(rng, [8, 1], device),
        }
    }

    pub(crate) fn error(&self, x: &[f32], device: &Device) -> Tensor<1> {
        let x = Tensor::<1>::from_floats(x, device).unsqueeze_dim::<2>(1);
        let y = self.output.forward(self.hidden.forward(x.clone()).tanh());
        (y - x.square()).square().mean()
    }
}

impl Model for Perceptron {
    type Batch = Vec<f32>;

    fn loss(&self, x: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        self.error(x, step.device())
    }

    fn num_examples(x: &Vec<f32>) -> usize {
        x.len()
    }
}

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

pub(crate) fn rows() -> Vec<f32> {
    (0..NUM_ROWS).map(|i| i as f32 / 8.0 - 1.0).collect()
}

/// Each batch has all rows, in some order.
fn trainer() -> Trainer<Perceptron, impl Examples<Batch = Vec<f32>>> {
    let data = collated(InMemDataset::new(rows()), |rows: Vec<f32>| rows);
    Trainer::new(Perceptron::init(&device()), data)
        .device(&device())
        .batch_size(NUM_ROWS)
        .iterations(10)
        .learning_rate(0.05)
}

fn biases() -> ParamGroup {
    ParamGroup::from_predicate("bias")
}

fn momentum() -> SgdConfig {
    SgdConfig::new().with_momentum(Some(MomentumConfig::new()))
}

fn bits(weights: &Weights) -> Vec<u32> {
    weights
        .to_vec()
        .iter()
        .map(|weight| weight.to_bits())
        .collect()
}

#[test]
fn groups_of_a_training_are_those_of_burns_optimizer() {
    let device = device();
    let decay = AdamWConfig::new().with_weight_decay(0.3);
    // By path, and by the parameters of a part of the model.
    let output = |model: &Perceptron| ParamGroup::ids_from_module(model.output.clone());
    let mut model = Perceptron::init(&device);
    let mut optimizer = decay.init().with_group(biases(), momentum().build(), None);
    optimizer = optimizer.with_group(output(&model), AdamWConfig::new().build(), None);
    for _ in 0..10 {
        let gradients = model.error(&rows(), &device).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(0.05, model, gradients);
    }
    let expected = FlatView::new(&model).unwrap().read_weights(&model);
    for num_servers in [1, 3] {
        let model = Perceptron::init(&device);
        let group = output(&model);
        let data = collated(InMemDataset::new(rows()), |rows: Vec<f32>| rows);
        let report = Trainer::new(model, data)
            .device(&device)
            .servers(num_servers)
            .batch_size(NUM_ROWS)
            .iterations(10)
            .learning_rate(0.05)
            .optimizer(decay.clone())
            .optimizer_for(&biases(), momentum())
            .optimizer_for(&group, AdamWConfig::new())
            .run()
            .unwrap();
        for (index, (got, expected)) in report.weights.to_vec().iter().zip(&expected).enumerate() {
            let difference = (got - expected).abs();
            assert!(difference < 1e-5, "weight {index}: {got} and {expected}");
        }
    }
}

#[test]
fn a_factor_multiplies_the_rate_of_the_group_alone() {
    let with = |rate: f64, factor: Option<f64>| {
        let trainer = trainer().iterations(1).learning_rate(rate).servers(2);
        let trainer = match factor {
            Some(factor) => trainer.learning_rate_for(&biases(), factor),
            None => trainer,
        };
        trainer.run().unwrap().weights
    };
    let (half, whole, mixed) = (with(0.05, None), with(0.1, None), with(0.1, Some(0.5)));
    for parameter in mixed.layout().parameters() {
        let expected = match parameter.name.ends_with("bias") {
            true => &half,
            false => &whole,
        };
        let range = parameter.range.clone();
        assert_eq!(
            mixed.read(range.clone()),
            expected.read(range),
            "{}",
            parameter.name
        );
    }
    assert_ne!(bits(&half), bits(&whole));
}

/// S-13 and S-14, with another number of servers in the second half.
#[test]
fn a_training_with_groups_goes_on_and_is_computed_again_to_the_bit() {
    let directory = tempfile::tempdir().unwrap();
    let with_groups = || {
        let trainer = trainer().optimizer(AdamWConfig::new());
        let trainer = trainer.optimizer_for(&biases(), momentum());
        trainer.learning_rate_for(&ParamGroup::from_predicate("output"), 0.5)
    };
    let file = directory.path().join("schedule");
    let whole = with_groups().record(file.clone()).run().unwrap();
    let replay = with_groups().replay(&file).unwrap();
    assert!(bits(&replay.weights) == bits(&whole.weights));

    let half = |num_iterations, num_servers| {
        let config = CheckpointConfig {
            resume: true,
            ..CheckpointConfig::new(directory.path().join("checkpoints"))
        };
        let trainer = with_groups().servers(num_servers).checkpoints(config);
        trainer.iterations(num_iterations).run().unwrap()
    };
    half(4, 3);
    assert!(bits(&half(10, 2).weights) == bits(&whole.weights));

    let refused = trainer().optimizer(AdamWConfig::new());
    let refused = refused.replay(&file).unwrap_err();
    assert!(
        error_chain(&refused).contains("the optimizer is"),
        "{}",
        error_chain(&refused)
    );
}

#[test]
fn groups_that_cannot_work_are_refused_before_anything_is_started() {
    let nobody = ParamGroup::from_predicate("nobody");
    let error = trainer().learning_rate_for(&nobody, 0.5).run().unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, TrainError::EmptyGroup { .. }), "{text}");
    assert!(text.contains("`hidden.weight`"), "{text}");
    for factor in [-1.0, f64::NAN, f64::INFINITY] {
        let error = trainer()
            .learning_rate_for(&biases(), factor)
            .run()
            .unwrap_err();
        assert!(matches!(error, TrainError::RateFactor(_)), "{error}");
    }
    let clipped = AdamWConfig::new();
    let clip = burn::grad_clipping::GradientClippingConfig::Norm(1.0);
    let clipped = clipped.with_grad_clipping(Some(clip));
    let error = trainer()
        .optimizer_for(&biases(), clipped)
        .run()
        .unwrap_err();
    assert!(matches!(error, TrainError::Rule(_)), "{error}");
}
