//! What is frozen stays as it is to the bit, whatever the update rule does with a gradient of zero.

use ps::actors::codec::{Encoded, encode};
use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::{Lora, Module};
use ps::model::burn::nn::Linear;
use ps::model::burn::optim::decay::WeightDecayConfig;
use ps::model::burn::optim::momentum::MomentumConfig;
use ps::model::burn::optim::{AdamConfig, AdamWConfig, SgdConfig};
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{ModelError, Rng, seeded};
use ps::prelude::*;

#[derive(Module, Debug)]
struct Perceptron {
    hidden: Linear,
    output: Linear,
}

impl Perceptron {
    fn init([inputs, hidden]: [usize; 2], device: &Device) -> Self {
        let rng = &mut Rng::new(5);
        Self {
            hidden: seeded::linear(rng, [inputs, hidden], device),
            output: seeded::linear(rng, [hidden, 1], device),
        }
    }

    fn with_frozen_layer(device: &Device) -> Self {
        let Self { hidden, output } = Self::init([2, 8], device);
        let hidden = hidden.freeze();
        Self { hidden, output }
    }
}

impl Model for Perceptron {
    type Batch = Vec<f32>;

    fn loss(&self, x: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        let x = Tensor::<1>::from_floats(x.as_slice(), step.device()).unsqueeze_dim::<2>(1);
        let inputs = x.clone().repeat(&[1, self.hidden.weight.dims()[0]]);
        let y = self.output.forward(self.hidden.forward(inputs).tanh());
        (y - x.square()).square().mean()
    }

    fn num_examples(x: &Vec<f32>) -> usize {
        x.len()
    }
}

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn data() -> impl Examples<Batch = Vec<f32>> {
    let numbers = (0..64).map(|i| i as f32 / 32.0 - 1.0).collect();
    collated(InMemDataset::new(numbers), |items: Vec<f32>| items)
}

fn bits<const D: usize>(tensor: Tensor<D>) -> Vec<u32> {
    let values = tensor.into_data().try_into_vec::<f32>().unwrap();
    values.into_iter().map(f32::to_bits).collect()
}

/// Trains under one rule and returns what comes back.
fn trained<E: Examples<Batch = Vec<f32>>>(
    model: &Perceptron,
    num_weights: usize,
    rule: impl FnOnce(Trainer<Perceptron, E>) -> Trainer<Perceptron, E>,
    data: E,
) -> Perceptron {
    let device = device();
    let trainer = Trainer::new(model.clone(), data)
        .device(&device)
        .workers(2)
        .servers(2)
        .batch_size(8)
        .iterations(12)
        .learning_rate(0.01);
    let report = rule(trainer).run().unwrap();
    assert_eq!(report.num_applied, 24);
    assert_eq!(report.weights.len(), num_weights);
    model_with_weights(model, &device, &report.weights).unwrap()
}

#[test]
fn a_frozen_layer_keeps_its_bits_under_every_rule() {
    let model = Perceptron::with_frozen_layer(&device());
    let check = |after: Perceptron| {
        let (then, now) = (&model.hidden, &after.hidden);
        assert_eq!(bits(then.weight.val()), bits(now.weight.val()));
        let biases = [then, now].map(|layer| bits(layer.bias.as_ref().unwrap().val()));
        assert_eq!(biases[0], biases[1]);
        // And the other one has learned.
        assert_ne!(
            bits(model.output.weight.val()),
            bits(after.output.weight.val())
        );
    };
    let l2 = || Some(WeightDecayConfig::new(0.1));
    let momentum = || Some(MomentumConfig::new());
    check(trained(&model, 9, |t| t, data()));
    check(trained(
        &model,
        9,
        |t| t.optimizer(SgdConfig::new().with_weight_decay(l2())),
        data(),
    ));
    check(trained(
        &model,
        9,
        |t| {
            let config = SgdConfig::new().with_weight_decay(l2());
            t.optimizer(config.with_momentum(momentum()))
        },
        data(),
    ));
    check(trained(
        &model,
        9,
        |t| t.optimizer(AdamConfig::new().with_weight_decay(l2())),
        data(),
    ));
    check(trained(
        &model,
        9,
        |t| t.optimizer(AdamWConfig::new()),
        data(),
    ));
    check(trained(
        &model,
        9,
        |t| t.optimizer(AdamWConfig::new().with_weight_decay(0.1)),
        data(),
    ));
    check(trained(
        &model,
        9,
        |t| t.update_rule(|| Sgd::with_momentum(0.9)),
        data(),
    ));
}

