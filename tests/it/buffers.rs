//! S-20: the servers keep the running statistics of a model's layers, as the mean of those of its workers.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, PoisonError};

use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::Module;
use ps::model::burn::nn::{BatchNorm, BatchNormConfig, Linear};
use ps::model::burn::optim::momentum::MomentumConfig;
use ps::model::burn::optim::{AdamConfig, AdamWConfig, SgdConfig};
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{FlatView, LocalModel, ModelError, Rng, StepSeed, seeded};
use ps::prelude::*;
use ps::source::ModelSource;

use crate::nodes::SOON;

/// The numbers of an example.
const WIDTH: usize = 3;

const RATE: f64 = 0.05;

type Rows = Vec<[f32; WIDTH]>;

/// The first normalization sees the examples themselves. So its statistics do not depend on the weights.
#[derive(Module, Debug)]
struct Normalized {
    first: BatchNorm,
    hidden: Linear,
    second: BatchNorm,
    output: Linear,
    /// Whether [`SEEN`] gets the batches.
    is_recorded: bool,
    /// Whether the first steps of all workers [meet](START).
    meets: bool,
}

/// How many workers a model that meets has.
const NUM_MEETING: usize = 4;

/// Where these workers have loaded the initial weights, and wait for each other. So all of their first steps but one
/// are stale in `Asp`.
static START: Barrier = Barrier::new(NUM_MEETING);

/// The batches that a recorded model has computed.
static SEEN: Mutex<Vec<Rows>> = Mutex::new(Vec::new());

impl Normalized {
    fn init(device: &Device) -> Self {
        let rng = &mut Rng::new(5);
        Self {
            first: BatchNormConfig::new(WIDTH).init(device),
            hidden: seeded::linear(rng, [WIDTH, 8], device),
            second: BatchNormConfig::new(8).init(device),
            output: seeded::linear(rng, [8, 1], device),
            is_recorded: false,
            meets: false,
        }
    }

    /// The mean squared error of the sum of the squares.
    fn error(&self, rows: &Rows, device: &Device) -> Tensor<1> {
        let x = Tensor::<1>::from_floats(rows.concat().as_slice(), device);
        let x = x.reshape([-1, WIDTH as i32]);
        let y = self.hidden.forward(self.first.forward(x.clone())).tanh();
        let y = self.output.forward(self.second.forward(y));
        (y - x.square().sum_dim(1)).square().mean()
    }
}

impl Model for Normalized {
    type Batch = Rows;

    fn loss(&self, rows: &Rows, step: &mut Step) -> Tensor<1> {
        static NUM_STEPS: AtomicU64 = AtomicU64::new(0);
        if self.meets && NUM_STEPS.fetch_add(1, Ordering::Relaxed) < NUM_MEETING as u64 {
            START.wait();
        }
        if self.is_recorded {
            let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
            seen.push(rows.clone());
        }
        self.error(rows, step.device())
    }

    fn num_examples(rows: &Rows) -> usize {
        rows.len()
    }
}

fn device() -> Device {
    select_device(default_device_name()).unwrap()
}

fn data() -> impl Examples<Batch = Rows> {
    let mut rng = Rng::new(11);
    // The columns have means of -1, 0 and 1.
    let mut row = || [-1.0, 0.0, 1.0].map(|mean| mean + 2.0 * rng.uniform() - 1.0);
    let rows = (0..64).map(|_| row()).collect();
    collated(InMemDataset::new(rows), |rows: Rows| rows)
}

