//! Evaluations, which make the batches of the test set one after the other.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ps::controls::Controls;

use ps::model::LocalModel;
use ps::model::burn;
use ps::model::burn::module::Module;
use ps::model::burn::tensor::{Device, Tensor};
use ps::observe::Event;
use ps::prelude::*;

use crate::groups::Perceptron;

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

/// How many batches there are, and how many there ever were at once.
#[derive(Default)]
struct Count {
    now: AtomicUsize,
    most: AtomicUsize,
}

struct Counted {
    numbers: Vec<f32>,
    count: Arc<Count>,
}

impl Counted {
    fn new(numbers: Vec<f32>, count: &Arc<Count>) -> Self {
        let now = count.now.fetch_add(1, Ordering::SeqCst) + 1;
        count.most.fetch_max(now, Ordering::SeqCst);
        let count = Arc::clone(count);
        Self { numbers, count }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.count.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Clone)]
struct Numbers {
    len: usize,
    /// The data set panics at this example.
    broken_at: usize,
    count: Arc<Count>,
}

impl Numbers {
    fn new(len: usize) -> Self {
        Self {
            len,
            broken_at: usize::MAX,
            count: Arc::default(),
        }
    }
}

impl Examples for Numbers {
    type Batch = Counted;

    fn num_examples(&self) -> usize {
        self.len
    }

    fn batch(&self, indices: &[usize]) -> Counted {
        assert!(!indices.contains(&self.broken_at), "the disk is broken");
        let numbers = indices.iter().map(|&i| (i % 97) as f32 / 50.0 - 1.0);
        Counted::new(numbers.collect(), &self.count)
    }
}

#[derive(Module, Debug)]
struct OnCounted {
    inner: Perceptron,
}

impl Model for OnCounted {
    type Batch = Counted;

    fn loss(&self, x: &Counted, step: &mut Step) -> Tensor<1> {
        self.inner.error(&x.numbers, step.device())
    }

    fn num_examples(x: &Counted) -> usize {
        x.numbers.len()
    }
}

fn model() -> OnCounted {
    OnCounted {
        inner: Perceptron::init(&device()),
    }
}

#[test]
fn an_evaluation_holds_a_few_batches_and_has_the_bits_of_all_at_once() {
    // 20 full batches and one of 5.
    let data = Numbers::new(20 * 256 + 5);
    let device = device();
    let weights = initial_weights(&model(), &device).unwrap();
    let local = LocalModel::new(model(), &device).unwrap();
    let all: Vec<usize> = (0..data.len).collect();
    let expected: Evaluation = all
        .chunks(256)
        .map(|chunk| {
            local
                .evaluate(&Numbers::new(data.len).batch(chunk))
                .unwrap()
        })
        .sum();
    let mut evaluator = Evaluator::new(&model(), &device, &data).unwrap();
    for _ in 0..3 {
        assert_eq!(evaluator.evaluate(&weights).unwrap(), expected);
        let now = data.count.now.load(Ordering::SeqCst);
        assert_eq!(now, 0, "between two evaluations nothing is held");
    }
    let most = data.count.most.load(Ordering::SeqCst);
    assert!((1..=5).contains(&most), "{most} batches at once");
}

#[test]
fn a_training_evaluates_batch_by_batch_too() {
    let (train, test) = (Numbers::new(64), Numbers::new(20 * 256));
    let report = Trainer::new(model(), train)
        .test_data(test.clone())
        .device(&device())
        .iterations(4)
        .evaluate_every(2)
        .run()
        .unwrap();
    assert_eq!(report.final_evaluation.unwrap().num_examples, 20 * 256);
    let most = test.count.most.load(Ordering::SeqCst);
    assert!((1..=5).contains(&most), "{most} batches at once");
}

#[test]
fn test_data_that_cannot_be_read_is_an_error_that_says_so() {
    let device = device();
    let broken_at = |broken_at| Numbers {
        broken_at,
        ..Numbers::new(1_000)
    };
    let weights = initial_weights(&model(), &device).unwrap();
    let mut evaluator = Evaluator::new(&model(), &device, &broken_at(600)).unwrap();
    let error = evaluator.evaluate(&weights).unwrap_err().to_string();
    assert!(error.contains("no batch to evaluate"), "{error}");
    assert!(error.contains("the disk is broken"), "{error}");
    // In a training, before anything is started.
    let trainer = Trainer::new(model(), Numbers::new(64)).test_data(broken_at(3));
    let error = trainer.device(&device).run().unwrap_err();
    let error = ps::actors::actor::error_chain(&error);
    assert!(error.contains("the disk is broken"), "{error}");
}

