//! The observer that feeds the facade.

use std::fmt;
use std::sync::Arc;

use metrics::{Recorder, with_recorder};

use super::handles::{Ended, Handles, Registry};
use crate::observe::{Change, Controlled, Event, Observer, Tally};

/// Feeds the metrics of a training to a recorder of the crate `metrics`; see the [module](super).
pub struct Metrics {
    /// `None`: the recorder that the program has installed.
    recorder: Option<Arc<dyn Recorder + Send + Sync>>,
    handles: Option<Handles>,
    ended: Ended,
    tally: Tally,
    /// When the sums were told last, in seconds since the run started.
    told: f64,
}

/// How often the sums are told while nothing but steps happens, in seconds.
const TELL_EVERY: f64 = 0.5;

impl Metrics {
    /// Makes an observer that feeds the recorder that the program has installed. Install it before the training
    /// starts. Without a recorder the observer does nothing.
    #[must_use]
    pub fn new() -> Self {
        Self {
            recorder: None,
            handles: None,
            ended: Ended::default(),
            tally: Tally::default(),
            told: 0.0,
        }
    }

    /// Makes an observer that feeds this recorder, whatever the program has installed.
    ///
    /// ```
    /// use std::sync::Arc;
    ///
    /// use ps::metrics::Metrics;
    ///
    /// // Any recorder, such as the one of an exporter for another system.
    /// let recorder = metrics::NoopRecorder;
    /// let observer = Metrics::feeding(Arc::new(recorder));
    /// # drop(observer);
    /// ```
    #[must_use]
    pub fn feeding(recorder: Arc<dyn Recorder + Send + Sync>) -> Self {
        Self {
            recorder: Some(recorder),
            ..Self::new()
        }
    }

    /// Makes it one of several that feed the same recorder.
    pub(super) fn with_ended(self, ended: Ended) -> Self {
        Self { ended, ..self }
    }

