//! Batches that hold tensors, as burn's `Batcher`s make them.

use std::sync::atomic::{AtomicUsize, Ordering};

use ps::model::burn;
use ps::model::burn::data::dataloader::batcher::Batcher;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::Module;
use ps::model::burn::nn::{Dropout, DropoutConfig, Linear};
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{Rng, seeded};
use ps::prelude::*;

use crate::groups::Perceptron;

const WIDTH: usize = 64;

/// burn's dropout on the input itself, which comes from the batch.
#[derive(Module, Debug)]
struct InputDropout {
    dropout: Dropout,
    linear: Linear,
}

static TRAINING_STEPS: AtomicUsize = AtomicUsize::new(0);

impl Model for InputDropout {
    type Batch = Tensor<2>;

    fn loss(&self, x: &Tensor<2>, step: &mut Step) -> Tensor<1> {
        let x = self.dropout.forward(x.clone());
        let dropped = x.clone().equal_elem(0.0).int().sum().into_scalar::<i64>();
        // Half of at least 128 ones: none or all of them drop out once in 2^128 steps.
        let size = (WIDTH * x.dims()[0]) as i64;
        if step.is_training() {
            TRAINING_STEPS.fetch_add(1, Ordering::Relaxed);
            assert!(0 < dropped && dropped < size, "{dropped} of {size}");
        } else {
            assert_eq!(dropped, 0);
        }
        self.linear.forward(x).square().mean()
    }

    fn num_examples(x: &Tensor<2>) -> usize {
        x.dims()[0]
    }
}

#[derive(Clone)]
struct Ones;

impl Batcher<(), Tensor<2>> for Ones {
    fn batch(&self, items: Vec<()>, device: &Device) -> Tensor<2> {
        Tensor::ones([items.len(), WIDTH], device)
    }
}

fn items() -> InMemDataset<()> {
    InMemDataset::new(vec![(); 16])
}

fn train<E: Examples<Batch = Tensor<2>>>(device: &Device, data: E) {
    let model = InputDropout {
        dropout: DropoutConfig::new(0.5).init(),
        linear: seeded::linear(&mut Rng::new(1), [WIDTH, 1], device),
    };
    let report = Trainer::new(model, data.clone())
        .test_data(data)
        .device(device)
        .batch_size(2)
        .iterations(5)
        .run();
    assert_eq!(report.unwrap().num_applied, 5);
}

#[test]
fn a_batcher_makes_inputs_that_layers_take_for_training() {
    let device = select_device(default_device_name()).unwrap();
    let before = TRAINING_STEPS.load(Ordering::Relaxed);
    let on = device.clone();
    train(
        &device,
        collated(items(), move |items| Ones.batch(items, &on)),
    );
    train(&device, batched(items(), Ones, &device));
    train(&device, batched(items(), Ones, &device.clone().inner()));
    let checkpointing = device.gradient_checkpointing();
    train(&checkpointing, batched(items(), Ones, &checkpointing));
    assert_eq!(TRAINING_STEPS.load(Ordering::Relaxed), before + 20);
}

/// Numbers in -1..1, with their places as an order.
fn numbers(len: usize) -> impl Examples<Batch = Vec<f32>> {
    let numbers = (0..len).map(|i| 2.0 * i as f32 / len as f32 - 1.0);
    collated(InMemDataset::new(numbers.collect()), |numbers: Vec<f32>| {
        numbers
    })
}

#[test]
fn an_epoch_has_every_example_once_if_its_end_is_enough_for_all_workers() {
    for (num_examples, num_workers, batch_size, num_left_out) in [
        (28, 3, 4, 0),
        (27, 3, 4, 0),
        (26, 3, 4, 2),
        (24, 3, 4, 0),
        (50, 1, 7, 0),
        (13, 4, 3, 1),
    ] {
        let data = numbers(num_examples);
        let mut seen = Vec::new();
        let mut all_steps = Vec::new();
        for rank in 0..num_workers {
            let config = WorkerConfig {
                worker: WorkerId(rank as u32),
                num_workers,
                batch_size,
                seed: 3,
            };
            let mut batches = WorkerBatches::new(&data, config).unwrap();
            let steps = batches.steps_per_epoch();
            all_steps.push(steps);
            for clock in steps..2 * steps {
                let batch = batches.batch(Clock(clock)).unwrap();
                assert!(!batch.is_empty() && batch.len() <= batch_size);
                seen.extend(batch.iter().map(|number| number.to_bits()));
            }
        }
        let what = format!("{num_examples} examples, {num_workers} workers, {batch_size}");
        assert!(
            all_steps.iter().all(|steps| *steps == all_steps[0]),
            "{what}"
        );
        assert_eq!(seen.len(), num_examples - num_left_out, "{what}");
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), num_examples - num_left_out, "{what}: twice");
    }
}

/// PS-3: the smaller batches at the end of an epoch count by their examples.
#[test]
fn workers_in_step_equal_one_worker_also_at_the_end_of_an_epoch() {
    let train = |num_workers, batch_size| {
        let device = select_device(default_device_name()).unwrap();
        // In the last step of an epoch, three workers have 2, 1 and 1 of them.
        let report = Trainer::new(Perceptron::init(&device), numbers(28))
            .device(&device)
            .workers(num_workers)
            .batch_size(batch_size)
            .learning_rate(0.1)
            .epochs(3)
            .run()
            .unwrap();
        assert_eq!((report.num_updates, report.num_examples), (9, 3 * 28));
        report.weights.to_vec()
    };
    let (one, three) = (train(1, 12), train(3, 4));
    for (one, three) in one.iter().zip(&three) {
        assert!((one - three).abs() < 1e-6, "{one} and {three}");
    }
}