#[test]
fn the_base_under_lora_adapters_keeps_its_bits() {
    let model = Perceptron::init([2, 8], &device()).apply_lora(Lora::new(2, 4.0));
    let num_weights = 2 * 2 + 2 * 8 + 8 * 2 + 2;
    let decay = AdamWConfig::new().with_weight_decay(0.1);
    let after = trained(&model, num_weights, |t| t.optimizer(decay), data());
    assert_eq!(
        bits(model.hidden.weight.base()),
        bits(after.hidden.weight.base())
    );
    assert_eq!(
        bits(model.output.bias.as_ref().unwrap().val()),
        bits(after.output.bias.as_ref().unwrap().val())
    );
    // The adapters have learned.
    assert_ne!(
        bits(model.hidden.weight.val()),
        bits(after.hidden.weight.val())
    );
}

/// M-1: the bytes on the wire are those of the trainable parameters, in both directions.
#[test]
fn bytes_on_the_wire_are_those_of_what_is_trained() {
    let device = device();
    let Perceptron { hidden, output } = Perceptron::init([50, 40], &device);
    let hidden = hidden.freeze();
    let frozen = Perceptron { hidden, output };
    let lora = Perceptron::init([50, 40], &device).apply_lora(Lora::new(2, 4.0));
    for (model, num_trainable) in [(frozen, 40 + 1), (lora, 50 * 2 + 2 * 40 + 40 * 2 + 2)] {
        let config = WorkerConfig {
            worker: WorkerId(0),
            num_workers: 1,
            batch_size: 8,
            seed: 1,
        };
        let weights = initial_weights(&model, &device).unwrap();
        let worker = spawn_worker(&model, &device, &data(), config).unwrap();
        let update = worker.ask(ComputeGradients(weights.clone())).wait();
        let update = update.unwrap().unwrap();
        let num_bytes = |message: &Encoded| -> usize {
            let numbers = message.bulk.iter().map(|bulk| bulk.len());
            4 * numbers.sum::<usize>()
        };
        let gradient = encode(&update).unwrap();
        assert_eq!(num_bytes(&gradient), 4 * num_trainable);
        // Weights also have the layout: names and shapes. A process that knows it does not read it again.
        let weights = encode(&weights).unwrap();
        let layout = num_bytes(&weights) - 4 * num_trainable;
        assert!(layout < 500, "{layout} bytes");
        // The 2,000 weights that are not trained are not in the headers either.
        for message in [gradient, weights] {
            assert!(message.header.len() < 500, "{} bytes", message.header.len());
        }
    }
}

#[test]
fn a_model_without_anything_to_train_is_refused_before_the_start() {
    let model = Perceptron::init([2, 8], &device()).freeze();
    let error = Trainer::new(model, data()).device(&device()).run();
    let error = std::error::Error::source(&error.unwrap_err())
        .unwrap()
        .to_string();
    assert!(error.contains("trainable"), "{error}");
}

#[test]
fn weights_of_another_model_are_refused_although_there_are_as_many() {
    let device = device();
    // 3·3 + 3 + 3 + 1 numbers, and 1·5 + 5 + 5 + 1.
    let (one, other) = (
        Perceptron::init([3, 3], &device),
        Perceptron::init([1, 5], &device),
    );
    let weights = initial_weights(&one, &device).unwrap();
    let fitting = initial_weights(&other, &device).unwrap();
    assert_eq!(weights.len(), fitting.len());
    let expected = ModelError::OtherModel {
        index: 0,
        expected: "`hidden.weight` [1, 5]".to_owned(),
        got: "`hidden.weight` [3, 3]".to_owned(),
    };
    let mut evaluator = Evaluator::new(&other, &device, &data()).unwrap();
    assert_eq!(evaluator.evaluate(&weights), Err(expected.clone()));
    let refused = model_with_weights(&other, &device, &weights);
    assert_eq!(refused.unwrap_err(), expected);
    let worker = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 4,
        seed: 0,
    };
    let worker = spawn_worker(&other, &device, &data(), worker).unwrap();
    let error = worker.ask(ComputeGradients(weights)).wait().unwrap();
    assert!(format!("{:?}", error.unwrap_err()).contains("OtherModel"));
    // Nothing is lost by that, and an equal layout of another process is as good as the own.
    evaluator.evaluate(&fitting).unwrap();
    worker
        .ask(ComputeGradients(fitting))
        .wait()
        .unwrap()
        .unwrap();
}
