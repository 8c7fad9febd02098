//! How runs end that go wrong: with an error that says why, and with what was trained until then.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use ps::actors::cluster::Transport;
use ps::actors::net::memory::MemoryNetwork;
use ps::actors::worker::{MAX_REFUSED, WorkerError};
use ps::model::burn::module::Module;
use ps::model::burn::tensor::{Device, Tensor};
use ps::observe::{Event, Observers, Settings};
use ps::prelude::*;

use crate::nodes::with_two_nodes;

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn convnet() -> Trainer<ConvNet, ImageDataset> {
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &device()), train)
        .device(&device())
        .test_data(test)
        .workers(2)
        .batch_size(8)
}

fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(chain).unwrap_or_default();
    format!("{error}: {source}")
}

/// S-11, S-12.
#[test]
fn a_run_that_diverges_ends_with_an_error_that_has_the_weights() {
    // To its end, and long before it.
    for iterations in [20, 1_000_000] {
        let run = convnet().learning_rate(1e30).iterations(iterations).run();
        let error = run.unwrap_err();
        let text = chain(&error);
        assert!(text.contains("training has diverged"), "{text}");
        assert!(text.contains("lower learning rate"), "{text}");
        let report = error.report().expect("something was applied");
        assert_eq!(report.weights.version().0, report.num_updates);
        let num_all = report.num_applied + report.num_refused;
        assert!(
            report.num_applied > 0 && num_all <= 2 * iterations.min(MAX_REFUSED + 50),
            "{text}"
        );
    }
}

#[test]
fn a_limit_that_nothing_keeps_to_ends_the_run() {
    let error = convnet()
        .max_gradient_norm(1e-12)
        .iterations(1_000_000)
        .run();
    let error = chain(&error.unwrap_err());
    assert!(error.contains("101 gradients of worker"), "{error}");
    assert!(error.contains("(the limit is"), "{error}");
    let error = convnet().max_gradient_norm(1e-12).iterations(3).run();
    let error = chain(&error.unwrap_err());
    assert!(error.contains("all 6 gradients were refused"), "{error}");
}

/// With a learning rate of 0 the weights do not change, so the norms are those of the recorded run.
#[test]
fn a_run_that_refuses_most_of_its_gradients_ends_with_an_error_that_says_how_many() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    let run = || convnet().learning_rate(0.0).iterations(10);
    run().record(file.clone()).run().unwrap();
    let schedule = ps::actors::schedule::Schedule::read(&file).unwrap();
    let gradients = schedule.updates.iter().flat_map(|update| &update.gradients);
    let mut norms: Vec<f64> = gradients.map(|gradient| gradient.norm).collect();
    norms.sort_unstable_by(f64::total_cmp);
    assert_eq!(norms.len(), 20);
    let between = |index: usize| (norms[index - 1] + norms[index]) / 2.0;
    let error = run().max_gradient_norm(between(9)).run().unwrap_err();
    let text = chain(&error);
    assert!(text.contains("11 of 20 gradients were refused"), "{text}");
    let report = error.report().expect("the weights are there");
    assert_eq!((report.num_applied, report.num_refused), (9, 11));
    let half = run().max_gradient_norm(between(10)).run().unwrap();
    assert_eq!((half.num_applied, half.num_refused), (10, 10));
}

#[test]
fn an_evaluation_that_meets_a_condition_ends_the_run_in_an_orderly_way() {
    for mode in [Consistency::Bsp, Consistency::Asp] {
        let directory = tempfile::tempdir().unwrap();
        let trainer = || {
            let checkpoints = CheckpointConfig {
                resume: true,
                ..CheckpointConfig::new(directory.path())
            };
            convnet()
                .consistency(mode)
                .checkpoints(checkpoints)
                .evaluate_every(2)
        };
        let report = trainer()
            .iterations(1_000_000)
            .stop_when(|_| false)
            .stop_when(|point| point.version >= Version(4))
            .run()
            .unwrap();
        let version = report.stopped_early.expect("the condition was met");
        assert!(
            version >= Version(4) && version.0 <= report.num_updates,
            "{mode}"
        );
        assert!(report.num_updates < 1_000_000 && report.interrupted.is_none());
        assert!(report.saved_all().is_some() && report.final_evaluation.is_some());
        assert!(
            report.to_string().starts_with("Stopped early after"),
            "{report}"
        );

        // It can go on, and a condition that is met only after the last step ends nothing.
        let num_steps = report.num_updates + 3;
        let after = trainer().iterations(num_steps).stop_when(|_| false).run();
        let after = after.unwrap();
        assert_eq!(after.resumed.unwrap().version.0, report.num_updates);
        assert_eq!(after.stopped_early, None);
    }
}

