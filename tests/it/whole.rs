//! LAMB and Muon, which need whole parameters (S-22).

use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::{Module, ParamGroup};
use ps::model::burn::nn::Linear;
use ps::model::burn::optim::{AdamWConfig, GradientsParams, LambConfig, MuonConfig};
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{FlatView, Rng, seeded};
use ps::prelude::*;

use crate::groups::{Perceptron, rows};

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn trainer() -> Trainer<Perceptron, impl Examples<Batch = Vec<f32>>> {
    let data = collated(InMemDataset::new(rows()), |rows: Vec<f32>| rows);
    Trainer::new(Perceptron::init(&device()), data)
        .device(&device())
        .batch_size(rows().len())
        .iterations(10)
        .learning_rate(0.05)
}

fn lamb() -> LambConfig {
    LambConfig::new().with_weight_decay(0.1)
}

fn matrices() -> ParamGroup {
    ParamGroup::from_predicate("weight")
}

fn bits(weights: &Weights) -> Vec<u32> {
    let weights = weights.to_vec();
    weights.iter().map(|weight| weight.to_bits()).collect()
}

fn assert_close(got: &Weights, expected: &[f32]) {
    for (index, (got, expected)) in got.to_vec().iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(difference < 1e-5, "weight {index}: {got} and {expected}");
    }
}

/// PS-3 and S-22. The model has four parameters: the last servers of five have none.
#[test]
fn lamb_on_any_number_of_servers_is_lamb_of_burn() {
    let device = device();
    let (mut model, mut optimizer) = (Perceptron::init(&device), lamb().init());
    for _ in 0..10 {
        let gradients = model.error(&rows(), &device).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(0.05, model, gradients);
    }
    let expected = FlatView::new(&model).unwrap().read_weights(&model);
    let one = trainer().optimizer(lamb()).run().unwrap();
    assert_close(&one.weights, &expected);
    for num_servers in [2, 3, 5] {
        let several = trainer().optimizer(lamb()).servers(num_servers);
        let several = several.run().unwrap();
        assert!(
            bits(&several.weights) == bits(&one.weights),
            "{num_servers}"
        );
    }
}

#[test]
fn muon_for_matrices_and_adamw_for_the_rest_is_that_of_burn() {
    let device = device();
    let adamw = AdamWConfig::new();
    let mut model = Perceptron::init(&device);
    let muon = MuonConfig::new().build();
    let mut optimizer = adamw.init().with_group(matrices(), muon, None);
    for _ in 0..10 {
        let gradients = model.error(&rows(), &device).backward();
        let gradients = GradientsParams::from_grads(gradients, &model);
        model = optimizer.step(0.05, model, gradients);
    }
    let expected = FlatView::new(&model).unwrap().read_weights(&model);
    let with_muon = |num_servers| {
        let trainer = trainer().optimizer(adamw.clone()).servers(num_servers);
        trainer.optimizer_for(&matrices(), MuonConfig::new())
    };
    let one = with_muon(1).run().unwrap();
    assert_close(&one.weights, &expected);
    for num_servers in [2, 3] {
        let several = with_muon(num_servers).run().unwrap();
        assert!(
            bits(&several.weights) == bits(&one.weights),
            "{num_servers}"
        );
    }
}

/// S-13 and S-14, with another number of servers in the second half.
#[test]
fn a_training_with_lamb_goes_on_and_is_computed_again_to_the_bit() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    let with_lamb = || trainer().optimizer(lamb());
    let whole = with_lamb().record(file.clone()).run().unwrap();
    let replay = with_lamb().replay(&file).unwrap();
    assert!(bits(&replay.weights) == bits(&whole.weights));
    let half = |num_iterations, num_servers| {
        let config = CheckpointConfig {
            resume: true,
            ..CheckpointConfig::new(directory.path().join("checkpoints"))
        };
        let trainer = with_lamb().servers(num_servers).checkpoints(config);
        trainer.iterations(num_iterations).run().unwrap()
    };
    half(4, 3);
    assert!(bits(&half(10, 2).weights) == bits(&whole.weights));
}

/// Most of its weights are in the first parameter: 72, 8, 8 and 1. So the first of three servers has none.
#[derive(Module, Debug)]
struct WideFirst {
    hidden: Linear,
    output: Linear,
}

impl Model for WideFirst {
    type Batch = Vec<f32>;

    fn loss(&self, x: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        let x = Tensor::<1>::from_floats(x.as_slice(), step.device()).unsqueeze_dim::<2>(1);
        let hidden = self.hidden.forward(x.clone().repeat(&[1, 9])).tanh();
        (self.output.forward(hidden) - x.square()).square().mean()
    }

    fn num_examples(x: &Vec<f32>) -> usize {
        x.len()
    }
}

/// S-13 and S-22. The state of the optimizer of a server without weights is never used.
#[test]
fn a_training_whose_first_server_has_no_weights_saves_and_goes_on() {
    let trainer = |with_muon, num_iterations| {
        let rng = &mut Rng::new(5);
        let model = WideFirst {
            hidden: seeded::linear(rng, [9, 8], &device()),
            output: seeded::linear(rng, [8, 1], &device()),
        };
        let data = collated(InMemDataset::new(rows()), |rows: Vec<f32>| rows);
        let trainer = Trainer::new(model, data)
            .device(&device())
            .batch_size(rows().len())
            .iterations(num_iterations)
            .learning_rate(0.05);
        match with_muon {
            true => trainer
                .optimizer(AdamWConfig::new())
                .optimizer_for(&matrices(), MuonConfig::new()),
            false => trainer.optimizer(lamb()),
        }
    };
    for with_muon in [false, true] {
        let whole = trainer(with_muon, 10).run().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let mut known = None;
        // The last part has another number of servers.
        for (num_iterations, num_servers) in [(3, 3), (6, 3), (8, 3), (10, 2)] {
            let config = CheckpointConfig {
                resume: true,
                ..CheckpointConfig::new(directory.path())
            };
            let trainer = trainer(with_muon, num_iterations).servers(num_servers);
            let report = trainer.checkpoints(config).run().unwrap();
            assert_eq!(report.resumed.map(|resumed| resumed.version), known);
            let saved = report.checkpoints.unwrap();
            assert_eq!(saved.num_failed, 0, "{with_muon}, {num_iterations}");
            known = Some(Version(num_iterations));
            assert!(saved.has(Version(num_iterations)));
            if num_iterations == 10 {
                assert!(bits(&report.weights) == bits(&whole.weights), "{with_muon}");
            }
        }
    }
}

#[test]
fn parameters_that_the_optimizer_cannot_update_are_refused_before_a_server_is_started() {
    let error = trainer().optimizer(MuonConfig::new()).run().unwrap_err();
    let text = ps::actors::actor::error_chain(&error);
    assert!(
        text.contains("`hidden.bias`, which has the shape [8]"),
        "{text}"
    );
    assert!(text.contains("optimizer_for"), "{text}");

    // Servers of one's own, cut anywhere.
    let initial = initial_weights(&ConvNet::init(1, &device()), &device()).unwrap();
    let spawn = |config| {
        ServerGroup::spawn(&initial, 2, config, |_| {
            Box::new(OptimizerRule::new(&lamb(), &device()).unwrap())
        })
    };
    let error = spawn(ServerConfig::default()).unwrap_err().to_string();
    assert!(error.contains("a part of `fc"), "{error}");
    assert!(error.contains("BetweenParameters"), "{error}");
    let config = ServerConfig {
        cut: Cut::BetweenParameters,
        ..ServerConfig::default()
    };
    spawn(config).unwrap();
}
