//! Data that is changed at random while it is trained on: the same changes whenever a batch is made again (M-4).

use ps::actors::cluster::Transport;
use ps::actors::net::memory::MemoryNetwork;
use ps::data::BatchPlace;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::tensor::Device;
use ps::prelude::*;

use crate::groups::Perceptron;
use crate::nodes::with_two_nodes;

const NUM_EXAMPLES: usize = 28;

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn share(rank: u32, num_workers: usize, batch_size: usize) -> WorkerConfig {
    WorkerConfig {
        worker: WorkerId(rank),
        num_workers,
        batch_size,
        seed: 3,
    }
}

/// Batches that are their own places.
#[derive(Clone)]
struct Places;

impl Examples for Places {
    type Batch = Option<BatchPlace>;

    fn num_examples(&self) -> usize {
        NUM_EXAMPLES
    }

    fn batch(&self, _: &[usize]) -> Self::Batch {
        None
    }

    fn training_batch(&self, _: &[usize], place: &BatchPlace) -> Self::Batch {
        Some(*place)
    }
}

#[test]
fn a_batch_that_is_trained_on_knows_its_place() {
    let mut batches = WorkerBatches::new(&Places, share(1, 2, 4)).unwrap();
    assert_eq!(batches.steps_per_epoch(), 4);
    // In order, and after jumps forwards and backwards.
    for step in [0, 1, 2, 3, 4, 5, 13, 2] {
        let expected = BatchPlace {
            seed: 3,
            epoch: step / 4,
            worker: WorkerId(1),
            step,
            part: 0,
        };
        assert_eq!(batches.batch(Clock(step)).unwrap(), Some(expected));
    }
}

#[test]
fn random_numbers_of_batches_and_of_examples_are_those_of_their_places() {
    let place = BatchPlace {
        seed: 3,
        epoch: 1,
        worker: WorkerId(1),
        step: 5,
        part: 0,
    };
    let of_batch = |place: BatchPlace| place.rng().next_u64();
    assert_eq!(of_batch(place), of_batch(place));
    for other in [
        BatchPlace { seed: 4, ..place },
        BatchPlace { step: 6, ..place },
        BatchPlace { part: 1, ..place },
        BatchPlace {
            worker: WorkerId(0),
            ..place
        },
    ] {
        assert_ne!(of_batch(place), of_batch(other), "{other:?}");
    }
    // Which worker has the example does not matter.
    let of_seven = |place: BatchPlace| place.rng_of(7).next_u64();
    let elsewhere = BatchPlace {
        worker: WorkerId(0),
        step: 4,
        part: 1,
        ..place
    };
    assert_eq!(of_seven(place), of_seven(elsewhere));
    assert_ne!(of_seven(place), place.rng_of(8).next_u64());
    assert_ne!(of_seven(place), of_seven(BatchPlace { epoch: 2, ..place }));
    assert_ne!(of_seven(place), of_seven(BatchPlace { seed: 4, ..place }));
}

/// All items of an epoch with their changes, in order.
fn changed(num_workers: usize, batch_size: usize, epoch: u64) -> Vec<u64> {
    let items = InMemDataset::new((0..NUM_EXAMPLES as u64).collect());
    let data = collated(items, |items: Vec<u64>| items)
        .augmented_by(|item, _, rng| (item << 32) | (rng.next_u64() >> 32));
    let mut all = Vec::new();
    for rank in 0..num_workers as u32 {
        let share = share(rank, num_workers, batch_size);
        let mut batches = WorkerBatches::new(&data, share).unwrap();
        let steps = batches.steps_per_epoch();
        for step in epoch * steps..(epoch + 1) * steps {
            all.extend(batches.batch(Clock(step)).unwrap());
        }
    }
    all.sort_unstable();
    all
}

#[test]
fn an_item_is_changed_alike_by_any_number_of_workers_and_otherwise_in_each_epoch() {
    let one = changed(1, 12, 0);
    assert_eq!(one.len(), NUM_EXAMPLES);
    assert_eq!(one, changed(3, 4, 0));
    assert_eq!(one, changed(2, 7, 0));
    let next = changed(1, 12, 1);
    let pairs = || one.iter().zip(&next);
    assert!(pairs().all(|(one, next)| one >> 32 == next >> 32));
    assert!(pairs().all(|(one, next)| one != next));
}

fn numbers(is_augmented: bool) -> impl Examples<Batch = Vec<f32>> {
    let numbers = (0..NUM_EXAMPLES).map(|i| 2.0 * i as f32 / NUM_EXAMPLES as f32 - 1.0);
    let data = collated(InMemDataset::new(numbers.collect()), |items: Vec<f32>| {
        items
    });
    let most = if is_augmented { 0.25 } else { 0.0 };
    data.augmented_by(move |item, _, rng| item + most * rng.uniform())
}

fn trainer(
    is_augmented: bool,
    num_workers: usize,
    batch_size: usize,
) -> Trainer<Perceptron, impl Examples<Batch = Vec<f32>>> {
    Trainer::new(Perceptron::init(&device()), numbers(is_augmented))
        .test_data(numbers(is_augmented))
        .device(&device())
        .workers(num_workers)
        .batch_size(batch_size)
        .learning_rate(0.1)
        .epochs(3)
}

fn bits(report: &Report) -> Vec<u32> {
    let weights = report.weights.to_vec();
    weights.iter().map(|weight| weight.to_bits()).collect()
}

/// PS-3 and M-4.
#[test]
fn augmented_trainings_are_those_of_one_worker_and_of_one_process() {
    let three = trainer(true, 3, 4).run().unwrap();
    assert_ne!(bits(&three), bits(&trainer(false, 3, 4).run().unwrap()));
    for other in [
        trainer(true, 1, 12),
        trainer(true, 1, 12).micro_batches(3),
        trainer(true, 3, 4).micro_batches(2),
    ] {
        let other = other.run().unwrap().weights.to_vec();
        for (three, other) in three.weights.to_vec().iter().zip(&other) {
            assert!((three - other).abs() < 1e-5, "{three} and {other}");
        }
    }

    let on_nodes = trainer(true, 3, 4);
    let hosts = on_nodes.hosts(Hosts::new()).unwrap();
    let memory = Transport::Memory(MemoryNetwork::new());
    let on_nodes = with_two_nodes(memory, hosts, |cluster| on_nodes.run_on(cluster).unwrap());
    assert_eq!(bits(&on_nodes), bits(&three));

    let directory = tempfile::tempdir().unwrap();
    let resumed = |num_steps| {
        let config = CheckpointConfig {
            resume: true,
            ..CheckpointConfig::new(directory.path())
        };
        let trainer = trainer(true, 3, 4).iterations(num_steps);
        trainer.checkpoints(config).run().unwrap()
    };
    resumed(4);
    let resumed = resumed(9);
    assert_eq!(resumed.resumed.unwrap().version, Version(4));
    assert_eq!(bits(&resumed), bits(&three));
}

#[test]
fn evaluations_see_the_examples_as_they_are() {
    let report = trainer(true, 2, 4).run().unwrap();
    let (model, device) = (Perceptron::init(&device()), device());
    let mut evaluator = Evaluator::new(&model, &device, &numbers(false)).unwrap();
    let expected = evaluator.evaluate(&report.weights).unwrap();
    assert_eq!(report.final_evaluation, Some(expected));
}
