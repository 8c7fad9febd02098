//! The series of a run, as handles of the facade: looked up once, then only counted.

use std::sync::{Arc, Mutex, PoisonError};

use metrics::{Counter, Gauge, Histogram, Key, Label, Level, Metadata, Recorder, Unit};
use ps_actors::ids::WorkerId;

use super::MAX_LABELED;
use super::names::{self, Kind, Metric};
use crate::observe::{RunStarted, ServersSeen, SettledStep, StepOutcome, StepTimes};

/// The parts of a step, as labels.
const PARTS: [&str; 5] = StepTimes::NAMES;

/// The mean of the latest steps: how much the newest one weighs.
const NEWEST: f64 = 1.0 / 20.0;

/// The label of the workers and servers that have none of their own.
const OTHER: &str = "other";

/// Who keeps the metrics, while handles are made.
#[derive(Clone, Copy)]
pub(super) struct Registry<'a>(pub(super) &'a dyn Recorder);

const METADATA: Metadata<'static> = Metadata::new("ps", Level::INFO, Some("ps::metrics"));

fn key(metric: &Metric, values: &[&str]) -> Key {
    debug_assert_eq!(metric.labels.len(), values.len(), "{}", metric.name);
    let labels = metric.labels.iter().zip(values);
    let labels = labels.map(|(&label, &value)| Label::new(label, value.to_owned()));
    Key::from_parts(metric.name, labels.collect::<Vec<_>>())
}

impl Registry<'_> {
    /// Says what the metrics mean.
    pub(super) fn describe(self) {
        for metric in names::ALL {
            let unit = match metric.name {
                name if name.ends_with("_seconds") => Some(Unit::Seconds),
                name if name.ends_with("_bytes") => Some(Unit::Bytes),
                _ => None,
            };
            let (name, help) = (metric.name.into(), metric.help.into());
            match metric.kind {
                Kind::Counter => self.0.describe_counter(name, unit, help),
                Kind::Gauge => self.0.describe_gauge(name, unit, help),
                Kind::Histogram(_) => self.0.describe_histogram(name, unit, help),
            }
        }
    }

    fn counter(self, metric: &Metric, values: &[&str]) -> Counter {
        self.0.register_counter(&key(metric, values), &METADATA)
    }

    fn gauge(self, metric: &Metric, values: &[&str]) -> Gauge {
        self.0.register_gauge(&key(metric, values), &METADATA)
    }

    fn histogram(self, metric: &Metric, values: &[&str]) -> Histogram {
        self.0.register_histogram(&key(metric, values), &METADATA)
    }
}

/// What the series of trainings that have ended say from the beginning of the next one: a series cannot be removed. A
/// clone is another handle to the same series.
#[derive(Clone, Debug, Default)]
pub(super) struct Ended(Arc<Mutex<Vec<(Gauge, f64)>>>);

impl Ended {
    pub(super) fn add(&self, series: impl Iterator<Item = (Gauge, f64)>) {
        let mut ended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ended.extend(series);
    }

    /// Another training begins.
    pub(super) fn clear(&self) {
        let mut ended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (gauge, value) in ended.drain(..) {
            gauge.set(value);
        }
    }
}

/// The series of a run.
pub(super) struct Handles {
    info: Gauge,
    pub(super) running: Gauge,
    pub(super) steps_planned: Gauge,
    pub(super) steps_done: Gauge,
    staleness: Histogram,
    norm: Histogram,
    steps: [Histogram; 5],
    pub(super) loss: Gauge,
    pub(super) evaluation_loss: Gauge,
    pub(super) accuracy: Gauge,
    pub(super) evaluation: Histogram,
    pub(super) learning_rate: Gauge,
    pub(super) workers_live: Gauge,
    pub(super) workers_lost: Gauge,
    pub(super) awaited: Gauge,
    pub(super) nodes: Gauge,
    pub(super) pending: Gauge,
    pub(super) checkpoints_saved: Counter,
    pub(super) checkpoints_failed: Counter,
    pub(super) checkpoint: Histogram,
    pub(super) worker_faults: Counter,
    pub(super) node_faults: Counter,
    pub(super) server_faults: Counter,
    pub(super) moves: Counter,
    pub(super) recovery: Histogram,
    pub(super) skipped: Counter,
    /// By label: the item at [`MAX_LABELED`] is of all other workers.
    workers: Vec<Option<WorkerHandles>>,
    /// As `workers`.
    servers: Vec<Option<ServerHandles>>,
}

