//! Learning-rate schedules of burn, and clipping, in trainings of real models (S-17, S-18).

use std::sync::{Arc, Mutex};

use burn::lr_scheduler::LrSchedulerConfig;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::lr_scheduler::exponential::ExponentialLrSchedulerConfig;
use burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use burn::lr_scheduler::noam::NoamLrSchedulerConfig;
use burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use burn::lr_scheduler::step::StepLrSchedulerConfig;
use burn::optim::AdamConfig;
use ps::actors::actor::error_chain;
use ps::actors::cluster::Transport;
use ps::actors::learning_rate::LearningRateSchedule;
use ps::actors::net::memory::MemoryNetwork;
use ps::observe::Event;
use ps::prelude::*;

use crate::nodes::with_two_nodes;

fn trainer() -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
        .device(&device)
        .workers(2)
        .batch_size(16)
}

/// A linear warm-up over 4 updates, then a cosine over 8.
fn warm_up_and_cosine() -> LrSchedulerConfig {
    let warm_up = LinearLrSchedulerConfig::new(1e-4, 5e-3, 4);
    let cosine = CosineAnnealingLrSchedulerConfig::new(5e-3, 8);
    let parts = vec![warm_up.into(), cosine.into()];
    SequentialLrSchedulerConfig::new(parts, vec![4]).into()
}

fn bits(weights: &Weights) -> Vec<u32> {
    let numbers = weights.to_vec().into_iter();
    numbers.map(f32::to_bits).collect()
}

/// S-17: every scheduler of burn, stepped by updates.
#[test]
fn a_schedule_is_stepped_once_for_each_update_in_any_order() {
    let all: [LrSchedulerConfig; 6] = [
        0.25.into(),
        LinearLrSchedulerConfig::new(0.5, 0.1, 5).into(),
        CosineAnnealingLrSchedulerConfig::new(0.5, 6).into(),
        ExponentialLrSchedulerConfig::new(0.5, 0.9).into(),
        StepLrSchedulerConfig::new(0.5, 3).into(),
        NoamLrSchedulerConfig::new(2.0).with_warmup_steps(4).into(),
    ];
    for config in all.into_iter().chain([warm_up_and_cosine()]) {
        let fresh = || BurnSchedule::new(config.clone()).unwrap();
        let mut schedule = fresh();
        let rates: Vec<f64> = (1..13)
            .map(|update| schedule.learning_rate(Version(update)))
            .collect();
        for (update, rate) in (1..13).zip(&rates) {
            // Again, after later ones, and by another process.
            for schedule in [&mut schedule, &mut fresh()] {
                let again = schedule.learning_rate(Version(update));
                assert_eq!(again.to_bits(), rate.to_bits(), "{schedule:?}, {update}");
            }
        }
    }
    let mut schedule = BurnSchedule::new(warm_up_and_cosine()).unwrap();
    let rates = [1, 5, 9, 13].map(|update| schedule.learning_rate(Version(update)));
    for (got, expected) in rates.into_iter().zip([1e-4, 5e-3, 2.5e-3, 0.0]) {
        assert!((got - expected).abs() < 1e-9, "{rates:?}");
    }
}

/// S-17. A driver's own loop sets the rates one by one.
#[test]
fn a_training_with_a_schedule_has_the_bits_of_one_whose_rates_are_set_by_hand() {
    let device = select_device(default_device_name()).unwrap();
    let report = trainer()
        .workers(1)
        .lr_scheduler(warm_up_and_cosine())
        .iterations(12)
        .run()
        .unwrap();
    let model = ConvNet::init(1, &device);
    let initial = initial_weights(&model, &device).unwrap();
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default()).unwrap();
    let server = server.spawn().unwrap();
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 16,
        seed: 0,
    };
    let worker = spawn_worker(&model, &device, &Mnist::bundled_sample().train, config).unwrap();
    let mut schedule = BurnSchedule::new(warm_up_and_cosine()).unwrap();
    let mut weights = initial;
    for update in 1..13 {
        let rate = schedule.learning_rate(Version(update));
        server.ask(SetLearningRate(rate)).flatten().wait().unwrap();
        let gradient = worker.ask(ComputeGradients(weights)).wait().unwrap();
        let apply = ApplyGradients::mean([gradient.unwrap()]);
        weights = server.ask(apply).flatten().wait().unwrap();
    }
    assert!(bits(&weights) == bits(&report.weights));
}

/// S-17 and S-18.
#[test]
fn a_training_in_two_halves_has_the_rates_and_the_clipping_of_one_in_a_piece() {
    let run = |directory: &std::path::Path, num_steps, num_servers, clip: f64| {
        let checkpoints = CheckpointConfig {
            resume: true,
            ..CheckpointConfig::new(directory)
        };
        trainer()
            .optimizer(AdamConfig::new())
            .lr_scheduler(warm_up_and_cosine())
            .clip_norm(clip)
            .checkpoints(checkpoints)
            .servers(num_servers)
            .iterations(num_steps)
            .run()
            .unwrap()
    };
    let directories = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let [whole, halves, unclipped] = &directories;
    let whole = run(whole.path(), 12, 1, 0.5);
    run(halves.path(), 5, 2, 0.5);
    let after = run(halves.path(), 12, 3, 0.5);
    assert_eq!(after.resumed.unwrap().version, Version(5));
    assert!(bits(&after.weights) == bits(&whole.weights));
    let unclipped = run(unclipped.path(), 12, 1, 1e6);
    assert!(
        bits(&unclipped.weights) != bits(&whole.weights),
        "no gradient was clipped"
    );
}

