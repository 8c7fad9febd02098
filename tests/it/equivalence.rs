//! PS-3 with real models: N workers are one worker on the joined batch, and any number of servers
//! is one server.

use ps::model::burn::optim::momentum::MomentumConfig;
use ps::model::burn::optim::{AdamConfig, SgdConfig};
use ps::prelude::*;

/// The rules to be compared, and how far results may be apart: see [`assert_close`].
#[derive(Clone, Copy, Debug)]
enum Rule {
    PlainSgd,
    BurnMomentum,
    Adam,
}

const RULES: [Rule; 3] = [Rule::PlainSgd, Rule::BurnMomentum, Rule::Adam];

/// Trains `ConvNet` for `num_steps` rounds and returns its final weights.
fn train(rule: Rule, num_workers: usize, num_servers: usize, batch: usize, seed: u64) -> Vec<f32> {
    let device = select_device(default_device_name()).unwrap();
    let model = ConvNet::init(seed, &device);
    let data = Mnist::bundled_sample().train;
    let config = ServerConfig {
        wait_for_workers: num_workers,
        ..ServerConfig::default()
    };
    let initial = initial_weights(&model, &device).unwrap();
    let make_rule = |_| -> Box<dyn UpdateRule> {
        match rule {
            Rule::PlainSgd => Box::new(Sgd::new()),
            Rule::BurnMomentum => {
                let momentum = MomentumConfig::new().with_momentum(0.9);
                let sgd = SgdConfig::new().with_momentum(Some(momentum));
                Box::new(OptimizerRule::new(&sgd, &device).unwrap())
            }
            Rule::Adam => Box::new(OptimizerRule::new(&AdamConfig::new(), &device).unwrap()),
        }
    };
    let servers = ServerGroup::spawn(&initial, num_servers, config, make_rule).unwrap();
    let workers: Vec<_> = (0..num_workers)
        .map(|rank| {
            let worker = WorkerId(rank as u32);
            let config = WorkerConfig {
                worker,
                num_workers,
                batch_size: batch,
                seed,
            };
            spawn_worker(&model, &device, &data, config).unwrap()
        })
        .collect();
    let runs: Vec<_> = workers
        .iter()
        .map(|worker| {
            worker.ask(RunSteps {
                servers: servers.clone(),
                num_steps: 12,
            })
        })
        .collect();
    for run in runs {
        assert_eq!(run.wait().unwrap().unwrap().num_applied, 12);
    }
    run(async move { servers.pull(PullVersion::Latest).await.unwrap() }).to_vec()
}

/// Sums in another order differ in the last bits of each gradient; the rules pass that on times
/// the learning rate per step. Adam divides by the gradient's own size, so a weight whose gradient
/// is nearly zero may take a step of another sign: its tolerance is two steps of such a weight.
fn assert_close(rule: Rule, got: &[f32], expected: &[f32]) {
    // How far one weight may be off, and all of them on average. Ten weights may take such a step.
    let (tolerance, average) = match rule {
        Rule::PlainSgd | Rule::BurnMomentum => (1e-6, 1e-6),
        Rule::Adam => (2e-2, 1e-4),
    };
    let mut sum = 0.0;
    for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = (got - expected).abs();
        assert!(
            difference <= tolerance,
            "{rule:?}, weight {index}: {got} and {expected}"
        );
        sum += f64::from(difference);
    }
    let mean = sum / got.len() as f64;
    assert!(
        mean < average,
        "{rule:?}: weights are {mean} apart on average"
    );
}

#[test]
fn workers_in_step_equal_one_worker_on_the_joined_batch() {
    for rule in RULES {
        let one = train(rule, 1, 1, 48, 3);
        for num_workers in [2, 3] {
            let several = train(rule, num_workers, 1, 48 / num_workers, 3);
            assert_close(rule, &several, &one);
        }
    }
}

#[test]
fn any_number_of_servers_gives_the_same_bits() {
    for rule in RULES {
        let one = train(rule, 2, 1, 16, 5);
        for num_servers in [2, 5] {
            let several = train(rule, 2, num_servers, 16, 5);
            let differs = (0..one.len()).find(|&i| one[i].to_bits() != several[i].to_bits());
            assert_eq!(differs, None, "{rule:?}, {num_servers} servers");
        }
    }
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_seed_does_not() {
    let first = train(Rule::PlainSgd, 2, 1, 16, 7);
    assert!(train(Rule::PlainSgd, 2, 1, 16, 7) == first);
    assert!(train(Rule::PlainSgd, 2, 1, 16, 8) != first);
}

#[test]
fn a_rule_with_a_restored_state_continues_identically() {
    let device = select_device(default_device_name()).unwrap();
    let new = || OptimizerRule::new(&AdamConfig::new(), &device).unwrap();
    let gradient: Vec<f32> = (0..50).map(|i| (i as f32).sin()).collect();
    let (mut rule, mut weights) = (new(), vec![1.0; 50]);
    for _ in 0..3 {
        rule.update(&mut weights, &gradient, 0.01);
    }
    let mut restored = new();
    restored.restore(rule.save()).unwrap();
    let mut other = weights.clone();
    rule.update(&mut weights, &gradient, 0.01);
    restored.update(&mut other, &gradient, 0.01);
    assert_eq!(weights, other);
    let foreign = Sgd::with_momentum(0.9).save();
    assert!(
        new().restore(foreign).is_ok(),
        "an empty state is that of a rule without steps"
    );
    let mut sgd = Sgd::with_momentum(0.9);
    sgd.update(&mut weights, &gradient, 0.01);
    let error = new().restore(sgd.save()).unwrap_err().to_string();
    assert!(error.contains("velocity"), "{error}");
}
