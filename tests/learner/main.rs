//! burn's `Learner` with the strategy of `ps`: the same weights as burn's own strategy, every example once in an epoch,
//! and burn's interrupter, checkpoints and early stopping.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use burn::data::dataset::{Dataset, DatasetError};
use burn::lr_scheduler::{LrScheduler, LrSchedulerRecord};
use burn::module::Module;
use burn::optim::{AdamConfig, ModuleOptimizer, SgdConfig};
use burn::tensor::TensorReadError;
use burn::train::metric::store::EventStoreClient;
use burn::train::metric::{Metric, MetricMetadata, MetricName, SerializedEntry};
use burn::train::{EarlyStoppingStrategy, Learner, TrainingStrategy};
use ps::learner::ClusterStrategy;
use ps::prelude::*;

use net::{
    Directory, Loader, NOT_A_NUMBER, Net, OnStep, assert_close, device, learner, loader, loader_of,
    train, weights_of,
};

mod net;
mod nodes;
mod saved;

/// A strategy for this process alone.
fn alone(
    learner: &Learner<Net>,
    loader: &Loader,
    num_workers: u16,
    consistency: Consistency,
) -> TrainingStrategy<Net> {
    let strategy = ClusterStrategy::new(learner, loader, &device()).unwrap();
    let strategy = strategy.workers(num_workers).consistency(consistency);
    strategy
        .heed_signals(false)
        .on(&Cluster::alone(Hosts::new()))
}

const OPTIMIZERS: [fn() -> ModuleOptimizer; 2] =
    [|| SgdConfig::new().init(), || AdamConfig::new().init()];

const NUM_EPOCHS: usize = 3;

/// Bounds every wait.
const SOON: Duration = Duration::from_secs(60);

/// The order in which one process must take the examples, so that its batches are those of `num_workers` workers,
/// joined.
fn joined(num_examples: usize, num_workers: usize, batch_size: usize) -> Vec<usize> {
    let share = |worker: usize| worker * num_examples / num_workers;
    let num_batches = num_examples.div_ceil(num_workers).div_ceil(batch_size);
    let batches = (0..num_batches).flat_map(|batch| {
        (0..num_workers).flat_map(move |worker| {
            let begin = share(worker) + batch * batch_size;
            begin..share(worker + 1).min(begin + batch_size)
        })
    });
    batches.collect()
}

#[test]
fn bsp_ends_with_the_weights_of_burns_own_strategy_on_the_joined_batches() {
    let nothing = OnStep::nothing();
    for (number, optimizer) in OPTIMIZERS.into_iter().enumerate() {
        // The shares have 16, 17 and 17 examples, so the last batches are smaller, and the first worker has one less.
        let num_updates = NUM_EPOCHS * 5;
        let alike = learner(optimizer(), num_updates);
        let loads = loader(joined(50, 3, 4), 12, None, &nothing);
        let expected = weights_of(&train(alike, loads, NUM_EPOCHS, None));

        let learner = learner(optimizer(), num_updates);
        let loads = loader(0..50, 4, None, &nothing);
        let strategy = alone(&learner, &loads, 3, Consistency::Bsp);
        let got = weights_of(&train(learner, loads, NUM_EPOCHS, Some(strategy)));
        assert_close(&got, &expected, &format!("optimizer {number}"));
        assert_ne!(got, Net::new(&device()).weights());
    }
}

/// With the same order of the examples, which burn's loader shuffles.
#[test]
fn one_worker_trains_as_burns_own_strategy() {
    let nothing = OnStep::nothing();
    let loads = || loader(0..30, 4, Some(9), &nothing);
    let new = || learner(AdamConfig::new().init(), 24);
    let expected = weights_of(&train(new(), loads(), NUM_EPOCHS, None));
    let (learner, loads) = (new(), loads());
    let strategy = alone(&learner, &loads, 1, Consistency::Bsp);
    let got = weights_of(&train(learner, loads, NUM_EPOCHS, Some(strategy)));
    assert_close(&got, &expected, "one worker");
}

/// S-20. They are in the weights that are compared, and in the learner that validates.
#[test]
fn running_statistics_are_those_of_burns_own_strategy() {
    let nothing = OnStep::nothing();
    let loads = || loader(0..32, 4, None, &nothing);
    let new = || {
        let net = Net::normalized(&device());
        Learner::new(net, SgdConfig::new().init(), 0.01)
    };
    let expected = weights_of(&train(new(), loads(), NUM_EPOCHS, None));
    let (learner, loads) = (new(), loads());
    let strategy = alone(&learner, &loads, 1, Consistency::Bsp);
    let got = weights_of(&train(learner, loads, NUM_EPOCHS, Some(strategy)));
    assert_close(&got, &expected, "statistics");
}