#[test]
fn a_metric_of_the_users_program_is_the_mean_of_all_examples() {
    fn mean(numbers: &[f32]) -> f64 {
        numbers.iter().copied().map(f64::from).sum::<f64>() / numbers.len() as f64
    }
    // A full batch and one of 44, so the mean of the two is another number.
    let (train, test) = (Numbers::new(64), Numbers::new(300));
    let all: Vec<usize> = (0..300).collect();
    let expected = mean(&test.batch(&all).numbers);
    let seen: Arc<Mutex<Vec<Event>>> = Arc::default();
    let trainer = Trainer::new(model(), train)
        .device(&device())
        .iterations(4)
        .evaluate_every(2)
        .metric("mean", |_, x: &Counted, _| mean(&x.numbers))
        .metric("no number", |_, _, _| f64::NAN);
    let report = trainer
        .test_data(test)
        .observe({
            let seen = Arc::clone(&seen);
            move |event: &Event| {
                if let Event::Evaluated(_) = event {
                    seen.lock().unwrap().push(event.clone());
                }
            }
        })
        .run()
        .unwrap();
    let events = seen.lock().unwrap();
    // As they are in a file.
    let read = events.iter().map(|event| {
        let text = serde_json::to_string(event).unwrap();
        match serde_json::from_str(&text).unwrap() {
            Event::Evaluated(evaluated) => evaluated.metrics,
            other => panic!("{other:?}"),
        }
    });
    let of_curve = report.curve.iter().map(|point| point.metrics.clone());
    let all: Vec<_> = of_curve
        .chain([report.final_metrics.clone()])
        .chain(read)
        .collect();
    assert!(all.len() >= 3, "{all:?}");
    for metrics in all {
        assert!((metrics["mean"] - expected).abs() < 1e-9, "{metrics:?}");
        assert!(metrics["no number"].is_nan(), "{metrics:?}");
    }
    let without = Trainer::new(model(), Numbers::new(64)).metric("mean", |_, _, _| 0.0);
    let error = without.device(&device()).run().unwrap_err().to_string();
    assert!(error.contains("set `test_data`"), "{error}");
}

/// Each evaluation but the first, which tries the data out, says that it begins, and waits until the gate is opened.
struct Gate {
    num_evaluations: AtomicUsize,
    begun: Sender<()>,
    /// Fails when it is opened.
    opened: Mutex<Receiver<()>>,
}

/// One number per example, and a gate for evaluations.
#[derive(Clone)]
struct Gated(Arc<Gate>);

struct GatedBatch {
    numbers: Vec<f32>,
    gate: Arc<Gate>,
}

impl Examples for Gated {
    type Batch = GatedBatch;

    fn num_examples(&self) -> usize {
        4
    }

    fn batch(&self, indices: &[usize]) -> GatedBatch {
        GatedBatch {
            numbers: indices.iter().map(|&i| i as f32 / 4.0).collect(),
            gate: Arc::clone(&self.0),
        }
    }
}

#[derive(Module, Debug)]
struct OnGated {
    inner: Perceptron,
}

impl Model for OnGated {
    type Batch = GatedBatch;

    fn loss(&self, x: &GatedBatch, step: &mut Step) -> Tensor<1> {
        self.inner.error(&x.numbers, step.device())
    }

    fn num_examples(x: &GatedBatch) -> usize {
        x.numbers.len()
    }

    fn evaluate(&self, x: &GatedBatch, device: &Device) -> Evaluation {
        if x.gate.num_evaluations.fetch_add(1, Ordering::SeqCst) > 0 {
            // The test may have failed.
            let _ = x.gate.begun.send(());
            let _ = x.gate.opened.lock().unwrap().recv();
        }
        let loss = self.inner.error(&x.numbers, device).into_scalar::<f32>();
        Evaluation::from_mean_loss(loss, x.numbers.len())
    }
}

/// A lost worker is replaced, a checkpoint is saved, and what is asked is done, however long an evaluation takes.
#[test]
fn an_evaluation_does_not_hold_up_what_else_the_driver_does() {
    let patience = Duration::from_secs(60);
    let (begun, evaluations) = channel();
    let (opens, opened) = channel::<()>();
    let gate = Arc::new(Gate {
        num_evaluations: AtomicUsize::new(0),
        begun,
        opened: Mutex::new(opened),
    });
    let device = device();
    let controls = Controls::new();
    let its_controls = controls.clone();
    let training = std::thread::spawn(move || {
        let model = OnGated {
            inner: Perceptron::init(&device),
        };
        Trainer::new(model, Gated(Arc::clone(&gate)))
            .device(&device)
            .test_data(Gated(gate))
            .batch_size(4)
            .epochs(1_000_000)
            .evaluate_every(1)
            .controls(&its_controls)
            .run()
    });
    evaluations
        .recv_timeout(patience)
        .expect("an evaluation begins");

    // It still lasts when this is done.
    let (sender, done) = channel();
    let its_controls = controls.clone();
    std::thread::spawn(move || sender.send(its_controls.set_learning_rate(0.001).wait()));
    let done = done.recv_timeout(patience);
    done.expect("the driver listens")
        .expect("it is a usable rate");

    // The end of the training does not wait for its result.
    controls.end().wait().unwrap();
    drop(opens);
    let report = training.join().unwrap().unwrap();
    assert!(report.ended_by_controls);
    assert_eq!(report.curve, []);
    assert!(report.final_evaluation.is_some());
}
