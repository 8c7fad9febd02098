//! Plans of faults: what is killed, stopped, lost, doubled and delayed in a run, and when.
//!
//! A [`Plan`] is written as text. The clauses are separated by `;`:
//!
//! | clause | meaning |
//! |---|---|
//! | `kill worker 2 @ step 40` | worker 2 is killed when it takes its step 40, and started again |
//! | `stop worker 1 for 3s @ step 10` | worker 1 does nothing for 3 s from its step 10 on |
//! | `kill server 1 @ version 100` | server 1 is killed when the weights have version 100 |
//! | `stop server 0 for 500ms @ version 7` | server 0 does nothing for 0.5 s from version 7 on |
//! | `lose power @ version 30` | all processes end, and the disk keeps only what was synced |
//! | `damage checkpoint @ version 30` | the newest checkpoint cannot be read from then on |
//! | `drop 5%` | 5 % of the messages are lost |
//! | `dup 2%` | 2 % of the messages arrive twice |
//! | `delay 20..80ms` | each message takes 20 to 80 ms |
//! | `seed 7` | the seed of everything that is random |
//!
//! Steps are clocks, so they count from 0. Durations have the units `us`, `ms`, `s` and `min`.
//!
//! Two executors follow a plan and give a [`Report`]: the simulator (`ps_actors::simulation`, with the feature
//! `simulation`), and real processes (the option `--chaos` of the examples; see `ps::chaos`). Real processes cannot do
//! `lose power`, and their messages travel on reliable streams. So `drop` cuts a connection, and `dup` makes a call
//! twice; see `network` (feature `chaos`). In real processes, the seed decides only the random choices, because the
//! order of events depends on time.

use std::fmt;
use std::time::Duration;

use crate::ids::{Clock, WorkerId};

#[cfg(feature = "chaos")]
pub mod network;
mod parse;
#[cfg(feature = "chaos")]
pub mod points;
mod report;
#[cfg(test)]
mod tests;

pub use parse::PlanError;
pub use report::{FaultCount, Report, Work};

/// The largest share of messages that a plan may lose or double, in percent. With more, no run would end.
pub const MAX_PERCENT: f64 = 90.0;

/// Faults of a run. For the text form, see the [module](self).
///
/// ```
/// use std::time::Duration;
///
/// use ps_actors::chaos::{Fault, Plan};
///
/// let plan: Plan = "kill worker 2 @ step 40; drop 5%; delay 20..80ms; seed 7".parse()?;
/// assert_eq!(plan.faults, [Fault::KillWorker { worker: 2, step: 40 }]);
/// assert_eq!(plan.delay, Some((Duration::from_millis(20), Duration::from_millis(80))));
/// assert_eq!(plan.to_string(), "kill worker 2 @ step 40; drop 5%; delay 20..80ms; seed 7");
///
/// let error = "drop 5%; kill worker 2 @ version 3".parse::<Plan>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "clause 2, `kill worker 2 @ version 3`: expected `step` instead of `version`; write it as \
///      `kill worker 2 @ step 40`"
/// );
/// # Ok::<(), ps_actors::chaos::PlanError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// What happens once, in any order.
    pub faults: Vec<Fault>,
    /// How many of the messages are lost, in percent: 0 to [`MAX_PERCENT`].
    pub drop_percent: f64,
    /// How many of the messages arrive twice, in percent: 0 to [`MAX_PERCENT`].
    pub dup_percent: f64,
    /// The shortest and the longest time that a message takes. With `None`, the executor decides.
    pub delay: Option<(Duration, Duration)>,
    /// The seed of everything that is random. With `None`, the executor decides.
    pub seed: Option<u64>,
}

/// Something that happens once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// A worker's process ends, and is started again.
    KillWorker {
        /// The rank of the worker whose process ends.
        worker: u32,
        /// The clock of the step that it is about to compute.
        step: u64,
    },
    /// A worker's process does nothing for a while, and then goes on as if nothing had happened.
    StopWorker {
        /// The rank of the worker whose process does nothing.
        worker: u32,
        /// How long it does nothing.
        pause: Duration,
        /// The clock of the step that it is about to compute.
        step: u64,
    },
    /// A server's process ends.
    KillServer {
        /// The index of the server in its group.
        server: usize,
        /// The version of the weights.
        version: u64,
    },
    /// A server's process does nothing for a while.
    StopServer {
        /// The index of the server in its group.
        server: usize,
        /// How long it does nothing.
        pause: Duration,
        /// The version of the weights.
        version: u64,
    },
    /// The machine loses its power: all processes end, and the disk has only what was synced, and perhaps a
    /// part of the rest.
    LosePower {
        /// The version of the weights.
        version: u64,
    },
    /// The newest checkpoint can no longer be read.
    DamageCheckpoint {
        /// The version of the weights.
        version: u64,
    },
}