/// S-20, in batches of different sizes.
#[test]
fn running_statistics_are_the_mean_of_those_of_several_workers() {
    let nothing = OnStep::nothing();
    // With a rate of 0, only the statistics move.
    let new = || Learner::new(Net::normalized(&device()), SgdConfig::new().init(), 0.0);
    let initial = new().model().weights();
    let mut expected = vec![0.0; initial.len()];
    for share in [0..4, 4..8, 8..13] {
        let part = share.len() as f32 / 13.0;
        let alone = weights_of(&train(new(), loader(share, 5, None, &nothing), 1, None));
        for (sum, weight) in expected.iter_mut().zip(alone) {
            *sum += part * weight;
        }
    }
    let (learner, loads) = (new(), loader(0..13, 5, None, &nothing));
    let strategy = alone(&learner, &loads, 3, Consistency::Bsp);
    let got = weights_of(&train(learner, loads, 1, Some(strategy)));
    assert_close(&got, &expected, "statistics");
    assert_ne!(got, initial);
}

/// S-20.
#[test]
fn accumulated_gradients_and_statistics_are_those_of_burns_own_strategy() {
    let nothing = OnStep::nothing();
    let loads = || loader(0..30, 4, None, &nothing);
    let accumulating = |strategy: Option<TrainingStrategy<Net>>, learner, loads| {
        let directory = Directory::new();
        let training = directory.training(loads, NUM_EPOCHS).grads_accumulation(3);
        let training = match strategy {
            Some(strategy) => training.with_training_strategy(strategy),
            None => training,
        };
        weights_of(&training.launch(learner))
    };
    let plain = || learner(SgdConfig::new().init(), 24);
    let normalized = || {
        let net = Net::normalized(&device());
        Learner::new(net, SgdConfig::new().init(), 0.01)
    };
    for new in [plain as fn() -> Learner<Net>, normalized] {
        // 8 batches: the last step of an epoch has 2.
        let expected = accumulating(None, new(), loads());
        let (learner, loads) = (new(), loads());
        let strategy = alone(&learner, &loads, 1, Consistency::Bsp);
        let got = accumulating(Some(strategy), learner, loads);
        assert_close(&got, &expected, "accumulated");
    }
}

/// How often each example was in a step.
#[derive(Clone, Default)]
struct Counts(Arc<Mutex<Vec<usize>>>);

impl Counts {
    fn on_step(&self) -> OnStep {
        let counts = Arc::clone(&self.0);
        OnStep(Arc::new(move |ids| {
            let mut counts = counts.lock().unwrap();
            for &id in ids {
                if counts.len() <= id {
                    counts.resize(id + 1, 0);
                }
                counts[id] += 1;
            }
        }))
    }

    fn take(&self) -> Vec<usize> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

#[test]
fn each_epoch_covers_every_example_once_in_every_mode() {
    let counts = Counts::default();
    for consistency in [
        Consistency::Bsp,
        Consistency::Asp,
        Consistency::Ssp { bound: 1 },
        Consistency::KofN { k: 2 },
    ] {
        // The shares have 16 or 17 examples, so their last batches are smaller.
        let learner = learner(SgdConfig::new().init(), 100);
        let loads = loader(0..50, 4, Some(3), &counts.on_step());
        let strategy = alone(&learner, &loads, 3, consistency);
        let result = train(learner, loads, NUM_EPOCHS, Some(strategy));
        weights_of(&result);
        assert_eq!(counts.take(), vec![NUM_EPOCHS; 50], "{consistency}");
    }
}

#[test]
fn gradients_are_counted_over_all_epochs() {
    for consistency in [
        Consistency::Bsp,
        Consistency::Asp,
        Consistency::Ssp { bound: 1 },
        Consistency::KofN { k: 2 },
    ] {
        let learner = learner(SgdConfig::new().init(), 100);
        let loads = loader(0..50, 4, Some(3), &OnStep::nothing());
        let strategy = ClusterStrategy::new(&learner, &loads, &device()).unwrap();
        let strategy = strategy.workers(3).consistency(consistency);
        let strategy = strategy.heed_signals(false);
        let counts = strategy.counts();
        let strategy = strategy.on(&Cluster::alone(Hosts::new()));
        weights_of(&train(learner, loads, NUM_EPOCHS, Some(strategy)));
        // The shares have 16, 17 and 17 examples, so their workers take 4, 5 and 5 steps in each epoch.
        let num_steps = (NUM_EPOCHS * 14) as u64;
        assert_eq!(counts.num_settled(), num_steps, "{consistency}");
        match consistency {
            // Some came too late for their round.
            Consistency::KofN { .. } => assert!(counts.num_applied() <= num_steps),
            _ => assert_eq!(counts.num_applied(), num_steps, "{consistency}"),
        }
    }
}

/// A constant rate that counts how often it is asked for.
#[derive(Clone, Default)]
struct Counting(Arc<AtomicUsize>);

impl LrScheduler for Counting {
    fn step(&mut self) -> f64 {
        self.0.fetch_add(1, Ordering::Relaxed);
        0.01
    }

