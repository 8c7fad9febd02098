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