    /// Does something with the recorder.
    fn with<T>(&mut self, work: impl FnOnce(&mut Self, Registry<'_>) -> T) -> T {
        match self.recorder.clone() {
            Some(recorder) => work(self, Registry(&*recorder)),
            None => with_recorder(|recorder| work(self, Registry(recorder))),
        }
    }

    fn feed(&mut self, registry: Registry<'_>, event: &Event) {
        if let Event::RunStarted(run) = event {
            registry.describe();
            self.ended.clear();
            let handles = Handles::new(registry, run);
            handles.running.set(1.0);
            handles.learning_rate.set(run.settings.learning_rate);
            // 0 would be a lie.
            handles.evaluation_loss.set(f64::NAN);
            handles.accuracy.set(f64::NAN);
            self.handles = Some(handles);
            self.sum_up();
            return;
        }
        // Nothing comes before the start.
        let Some(handles) = &mut self.handles else {
            return;
        };
        match event {
            Event::Step(step) => {
                handles.step(registry, step);
                // There are many of them.
                if self.tally.seconds < self.told + TELL_EVERY {
                    return;
                }
            }
            Event::StepsMissed(missed) => handles.missed(registry, missed.worker, missed.num_steps),
            Event::Evaluated(evaluated) => {
                handles.evaluation_loss.set(evaluated.loss);
                // A model that does not classify has none.
                handles.accuracy.set(evaluated.accuracy.unwrap_or(f64::NAN));
                handles.evaluation.record(evaluated.seconds);
            }
            Event::WorkerLost(_) => handles.worker_faults.increment(1),
            Event::WorkerMoved(_) => handles.moves.increment(1),
            Event::NodeLost(_) => handles.node_faults.increment(1),
            Event::CheckpointSaved(saved) => {
                handles.checkpoints_saved.increment(1);
                handles.checkpoint.record(saved.seconds);
            }
            Event::CheckpointFailed(_) => handles.checkpoints_failed.increment(1),
            Event::ServersLost(_) => handles.server_faults.increment(1),
            Event::ServersRecovered(recovered) => handles.recovery.record(recovered.seconds),
            Event::ServersSeen(seen) => {
                handles.learning_rate.set(seen.learning_rate);
                handles.awaited.set(seen.awaited.len() as f64);
                handles.pending.set(seen.num_pending as f64);
                handles.servers(registry, seen);
            }
            // Nobody looks at the servers of a driver's own loop.
            Event::Controlled(Controlled {
                change: Change::LearningRate { learning_rate },
                ..
            }) => handles.learning_rate.set(*learning_rate),
            Event::EventsSkipped(skipped) => handles.skipped.increment(skipped.num_events),
            Event::RunEnded(_) => {
                handles.running.set(0.0);
                self.ended.add(handles.ended());
            }
            _ => {}
        }
        self.sum_up();
    }

    /// Tells what the tally knows.
    fn sum_up(&mut self) {
        self.told = self.tally.seconds;
        let (Some(handles), tally) = (&self.handles, &self.tally) else {
            return;
        };
        let (done, planned) = tally.steps_done();
        handles.steps_done.set(done as f64);
        handles.steps_planned.set(planned as f64);
        handles.loss.set(tally.loss().unwrap_or(f64::NAN));
        let num_lost = tally.num_workers_lost();
        handles.workers_lost.set(num_lost as f64);
        handles.workers_live.set(tally.num_workers_live() as f64);
        handles.nodes.set(tally.nodes.len() as f64);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics")
            .field("has_own_recorder", &self.recorder.is_some())
            .field("tally", &self.tally)
            .finish_non_exhaustive()
    }
}

impl Observer for Metrics {
    fn observe(&mut self, event: &Event) {
        self.tally.count(event);
        self.with(|metrics, registry| metrics.feed(registry, event));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use ps_actors::cluster::NodeId;
    use ps_actors::ids::{Clock, Version, WorkerId};

    use super::super::{Exporter, MAX_LABELED, names};
    use super::*;
    use crate::observe::{
        CheckpointFailed, CheckpointSaved, Evaluated, EventsSkipped, NodeJoined, NodeLost,
        RunEnded, RunStarted, ServerSeen, ServersLost, ServersRecovered, ServersSeen, Settings,
        SettledStep, StepOutcome, StepsMissed, Versions, WorkerMoved, testing,
    };

    fn started(num_workers: usize) -> Event {
        Event::RunStarted(Box::new(RunStarted {
            time: 0.0,
            unix_time: 1000.0,
            settings: Settings {
                model: "a \"b\"\nc\\".to_owned(),
                num_workers,
                steps_per_worker: 10,
                learning_rate: 0.5,
                ..Settings::default()
            },
            versions: Versions::here(),
            first_version: Version(0),
        }))
    }

    fn step(worker: u32, clock: u64, time: f64, outcome: StepOutcome, norm: f64) -> Event {
        let Event::Step(step) = testing::step(worker, clock, time) else {
            unreachable!("it is a step");
        };
        Event::Step(SettledStep {
            outcome,
            norm,
            ..step
        })
    }

    fn seen(time: f64, num_servers: u64) -> Event {
        Event::ServersSeen(ServersSeen {
            time,
            learning_rate: 0.25,
            consistency: "asp".to_owned(),
            num_pending: 3,
            awaited: vec![WorkerId(1)],
            members: vec![WorkerId(0), WorkerId(1)],
            servers: (0..num_servers)
                .map(|number| ServerSeen {
                    node: NodeId::DRIVER,
                    version: Version(1100 - number),
                    num_weights: 10,
                    num_staged: 1,
                    num_waiting: 2,
                })
                .collect(),
            log: None,
        })
    }

    fn all_events() -> Vec<Event> {
        let (node, reason) = (NodeId::DRIVER, "test".to_owned());
        vec![
            started(2),
            Event::NodeJoined(NodeJoined {
                time: 0.0,
                node,
                host: "here".to_owned(),
                pid: 1,
            }),
            step(0, 0, 0.1, StepOutcome::Applied, 1.5),
            step(0, 1, 0.2, StepOutcome::Late, 1.0),
            step(1, 0, 0.3, StepOutcome::Refused, f64::NAN),
            Event::StepsMissed(StepsMissed {
                time: 0.4,
                worker: WorkerId(1),
                first: Clock(1),
                num_steps: 4,
            }),
            Event::Evaluated(Evaluated {
                time: 0.5,
                seconds: 0.25,
                version: Version(1),
                loss: 2.5,
                accuracy: Some(0.75),
                metrics: BTreeMap::new(),
                is_final: false,
            }),
            testing::worker_lost(0.6),
            Event::WorkerMoved(WorkerMoved {
                time: 0.7,
                worker: WorkerId(1),
                from: node,
                to: node,
            }),
            Event::CheckpointSaved(CheckpointSaved {
                time: 0.8,
                version: Version(1),
                path: String::new(),
                seconds: 0.02,
                bytes: 4000,
            }),
            Event::CheckpointFailed(CheckpointFailed {
                time: 0.8,
                reason: reason.clone(),
            }),
            Event::ServersLost(ServersLost { time: 0.9, reason }),
            Event::ServersRecovered(ServersRecovered {
                time: 1.0,
                version: Version(1),
                seconds: 0.1,
            }),
            seen(1.1, 2),
            Event::NodeLost(NodeLost { time: 1.2, node }),
            Event::EventsSkipped(EventsSkipped {
                time: 1.2,
                num_events: 7,
            }),
        ]
    }

    fn rendered(events: &[Event]) -> String {
        let exporter = Exporter::new();
        let mut observer = exporter.observer();
        events.iter().for_each(|event| observer.observe(event));
        exporter.render()
    }

    #[track_caller]
    fn has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(text.lines().any(|other| other == *line), "{line}\n{text}");
        }
    }