    fn to_record(&self) -> LrSchedulerRecord {
        LrSchedulerRecord::new()
    }

    fn load_record(&mut self, _: LrSchedulerRecord) {}
}

#[test]
fn the_schedule_counts_updates() {
    // 5 steps per worker and epoch.
    for (consistency, per_epoch) in [(Consistency::Bsp, 5), (Consistency::Asp, 10)] {
        let counting = Counting::default();
        let num_updates = Arc::clone(&counting.0);
        let learner = Learner::new(Net::new(&device()), SgdConfig::new().init(), counting);
        let loads = loader(0..40, 4, None, &OnStep::nothing());
        let strategy = alone(&learner, &loads, 2, consistency);
        weights_of(&train(learner, loads, NUM_EPOCHS, Some(strategy)));
        let num_updates = num_updates.load(Ordering::Relaxed);
        assert_eq!(num_updates, NUM_EPOCHS * per_epoch, "{consistency}");
    }
}

/// A program may make what is not trained at random. Then the checkpoint has what the trained layers fit to.
#[test]
fn what_is_not_trained_comes_from_burns_checkpoint() {
    let run = |directory: &Directory, factor, num_epochs, from: Option<usize>| {
        let net = Net::with_frozen_layer(factor, &device());
        let learner = Learner::new(net, AdamConfig::new().init(), 0.01);
        let loads = loader(0..40, 4, None, &OnStep::nothing());
        let strategy = alone(&learner, &loads, 2, Consistency::Bsp);
        let training = directory.training(loads, num_epochs);
        let training = match from {
            Some(epoch) => training.checkpoint(epoch),
            None => training,
        };
        let training = training.with_default_checkpointers();
        weights_of(&training.with_training_strategy(strategy).launch(learner))
    };
    let expected = run(&Directory::new(), 1.0, 4, None);
    let directory = Directory::new();
    run(&directory, 1.0, 2, None);
    assert_eq!(run(&directory, 3.0, 4, Some(2)), expected);
    assert_ne!(run(&Directory::new(), 3.0, 4, None), expected);
}

#[derive(Clone)]
struct StopAfter(usize);

impl EarlyStoppingStrategy for StopAfter {
    fn should_stop(&mut self, epoch: usize, _: &EventStoreClient) -> bool {
        epoch == self.0
    }
}

#[test]
fn early_stopping_ends_a_training() {
    let counts = Counts::default();
    let learner = learner(SgdConfig::new().init(), 100);
    let loads = loader(0..20, 4, None, &counts.on_step());
    let strategy = alone(&learner, &loads, 2, Consistency::Asp);
    let directory = Directory::new();
    let training = directory.training(loads, 100).early_stopping(StopAfter(2));
    weights_of(&training.with_training_strategy(strategy).launch(learner));
    assert_eq!(counts.take(), [2; 20]);
}

#[test]
fn the_interrupter_ends_a_training_within_an_epoch() {
    for consistency in [Consistency::Bsp, Consistency::Asp] {
        let directory = Directory::new();
        let interrupter = burn::train::Interrupter::new();
        let num_steps = Arc::new(AtomicUsize::new(0));
        let (interrupts, counts) = (interrupter.clone(), Arc::clone(&num_steps));
        let on_step = OnStep(Arc::new(move |_| {
            if counts.fetch_add(1, Ordering::Relaxed) == 9 {
                interrupts.stop(Some("enough"));
            }
        }));
        let learner = learner(SgdConfig::new().init(), 1_000);
        // Far more steps than can be taken until the driver looks.
        let loads = loader(0..400_000, 4, None, &on_step);
        let strategy = alone(&learner, &loads, 2, consistency);
        let training = directory.training(loads, 1).with_interrupter(interrupter);
        let result = training.with_training_strategy(strategy).launch(learner);
        let interrupted = result.interrupted.expect("it was interrupted");
        assert_eq!(interrupted.reason.as_deref(), Some("enough"));
        let num_steps = num_steps.load(Ordering::Relaxed);
        assert!(num_steps < 50_000, "{consistency}: {num_steps} steps");
    }
}

#[test]
fn a_panic_in_a_step_ends_a_training_with_an_error_that_names_the_worker() {
    let on_step = OnStep(Arc::new(|ids| assert!(!ids.contains(&33), "as planned")));
    let learner = learner(SgdConfig::new().init(), 100);
    let loads = loader(0..40, 4, None, &on_step);
    let strategy = alone(&learner, &loads, 2, Consistency::Bsp);
    let result = train(learner, loads, 1, Some(strategy));
    let error = result.error.expect("a step panicked").to_string();
    // The second worker has the examples from 20 on.
    assert!(
        error.contains("device 1") && error.contains("as planned"),
        "{error}"
    );
}

/// A metric of a user. burn's renderer panics, too, if its output is closed.
#[derive(Clone)]
struct Panics;

impl Metric for Panics {
    type Input = ();