fn trainer(model: Normalized) -> Trainer<Normalized, impl Examples<Batch = Rows>> {
    Trainer::new(model, data())
        .device(&device())
        .workers(2)
        .batch_size(8)
        .iterations(12)
        .learning_rate(RATE)
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// The statistics of the first normalization.
fn of_first(weights: &Weights) -> Vec<f32> {
    let at = weights.layout().num_trainable();
    weights.read(at..at + 2 * WIDTH).into_owned()
}

/// burn alone, without flat weights: each worker has a copy of the model, and the statistics are averaged.
fn with_burn_alone(batches: &[Rows], num_workers: usize) -> Vec<f32> {
    let device = device();
    let mut model = Normalized::init(&device);
    let view = FlatView::new(&model).unwrap();
    for round in batches.chunks(num_workers) {
        let mut sums = vec![0.0; view.num_weights()];
        for rows in round {
            let own = model.valid().train();
            let gradients = own.error(rows, &device).backward();
            let mut gradient = vec![0.0; view.num_weights()];
            view.read_gradients(&own, gradients, &mut gradient);
            let statistics = view.read_weights(&own);
            let at = view.num_trainable();
            gradient[at..].copy_from_slice(&statistics[at..]);
            for (sum, number) in sums.iter_mut().zip(gradient) {
                *sum += number / num_workers as f32;
            }
        }
        let mut weights = view.read_weights(&model);
        let (trained, statistics) = weights.split_at_mut(view.num_trainable());
        let (slopes, means) = sums.split_at(view.num_trainable());
        for (weight, slope) in trained.iter_mut().zip(slopes) {
            *weight -= RATE as f32 * slope;
        }
        statistics.copy_from_slice(means);
        let read = |range: Range<usize>| weights[range].to_vec();
        model = view.write_weights(model, read).unwrap();
    }
    view.read_weights(&model)
}

#[test]
fn workers_in_step_have_the_statistics_that_burn_has_on_average() {
    for num_workers in [1, 2] {
        let mut model = Normalized::init(&device());
        model.is_recorded = true;
        let report = trainer(model).workers(num_workers).run().unwrap();
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        let expected = with_burn_alone(&std::mem::take(&mut *seen), num_workers);
        let got = report.weights.to_vec();
        assert_eq!(got.len(), expected.len());
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let difference = (got - expected).abs();
            assert!(
                difference < 1e-5,
                "{num_workers} workers, weight {index}: {got}, {expected}"
            );
        }
        // They have moved, and towards those of the data.
        let [first, _, third] = [0, 1, 2].map(|column| of_first(&report.weights)[column]);
        assert!(first < -0.3 && third > 0.3, "{first} and {third}");
    }
}

#[test]
fn any_number_of_servers_has_the_same_bits() {
    let with = |num_servers| {
        let model = Normalized::init(&device());
        let trainer = trainer(model).servers(num_servers).clip_norm(0.5);
        trainer.optimizer(AdamWConfig::new()).run().unwrap()
    };
    let one = with(1).weights.to_vec();
    for num_servers in [2, 5, 17] {
        assert!(
            bits(&with(num_servers).weights.to_vec()) == bits(&one),
            "{num_servers}"
        );
    }
}

/// The first statistics depend on the data alone, so they must be the same whatever happens to the weights.
#[test]
fn no_rule_rate_sum_or_limit_changes_what_is_done_to_statistics() {
    type Setting<E> = fn(Trainer<Normalized, E>) -> Trainer<Normalized, E>;

    fn check<E: Examples<Batch = Rows>>(make: impl Fn() -> Trainer<Normalized, E>) {
        let plain = make().run().unwrap();
        let expected = bits(&of_first(&plain.weights));
        let settings: [(&str, Setting<E>); 8] = [
            ("rate", |trainer| trainer.learning_rate(1e-3)),
            ("sum", |trainer| trainer.reduction(Reduction::Sum)),
            ("norm", |trainer| trainer.clip_norm(1e-3)),
            ("value", |trainer| trainer.clip_value(1e-4)),
            ("momentum", |trainer| {
                let momentum = Some(MomentumConfig::new());
                trainer.optimizer(SgdConfig::new().with_momentum(momentum))
            }),
            ("Adam", |trainer| trainer.optimizer(AdamConfig::new())),
            ("decay", |trainer| {
                trainer.optimizer(AdamWConfig::new().with_weight_decay(0.1))
            }),
            ("own", |trainer| {
                trainer.update_rule(|| Sgd::with_momentum(0.9))
            }),
        ];
        for (name, set) in settings {
            let report = set(make()).run().unwrap();
            assert!(bits(&of_first(&report.weights)) == expected, "{name}");
            assert!(
                bits(&report.weights.to_vec()) != bits(&plain.weights.to_vec()),
                "{name}"
            );
        }
    }

    check(|| trainer(Normalized::init(&device())).servers(2));
}

