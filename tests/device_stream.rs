//! burn's own dropout layer, which draws from a stream that the whole process shares.
//!
//! A binary of its own, with one test, so that nobody else draws.

use std::io::Write;
use std::sync::{Arc, Barrier, Mutex};

use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::Module;
use ps::model::burn::nn::{Dropout, DropoutConfig, Linear};
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{LocalModel, Rng, StepSeed, seeded};
use ps::prelude::*;

#[derive(Module, Debug)]
struct Noisy {
    layers: Vec<Dropout>,
    linear: Linear,
    #[module(skip)]
    meet: Option<Meeting>,
}

/// Where two steps wait for each other, so that both are in the middle.
#[derive(Clone, Debug)]
struct Meeting(Arc<Barrier>);

impl Model for Noisy {
    type Batch = Vec<f32>;

    fn loss(&self, x: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        if let Some(Meeting(barrier)) = &self.meet {
            barrier.wait();
        }
        let x = Tensor::<1>::from_floats(x.as_slice(), step.device());
        let x = self.layers[0].forward(x.unsqueeze_dim::<2>(1).repeat(&[1, 4]));
        let y = self.linear.forward(x).square().mean();
        if let Some(Meeting(barrier)) = &self.meet {
            barrier.wait();
        }
        y
    }

    fn num_examples(x: &Vec<f32>) -> usize {
        x.len()
    }
}

fn model(device: &Device) -> Noisy {
    Noisy {
        layers: vec![DropoutConfig::new(0.5).init()],
        linear: seeded::linear(&mut Rng::new(1), [4, 1], device),
        meet: None,
    }
}

/// Keeps what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// One worker in a process gives the same bits from the same seed, although the layer draws from the
/// process's stream. Two at a time do not, and a warning names the layer, once.
#[test]
fn a_layer_that_draws_from_the_device_is_seeded_where_one_worker_has_the_process() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt()
        .with_writer(move || writer.clone())
        .init();
    let text = || String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    let device = select_device(default_device_name()).unwrap();

    let data = || {
        let numbers = (0..64_u8).map(|i| f32::from(i) / 64.0).collect();
        collated(InMemDataset::new(numbers), |items: Vec<f32>| items)
    };
    let train = |seed| {
        let trainer = Trainer::new(model(&device), data()).device(&device);
        let report = trainer
            .seed(seed)
            .batch_size(4)
            .iterations(10)
            .run()
            .unwrap();
        report.weights.to_vec()
    };
    let first = train(3);
    // Whoever drew in the meantime changes nothing.
    let _: Vec<f32> = Tensor::<1>::random([7], burn::tensor::Distribution::Default, &device)
        .into_data()
        .try_into_vec()
        .unwrap();
    assert!(train(3) == first);
    assert!(train(4) != first);
    let warning = "draw random numbers from one stream";
    assert!(!text().contains(warning), "{}", text());

    let two_at_a_time = || {
        let barrier = Arc::new(Barrier::new(2));
        std::thread::scope(|scope| {
            for worker in 0..2 {
                let (device, meet) = (device.clone(), Some(Meeting(Arc::clone(&barrier))));
                let model = Noisy {
                    meet,
                    ..model(&device)
                };
                scope.spawn(move || {
                    let model = LocalModel::new(model, &device).unwrap();
                    let seed = StepSeed {
                        worker,
                        ..StepSeed::default()
                    };
                    let mut gradient = vec![0.0; model.num_weights()];
                    model.gradient(&vec![0.5; 4], seed, &mut gradient).unwrap();
                });
            }
        });
    };
    two_at_a_time();
    two_at_a_time();
    let text = text();
    assert!(text.contains("`layers.0 (Dropout)`"), "{text}");
    assert_eq!(text.matches(warning).count(), 1, "{text}");
}