    fn name(&self) -> MetricName {
        Arc::new("Panics".to_owned())
    }

    fn update(&mut self, (): &(), _: &MetricMetadata) -> Result<SerializedEntry, TensorReadError> {
        panic!("as planned")
    }

    fn compute(&mut self) -> Result<SerializedEntry, TensorReadError> {
        Ok(SerializedEntry::new(String::new(), String::new()))
    }

    fn clear(&mut self) {}
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| text.to_string());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_default()
}

#[test]
fn a_panic_in_a_metric_reaches_the_caller_before_the_epoch_is_over() {
    for consistency in [Consistency::Bsp, Consistency::Asp] {
        let counts = Arc::new(AtomicUsize::new(0));
        let num_steps = Arc::clone(&counts);
        let on_step = OnStep(Arc::new(move |_| {
            counts.fetch_add(1, Ordering::Relaxed);
        }));
        let (sender, ended) = mpsc::channel();
        thread::spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| {
                let learner = learner(SgdConfig::new().init(), 1_000);
                let loads = loader(0..400_000, 4, None, &on_step);
                let strategy = alone(&learner, &loads, 2, consistency);
                let directory = Directory::new();
                let training = directory.training(loads, 1).metric_train(Panics);
                drop(training.with_training_strategy(strategy).launch(learner));
            }));
            // Nobody waits any more if this has taken too long.
            let _ = sender.send(result.map_err(|panic| text_of(&*panic)));
        });
        let result = ended.recv_timeout(SOON).expect("the training hangs");
        assert_eq!(result, Err("as planned".to_owned()), "{consistency}");
        let num_steps = num_steps.load(Ordering::Relaxed);
        assert!(num_steps < 50_000, "{consistency}: {num_steps} steps");
    }
}

/// S-11, in epochs that are too short for a worker to notice it.
#[test]
fn a_training_that_diverges_in_short_epochs_ends_with_an_error() {
    for consistency in [Consistency::Bsp, Consistency::Asp] {
        let learner = Learner::new(Net::new(&device()), SgdConfig::new().init(), 1e30);
        let loads = loader(0..20, 4, None, &OnStep::nothing());
        let strategy = alone(&learner, &loads, 2, consistency);
        let result = train(learner, loads, 5, Some(strategy));
        let error = result.error.expect("it diverges").to_string();
        assert!(error.contains("diverged"), "{consistency}: {error}");
    }
}

