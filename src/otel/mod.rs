//! A training as OpenTelemetry traces, for Jaeger, Tempo and others.
//!
//! [`OpenTelemetry`] is an observer. It sends spans to a collector over OTLP: HTTP with JSON, port 4318 by default.
//!
//! ```no_run
//! use ps::otel::OpenTelemetry;
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .workers(2)
//!     .observe(OpenTelemetry::new("http://127.0.0.1:4318".parse()?))
//!     .run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The spans
//! | span | what it is |
//! |---|---|
//! | `training` | the whole run, with its settings, and its faults and changes as events; sent at the end |
//! | `step` | one step of a worker, with its worker, clock, versions, staleness, loss and outcome; it has the parts below |
//! | `batch`, `compute`, `send`, `servers`, `receive` | the parts of a step. The times for sending and for receiving are not measured separately, so each part has half of their sum |
//! | `part` | one of the servers that follow the first one (`ps.server`) has its part of the gradient: from its arrival until it has made its part of the update. Its position is as exact as in the traces of `ps::trace`; it may end after the step |
//! | `evaluation`, `checkpoint` | what the driver does meanwhile |
//!
//! Each step is a trace of its own, so it can be found by its duration. The trace ids of a run begin with the same 16
//! digits.
//!
//! # Bounds
//! Of each second, 100 steps have spans: the first ones of each worker, as many of one as of the other, and at least
//! one. `training` says how many steps have none (`ps.steps_left_out`). It also says for
//! how many events this observer was too slow (`ps.events_skipped`): steps, and what the servers and the loop told of their
//! gradients. A step of a driver's own loop has the parts `compute` and `servers`, which are the loop's
//! [calls](crate::observe::LoopCall); one whose loop tells of no calls has no spans, because nobody knows when it began.
//! Spans are sent when there are 500, or after a second. If the collector cannot be reached or refuses them, they are dropped, the log says so once, and it is tried again
//! every 10 s; the training goes on. TLS is not supported: run a collector on the same host.
//!
//! | file | what it holds |
//! |---|---|
//! | `spans` | makes spans of events; pure |
//! | `send` | sends them |
//! | `mod` | the observer |

mod send;
mod spans;

use std::time::{Duration, Instant};

use ps_actors::actor::error_chain;
use serde_json::Value;

pub use self::send::{Endpoint, EndpointError};
use self::spans::{Spans, request};
use crate::observe::{Event, Observer};

/// How many spans are sent at once.
const BATCH: usize = 500;

/// How long spans wait for others.
const SEND_AFTER: Duration = Duration::from_secs(1);

/// The pause after a failure.
const PAUSE: Duration = Duration::from_secs(10);

/// Sends a training as traces to a collector; see the [module](self).
#[derive(Debug)]
pub struct OpenTelemetry {
    endpoint: Endpoint,
    spans: Spans,
    waiting: Vec<Value>,
    sent: Instant,
    paused_until: Option<Instant>,
    num_lost: usize,
}

impl OpenTelemetry {
    /// Makes an observer that sends spans to this collector. Nothing is sent before the training begins.
    #[must_use]
    pub fn new(endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            spans: Spans::default(),
            waiting: Vec::new(),
            sent: Instant::now(),
            paused_until: None,
            num_lost: 0,
        }
    }

    fn send(&mut self) {
        let spans = std::mem::take(&mut self.waiting);
        self.sent = Instant::now();
        if spans.is_empty() {
            return;
        }
        if self
            .paused_until
            .is_some_and(|until| Instant::now() < until)
        {
            self.num_lost += spans.len();
            return;
        }
        if let Err(error) = self.endpoint.post(request(&spans).to_string().into_bytes()) {
            if self.num_lost == 0 {
                tracing::warn!(
                    endpoint = %self.endpoint, error = error_chain(&error),
                    "spans cannot be sent; the training goes on without them"
                );
            }
            self.num_lost += spans.len();
            self.paused_until = Some(Instant::now() + PAUSE);
        }
    }
}

impl Observer for OpenTelemetry {
    fn follows_gradients(&self) -> bool {
        true
    }

    fn observe(&mut self, event: &Event) {
        self.waiting.extend(self.spans.of(event));
        let is_over = matches!(event, Event::RunEnded(_));
        if is_over || self.waiting.len() >= BATCH || self.sent.elapsed() >= SEND_AFTER {
            self.send();
        }
        if is_over && self.num_lost > 0 {
            let num_lost = std::mem::take(&mut self.num_lost);
            tracing::warn!(endpoint = %self.endpoint, num_lost, "spans were not sent");
        }
    }
}