/// Plain SGD that panics once.
struct PanicsOnce {
    sgd: Sgd,
    num_updates: Arc<AtomicU64>,
}

/// Checkpoints compare this text.
impl fmt::Debug for PanicsOnce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PanicsOnce")
    }
}

impl UpdateRule for PanicsOnce {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        let number = self.num_updates.fetch_add(1, Ordering::Relaxed);
        assert_ne!(number, 8, "a test: this update fails");
        self.sgd.update(weights, gradient, learning_rate);
    }
}

/// S-13 and S-15.
#[test]
fn checkpoints_and_the_update_log_have_the_statistics() {
    let train = |num_iterations, num_updates: u64, config: CheckpointConfig| {
        let num_updates = Arc::new(AtomicU64::new(num_updates));
        let rule = move || PanicsOnce {
            sgd: Sgd::new(),
            num_updates: Arc::clone(&num_updates),
        };
        let trainer = trainer(Normalized::init(&device())).update_rule(rule);
        let trainer = trainer.iterations(num_iterations).checkpoints(config);
        trainer.run().unwrap()
    };
    let whole = tempfile::tempdir().unwrap();
    let whole = train(12, 100, CheckpointConfig::new(whole.path()));
    let whole = bits(&whole.weights.to_vec());

    // The checkpoint of a run that ends.
    let halves = tempfile::tempdir().unwrap();
    let resume = || CheckpointConfig {
        resume: true,
        ..CheckpointConfig::new(halves.path())
    };
    train(6, 100, resume());
    let second = train(12, 100, resume());
    assert!(bits(&second.weights.to_vec()) == whole);

    // The servers are lost at update 8. A checkpoint has 5 updates, and the log has the others.
    let lossy = tempfile::tempdir().unwrap();
    let with_log = CheckpointConfig {
        every: 5,
        log: Some(LogConfig::default()),
        ..CheckpointConfig::new(lossy.path())
    };
    let lossy = train(12, 0, with_log);
    assert_eq!(lossy.num_recoveries, 1, "{lossy}");
    assert!(bits(&lossy.weights.to_vec()) == whole, "{lossy}");
}

#[test]
fn an_asynchronous_training_is_computed_again_to_the_bit() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("schedule");
    let trainer = |meets| {
        let model = Normalized {
            meets,
            ..Normalized::init(&device())
        };
        let trainer = trainer(model).consistency(Consistency::Asp);
        trainer.workers(NUM_MEETING).clip_norm(0.5).servers(3)
    };
    let report = trainer(true).record(file.clone()).run().unwrap();
    assert!(report.staleness.max() >= NUM_MEETING as u64 - 1, "{report}");
    let replay = trainer(false).replay(&file).unwrap();
    assert!(bits(&replay.weights.to_vec()) == bits(&report.weights.to_vec()));
}

