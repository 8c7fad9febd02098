//! Events as spans, in the JSON encoding of OTLP.
//!
//! The format: <https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding>. Ids are hexadecimal, 64-bit numbers are texts,
//! and times are nanoseconds since 1970.

use std::collections::BTreeMap;

use ps_actors::ids::{GradientId, WorkerId};
use serde_json::{Value, json};

use crate::observe::{
    Computed, Event, Latest, PartApplied, RunEnded, RunStarted, SettledStep, StepOutcome,
    StepTimes, UpdateMade,
};

/// How many steps of all workers get spans per second. A step has six, and one more for each further server. Each worker has
/// the same share, and at least one.
const MAX_STEPS_PER_SECOND: u32 = 100;

/// How many gradients are remembered, for the spans of their parts.
const MAX_GRADIENTS: usize = 1 << 12;

/// How many faults and changes the span of the training has: as many as the SDKs of OpenTelemetry allow.
const MAX_EVENTS: usize = 128;

/// What is known of a training so far.
#[derive(Debug)]
pub(super) struct Spans {
    /// The first half of all trace ids of this run.
    run: u64,
    /// When the run started, in nanoseconds since 1970.
    started: u64,
    /// The number of the latest span.
    latest: u64,
    /// The settings, as attributes.
    settings: Vec<Value>,
    /// Faults and changes.
    events: Vec<Value>,
    num_events_left_out: usize,
    num_workers: usize,
    num_servers: usize,
    /// The latest second of each worker, and how many steps of it have spans.
    seconds: BTreeMap<WorkerId, (u64, u32)>,
    /// How many steps have no spans.
    num_steps_left_out: u64,
    /// How many events did not come, because this observer was too slow.
    num_events_skipped: u64,
    /// The steps that have spans.
    steps: Latest<GradientId, Followed>,
    /// Gradients that a driver's own loop has got, and its latest update.
    computed: Latest<GradientId, Computed>,
    update: Option<UpdateMade>,
}

/// A step, for the spans of its gradient's parts.
#[derive(Clone, Copy, Debug)]
struct Followed {
    /// The span of the step.
    id: u64,
    /// When the gradient was sent. When it was asked for, if a driver's own loop did.
    sent: f64,
    /// How many more spans of other servers it may have.
    num_left: usize,
}

impl Default for Spans {
    fn default() -> Self {
        Self {
            run: 0,
            started: 0,
            latest: 0,
            settings: Vec::new(),
            events: Vec::new(),
            num_events_left_out: 0,
            num_workers: 0,
            num_servers: 0,
            seconds: BTreeMap::new(),
            num_steps_left_out: 0,
            num_events_skipped: 0,
            steps: Latest::new(MAX_GRADIENTS),
            computed: Latest::new(MAX_GRADIENTS),
            update: None,
        }
    }
}

/// A part of a training: what it is, and when it began and how long it took, in seconds.
struct Part<'a> {
    name: &'a str,
    from: f64,
    seconds: f64,
    attributes: Vec<Value>,
}