/// S-11.
#[test]
fn gradients_that_are_not_finite_are_refused_and_more_than_half_of_them_are_an_error() {
    let training_with = |num_bad: usize| {
        let first = move |batch| if batch < num_bad { NOT_A_NUMBER } else { batch };
        let ids = (0..10).flat_map(|batch| [first(batch), 100 + batch]);
        let learner = learner(SgdConfig::new().init(), 100);
        let loads = loader(ids, 2, None, &OnStep::nothing());
        let strategy = alone(&learner, &loads, 1, Consistency::Bsp);
        train(learner, loads, 1, Some(strategy))
    };
    let weights = weights_of(&training_with(5));
    assert!(weights.iter().all(|weight| weight.is_finite()));
    assert_ne!(weights, Net::new(&device()).weights());
    let error = training_with(6).error.expect("more than half are refused");
    let error = error.to_string();
    assert!(error.contains("6 of the 10 gradients"), "{error}");
}

/// Fails for one example.
struct Broken;

impl Dataset<usize> for Broken {
    fn get(&self, index: usize) -> Result<usize, DatasetError> {
        match index {
            33 => Err(DatasetError::new(io::Error::other("a bad sector"))),
            _ => Ok(index),
        }
    }

    fn len(&self) -> usize {
        40
    }
}

#[test]
fn the_error_of_a_data_set_ends_a_training_and_names_the_worker() {
    let learner = learner(SgdConfig::new().init(), 100);
    let loads = loader_of(Broken, 4, None, &OnStep::nothing());
    let strategy = alone(&learner, &loads, 2, Consistency::Bsp);
    let result = train(learner, loads, 1, Some(strategy));
    let error = result.error.expect("an example cannot be read").to_string();
    // The second worker has the examples from 20 on.
    assert!(
        error.contains("device 1") && error.contains("a bad sector"),
        "{error}"
    );
}

/// M-7. burn's own strategies would change one of the fields only, so they train a model that uses the first one twice.
#[test]
fn a_parameter_in_two_fields_stays_one() {
    let nothing = OnStep::nothing();
    let loads = || loader(0..32, 4, None, &nothing);
    for (number, optimizer) in OPTIMIZERS.into_iter().enumerate() {
        let new = |net| Learner::new(net, optimizer(), 0.01);
        let result = train(
            new(Net::with_bias_used_twice(&device())),
            loads(),
            NUM_EPOCHS,
            None,
        );
        let mut expected = weights_of(&result);
        // The factors that are not used stand behind the first layer: 3 × 8 weights and 8 biases.
        expected.drain(32..40);

        let (learner, loads) = (new(Net::tied(&device())), loads());
        let strategy = alone(&learner, &loads, 1, Consistency::Bsp);
        let result = train(learner, loads, NUM_EPOCHS, Some(strategy));
        assert_close(
            &weights_of(&result),
            &expected,
            &format!("optimizer {number}"),
        );
        let [bias, factors] = result.model.bias_and_factors();
        assert_eq!(bias, factors);
        assert_ne!(bias, Net::tied(&device()).bias_and_factors()[0]);
    }
}

/// A record has the ids, too.
#[test]
fn a_checkpoint_may_tie_fields() {
    let loads = loader(0..8, 4, None, &OnStep::nothing());
    let mut learner = Learner::new(Net::normalized(&device()), SgdConfig::new().init(), 0.1);
    let strategy = alone(&learner, &loads, 1, Consistency::Bsp);
    learner.load_model(Net::tied(&device()).into_record());
    let result = train(learner, loads, 1, Some(strategy));
    let _ = weights_of(&result);
    let [bias, factors] = result.model.bias_and_factors();
    assert_eq!(bias, factors);
}

#[test]
fn what_cannot_work_is_an_error_that_says_so() {
    let nothing = OnStep::nothing();
    let error = |num_workers, consistency, other: bool| {
        let learner = learner(SgdConfig::new().init(), 100);
        let loads = loader(0..4, 1, None, &nothing);
        let strategy = alone(&learner, &loads, num_workers, consistency);
        let loads = match other {
            true => loader(0..4, 1, None, &nothing),
            false => loads,
        };
        let result = train(learner, loads, 1, Some(strategy));
        result.error.expect("it cannot work").to_string()
    };
    let too_many = error(5, Consistency::Asp, false);
    assert!(
        too_many.contains("4 examples are fewer than 5 workers"),
        "{too_many}"
    );
    let none = error(0, Consistency::Asp, false);
    assert!(none.contains("at least one worker"), "{none}");
    let other_loader = error(2, Consistency::Asp, true);
    assert!(
        other_loader.contains("different data loaders"),
        "{other_loader}"
    );
    let mode = error(2, Consistency::KofN { k: 3 }, false);
    assert!(mode.contains('3'), "{mode}");
}