/// The last step of an epoch has what is left. The variance of a single example would be 0.
#[test]
fn a_batch_that_is_not_full_moves_statistics_less() {
    let device = device();
    let model = Normalized::init(&device);
    let weights = initial_weights(&model, &device).unwrap();
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 48,
        seed: 3,
    };
    let mut batches = WorkerBatches::new(&data(), config).unwrap();
    let rows = batches.batch(Clock(1)).unwrap();
    assert_eq!(rows.len(), 16, "a third of a batch");
    let local = LocalModel::new(model.clone(), &device).unwrap();
    let buffers = local.num_trainable()..local.num_weights();
    let made = |rows: &[[f32; WIDTH]]| {
        let mut gradient = vec![0.0; local.num_weights()];
        let seed = StepSeed::default();
        let loss = local.gradient(&rows.to_vec(), seed, &mut gradient);
        loss.unwrap();
        gradient.split_off(local.num_trainable())
    };
    for num_parts in [1, 2] {
        let parts: Vec<Vec<f32>> = rows.chunks(16 / num_parts).map(made).collect();
        let source = ModelSource::in_micro_batches(&model, &device, &data(), config, num_parts);
        let computed = source.unwrap().gradient(Clock(1), &weights).unwrap();
        let got = &computed.gradient.values()[buffers.clone()];
        let loaded = weights.read(buffers.clone());
        for (index, (got, loaded)) in got.iter().zip(&loaded[..]).enumerate() {
            let mean = parts.iter().map(|part| part[index]).sum::<f32>() / num_parts as f32;
            let expected = loaded + (mean - loaded) / 3.0;
            let difference = (got - expected).abs();
            assert!(
                difference < 1e-6 && (mean - loaded).abs() > 1e-4,
                "{num_parts} parts, {index}: {got}, and {expected} of {loaded} and {mean}"
            );
        }
    }
}

/// M-3: a peer may say of the same parameters that others of them are buffers. A worker that looked for the first
/// parameter that differs would look for ever.
#[test]
fn weights_with_other_buffers_are_refused() {
    let device = device();
    let model = Normalized::init(&device);
    let weights = initial_weights(&model, &device).unwrap();
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 8,
        seed: 0,
    };
    let worker = spawn_worker(&model, &device, &data(), config).unwrap();
    let parameters = weights.layout().parameters();
    let num_buffers = weights.layout().num_buffers();
    for other in [0, num_buffers - 1, num_buffers + 1] {
        let layout = Layout::with_buffers(parameters.to_vec(), other).unwrap();
        let strange = Weights::initial(layout, weights.to_vec());
        let answer = worker.ask(ComputeGradients(strange.clone()));
        let answer = answer.wait_timeout(SOON).unwrap();
        answer.unwrap_err();
        let error = model_with_weights(&model, &device, &strange).unwrap_err();
        let ModelError::OtherModel {
            index,
            expected,
            got,
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!(index, parameters.len() - other.max(num_buffers));
        let of_layout = |is_buffer| match is_buffer {
            true => "the running statistic `",
            false => "`",
        };
        assert!(
            expected.starts_with(of_layout(other < num_buffers)),
            "{expected}"
        );
        assert!(got.starts_with(of_layout(other > num_buffers)), "{got}");
    }
    let answer = worker.ask(ComputeGradients(weights)).wait_timeout(SOON);
    answer.unwrap().unwrap();
}

#[test]
fn the_trained_model_has_the_statistics_of_the_servers_and_is_evaluated_with_them() {
    let device = device();
    let model = Normalized::init(&device);
    let report = Trainer::new(model.clone(), data())
        .device(&device)
        .batch_size(8)
        .iterations(12)
        .test_data(data())
        .run()
        .unwrap();
    let trained = model_with_weights(&model, &device, &report.weights).unwrap();
    let statistics = trained.first.running_mean.value().into_data();
    let statistics: Vec<f32> = statistics.try_into_vec().unwrap();
    assert_eq!(statistics, of_first(&report.weights)[..WIDTH]);
    // What the caller's model has learned is its own.
    assert_eq!(
        bits(
            &model
                .first
                .running_mean
                .value_sync()
                .into_data()
                .try_into_vec()
                .unwrap()
        ),
        [0; 3]
    );

    let rows = data().batch(&(0..64).collect::<Vec<_>>());
    let loss = trained
        .error(&rows, &device.clone().inner())
        .into_scalar::<f32>();
    let evaluated = report.final_evaluation.as_ref().unwrap().mean_loss();
    assert!(
        (f64::from(loss) - evaluated).abs() < 1e-5,
        "{loss} and {evaluated}"
    );
    let local = LocalModel::new(trained, &device).unwrap();
    assert_eq!(
        bits(&local.weights().unwrap()),
        bits(&report.weights.to_vec())
    );
}