impl Fault {
    /// Returns the words for all faults of this kind, such as `kill worker`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::KillWorker { .. } => "kill worker",
            Self::StopWorker { .. } => "stop worker",
            Self::KillServer { .. } => "kill server",
            Self::StopServer { .. } => "stop server",
            Self::LosePower { .. } => "lose power",
            Self::DamageCheckpoint { .. } => "damage checkpoint",
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = self.kind();
        match *self {
            Self::KillWorker { worker, step } => write!(f, "{kind} {worker} @ step {step}"),
            Self::StopWorker {
                worker,
                pause,
                step,
            } => write!(f, "{kind} {worker} for {} @ step {step}", Time(pause)),
            Self::KillServer { server, version } => {
                write!(f, "{kind} {server} @ version {version}")
            }
            Self::StopServer {
                server,
                pause,
                version,
            } => write!(f, "{kind} {server} for {} @ version {version}", Time(pause)),
            Self::LosePower { version } | Self::DamageCheckpoint { version } => {
                write!(f, "{kind} @ version {version}")
            }
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut clauses: Vec<String> = self.faults.iter().map(Fault::to_string).collect();
        if self.drop_percent > 0.0 {
            clauses.push(format!("drop {}%", self.drop_percent));
        }
        if self.dup_percent > 0.0 {
            clauses.push(format!("dup {}%", self.dup_percent));
        }
        if let Some((shortest, longest)) = self.delay {
            let (from, to) = (Time(shortest).parts(), Time(longest).parts());
            clauses.push(match from.1 == to.1 {
                true => format!("delay {}..{}", from.0, Time(longest)),
                false => format!("delay {}..{}", Time(shortest), Time(longest)),
            });
        }
        if let Some(seed) = self.seed {
            clauses.push(format!("seed {seed}"));
        }
        f.write_str(&clauses.join("; "))
    }
}

/// The units of durations, in microseconds, from the longest.
const UNITS: [(&str, u64); 4] = [
    ("min", 60_000_000),
    ("s", 1_000_000),
    ("ms", 1000),
    ("us", 1),
];

/// A duration in whole microseconds, as a plan writes it.
struct Time(Duration);

impl Time {
    /// Returns the number and the longest unit in which it is a whole number.
    fn parts(&self) -> (u64, &'static str) {
        let micros = u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX);
        let whole = |&&(_, unit): &&(&str, u64)| micros >= unit && micros.is_multiple_of(unit);
        let (name, unit) = UNITS.iter().find(whole).copied().unwrap_or(("ms", 1000));
        (micros / unit, name)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, unit) = self.parts();
        write!(f, "{number}{unit}")
    }
}

/// Says that the code has reached a point, if the feature `chaos` is on. Otherwise it is nothing.
macro_rules! reached {
    ($($point:tt)+) => {
        #[cfg(feature = "chaos")]
        {
            use $crate::chaos::points::Point;
            $crate::chaos::points::reached(&Point::$($point)+);
        }
    };
}
pub(crate) use reached;

/// Says that a worker is about to compute the gradient of a step. So a plan can kill or stop its process then. Without
/// the feature `chaos` it does nothing.
///
/// [`DataWorker`](crate::worker::DataWorker) says so by itself. Call it in a loop of your own, on the thread that computes.
///
/// ```
/// use ps_actors::chaos::worker_computes;
/// use ps_actors::ids::{Clock, WorkerId};
///
/// for step in 0..3 {
///     worker_computes(WorkerId(0), Clock(step));
///     // forward, backward, push
/// }
/// ```
#[cfg_attr(not(feature = "chaos"), expect(unused_variables, reason = "see above"))]
pub fn worker_computes(worker: WorkerId, clock: Clock) {
    reached!(WorkerComputes { worker, clock });
}

/// Calls a server. With the feature `chaos`, the network may have faults.
pub(crate) fn ask<A, M>(
    actor: &ps_runtime::ActorRef<A>,
    message: M,
) -> impl Future<Output = Result<M::Result, ps_runtime::CallError>> + use<A, M>
where
    A: ps_runtime::remote::Remote + actix::Handler<M>,
    M: actix::Message + Clone + Send + 'static,
    M::Result: Send,
{
    #[cfg(feature = "chaos")]
    {
        network::ask(actor, message)
    }
    #[cfg(not(feature = "chaos"))]
    {
        actor.ask(message)
    }
}

/// Polls a call once, so that its message is on its way, and then says that the gradient was sent.
pub(crate) async fn sent<T>(id: crate::ids::GradientId, call: impl Future<Output = T>) -> T {
    #[cfg(not(feature = "chaos"))]
    {
        let _ = id;
        call.await
    }
    #[cfg(feature = "chaos")]
    {
        let mut call = std::pin::pin!(call);
        let first = std::future::poll_fn(|cx| std::task::Poll::Ready(call.as_mut().poll(cx))).await;
        reached!(WorkerSent(id));
        match first {
            std::task::Poll::Ready(answer) => answer,
            std::task::Poll::Pending => call.await,
        }
    }
}