/// The series of one worker.
struct WorkerHandles {
    applied: Counter,
    late: Counter,
    refused: Counter,
    missed: Counter,
    examples: Counter,
    parts: [Gauge; 5],
    /// The mean times of the latest steps.
    means: Option<[f64; 5]>,
}

/// The series of one server.
struct ServerHandles {
    version: Gauge,
    weights: Gauge,
    staged: Gauge,
    waiting: Gauge,
}

impl Handles {
    pub(super) fn new(registry: Registry<'_>, run: &RunStarted) -> Self {
        let (settings, versions) = (&run.settings, &run.versions);
        let build = registry.gauge(&names::BUILD, &[&versions.ps, &versions.burn]);
        build.set(1.0);
        let words = [
            &settings.name,
            &settings.model,
            &settings.consistency,
            &settings.optimizer,
            &settings.device,
        ];
        let info = registry.gauge(&names::RUN, &words.map(String::as_str));
        info.set(1.0);
        registry.gauge(&names::STARTED, &[]).set(run.unix_time);
        let gauge = |metric| registry.gauge(metric, &[]);
        let histogram = |metric| registry.histogram(metric, &[]);
        let workers = |state| registry.gauge(&names::WORKERS, &[state]);
        let checkpoints = |outcome| registry.counter(&names::CHECKPOINTS, &[outcome]);
        let faults = |kind| registry.counter(&names::FAULTS, &[kind]);
        Self {
            info,
            running: gauge(&names::RUNNING),
            steps_planned: gauge(&names::STEPS_PLANNED),
            steps_done: gauge(&names::STEPS_DONE),
            staleness: histogram(&names::STALENESS),
            norm: histogram(&names::NORM),
            steps: PARTS.map(|part| registry.histogram(&names::STEP, &[part])),
            loss: gauge(&names::LOSS),
            evaluation_loss: gauge(&names::EVALUATION_LOSS),
            accuracy: gauge(&names::ACCURACY),
            evaluation: histogram(&names::EVALUATION),
            learning_rate: gauge(&names::LEARNING_RATE),
            workers_live: workers("live"),
            workers_lost: workers("lost"),
            awaited: gauge(&names::AWAITED),
            nodes: gauge(&names::NODES),
            pending: gauge(&names::PENDING),
            checkpoints_saved: checkpoints("saved"),
            checkpoints_failed: checkpoints("failed"),
            checkpoint: histogram(&names::CHECKPOINT),
            worker_faults: faults("worker_lost"),
            node_faults: faults("node_lost"),
            server_faults: faults("servers_lost"),
            moves: registry.counter(&names::MOVES, &[]),
            recovery: histogram(&names::RECOVERY),
            skipped: registry.counter(&names::SKIPPED, &[]),
            workers: (0..=MAX_LABELED).map(|_| None).collect(),
            servers: (0..=MAX_LABELED).map(|_| None).collect(),
        }
    }

