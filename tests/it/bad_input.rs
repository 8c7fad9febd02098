//! What cannot work is refused before anything is started, with a reason and no panic.

use std::sync::atomic::{AtomicI64, Ordering};

use ps::model::burn::module::Module;
use ps::model::burn::tensor::{Device, Tensor};
use ps::prelude::*;

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn check(
    change: impl FnOnce(Trainer<ConvNet, ImageDataset>) -> Trainer<ConvNet, ImageDataset>,
    expected: &str,
) {
    let trainer = Trainer::new(ConvNet::init(1, &device()), Mnist::bundled_sample().train)
        .device(&device())
        .iterations(1);
    let error = change(trainer).run().expect_err(expected);
    let mut chain = vec![error.to_string()];
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        chain.push(cause.to_string());
        source = cause.source();
    }
    let chain = chain.join(": ");
    assert!(
        chain.contains(expected),
        "expected `{expected}`, got `{chain}`"
    );
}

#[test]
fn settings_that_cannot_work_are_refused_with_the_reason() {
    check(|t| t.workers(0), "at least one worker");
    check(|t| t.workers(1 << 20), "too many");
    check(|t| t.devices([]), "no device");
    check(|t| t.servers(0), "at least one server");
    check(|t| t.batch_size(0), "batch");
    check(|t| t.batch_size(5_000), "use a batch size of 4000 or less");
    check(|t| t.workers(2).batch_size(2_001), "2001");
    check(
        |t| t.workers(2).consistency(Consistency::KofN { k: 3 }),
        "number of workers, which is 2",
    );
    check(|t| t.consistency(Consistency::KofN { k: 0 }), "k between 1");
    check(|t| t.learning_rate(f64::NAN), "learning rate");
    check(|t| t.learning_rate(f64::INFINITY), "learning rate");
    check(|t| t.learning_rate(-1.0), "learning rate");
    check(|t| t.max_gradient_norm(f64::NAN), "norm");
    check(|t| t.worker_lease(std::time::Duration::ZERO), "lease");
}

/// A model that is in the way of its own training.
#[derive(Module, Debug)]
struct Broken {
    net: ConvNet,
    #[module(skip)]
    fault: Fault,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    WrongShape,
    NotANumber,
    None,
}

/// In how many batches from now on `Broken::num_examples`, which runs outside of what catches a
/// model's panics, takes its worker down.
static PANIC_IN: AtomicI64 = AtomicI64::new(i64::MAX);

impl Model for Broken {
    type Batch = ImageBatch;

    fn loss(&self, batch: &ImageBatch, step: &mut Step) -> Tensor<1> {
        let [batch_size, ..] = batch.dims();
        let images = batch.images_on(step.device());
        let output = match self.fault {
            Fault::WrongShape => self
                .net
                .forward(images.reshape([batch_size * 2, 1, 14, 28])),
            Fault::NotANumber => self.net.forward(images) * f32::NAN,
            Fault::None => self.net.forward(images),
        };
        nll_loss(output, batch.labels_on(step.device()))
    }

    fn num_examples(batch: &ImageBatch) -> usize {
        // Batches of this size belong to one test only.
        if batch.num_examples() == 5 {
            assert_ne!(PANIC_IN.fetch_sub(1, Ordering::Relaxed), 0, "as planned");
        }
        batch.num_examples()
    }
}

fn broken(fault: Fault) -> Trainer<Broken, ImageDataset> {
    let model = Broken {
        net: ConvNet::init(1, &device()),
        fault,
    };
    Trainer::new(model, Mnist::bundled_sample().train)
        .device(&device())
        .workers(2)
        .batch_size(8)
        .iterations(3)
}

#[test]
fn a_model_that_panics_ends_the_run_with_its_message() {
    let error = broken(Fault::WrongShape).run().unwrap_err();
    let TrainError::Worker(error) = error else {
        panic!("a worker failed, not {error:?}")
    };
    let message = format!("{error:?}");
    assert!(message.contains("Panicked"), "{message}");
}

