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
mod tests;