/// S-14, S-17 and S-18.
#[test]
fn a_training_with_a_schedule_and_clipping_is_computed_again_to_the_bit() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    let trainer = |limit| {
        trainer()
            .lr_scheduler(ExponentialLrSchedulerConfig::new(0.1, 0.9))
            .consistency(Consistency::Asp)
            .clip_norm(limit)
            .servers(2)
            .iterations(10)
    };
    let report = trainer(0.5).record(file.clone()).run().unwrap();
    let replay = trainer(0.5).replay(&file).unwrap();
    assert_eq!(replay.weights.version(), Version(20));
    assert!(bits(&replay.weights) == bits(&report.weights));

    let refused = error_chain(&trainer(0.25).replay(&file).unwrap_err());
    let expected = "the clipping is `norm 0.5` there, and `norm 0.25` here";
    assert!(refused.contains(expected), "{refused}");
}

/// S-17 and S-18: the nodes make the schedule of their servers themselves, and the settings come from the driver.
#[test]
fn servers_and_workers_on_nodes_use_the_schedule_the_clipping_and_the_parts_of_the_training() {
    let with_two_halves = || {
        trainer()
            .lr_scheduler(warm_up_and_cosine())
            .clip_norm(0.5)
            .micro_batches(2)
            .iterations(12)
    };
    let constant = || trainer().iterations(12);
    let hosts = constant().hosts(with_two_halves().hosts(Hosts::new()).unwrap());
    let hosts = hosts.unwrap();
    with_two_nodes(Transport::Memory(MemoryNetwork::new()), hosts, |cluster| {
        let both: [&dyn Fn() -> Trainer<ConvNet, ImageDataset>; 2] = [&with_two_halves, &constant];
        for make in both {
            let trainer = make().servers_on_nodes(true).servers(2);
            let report = trainer.run_on(cluster).unwrap();
            assert!(bits(&report.weights) == bits(&make().run().unwrap().weights));
        }
    });
}

#[test]
fn the_events_tell_the_schedule_and_its_first_rate() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    trainer()
        .lr_scheduler(warm_up_and_cosine())
        .iterations(2)
        .observe(move |event: &Event| {
            if let Event::RunStarted(started) = event {
                told.lock().unwrap().push(started.settings.clone());
            }
        })
        .run()
        .unwrap();
    let seen = seen.lock().unwrap();
    let first = seen[0].learning_rate;
    assert!((first - 1e-4).abs() < 1e-12, "{first}");
    assert!(seen[0].schedule.contains("Cosine"), "{}", seen[0].schedule);
}

#[derive(Debug)]
struct Sinking;

impl LearningRateSchedule for Sinking {
    fn learning_rate(&mut self, version: Version) -> f64 {
        0.0125 - 0.001 * version.0 as f64
    }
}

#[test]
fn settings_that_cannot_work_are_refused_before_anything_is_started() {
    let refused = |trainer: Trainer<ConvNet, ImageDataset>| {
        let error = trainer.iterations(20).run().unwrap_err();
        assert!(error.report().is_none());
        error_chain(&error)
    };
    let negative = LinearLrSchedulerConfig::new(-0.1, 0.0, 5);
    let text = refused(trainer().lr_scheduler(negative));
    assert!(
        text.contains("Initial learning rate must be greater than 0")
            && text.contains("initial_lr: -0.1"),
        "{text}"
    );
    // burn accepts it.
    let text = refused(trainer().lr_scheduler(NoamLrSchedulerConfig::new(f64::NAN)));
    assert!(text.contains("NaN for update 1"), "{text}");
    let text = refused(trainer().learning_rate_schedule(|| Sinking));
    assert!(
        text.contains("Sinking gives -0.0") && text.contains("update 13"),
        "{text}"
    );
    let text = refused(trainer().clip_norm(-1.0));
    assert!(text.contains("clipped to a positive number"), "{text}");
    let text = refused(trainer().clip_value(0.0));
    assert!(text.contains("clipped to a positive number"), "{text}");
}

/// The gradient of a batch is the mean of those of its parts, weighted by their examples.
#[test]
fn a_batch_in_parts_trains_as_one_in_a_piece() {
    let run = |parts| {
        let run = trainer().micro_batches(parts).iterations(12).run().unwrap();
        (run.weights.to_vec(), run.losses, run.num_examples)
    };
    let (whole, losses, num_examples) = run(1);
    // 16 examples are 5 + 5 + 6 in some order, and 4 times 4.
    for parts in [3, 4] {
        let (weights, part_losses, part_examples) = run(parts);
        assert_eq!(part_examples, num_examples);
        for (got, expected) in weights.iter().zip(&whole) {
            assert!(
                (got - expected).abs() < 1e-5,
                "{got} and {expected}, {parts} parts"
            );
        }
        for (got, expected) in part_losses.concat().iter().zip(losses.concat()) {
            assert!(
                (got - expected).abs() < 1e-4,
                "{got} and {expected}, {parts} parts"
            );
        }
        assert!(weights != whole, "computed in one piece");
    }
    for parts in [0, 17] {
        let error = trainer().micro_batches(parts).iterations(1).run();
        let text = error_chain(&error.unwrap_err());
        assert!(text.contains("give 1 to the batch size"), "{text}");
    }
}