    #[test]
    fn each_event_is_counted() {
        let mut events = all_events();
        let text = rendered(&events);
        has(
            &text,
            &[
                "ps_running 1",
                "ps_run_start_time_seconds 1000",
                "ps_steps_planned 20",
                "ps_steps_done 7",
                r#"ps_run_info{name="",model="a \"b\"\nc\\",consistency="",optimizer="",device=""} 1"#,
                r#"ps_gradients_total{worker="0",outcome="applied"} 1"#,
                r#"ps_gradients_total{worker="0",outcome="late"} 1"#,
                r#"ps_gradients_total{worker="1",outcome="refused"} 1"#,
                r#"ps_gradients_total{worker="1",outcome="applied"} 0"#,
                r#"ps_gradients_total{worker="1",outcome="missed"} 4"#,
                r#"ps_examples_total{worker="0"} 20"#,
                r#"ps_staleness_updates_bucket{le="0"} 1"#,
                "ps_staleness_updates_count 1",
                "ps_gradient_norm_sum 2.5",
                r#"ps_step_seconds_bucket{part="compute",le="0.01"} 0"#,
                r#"ps_step_seconds_bucket{part="compute",le="0.025"} 3"#,
                r#"ps_step_seconds_count{part="waiting"} 3"#,
                r#"ps_worker_step_seconds{worker="0",part="wire"} 0.03"#,
                "ps_loss 2",
                "ps_evaluation_loss 2.5",
                "ps_evaluation_accuracy_ratio 0.75",
                "ps_evaluation_seconds_sum 0.25",
                "ps_learning_rate 0.25",
                r#"ps_workers{state="live"} 1"#,
                r#"ps_workers{state="lost"} 1"#,
                "ps_awaited_workers 1",
                "ps_nodes 0",
                "ps_pending_pushes 3",
                r#"ps_server_version{server="1"} 1099"#,
                r#"ps_server_weights_bytes{server="0"} 40"#,
                r#"ps_server_staged_gradients{server="0"} 1"#,
                r#"ps_server_waiting_calls{server="0"} 2"#,
                r#"ps_checkpoints_total{outcome="saved"} 1"#,
                r#"ps_checkpoints_total{outcome="failed"} 1"#,
                "ps_checkpoint_seconds_count 1",
                r#"ps_faults_total{kind="worker_lost"} 1"#,
                r#"ps_faults_total{kind="node_lost"} 1"#,
                r#"ps_faults_total{kind="servers_lost"} 1"#,
                "ps_worker_moves_total 1",
                "ps_recovery_seconds_count 1",
                "ps_events_skipped_total 7",
            ],
        );
        events.push(Event::RunEnded(Box::new(RunEnded::new(2.0, None))));
        has(&rendered(&events), &["ps_running 0"]);
    }