#[test]
fn gradients_that_are_not_numbers_are_counted_and_change_nothing() {
    let error = broken(Fault::NotANumber).run().unwrap_err();
    let Some(report) = error.report() else {
        panic!("the report is missing: {error:?}")
    };
    assert_eq!(
        (report.num_refused, report.num_applied, report.num_updates),
        (6, 0, 0)
    );
}

#[test]
fn weights_of_another_model_are_refused() {
    let device = device();
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    let other = initial_weights(&Net::init(1, &device), &device).unwrap();
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 4,
        seed: 0,
    };
    let model = ConvNet::init(1, &device);
    let worker = spawn_worker(&model, &device, &train, config).unwrap();
    let error = worker
        .ask(ComputeGradients(other.clone()))
        .wait()
        .unwrap()
        .unwrap_err();
    let error = format!("{error:?}");
    assert!(
        error.contains("OtherModel") && error.contains("[32, 1, 3, 3]"),
        "{error}"
    );
    let mut evaluator = Evaluator::new(&model, &device, &test).unwrap();
    assert!(evaluator.evaluate(&other).is_err());
}

#[test]
fn a_worker_that_panics_is_restarted_and_every_step_counts_once() {
    PANIC_IN.store(7, Ordering::Relaxed);
    let report = broken(Fault::None)
        .batch_size(5)
        .iterations(20)
        .run()
        .unwrap();
    assert_eq!(report.num_worker_restarts, 1);
    assert_eq!(report.num_applied, 40);
    assert!(PANIC_IN.load(Ordering::Relaxed) < 0, "it did panic");
}

/// In a process of its own, which has no file descriptor left.
#[cfg(unix)]
#[test]
fn without_descriptors_actors_start_and_a_training_is_an_error() {
    const CHILD: &str = "PS_TEST_NO_FILES";
    const NAME: &str = "bad_input::without_descriptors_actors_start_and_a_training_is_an_error";
    if std::env::var_os(CHILD).is_none() {
        // A shell sets the limit.
        let script = "ulimit -n 256 && exec \"$0\" --exact \"$1\" --nocapture";
        let program = std::env::current_exe().unwrap();
        let mut shell = std::process::Command::new("sh");
        let shell = shell.args(["-c", script]).arg(program).arg(NAME);
        let output = shell.env(CHILD, "1").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        return;
    }
    let device = device();
    let model = ConvNet::init(1, &device);
    let train = Mnist::bundled_sample().train;
    let weights = initial_weights(&model, &device).unwrap();
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 4,
        seed: 0,
    };
    let cluster = Cluster::alone(host_workers(Hosts::new(), &model, &device, &train));
    let spawn_hosted = || cluster.spawn::<ModelWorker<ConvNet>>(config).wait();
    // The network's threads and the timers run from the first use on.
    spawn_hosted().unwrap();
    let open = || std::fs::File::open("/dev/null");
    let files: Vec<_> = std::iter::from_fn(|| open().ok()).collect();
    let rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
    let servers = ServerGroup::spawn(&weights, 2, ServerConfig::default(), rule).unwrap();
    let workers = [
        spawn_worker(&model, &device, &train, config).unwrap(),
        spawn_hosted().unwrap(),
    ];
    for worker in workers {
        let (servers, num_steps) = (servers.clone(), 1);
        let report = worker.ask(RunSteps { servers, num_steps }).flatten().wait();
        assert_eq!(report.unwrap().num_applied, 1);
    }
    ps::served::serve_part(&model, &device, &servers, Default::default()).unwrap();
    let trainer = Trainer::new(model, train).device(&device).iterations(1);
    // To hear signals needs descriptors, too.
    let trainer = trainer.heed_signals(false);
    let error = trainer
        .run_on(&cluster)
        .expect_err("it needs an event loop");
    assert!(error.to_string().contains("ulimit -n"), "{error}");
    drop(files);
}
