//! Trainings that go on from a checkpoint.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::optim::{AdamConfig, AdamWConfig};
use burn_store::{ModuleSnapshot as _, SafetensorsStore};
use ps::prelude::*;

fn trainer(checkpoints: CheckpointConfig) -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &device), train)
        .device(&device)
        .test_data(test)
        .workers(2)
        .batch_size(16)
        .checkpoints(checkpoints)
}

fn resume(directory: &std::path::Path) -> CheckpointConfig {
    CheckpointConfig {
        resume: true,
        ..CheckpointConfig::new(directory)
    }
}

fn bits(weights: &Weights) -> Vec<u32> {
    let numbers = weights.to_vec().into_iter();
    numbers.map(f32::to_bits).collect()
}

type Setting = fn(Trainer<ConvNet, ImageDataset>) -> Trainer<ConvNet, ImageDataset>;

/// S-13: weights, slots, step counters, clocks, and the order of the examples.
#[test]
fn a_training_in_two_halves_has_the_bits_of_one_in_a_piece() {
    let optimizers: [(&str, Setting); 4] = [
        ("sgd", |trainer| trainer.learning_rate(0.1)),
        ("momentum", |trainer| {
            trainer
                .update_rule(|| Sgd::with_momentum(0.9))
                .learning_rate(0.02)
        }),
        ("adam", |trainer| {
            trainer.optimizer(AdamConfig::new()).learning_rate(2e-3)
        }),
        ("adamw", |trainer| {
            let clipping = Some(GradientClippingConfig::Value(0.5));
            let config = AdamWConfig::new().with_grad_clipping(clipping);
            trainer.optimizer(config).learning_rate(2e-3)
        }),
    ];
    for (name, with_optimizer) in optimizers {
        let whole = tempfile::tempdir().unwrap();
        let whole = with_optimizer(trainer(resume(whole.path())))
            .iterations(12)
            .run()
            .unwrap();
        // At step 3 Adam's correction of its bias is still far from 1.
        for (first, servers) in [(3, [1, 1]), (6, [2, 3])] {
            let directory = tempfile::tempdir().unwrap();
            let run = |num_steps, num_servers| {
                let trainer = with_optimizer(trainer(resume(directory.path())));
                trainer
                    .iterations(num_steps)
                    .servers(num_servers)
                    .run()
                    .unwrap()
            };
            let before = run(first, servers[0]);
            assert_eq!((before.num_updates, before.resumed), (first, None));
            let after = run(12, servers[1]);
            let what = format!("{name}, {first} steps first\n{after}");
            assert_eq!(after.resumed.unwrap().version, Version(first), "{what}");
            assert!(bits(&after.weights) == bits(&whole.weights), "{what}");
            assert_eq!(after.final_evaluation, whole.final_evaluation, "{what}");
            assert_eq!(
                after.losses[1][..],
                whole.losses[1][first as usize..],
                "{what}"
            );
            assert_eq!(
                (after.num_applied, after.num_examples),
                (24, 24 * 16),
                "{what}"
            );
            assert_eq!(after.num_untold, 0, "{what}");
            assert!(after.saved_all().is_some(), "{what}");
        }
    }
}

#[test]
fn checkpoints_are_saved_while_the_workers_go_on_and_the_newest_are_kept() {
    let directory = tempfile::tempdir().unwrap();
    let every = CheckpointConfig {
        every: 50,
        keep: 2,
        ..CheckpointConfig::new(directory.path())
    };
    let report = trainer(every)
        .consistency(Consistency::Asp)
        .iterations(400)
        .run()
        .unwrap();
    let saved = report.checkpoints.as_ref().unwrap();
    // They are written beside the training, as many as there is time for; the last one in any case.
    assert!(saved.num_saved >= 1 && saved.num_failed == 0, "{saved:?}");
    assert!(saved.has(Version(800)), "{saved:?}");
    let kept = std::fs::read_dir(directory.path()).unwrap();
    let kept = kept.filter(|entry| {
        let name = entry.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with("checkpoint-")
    });
    assert_eq!(kept.count() as u64, saved.num_saved.min(2));
    assert!(
        report.to_string().contains("checkpoint-000000000800"),
        "{report}"
    );

    // All steps are taken already.
    let nothing = trainer(resume(directory.path()));
    let nothing = nothing
        .consistency(Consistency::Asp)
        .iterations(400)
        .run()
        .unwrap();
    assert_eq!((nothing.num_updates, nothing.losses[0].len()), (800, 0));
    assert_eq!(nothing.final_evaluation, report.final_evaluation);
    assert!(bits(&nothing.weights) == bits(&report.weights));
}

#[test]
fn a_training_goes_on_with_more_and_with_fewer_workers() {
    let directory = tempfile::tempdir().unwrap();
    let run = |num_workers, epochs| {
        let trainer = trainer(resume(directory.path()))
            .workers(num_workers)
            .epochs(epochs);
        trainer.learning_rate(0.05).run().unwrap()
    };
    // 4,000 examples in batches of 16: 125 steps of 2 workers, 63 of 4, 84 of 3.
    // The last step of 4 and of 3 has fewer.
    assert_eq!(run(2, 1).num_updates, 125);
    let more = run(4, 2);
    assert_eq!(
        more.losses.iter().map(Vec::len).collect::<Vec<_>>(),
        [63; 4]
    );
    assert_eq!(
        (more.num_updates, more.num_applied),
        (125 + 63, 250 + 4 * 63)
    );
    let fewer = run(3, 3);
    assert_eq!(
        fewer.losses.iter().map(Vec::len).collect::<Vec<_>>(),
        [84; 3]
    );
    assert_eq!(fewer.num_updates, 125 + 63 + 84);
    let accuracy = fewer.final_accuracy().unwrap();
    assert!(accuracy > 0.8, "{accuracy}");
}