    #[test]
    fn a_training_takes_over_the_series_of_the_one_before() {
        let exporter = Exporter::new();
        let end = Event::RunEnded(Box::new(RunEnded::new(2.0, None)));
        let mut observer = exporter.observer();
        let events = all_events();
        events
            .iter()
            .chain([&end])
            .for_each(|event| observer.observe(event));
        let first =
            r#"ps_run_info{name="",model="a \"b\"\nc\\",consistency="",optimizer="",device=""}"#;
        // Its last numbers can be read after its end.
        let last = [
            format!("{first} 1"),
            r#"ps_worker_step_seconds{worker="1",part="wire"} 0.03"#.to_owned(),
            r#"ps_server_version{server="1"} 1099"#.to_owned(),
        ];
        has(&exporter.render(), &last.each_ref().map(String::as_str));

        let Event::RunStarted(mut second) = started(1) else {
            unreachable!("it is a start");
        };
        second.settings.name = "second".to_owned();
        let mut observer = exporter.observer();
        observer.observe(&Event::RunStarted(second));
        observer.observe(&step(0, 0, 0.1, StepOutcome::Applied, 1.0));
        observer.observe(&seen(0.2, 1));
        let text = exporter.render();
        has(
            &text,
            &[
                &format!("{first} 0"),
                r#"ps_worker_step_seconds{worker="0",part="wire"} 0.03"#,
                r#"ps_worker_step_seconds{worker="1",part="wire"} NaN"#,
                r#"ps_server_version{server="0"} 1100"#,
                r#"ps_server_version{server="1"} NaN"#,
            ],
        );
        let is_now = |line: &&str| line.starts_with("ps_run_info{") && line.ends_with(" 1");
        assert_eq!(text.lines().filter(is_now).count(), 1);
    }

    #[test]
    fn the_learning_rate_is_the_one_that_somebody_has_set() {
        let change = Change::LearningRate {
            learning_rate: 0.125,
        };
        let changed = Event::Controlled(Controlled { time: 1.0, change });
        has(
            &rendered(&[started(1), changed]),
            &["ps_learning_rate 0.125"],
        );
    }

    #[test]
    fn what_is_not_known_is_not_zero() {
        let text = rendered(&[started(1)]);
        has(
            &text,
            &[
                "ps_loss NaN",
                "ps_evaluation_loss NaN",
                "ps_evaluation_accuracy_ratio NaN",
                r#"ps_checkpoints_total{outcome="failed"} 0"#,
            ],
        );
    }

    #[test]
    fn all_metrics_of_the_table_are_there_with_their_words_and_no_others() {
        let text = rendered(&all_events());
        let of = |word| {
            let lines = text.lines().filter_map(move |line| line.strip_prefix(word));
            lines.map(str::to_owned).collect::<BTreeSet<String>>()
        };
        let types = names::ALL
            .iter()
            .map(|metric| format!("{} {}", metric.name, metric.kind.name()));
        assert_eq!(of("# TYPE "), types.collect());
        let helps = names::ALL
            .iter()
            .map(|metric| format!("{} {}", metric.name, metric.help));
        assert_eq!(of("# HELP "), helps.collect());
    }

    #[test]
    fn any_number_of_workers_and_servers_has_few_series() {
        let mut events = vec![started(1 << 16), seen(0.1, 1000)];
        let steps = |clock| {
            (0..1 << 16).map(move |worker| step(worker, clock, 1.0, StepOutcome::Applied, 1.0))
        };
        events.extend(steps(0));
        let once = rendered(&events);
        let num_rest = (1 << 16) - u64::from(MAX_LABELED);
        let applied =
            format!(r#"ps_gradients_total{{worker="other",outcome="applied"}} {num_rest}"#);
        has(&once, &[&applied]);
        // 936 servers of 10 weights, and the last of them is the oldest.
        has(
            &once,
            &[
                r#"ps_server_weights_bytes{server="other"} 37440"#,
                r#"ps_server_version{server="63"} 1037"#,
                r#"ps_server_version{server="other"} 101"#,
            ],
        );
        events.extend(steps(1));
        let num_lines = once.lines().count();
        assert_eq!(num_lines, rendered(&events).lines().count());
        assert!(num_lines < 1500, "{num_lines}");
    }

    #[test]
    fn a_recorder_of_the_program_gets_them_without_being_installed() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        let mut metrics = Metrics::feeding(Arc::new(recorder));
        all_events().iter().for_each(|event| metrics.observe(event));
        has(&handle.render(), &["ps_events_skipped_total 7"]);

        // The one that is installed, here only for this thread.
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        ::metrics::with_local_recorder(&recorder, || {
            let mut metrics = Metrics::new();
            all_events().iter().for_each(|event| metrics.observe(event));
        });
        has(&handle.render(), &["ps_events_skipped_total 7"]);
    }
}
