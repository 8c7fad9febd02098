//! Recorded trainings, computed again.

use std::fmt;

use burn::optim::AdamConfig;
use ps::actors::actor::error_chain;
use ps::prelude::*;

fn trainer(consistency: &str) -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &device), train)
        .device(&device)
        .test_data(test)
        .workers(3)
        .batch_size(16)
        .optimizer(AdamConfig::new())
        .learning_rate(2e-3)
        .consistency(consistency.parse().unwrap())
        .iterations(20)
}

fn bits(weights: &Weights) -> Vec<u32> {
    let numbers = weights.to_vec().into_iter();
    numbers.map(f32::to_bits).collect()
}

/// S-14.
#[test]
fn a_training_in_any_mode_is_computed_again_to_the_bit() {
    for mode in ["asp", "ssp:1", "k-of-n:2", "bsp"] {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("schedule");
        let report = trainer(mode).servers(2).record(file.clone()).run().unwrap();
        let replay = trainer(mode).replay(&file).unwrap();
        assert_eq!(replay.weights.version(), report.weights.version(), "{mode}");
        assert!(bits(&replay.weights) == bits(&report.weights), "{mode}");
        assert_eq!(replay.final_evaluation, report.final_evaluation, "{mode}");
        assert_eq!(
            (replay.num_gradients, replay.is_cut),
            (report.num_applied, false),
            "{mode}"
        );
    }
}

/// S-14. Dropout depends on seed, worker and clock only.
#[test]
fn a_model_with_dropout_is_computed_again_to_the_bit() {
    let device = select_device(default_device_name()).unwrap();
    let trainer = || {
        Trainer::new(Net::init(2, &device), Mnist::bundled_sample().train)
            .device(&device)
            .workers(2)
            .batch_size(4)
            .consistency(Consistency::Asp)
            .iterations(4)
    };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    let report = trainer().record(file.clone()).run().unwrap();
    let replay = trainer().replay(&file).unwrap();
    assert!(bits(&replay.weights) == bits(&report.weights));
}

#[test]
fn a_training_that_went_on_from_a_checkpoint_has_one_schedule() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    let run = |num_iterations| {
        let checkpoints = CheckpointConfig {
            resume: true,
            ..CheckpointConfig::new(directory.path().join("checkpoints"))
        };
        let trainer = trainer("asp")
            .iterations(num_iterations)
            .checkpoints(checkpoints);
        trainer.record(file.clone()).run().unwrap()
    };
    run(7);
    let report = run(20);
    let replay = trainer("asp").replay(&file).unwrap();
    assert_eq!(replay.weights.version(), Version(60));
    assert!(bits(&replay.weights) == bits(&report.weights));

    // Without a checkpoint, the schedule of an earlier training is not overwritten.
    let refused = error_chain(&trainer("asp").record(file.clone()).run().unwrap_err());
    assert!(refused.contains("File exists"), "{refused}");
}

#[test]
fn a_cut_schedule_is_replayed_as_far_as_it_goes() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    trainer("asp").record(file.clone()).run().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 5]).unwrap();
    let replay = trainer("asp").replay(&file).unwrap();
    assert_eq!(
        (replay.weights.version(), replay.is_cut),
        (Version(59), true)
    );
    assert!(
        replay
            .to_string()
            .contains("the end of the schedule is missing"),
        "{replay}"
    );
}

/// The examples in another order.
#[derive(Clone)]
struct Shifted {
    examples: ImageDataset,
    by: usize,
}

impl Examples for Shifted {
    type Batch = <ImageDataset as Examples>::Batch;

    fn num_examples(&self) -> usize {
        self.examples.num_examples()
    }

    fn batch(&self, indices: &[usize]) -> Self::Batch {
        let shifted = indices
            .iter()
            .map(|index| (index + self.by) % self.num_examples());
        Examples::batch(&self.examples, &shifted.collect::<Vec<_>>())
    }
}

/// SGD that makes one of its updates twice.
struct Doubling {
    sgd: Sgd,
    update: u64,
    num_updates: u64,
}

/// A schedule compares this text.
impl fmt::Debug for Doubling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Doubling")
    }
}

impl UpdateRule for Doubling {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        self.num_updates += 1;
        let times = 1 + usize::from(self.num_updates == self.update);
        (0..times).for_each(|_| self.sgd.update(weights, gradient, learning_rate));
    }
}

/// S-14: nothing but the data and the rule themselves tells these apart.
#[test]
fn a_replay_with_other_data_or_another_rule_is_found_out() {
    let trainer = |by, update| {
        let device = select_device(default_device_name()).unwrap();
        let examples = Mnist::bundled_sample().train;
        let rule = move || Doubling {
            sgd: Sgd::new(),
            update,
            num_updates: 0,
        };
        Trainer::new(ConvNet::init(1, &device), Shifted { examples, by })
            .device(&device)
            .batch_size(8)
            .update_rule(rule)
            .iterations(5)
    };
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    trainer(0, 2).record(file.clone()).run().unwrap();
    trainer(0, 2).replay(&file).unwrap();
    let differs = |by, update| error_chain(&trainer(by, update).replay(&file).unwrap_err());
    for (differs, expected) in [
        (differs(1, 2), "in the update that makes version 1"),
        (differs(0, 4), "in the weights of version 2"),
        (differs(0, 1), "in the weights of version 1"),
    ] {
        let expected = format!("the first difference is {expected}");
        assert!(differs.contains(&expected), "{expected}: {differs}");
    }
}

#[test]
fn a_replay_names_the_first_update_that_differs() {
    let device = select_device(default_device_name()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    trainer("asp").record(file.clone()).run().unwrap();
    let other = Trainer::new(ConvNet::init(5, &device), Mnist::bundled_sample().train)
        .device(&device)
        .workers(3)
        .batch_size(16)
        .optimizer(AdamConfig::new());
    let differs = error_chain(&other.replay(&file).unwrap_err());
    assert!(
        differs.contains("the first difference is in the weights of version 0"),
        "{differs}"
    );

    let seed = error_chain(&trainer("asp").seed(3).replay(&file).unwrap_err());
    assert!(
        seed.contains("the seed is `0` there, and `3` here"),
        "{seed}"
    );
    let nothing = error_chain(
        &trainer("asp")
            .replay(&directory.path().join("none"))
            .unwrap_err(),
    );
    assert!(
        nothing.contains("cannot use") && nothing.contains("none"),
        "{nothing}"
    );
}
