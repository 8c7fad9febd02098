//! Models learn, in every mode, and the report says what happened.

use ps::prelude::*;

fn trainer() -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &device), train)
        .device(&device)
        .test_data(test)
        .workers(2)
        .batch_size(32)
        .learning_rate(0.1)
}

#[test]
fn convnet_learns_digits_in_every_consistency_mode() {
    for mode in ["bsp", "asp", "ssp:1", "k-of-n:1"] {
        let consistency: Consistency = mode.parse().unwrap();
        let report = trainer()
            .consistency(consistency)
            .servers(2)
            .epochs(4)
            .evaluate_every(50)
            .run();
        let report = report.unwrap();
        let accuracy = report.final_accuracy().unwrap();
        assert!(accuracy > 0.78, "{mode}: {accuracy}\n{report}");
        let evaluation = report.final_evaluation.unwrap();
        assert_eq!(evaluation.num_examples, 1_000, "the whole test set");
        // 4,000 examples in batches of 32 for 2 workers: 62 steps each per epoch, and one of half the size.
        assert_eq!(
            report.losses.iter().map(Vec::len).collect::<Vec<_>>(),
            [252, 252],
            "{mode}"
        );
        let total = report.num_applied + report.num_dropped_late + report.num_refused;
        assert_eq!((total, report.num_examples), (504, 4 * 4_000), "{mode}");
        assert_eq!(report.staleness.num_values(), report.num_applied);
        // The first one is due at version 50. Each later one is of a later version, and of another fifty.
        let fifties = report.curve.iter().map(|point| point.version.0 / 50);
        let fifties: Vec<u64> = fifties.collect();
        assert!(!fifties.contains(&0), "{mode}: {fifties:?}");
        assert!(
            fifties.is_sorted_by(|before, after| before < after),
            "{mode}: {fifties:?}"
        );
        match consistency {
            Consistency::Bsp => assert_eq!((report.num_updates, report.staleness.max()), (252, 0)),
            Consistency::KofN { .. } => assert!(report.num_updates >= 252),
            _ => assert_eq!(report.num_updates, 504, "{mode}"),
        }
        let first: f32 = report.losses[0][..20].iter().sum();
        let last: f32 = report.losses[0][232..].iter().sum();
        assert!(
            last < 0.5 * first,
            "{mode}: losses went from {first} to {last}"
        );
    }
}

#[test]
fn a_drivers_loop_and_the_workers_loop_give_the_same_bits() {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, .. } = Mnist::bundled_sample();
    let model = ConvNet::init(9, &device);
    let initial = initial_weights(&model, &device).unwrap();
    let config = ServerConfig {
        wait_for_workers: 2,
        ..ServerConfig::default()
    };
    let start = || -> (_, Vec<_>) {
        let server = ParameterServer::new(&initial, Sgd::new(), config);
        let workers = [0, 1].map(|rank| {
            let worker = WorkerId(rank);
            let config = WorkerConfig {
                worker,
                num_workers: 2,
                batch_size: 16,
                seed: 9,
            };
            spawn_worker(&model, &device, &train, config).unwrap()
        });
        (server.unwrap().spawn().unwrap(), workers.into())
    };

    let (server, workers) = start();
    let mut by_driver = server.ask(GetWeights).wait().unwrap();
    for _ in 0..10 {
        let replies: Vec<_> = workers
            .iter()
            .map(|worker| worker.ask(ComputeGradients(by_driver.clone())))
            .collect();
        let gradients = replies
            .into_iter()
            .map(|reply| reply.wait().unwrap().unwrap());
        by_driver = server
            .ask(ApplyGradients::mean(gradients))
            .wait()
            .unwrap()
            .unwrap();
    }

    let (server, workers) = start();
    let servers = ServerGroup::single(server.clone());
    let runs: Vec<_> = workers
        .iter()
        .map(|worker| {
            worker.ask(RunSteps {
                servers: servers.clone(),
                num_steps: 10,
            })
        })
        .collect();
    runs.into_iter().for_each(|run| {
        run.wait().unwrap().unwrap();
    });
    let by_workers = server.ask(GetWeights).wait().unwrap();
    assert!(by_workers.to_vec() == by_driver.to_vec());
}

#[test]
fn dropout_of_net_depends_on_seed_worker_and_step_only() {
    let device = select_device(default_device_name()).unwrap();
    let Mnist { train, .. } = Mnist::bundled_sample();
    let run = || {
        let report = Trainer::new(Net::init(2, &device), train.clone())
            .device(&device)
            .workers(2)
            .batch_size(4)
            .iterations(2)
            .run();
        report.unwrap().losses
    };
    assert_eq!(run(), run());
}

#[test]
fn the_trained_weights_come_back_as_an_ordinary_burn_module() {
    let device = select_device(default_device_name()).unwrap();
    let report = trainer().iterations(30).run().unwrap();
    let untrained = ConvNet::init(99, &device);
    let trained = model_with_weights(&untrained, &device, &report.weights).unwrap();
    let test = Mnist::bundled_sample().test;
    let all: Vec<usize> = (0..test.len()).collect();
    let evaluation = trained.evaluate(&Examples::batch(&test, &all), &device);
    let expected = report.final_evaluation.unwrap();
    assert_eq!(evaluation.num_correct, expected.num_correct);
    let other = Net::init(1, &device);
    assert!(model_with_weights(&other, &device, &report.weights).is_err());
}

#[test]
fn workers_on_several_devices_of_one_kind_have_the_bits_of_one_device() {
    let devices = vec![select_device(default_device_name()).unwrap(); 3];
    let one = trainer().workers(4).iterations(10).run().unwrap();
    let several = trainer().devices(devices).workers(4).iterations(10);
    let several = several.run().unwrap();
    let bits = |report: &Report| -> Vec<u32> {
        let weights = report.weights.to_vec();
        weights.iter().map(|weight| weight.to_bits()).collect()
    };
    assert_eq!(bits(&one), bits(&several));
}