#[test]
fn a_condition_without_evaluations_is_refused() {
    let text = chain(&convnet().stop_when(|_| true).run().unwrap_err());
    assert!(text.contains("`evaluate_every`"), "{text}");
}

/// S-12.
#[test]
fn a_test_set_that_the_model_does_not_take_is_found_before_the_first_step() {
    let Mnist { test, .. } = Mnist::bundled_sample();
    let pixels = test.image(0)[..14 * 14].to_vec();
    let dims = [1, 14, 14];
    let small = ImageDataset::new(pixels, vec![0], dims, 10, test.normalization()).unwrap();
    let error = convnet()
        .test_data(small)
        .iterations(u64::MAX)
        .run()
        .unwrap_err();
    assert!(matches!(error, TrainError::TestData(_)), "{error:?}");
}

/// A model that panics now and then.
#[derive(Module, Debug)]
struct Fragile {
    net: ConvNet,
    #[module(skip)]
    faults: Faults,
}

#[derive(Clone, Debug)]
struct Faults {
    /// Every how many batches the worker panics.
    period: u64,
    num_batches: Arc<AtomicU64>,
    /// How many batches can be evaluated.
    evaluations: Arc<AtomicU64>,
}

/// A batch that panics, with its worker, when its examples are counted.
struct Charged {
    images: ImageBatch,
    faults: Faults,
}

#[derive(Clone)]
struct ChargedData {
    images: ImageDataset,
    faults: Faults,
}

impl Examples for ChargedData {
    type Batch = Charged;

    fn num_examples(&self) -> usize {
        self.images.len()
    }

    fn batch(&self, indices: &[usize]) -> Charged {
        let images = Examples::batch(&self.images, indices);
        let faults = self.faults.clone();
        Charged { images, faults }
    }
}

impl Model for Fragile {
    type Batch = Charged;

    fn loss(&self, batch: &Charged, step: &mut Step) -> Tensor<1> {
        let images = batch.images.images_on(step.device());
        nll_loss(
            self.net.forward(images),
            batch.images.labels_on(step.device()),
        )
    }

    // Runs outside of what catches a model's panics.
    fn num_examples(batch: &Charged) -> usize {
        let number = batch.faults.num_batches.fetch_add(1, Ordering::Relaxed) + 1;
        assert!(!number.is_multiple_of(batch.faults.period), "as planned");
        batch.images.num_examples()
    }

    fn evaluate(&self, batch: &Charged, device: &Device) -> Evaluation {
        let left = &self.faults.evaluations;
        let more = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            left.checked_sub(1)
        });
        assert!(more.is_ok(), "no more evaluations");
        let output = self.net.forward(batch.images.images_on(device));
        Evaluation::of_classifier(output, batch.images.labels_on(device))
    }
}

fn faults(period: u64, evaluations: u64) -> Faults {
    Faults {
        period,
        num_batches: Arc::default(),
        evaluations: Arc::new(AtomicU64::new(evaluations)),
    }
}

fn fragile(period: u64, evaluations: u64) -> Trainer<Fragile, ChargedData> {
    let (model, data) = model_and_data(faults(period, evaluations));
    Trainer::new(model, data).device(&device()).batch_size(4)
}

fn model_and_data(faults: Faults) -> (Fragile, ChargedData) {
    let model = Fragile {
        net: ConvNet::init(1, &device()),
        faults: faults.clone(),
    };
    let images = Mnist::bundled_sample().train;
    (model, ChargedData { images, faults })
}

/// Checks that a worker joins once, and again after each loss, with the step that it takes next.
fn check_faults(events: &[Event], is_lost: bool) {
    let (mut num_losses, mut is_there, mut clock) = (0, false, Clock(0));
    for event in events {
        match event {
            Event::WorkerJoined(joined) => {
                assert!(!is_there && joined.next_clock >= clock, "{events:?}");
                (is_there, clock) = (true, joined.next_clock);
            }
            Event::WorkerLost(_) => {
                assert!(is_there, "{events:?}");
                (is_there, num_losses) = (false, num_losses + 1);
            }
            _ => {}
        }
    }
    assert!(is_there, "{events:?}");
    assert_eq!(
        (num_losses > 0, clock > Clock(0)),
        (is_lost, is_lost),
        "{events:?}"
    );
}

