//! Workers that compute while they push (S-24).

use ps::prelude::*;

fn trainer(consistency: Consistency) -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    Trainer::new(ConvNet::init(3, &device), Mnist::bundled_sample().train)
        .device(&device)
        .batch_size(8)
        .iterations(20)
        .consistency(consistency)
        .overlap(true)
}

/// The staleness is that of the recorded schedule, so a replay has the same bits (S-14).
#[test]
fn a_training_with_overlap_can_be_replayed() {
    let directory = tempfile::tempdir().unwrap();
    for (number, consistency) in [Consistency::Asp, Consistency::Ssp { bound: 1 }]
        .into_iter()
        .enumerate()
    {
        let file = directory.path().join(number.to_string());
        let new = || trainer(consistency).workers(2).servers(3);
        let report = new().record(file.clone()).run().unwrap();
        assert_eq!(report.num_applied, 40);
        // The two first gradients of a worker are its only ones without it.
        assert!(
            report.staleness.mean() >= 0.9,
            "{}",
            report.staleness.mean()
        );
        let replay = new().replay(&file).unwrap();
        assert_eq!(replay.weights.to_vec(), report.weights.to_vec());
    }
}

#[test]
fn a_training_that_goes_on_has_each_step_once() {
    let directory = tempfile::tempdir().unwrap();
    let new = |steps| {
        let checkpoints = CheckpointConfig {
            resume: true,
            ..CheckpointConfig::new(directory.path())
        };
        trainer(Consistency::Asp)
            .workers(2)
            .iterations(steps)
            .checkpoints(checkpoints)
            .run()
            .unwrap()
    };
    assert_eq!(new(10).num_applied, 20);
    let report = new(20);
    assert_eq!((report.num_applied, report.num_applied_before), (40, 20));
}

#[test]
fn a_mode_that_needs_the_update_is_refused() {
    for consistency in [Consistency::Bsp, Consistency::KofN { k: 1 }] {
        let error = trainer(consistency).run().unwrap_err();
        assert!(matches!(error, TrainError::Overlap(_)), "{error:?}");
        assert!(
            error.to_string().contains(&consistency.to_string()),
            "{error}"
        );
    }
}