/// Plain SGD that panics at some updates, counted over all its servers.
struct Panics {
    sgd: Sgd,
    panics_at: fn(u64) -> bool,
    num_updates: Arc<AtomicU64>,
}

/// Checkpoints compare this text.
impl fmt::Debug for Panics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Panics")
    }
}

impl UpdateRule for Panics {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        let number = self.num_updates.fetch_add(1, Ordering::Relaxed);
        assert!(!(self.panics_at)(number), "a test: update {number} fails");
        self.sgd.update(weights, gradient, learning_rate);
    }
}

/// S-13: a lost server costs the updates since the last checkpoint, and no attention.
#[test]
fn a_training_that_loses_its_servers_goes_on_from_its_last_checkpoint() {
    let run = |panics_at: fn(u64) -> bool, directory: &std::path::Path| {
        let every = CheckpointConfig {
            every: 4,
            ..CheckpointConfig::new(directory)
        };
        let num_updates = Arc::new(AtomicU64::new(0));
        let rule = move || Panics {
            sgd: Sgd::new(),
            panics_at,
            num_updates: Arc::clone(&num_updates),
        };
        trainer(every).update_rule(rule).iterations(30).run()
    };
    let whole = tempfile::tempdir().unwrap();
    let whole = run(|_| false, whole.path()).unwrap();
    let lossy = tempfile::tempdir().unwrap();
    let lossy = run(|number| matches!(number, 10 | 25), lossy.path()).unwrap();
    assert_eq!(
        (lossy.num_recoveries, lossy.num_updates),
        (2, 30),
        "{lossy}"
    );
    assert!(bits(&lossy.weights) == bits(&whole.weights), "{lossy}");

    // What fails again and again is no accident.
    let hopeless = tempfile::tempdir().unwrap();
    let error = run(|number| number >= 10, hopeless.path()).unwrap_err();
    let error = ps::actors::actor::error_chain(&error);
    assert!(
        error.contains("server 0 of the group did not answer"),
        "{error}"
    );
}

#[test]
fn a_checkpoint_of_another_training_is_refused_by_what_differs() {
    let directory = tempfile::tempdir().unwrap();
    trainer(resume(directory.path()))
        .iterations(2)
        .run()
        .unwrap();
    let settings: [(&str, Setting); 4] = [
        ("the optimizer is", |trainer| {
            trainer.optimizer(AdamConfig::new())
        }),
        ("the batch size is `16` there, and `32` here", |trainer| {
            trainer.batch_size(32)
        }),
        ("the seed is `0` there, and `5` here", |trainer| {
            trainer.seed(5)
        }),
        ("the name of the training", |trainer| {
            trainer.name("another")
        }),
    ];
    for (expected, with_setting) in settings {
        let refused = with_setting(trainer(resume(directory.path())))
            .iterations(4)
            .run();
        let refused = ps::actors::actor::error_chain(&refused.unwrap_err());
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
    let device = select_device(default_device_name()).unwrap();
    let other = Trainer::new(Net::init(1, &device), Mnist::bundled_sample().train)
        .batch_size(16)
        .iterations(4)
        .checkpoints(resume(directory.path()));
    let refused = ps::actors::actor::error_chain(&other.run().unwrap_err());
    assert!(
        refused.contains("it has `conv1.weight` [3, 1, 3, 3] where"),
        "{refused}"
    );
    // What only changes the way is no difference.
    let report = trainer(resume(directory.path()))
        .learning_rate(0.001)
        .consistency(Consistency::Asp)
        .servers(2)
        .iterations(4)
        .run()
        .unwrap();
    assert_eq!(report.num_applied, 8);
}

/// S-13: burn's own reader of safetensors finds each trained parameter by its name, as other programs do.
#[test]
fn burns_own_loader_reads_the_weights_of_a_checkpoint() {
    fn check<M: Model + Module>(mut model: M, file: &std::path::Path, expected: &Weights) {
        let device = select_device(default_device_name()).unwrap();
        let other = initial_weights(&model, &device).unwrap();
        assert!(bits(&other) != bits(expected));
        let read = model.load_from(&mut SafetensorsStore::from_file(file));
        let read = read.unwrap_or_else(|error| panic!("{error}"));
        let is_whole = read.errors.is_empty() && read.missing.is_empty() && read.unused.is_empty();
        assert!(is_whole, "{read:?}");
        let weights = initial_weights(&model, &device).unwrap();
        assert!(bits(&weights) == bits(expected));
    }

    let device = select_device(default_device_name()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let report = trainer(resume(directory.path()))
        .iterations(3)
        .run()
        .unwrap();
    let file = report.saved_all().unwrap().join("model.safetensors");
    check(ConvNet::init(2, &device), &file, &report.weights);

    // With linear layers, whose weights PyTorch has the other way round.
    let weights = initial_weights(&Net::init(1, &device), &device).unwrap();
    let file = directory.path().join("net.safetensors");
    weights.write_safetensors(&file).unwrap();
    check(Net::init(2, &device), &file, &weights);
}