#[test]
fn a_lasting_worker_goes_on_with_the_batch_that_it_was_lost_with() {
    let losses = |period| {
        let (model, data) = model_and_data(faults(period, 0));
        let hosts = host_workers(Hosts::new(), &model, &device(), &data);
        let config = WorkerConfig {
            worker: WorkerId(0),
            num_workers: 1,
            batch_size: 4,
            seed: 0,
        };
        let cluster = Cluster::alone(hosts);
        let mut worker = LastingWorker::<Fragile>::spawn(&cluster, config).unwrap();
        let (sender, events) = channel();
        let told = move |event: &Event| sender.send(event.clone()).unwrap();
        let observers = Observers::start(vec![Box::new(told)]);
        observers.run_started(Settings::default(), Version(0));
        worker.observed_by(&observers);
        let weights = initial_weights(&model, &device()).unwrap();
        let mut gradient = || {
            let reply = worker.compute(&weights);
            worker.finish(reply, &weights).unwrap()
        };
        let losses: Vec<f32> = (0..6).map(|_| gradient().loss).collect();
        assert_eq!(worker.clock(), Clock(6));
        observers.run_ended();
        check_faults(&events.iter().collect::<Vec<_>>(), period == 2);
        losses
    };
    assert_eq!(losses(2), losses(u64::MAX));
}

/// The worker has not taken the step either.
#[test]
fn a_lasting_worker_whose_data_failed_keeps_its_clock() {
    let (model, data) = model_and_data(faults(u64::MAX, 0));
    let cluster = Cluster::alone(host_workers(Hosts::new(), &model, &device(), &data));
    let id = WorkerId(0);
    let config = WorkerConfig {
        worker: id,
        num_workers: 1,
        batch_size: 4,
        seed: 0,
    };
    let mut worker = LastingWorker::<Fragile>::spawn(&cluster, config).unwrap();
    let failed = WorkerError::Source {
        worker: id,
        clock: Clock(0),
        source: std::io::Error::other("the file is gone").into(),
    };
    worker.settle(Ok(Err(failed))).unwrap_err();
    assert_eq!(worker.clock(), Clock(0));
}

/// S-12.
#[test]
fn an_evaluation_that_fails_at_the_end_leaves_the_weights() {
    let trainer = fragile(u64::MAX, 1);
    let one = ImageDataset::new(
        vec![0; 784],
        vec![0],
        [1, 28, 28],
        10,
        ps::dataset::Normalization::MNIST,
    );
    let test = ChargedData {
        images: one.unwrap(),
        faults: faults(u64::MAX, 0),
    };
    let error = trainer.test_data(test).iterations(5).run().unwrap_err();
    let text = chain(&error);
    assert!(text.contains("no more evaluations"), "{text}");
    let report = error.report().expect("it was trained");
    let without = fragile(u64::MAX, 0).iterations(5).run().unwrap();
    assert!(report.weights.to_vec() == without.weights.to_vec());
    assert_eq!(report.losses, without.losses);
}

/// a worker's actor is restarted three times a minute, then it is lost. This one is lost 25 times.
#[test]
fn a_worker_may_be_lost_any_number_of_times_if_it_gets_on_in_between() {
    const NUM_STEPS: u64 = 120;
    let trainer = || fragile(2, 0).iterations(NUM_STEPS);
    let hosts = trainer().hosts(Hosts::new()).unwrap();
    with_two_nodes(Transport::Memory(MemoryNetwork::new()), hosts, |cluster| {
        let report = trainer().run_on(cluster).unwrap();
        assert_eq!(report.num_applied, NUM_STEPS);
        assert!(report.num_worker_restarts > 100, "{report}");
        // Most of it was done by incarnations that could not tell.
        assert_eq!(report.num_examples, 4 * NUM_STEPS);
        assert_eq!(report.losses[0].len() as u64, NUM_STEPS);
        assert!(report.num_untold > 0, "{report}");
        assert_eq!(
            (report.compute_time, report.compute_fraction()),
            (None, None)
        );
        assert!(report.to_string().contains("is not known"), "{report}");
    });
}

///
#[test]
fn a_worker_that_is_lost_again_and_again_without_a_step_ends_the_run() {
    let trainer = || fragile(1, 0).iterations(10);
    let hosts = trainer().hosts(Hosts::new()).unwrap();
    with_two_nodes(Transport::Memory(MemoryNetwork::new()), hosts, |cluster| {
        let error = trainer().run_on(cluster).unwrap_err();
        assert!(matches!(error, TrainError::WorkerLost { .. }), "{error:?}");
    });
}