/// The finalizer of SplitMix64: runs that began soon after each other get ids that look nothing alike.
const fn mixed(mut number: u64) -> u64 {
    number = (number ^ (number >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    number ^ (number >> 31)
}

fn text(key: &str, value: impl Into<String>) -> Value {
    json!({"key": key, "value": {"stringValue": value.into()}})
}

fn whole(key: &str, value: u64) -> Value {
    json!({"key": key, "value": {"intValue": value.to_string()}})
}

fn number(key: &str, value: f64) -> Value {
    let value = match value.is_finite() {
        true => json!(value),
        // As the JSON of Protobuf writes them.
        false if value.is_nan() => json!("NaN"),
        false if value > 0.0 => json!("Infinity"),
        false => json!("-Infinity"),
    };
    json!({"key": key, "value": {"doubleValue": value}})
}

impl Spans {
    /// Returns the spans of an event.
    pub(super) fn of(&mut self, event: &Event) -> Vec<Value> {
        match event {
            Event::RunStarted(started) => {
                self.begin(started);
                Vec::new()
            }
            Event::Step(step) => self.step(step),
            Event::PartApplied(part) => self.part(part),
            Event::Computed(computed) => {
                self.computed.insert(computed.gradient(), computed.clone());
                Vec::new()
            }
            Event::UpdateMade(made) => {
                self.update = Some(made.clone());
                Vec::new()
            }
            Event::StepsMissed(missed) => self.leave_out(missed.num_steps),
            // Steps, and what is about their gradients: nobody knows how many of each.
            Event::EventsSkipped(skipped) => {
                let num_all = self.num_events_skipped.saturating_add(skipped.num_events);
                self.num_events_skipped = num_all;
                Vec::new()
            }
            Event::Evaluated(evaluated) => {
                let mut attributes = vec![
                    whole("ps.version", evaluated.version.0),
                    number("ps.loss", evaluated.loss),
                ];
                attributes.extend(evaluated.accuracy.map(|part| number("ps.accuracy", part)));
                self.alone(Part {
                    name: "evaluation",
                    from: evaluated.time,
                    seconds: evaluated.seconds,
                    attributes,
                })
            }
            Event::CheckpointSaved(saved) => self.alone(Part {
                name: "checkpoint",
                from: saved.time - saved.seconds,
                seconds: saved.seconds,
                attributes: vec![
                    whole("ps.version", saved.version.0),
                    text("ps.path", &*saved.path),
                ],
            }),
            Event::WorkerLost(_)
            | Event::NodeLost(_)
            | Event::ServersLost(_)
            | Event::ServersRecovered(_)
            | Event::CheckpointFailed(_)
            | Event::Controlled(_) => {
                if let Event::ServersLost(_) = event {
                    // Steps since the checkpoint come again.
                    self.steps = Latest::new(MAX_GRADIENTS);
                }
                self.remember(event);
                Vec::new()
            }
            Event::RunEnded(ended) => self.end(ended),
            _ => Vec::new(),
        }
    }

    fn begin(&mut self, started: &RunStarted) {
        let settings = &started.settings;
        let nanos = (started.unix_time.max(0.0) * 1e9) as u64;
        *self = Self {
            // An id of zeros would be none.
            run: mixed(nanos ^ u64::from(std::process::id()).rotate_left(48)) | 1,
            started: nanos,
            settings: vec![
                text("ps.model", &*settings.model),
                text("ps.consistency", &*settings.consistency),
                text("ps.optimizer", &*settings.optimizer),
                whole("ps.workers", settings.num_workers as u64),
                whole("ps.servers", settings.num_servers as u64),
                whole("ps.batch_size", settings.batch_size as u64),
                number("ps.learning_rate", settings.learning_rate),
            ],
            num_workers: settings.num_workers,
            num_servers: settings.num_servers,
            ..Self::default()
        };
    }

    /// Returns a time, which is in seconds since the run started, in nanoseconds since 1970.
    fn at(&self, seconds: f64) -> String {
        let nanos = (seconds.max(0.0) * 1e9).round() as u64;
        self.started.saturating_add(nanos).to_string()
    }

    /// Makes a span. `of` are the ids of its trace and of the span that it is a part of.
    fn span(&mut self, part: Part<'_>, of: Option<(u64, u64)>) -> (u64, Value) {
        self.latest += 1;
        let id = self.latest;
        let (trace, parent) = of.unwrap_or((id, 0));
        let mut span = json!({
            "traceId": format!("{:016x}{trace:016x}", self.run),
            "spanId": format!("{id:016x}"),
            "name": part.name,
            "kind": 1,
            "startTimeUnixNano": self.at(part.from),
            "endTimeUnixNano": self.at(part.from + part.seconds.max(0.0)),
            "attributes": part.attributes,
        });
        if parent != 0 {
            span["parentSpanId"] = json!(format!("{parent:016x}"));
        }
        (id, span)
    }

    fn alone(&mut self, part: Part<'_>) -> Vec<Value> {
        vec![self.span(part, None).1]
    }

    fn leave_out(&mut self, num_steps: u64) -> Vec<Value> {
        self.num_steps_left_out = self.num_steps_left_out.saturating_add(num_steps);
        Vec::new()
    }

    /// Whether the step gets spans. Of each second, the first ones of each worker do.
    fn takes(&mut self, step: &SettledStep) -> bool {
        let second = step.time.max(0.0) as u64;
        // More workers may have come by themselves than there were to be.
        let num_workers = self.num_workers.max(self.seconds.len()).max(1);
        let share = MAX_STEPS_PER_SECOND / u32::try_from(num_workers).unwrap_or(u32::MAX);
        let latest = self.seconds.entry(step.worker).or_default();
        if second > latest.0 {
            *latest = (second, 0);
        }
        let takes = latest.1 < share.max(1);
        latest.1 += u32::from(takes);
        takes
    }

    fn step(&mut self, step: &SettledStep) -> Vec<Value> {
        let Some(times) = step.times else {
            return self.step_of_loop(step);
        };
        if !self.takes(step) {
            return self.leave_out(1);
        }
        let StepTimes {
            data,
            compute,
            wire,
            waiting,
            apply,
        } = times;
        let began = step.time - times.total();
        let (id, whole_step) = self.whole_step(step, (began, began + data + compute));
        let mut spans = vec![whole_step];
        let mut from = began;
        for (name, seconds, attributes) in [
            ("batch", data, Vec::new()),
            ("compute", compute, Vec::new()),
            // Nobody measures the two ways one by one.
            ("send", wire / 2.0, Vec::new()),
            (
                "servers",
                waiting + apply,
                vec![number("ps.apply_seconds", apply)],
            ),
            ("receive", wire / 2.0, Vec::new()),
        ] {
            let part = Part {
                name,
                from,
                seconds,
                attributes,
            };
            spans.push(self.span(part, Some((id, id))).1);
            from += seconds;
        }
        spans
    }

    /// Makes the span of a step, of which others are parts. It says when the step began and its gradient was sent.
    fn whole_step(&mut self, step: &SettledStep, (began, sent): (f64, f64)) -> (u64, Value) {
        let outcome = match step.outcome {
            StepOutcome::Applied => "applied",
            StepOutcome::Late => "late",
            StepOutcome::Refused => "refused",
        };
        let (id, span) = self.span(
            Part {
                name: "step",
                from: began,
                seconds: step.time - began,
                attributes: vec![
                    whole("ps.worker", step.worker.0.into()),
                    whole("ps.incarnation", step.incarnation.0),
                    whole("ps.clock", step.clock.0),
                    whole("ps.computed_on", step.computed_on.0),
                    whole("ps.version", step.version.0),
                    whole("ps.staleness", step.staleness),
                    whole("ps.examples", step.num_examples),
                    text("ps.outcome", outcome),
                    number("ps.loss", step.loss.into()),
                    number("ps.norm", step.norm),
                ],
            },
            None,
        );
        let followed = Followed {
            id,
            sent,
            num_left: self.num_servers.saturating_sub(1),
        };
        self.steps.insert(step.gradient(), followed);
        (id, span)
    }

    /// A step of a driver's own loop consists of two calls, if the loop has told of them.
    fn step_of_loop(&mut self, step: &SettledStep) -> Vec<Value> {
        let made = self.update.clone();
        let made = made.filter(|made| made.version == step.version);
        let computed = self.computed.get(&step.gradient()).cloned();
        let (Some(made), Some(computed)) = (made, computed) else {
            return self.leave_out(1);
        };
        if !self.takes(step) {
            return self.leave_out(1);
        }
        let began = computed.time - computed.seconds;
        let (id, whole_step) = self.whole_step(step, (began, began));
        let mut spans = vec![whole_step];
        for (name, time, seconds) in [
            ("compute", computed.time, computed.seconds),
            ("servers", made.time, made.seconds),
        ] {
            let part = Part {
                name,
                from: time - seconds,
                seconds,
                attributes: Vec::new(),
            };
            spans.push(self.span(part, Some((id, id))).1);
        }
        spans
    }

    /// Another server has applied its part of a gradient.
    fn part(&mut self, part: &PartApplied) -> Vec<Value> {
        // Its step has no spans either, or has come too long ago. Or a server says the same again.
        let known = self.steps.get(&part.gradient()).copied();
        let Some(step) = known.filter(|step| step.num_left > 0) else {
            return Vec::new();
        };
        let num_left = step.num_left - 1;
        self.steps
            .insert(part.gradient(), Followed { num_left, ..step });
        let seconds = part.held + part.took;
        let span = Part {
            name: "part",
            // It cannot have come before it was sent, as in `trace`.
            from: (part.time - seconds).max(step.sent),
            seconds,
            attributes: vec![
                whole("ps.server", part.server as u64),
                text("ps.node", part.node.to_string()),
                whole("ps.version", part.version.0),
                number("ps.apply_seconds", part.took),
            ],
        };
        vec![self.span(span, Some((step.id, step.id))).1]
    }

    /// Keeps a fault or a change for the span of the training.
    fn remember(&mut self, event: &Event) {
        if self.events.len() == MAX_EVENTS {
            self.num_events_left_out += 1;
            return;
        }
        let fields = serde_json::to_value(event).unwrap_or_default();
        let name = fields["event"].as_str().unwrap_or("event").to_owned();
        let time = self.at(event.time());
        let about = text("ps.event", fields.to_string());
        self.events
            .push(json!({"timeUnixNano": time, "name": name, "attributes": [about]}));
    }

    fn end(&mut self, ended: &RunEnded) -> Vec<Value> {
        let mut attributes = std::mem::take(&mut self.settings);
        attributes.push(whole("ps.steps_left_out", self.num_steps_left_out));
        attributes.push(whole("ps.events_skipped", self.num_events_skipped));
        let part = Part {
            name: "training",
            from: 0.0,
            seconds: ended.time,
            attributes,
        };
        let (_, mut span) = self.span(part, None);
        span["events"] = json!(std::mem::take(&mut self.events));
        span["droppedEventsCount"] = json!(self.num_events_left_out);
        if let Some(error) = &ended.error {
            span["status"] = json!({"code": 2, "message": error});
        }
        vec![span]
    }
}

/// Returns a request with these spans.
pub(super) fn request(spans: &[Value]) -> Value {
    let version = env!("CARGO_PKG_VERSION");
    json!({"resourceSpans": [{
        "resource": {"attributes": [
            text("service.name", "ps"),
            text("service.version", version),
            whole("process.pid", std::process::id().into()),
        ]},
        "scopeSpans": [{"scope": {"name": "ps", "version": version}, "spans": spans}],
    }]})
}

#[cfg(test)]
mod tests {
    use ps_actors::ids::Clock;

    use super::*;
    use crate::observe::{EventsSkipped, Settings, StepsMissed, testing};

    fn begun() -> Spans {
        let mut spans = Spans::default();
        spans.of(&Event::RunStarted(Box::new(testing::started(
            1_700_000_000.25,
            Settings::default(),
        ))));
        spans
    }

    /// A whole number among the attributes of a span.
    fn attribute<'a>(span: &'a Value, key: &str) -> &'a Value {
        let mut attributes = span["attributes"].as_array().unwrap().iter();
        let found = attributes.find(|attribute| attribute["key"] == key);
        &found.unwrap()["value"]["intValue"]
    }

    fn nanos(span: &Value, key: &str) -> u64 {
        span[key].as_str().unwrap().parse().unwrap()
    }

    #[test]
    fn the_parts_of_a_step_follow_one_another_within_it() {
        let mut spans = begun();
        // 0.11 s: data 0.01, compute 0.02, wire 0.03, waiting 0.04, apply 0.01.
        let step = spans.of(&testing::step(3, 7, 2.0));
        let names: Vec<&str> = step
            .iter()
            .map(|span| span["name"].as_str().unwrap())
            .collect();
        assert_eq!(
            names,
            ["step", "batch", "compute", "send", "servers", "receive"]
        );
        let (root, parts) = step.split_first().unwrap();
        let end = nanos(root, "endTimeUnixNano");
        // The start of the run is an `f64`, which has steps of 256 ns there. It is the same for all spans.
        assert!(end.abs_diff(1_700_000_002_250_000_000) <= 256, "{root}");
        assert!(nanos(root, "startTimeUnixNano").abs_diff(end - 110_000_000) <= 2);
        assert!(root["parentSpanId"].is_null());
        let mut at = nanos(root, "startTimeUnixNano");
        for (part, millis) in parts.iter().zip([10, 20, 15, 50, 15]) {
            assert_eq!(part["traceId"], root["traceId"]);
            assert_eq!(part["parentSpanId"], root["spanId"]);
            assert!(nanos(part, "startTimeUnixNano").abs_diff(at) <= 2, "{part}");
            at += millis * 1_000_000;
            assert!(nanos(part, "endTimeUnixNano").abs_diff(at) <= 2, "{part}");
        }
        let worker = &root["attributes"][0];
        assert_eq!(worker["key"], "ps.worker");
        assert_eq!(worker["value"]["intValue"], "3");
    }

    #[test]
    fn the_parts_of_other_servers_belong_to_the_step_of_their_gradient() {
        let mut spans = Spans::default();
        let settings = Settings {
            num_servers: 3,
            ..Settings::default()
        };
        let started = testing::started(1_700_000_000.25, settings);
        spans.of(&Event::RunStarted(Box::new(started)));
        let Event::Step(step) = testing::step(3, 7, 2.0) else {
            panic!("a step");
        };
        let applied_at = |time| {
            Event::PartApplied(PartApplied {
                time,
                server: 1,
                node: ps_actors::cluster::NodeId::DRIVER,
                worker: step.worker,
                incarnation: step.incarnation,
                clock: step.clock,
                version: step.version,
                held: 0.02,
                took: 0.01,
            })
        };
        let part = applied_at(1.99);
        assert!(spans.of(&part).is_empty(), "its step is not known");
        let told = Event::Step(step.clone());
        let root = spans.of(&told)[0].clone();
        // There are two other servers. Whoever says more has made it up.
        let [one, _] = [spans.of(&part), spans.of(&part)].map(|mut of_one| of_one.remove(0));
        assert!(spans.of(&part).is_empty());
        assert_eq!(one["name"], "part");
        assert_eq!(one["traceId"], root["traceId"]);
        assert_eq!(one["parentSpanId"], root["spanId"]);
        let end = nanos(&root, "endTimeUnixNano");
        for (key, millis) in [("startTimeUnixNano", 40), ("endTimeUnixNano", 10)] {
            assert!(
                nanos(&one, key).abs_diff(end - millis * 1_000_000) <= 2,
                "{one}"
            );
        }
        // A part that seems to have come before it was sent is moved. The step sent it at 1.92.
        spans.of(&told);
        let moved = spans.of(&applied_at(1.9)).remove(0);
        for (key, millis) in [("startTimeUnixNano", 80), ("endTimeUnixNano", 50)] {
            assert!(
                nanos(&moved, key).abs_diff(end - millis * 1_000_000) <= 2,
                "{moved}"
            );
        }
        // After a recovery, its gradient would be another one.
        let lost = crate::observe::ServersLost {
            time: 3.0,
            reason: "test".to_owned(),
        };
        spans.of(&Event::ServersLost(lost));
        assert!(spans.of(&part).is_empty());
    }

    #[test]
    fn a_step_of_a_drivers_own_loop_consists_of_its_calls() {
        let mut spans = begun();
        let Event::Step(mut step) = testing::step(3, 7, 2.0) else {
            panic!("a step");
        };
        step.times = None;
        let told = Event::Step(step.clone());
        assert!(spans.of(&told).is_empty(), "the loop tells of no calls");
        let calls = [
            Event::Computed(Computed {
                time: 1.75,
                seconds: 0.5,
                worker: step.worker,
                incarnation: step.incarnation,
                clock: step.clock,
                computed_on: step.computed_on,
            }),
            Event::UpdateMade(UpdateMade {
                time: 2.0,
                seconds: 0.125,
                version: step.version,
                num_gradients: 1,
            }),
        ];
        assert!(calls.iter().all(|call| spans.of(call).is_empty()));
        let of_step = spans.of(&told);
        let end = nanos(&of_step[0], "endTimeUnixNano");
        for (span, (name, from, to)) in
            of_step
                .iter()
                .zip([("step", 750, 0), ("compute", 750, 250), ("servers", 125, 0)])
        {
            assert_eq!(span["name"], name);
            for (key, millis) in [("startTimeUnixNano", from), ("endTimeUnixNano", to)] {
                assert!(
                    nanos(span, key).abs_diff(end - millis * 1_000_000) <= 2,
                    "{span}"
                );
            }
        }
        assert_eq!(of_step.len(), 3);
    }

    #[test]
    fn ids_are_as_long_as_they_must_be_and_no_two_are_the_same() {
        let mut spans = begun();
        let all: Vec<Value> = (0..50)
            .flat_map(|clock| spans.of(&testing::step(0, clock, 1.0)))
            .collect();
        let ids = |key: &str, len: usize| {
            let ids = all
                .iter()
                .map(|span| span[key].as_str().unwrap().to_owned());
            let ids: std::collections::BTreeSet<String> = ids.collect();
            let is_id = |id: &String| {
                id.len() == len
                    && id.bytes().all(|b| b.is_ascii_hexdigit())
                    && id.bytes().any(|b| b != b'0')
            };
            assert!(ids.iter().all(is_id), "{ids:?}");
            ids.len()
        };
        assert_eq!((ids("spanId", 16), ids("traceId", 32)), (300, 50));
    }

    #[test]
    fn so_many_steps_of_each_second_have_spans() {
        let mut spans = begun();
        let mut num_spans = 0;
        for clock in 0..1000 {
            num_spans += spans
                .of(&testing::step(0, clock, 1.0 + clock as f64 / 500.0))
                .len();
        }
        assert_eq!(num_spans, 6 * 2 * MAX_STEPS_PER_SECOND as usize);
        for _ in 0..MAX_EVENTS + 3 {
            assert!(spans.of(&testing::worker_lost(3.0)).is_empty());
        }
        let error = Some("it failed".to_owned());
        let end = spans.of(&Event::RunEnded(Box::new(RunEnded::new(3.5, error))));
        let [end] = &end[..] else { panic!("{end:?}") };
        assert_eq!(attribute(end, "ps.steps_left_out"), "800");
        assert_eq!(end["events"].as_array().unwrap().len(), MAX_EVENTS);
        assert_eq!(end["events"][0]["name"], "worker_lost");
        assert_eq!(
            (&end["droppedEventsCount"], &end["status"]["code"]),
            (&json!(3), &json!(2))
        );
    }

    #[test]
    fn each_worker_has_its_share_of_the_spans_and_all_steps_without_any_are_counted() {
        let settings = Settings {
            num_workers: 4,
            ..Settings::default()
        };
        let mut spans = Spans::default();
        spans.of(&Event::RunStarted(Box::new(testing::started(
            1_700_000_000.0,
            settings,
        ))));
        let mut num_steps = |worker, num: u64, time| {
            let steps = (0..num).map(|clock| spans.of(&testing::step(worker, clock, time)));
            steps.filter(|spans| !spans.is_empty()).count()
        };
        // The driver learns of many steps of one worker at once.
        assert_eq!(num_steps(0, 300, 1.5), 25);
        assert_eq!(num_steps(1, 20, 1.2), 20);
        assert_eq!(num_steps(0, 1, 2.0), 1);
        // There are more workers than there were to be: each has at least one.
        for worker in 2..500 {
            assert!((1..=25).contains(&num_steps(worker, 30, 3.0)));
        }
        assert_eq!(num_steps(500, 30, 3.0), 1);

        let mut spans = begun();
        let Event::Step(step) = testing::step(0, 0, 1.0) else {
            unreachable!("it is a step");
        };
        let untimed = Event::Step(SettledStep {
            times: None,
            ..step
        });
        let missed = Event::StepsMissed(StepsMissed {
            time: 1.0,
            worker: WorkerId(0),
            first: Clock(1),
            num_steps: 10,
        });
        let skipped = Event::EventsSkipped(EventsSkipped {
            time: 1.0,
            num_events: 100,
        });
        for event in [untimed, missed, skipped] {
            assert!(spans.of(&event).is_empty());
        }
        let end = spans.of(&Event::RunEnded(Box::new(RunEnded::new(2.0, None))));
        assert_eq!(attribute(&end[0], "ps.steps_left_out"), "11");
        assert_eq!(attribute(&end[0], "ps.events_skipped"), "100");
    }

    #[test]
    fn numbers_that_are_not_finite_are_texts() {
        for (value, expected) in [
            (0.5, json!(0.5)),
            (f64::NAN, json!("NaN")),
            (f64::INFINITY, json!("Infinity")),
            (f64::NEG_INFINITY, json!("-Infinity")),
        ] {
            assert_eq!(number("x", value)["value"]["doubleValue"], expected);
        }
    }
}
