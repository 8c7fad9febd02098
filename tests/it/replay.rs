//! Recorded trainings, computed again.

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
        differs.contains("the first difference is in the update that makes version 1"),
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