    /// Counts a settled gradient. `registry` makes the series of a worker that has none yet.
    pub(super) fn step(&mut self, registry: Registry<'_>, step: &SettledStep) {
        let worker = self.worker(registry, step.worker);
        match step.outcome {
            StepOutcome::Applied => worker.applied.increment(1),
            StepOutcome::Late => worker.late.increment(1),
            StepOutcome::Refused => worker.refused.increment(1),
        }
        worker.examples.increment(step.num_examples);
        if let Some(times) = step.times.map(|times| times.parts()) {
            let before = worker.means.unwrap_or(times);
            let means: [f64; 5] =
                std::array::from_fn(|part| before[part] + NEWEST * (times[part] - before[part]));
            worker.means = Some(means);
            for (gauge, mean) in worker.parts.iter().zip(means) {
                gauge.set(mean);
            }
            for (histogram, time) in self.steps.iter().zip(times) {
                histogram.record(time);
            }
        }
        if step.outcome == StepOutcome::Applied {
            self.staleness.record(step.staleness as f64);
        }
        // One NaN would make the sum NaN for ever.
        if step.norm.is_finite() {
            self.norm.record(step.norm);
        }
    }

    pub(super) fn missed(&mut self, registry: Registry<'_>, worker: WorkerId, num_steps: u64) {
        self.worker(registry, worker).missed.increment(num_steps);
    }

    /// Takes over the state of the servers.
    pub(super) fn servers(&mut self, registry: Registry<'_>, seen: &ServersSeen) {
        let of = |count: usize| count as f64;
        for (number, place) in self.servers.iter_mut().enumerate() {
            // The last place is of all the others: their sums, and the oldest of their versions.
            let servers = match number == MAX_LABELED as usize {
                true => seen.servers.get(number..),
                false => seen.servers.get(number..=number),
            };
            let Some(servers) = servers.filter(|servers| !servers.is_empty()) else {
                continue;
            };
            let handles = place.get_or_insert_with(|| ServerHandles::new(registry, number));
            let version = servers.iter().map(|server| server.version.0).min();
            handles.version.set(version.unwrap_or(0) as f64);
            let num_weights: usize = servers.iter().map(|server| server.num_weights).sum();
            handles.weights.set(of(num_weights) * of(size_of::<f32>()));
            let num_staged = servers.iter().map(|server| server.num_staged).sum();
            handles.staged.set(of(num_staged));
            let num_waiting = servers.iter().map(|server| server.num_waiting).sum();
            handles.waiting.set(of(num_waiting));
        }
    }

    /// Returns the series that are of this run alone, and what they say when it is over.
    pub(super) fn ended(&self) -> impl Iterator<Item = (Gauge, f64)> {
        let workers = self.workers.iter().flatten().flat_map(|one| &one.parts);
        let servers = self.servers.iter().flatten();
        let servers =
            servers.flat_map(|one| [&one.version, &one.weights, &one.staged, &one.waiting]);
        // 0 would be a lie.
        let parts = workers
            .chain(servers)
            .map(|gauge| (gauge.clone(), f64::NAN));
        parts.chain([(self.info.clone(), 0.0)])
    }

    fn worker(&mut self, registry: Registry<'_>, worker: WorkerId) -> &mut WorkerHandles {
        let number = worker.0.min(MAX_LABELED) as usize;
        self.workers[number].get_or_insert_with(|| WorkerHandles::new(registry, number))
    }
}

fn label(number: usize) -> String {
    match number == MAX_LABELED as usize {
        true => OTHER.to_owned(),
        false => number.to_string(),
    }
}

impl WorkerHandles {
    fn new(registry: Registry<'_>, number: usize) -> Self {
        let label = label(number);
        let gradients = |outcome| registry.counter(&names::GRADIENTS, &[&label, outcome]);
        Self {
            applied: gradients("applied"),
            late: gradients("late"),
            refused: gradients("refused"),
            missed: gradients("missed"),
            examples: registry.counter(&names::EXAMPLES, &[&label]),
            parts: PARTS.map(|part| registry.gauge(&names::WORKER_STEP, &[&label, part])),
            means: None,
        }
    }
}

impl ServerHandles {
    fn new(registry: Registry<'_>, number: usize) -> Self {
        let label = label(number);
        let gauge = |metric| registry.gauge(metric, &[&label]);
        Self {
            version: gauge(&names::VERSION),
            weights: gauge(&names::WEIGHTS),
            staged: gauge(&names::STAGED),
            waiting: gauge(&names::WAITING),
        }
    }
}
