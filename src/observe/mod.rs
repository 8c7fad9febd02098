//! What happens in a training, as a stream of events for programs that show or store it.
//!
//! An [`Observer`] gets every [`Event`]: each settled step of each worker, evaluations, workers and nodes that
//! come and go, checkpoints, servers that are lost and recovered, and the end. Progress displays, files of a
//! run, metrics and dashboards are observers.
//!
//! ```
//! use std::sync::mpsc;
//!
//! use ps::observe::Event;
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! let (sender, losses) = mpsc::channel();
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .workers(2)
//!     .iterations(5)
//!     .observe(move |event: &Event| {
//!         if let Event::Step(step) = event {
//!             let _ = sender.send((step.worker, step.clock, step.loss));
//!         }
//!     })
//!     .run()?;
//! assert_eq!(losses.iter().count(), 2 * 5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How it works
//! Workers keep records of their latest steps, and the driver fetches them four times per second. So no
//! message is sent per step. Workers that nobody observes record nothing. Servers and the data path know
//! nothing of it, except that a server says in its answer to a push how long it held the push. If an observer
//! [follows each gradient](Observer::follows_gradients), the servers that follow the first one keep records of their parts
//! of it, too, and the driver fetches them in the same way.
//!
//! # What is promised
//! - Of each worker, the steps come in the order of their clocks, and each settled step comes exactly once: as a
//!   [`SettledStep`], or as one of [`StepsMissed`] if only the servers still know of it. Events of different workers and
//!   kinds come in the order in which the driver learns of them, so their [times](Event::time) may go back
//!   by up to a second. A [`PartApplied`] waits for its step, so its time may go back further if the worker is slow or
//!   stopped. If the servers are lost, the steps since the last checkpoint come again, after [`ServersRecovered`].
//! - [`RunStarted`] comes first, and [`RunEnded`] last, even if the training fails.
//! - Each observer has a thread and a queue of its own. One that is slow delays neither the training nor other
//!   observers. If its queue is full, it does not get some of the steps, or of the events that follow each gradient, and
//!   gets [`EventsSkipped`]. At the end, the training waits up to 10 s until the observers have handled all events and are
//!   dropped.
//! - An observer that panics gets no more events, which is logged. The training goes on.
//!
//! | file | what it holds |
//! |---|---|
//! | `event`, `summary` | the events; pure data |
//! | `tally` | counts events: per worker and in all; who is slow, and why; pure |
//! | `queue`, `observers` | a thread and a queue for each observer |
//! | `collector`, `parts` | fetch the records of the workers, and those of the servers |
//! | `latest` | a bounded memory of gradients, for a trace |
//! | `telling` | what is told of evaluations and checkpoints |
//! | `visitors` | workers that come by themselves, over HTTP |

mod collector;
mod event;
#[cfg(any(feature = "otel", feature = "trace"))]
mod latest;
mod number;
mod observers;
mod parts;
mod queue;
mod summary;
mod tally;
mod telling;
mod visitors;

pub(crate) use collector::Collector;
#[cfg(test)]
pub(crate) use event::testing;
pub use event::{
    Change, CheckpointFailed, CheckpointSaved, Computed, Controlled, Evaluated, Evaluating, Event,
    EventsSkipped, NodeJoined, NodeLost, PartApplied, RunStarted, ServerSeen, ServersLost,
    ServersRecovered, ServersSeen, Settings, SettledStep, StepOutcome, StepTimes, StepsMissed,
    StepsThinned, UpdateMade, Versions, WorkerJoined, WorkerLeft, WorkerLost, WorkerMoved,
};
#[cfg(any(feature = "otel", feature = "trace"))]
pub(crate) use latest::Latest;
pub use observers::{LoopCall, Observers};
pub use summary::{EvaluationSummary, RunEnded, RunSummary};
pub use tally::{Cause, Straggler, Tally, WorkerTally};
pub use visitors::Visitors;

/// Gets the events of a training. Every closure that takes an [`Event`] is an observer.
///
/// It runs on a thread of its own; see the [module](self) for what that means. It is dropped after the last
/// event, before [`Trainer::run`](crate::Trainer::run) returns.
///
/// ```
/// use ps::observe::{Event, Observer};
///
/// #[derive(Default)]
/// struct CountSteps(u64);
///
/// impl Observer for CountSteps {
///     fn observe(&mut self, event: &Event) {
///         self.0 += u64::from(matches!(event, Event::Step(_)));
///     }
/// }
///
/// let observers: Vec<Box<dyn Observer>> =
///     vec![Box::new(CountSteps::default()), Box::new(|event: &Event| println!("{event:?}"))];
/// # drop(observers);
/// ```
pub trait Observer: Send + 'static {
    /// Handles one event.
    fn observe(&mut self, event: &Event);

    /// Whether it also gets the events that follow each gradient: [`PartApplied`], [`Computed`] and [`UpdateMade`]. As
    /// long as no observer does, servers record nothing for them. It is asked once, before the first event.
    ///
    /// By default it does not, so that whoever counts or stores events gets few per step.
    fn follows_gradients(&self) -> bool {
        false
    }
}

impl<F: FnMut(&Event) + Send + 'static> Observer for F {
    fn observe(&mut self, event: &Event) {
        self(event);
    }
}
