//! The evaluations of a run, on a thread of their own. The driver goes on with everything else meanwhile: it replaces lost
//! workers, saves checkpoints, does what it is asked to do, and ends.

use std::cell::Cell;
use std::io;
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use ps_actors::group::ServerGroup;
use ps_actors::ids::Version;
use ps_actors::server::PullVersion;
use ps_actors::weights::Weights;
use ps_model::{Model, ModelError};
use tokio::sync::{oneshot, watch};

use super::TrainError;
use crate::observe::Observers;
use crate::report::CurvePoint;
use crate::source::{Evaluator, TestResult};

/// How long the final weights may be evaluated after a signal. A process has 30 s to end, and some of them may have gone to the
/// last steps and to a checkpoint.
const AFTER_SIGNAL: Duration = Duration::from_secs(10);

/// Weights to evaluate.
struct Request {
    weights: Weights,
    is_final: bool,
    /// Closed when nobody wants the result any more.
    result: oneshot::Sender<Result<TestResult, ModelError>>,
}

/// The thread on which a run evaluates weights. It ends when this is dropped, after its current batch.
pub(super) struct Evaluations {
    requests: mpsc::Sender<Request>,
    /// `None` after it has panicked.
    thread: Cell<Option<JoinHandle<()>>>,
    /// Whether [`watch`](Self::watch) evaluates weights now.
    is_busy: watch::Sender<bool>,
    /// Whether it may begin no other evaluation.
    is_over: Cell<bool>,
}

impl Evaluations {
    /// # Errors
    /// If the system gives no thread.
    pub(super) fn new<M: Model>(
        mut evaluator: Evaluator<M>,
        observers: &Observers,
    ) -> io::Result<Self> {
        let (requests, requested) = mpsc::channel::<Request>();
        let observers = observers.clone();
        let thread = thread::Builder::new().name("evaluations".to_owned());
        let thread = thread.spawn(move || {
            for request in requested {
                let Request {
                    weights,
                    is_final,
                    result: sender,
                } = request;
                let is_wanted = || !sender.is_closed();
                let result =
                    observers.evaluate_while(&mut evaluator, &weights, is_final, is_wanted);
                if let Some(result) = result.transpose() {
                    // Nobody may want it any more.
                    let _ = sender.send(result);
                }
            }
        })?;
        Ok(Self {
            requests,
            thread: Cell::new(Some(thread)),
            is_busy: watch::Sender::new(false),
            is_over: Cell::new(false),
        })
    }

    /// Evaluates the weights every so many updates, as long as it is polled, but not while the training is `ending`. Returns
    /// only if an evaluation fails.
    pub(super) async fn watch<F: Future<Output = ()>>(
        &self,
        servers: &ServerGroup,
        every: u64,
        started: Instant,
        ending: impl Fn() -> F,
        mut on_evaluation: impl FnMut(CurvePoint),
    ) -> TrainError {
        self.is_busy.send_replace(false);
        self.is_over.set(false);
        let mut next = every;
        while !self.is_over.get() {
            let weights = match servers.pull(PullVersion::AtLeast(Version(next))).await {
                Ok(weights) => weights,
                Err(error) => return error.into(),
            };
            let (version, elapsed) = (weights.version(), started.elapsed());
            self.is_busy.send_replace(true);
            let evaluating = pin!(self.evaluate(weights, false));
            // If the training ends, its final weights are evaluated soon, and these need not be.
            let result = match select(pin!(ending()), evaluating).await {
                Either::Left(_) => break,
                Either::Right((result, _)) => result,
            };
            match result {
                Ok(TestResult {
                    evaluation,
                    metrics,
                }) => {
                    on_evaluation(CurvePoint {
                        version,
                        elapsed,
                        evaluation,
                        metrics,
                    });
                }
                Err(error) => return error,
            }
            self.is_busy.send_replace(false);
            next = (version.0 / every + 1) * every;
        }
        self.is_busy.send_replace(false);
        std::future::pending().await
    }

    /// Waits until [`watch`](Self::watch) has finished the evaluation that it has begun, when all steps are taken.
    pub(super) async fn finish(
        &self,
        watch: impl Future<Output = TrainError>,
    ) -> Result<(), TrainError> {
        self.is_over.set(true);
        let mut is_busy = self.is_busy.subscribe();
        let idle = pin!(is_busy.wait_for(|is_busy| !is_busy));
        match select(idle, pin!(watch)).await {
            Either::Left(_) => Ok(()),
            Either::Right((error, _)) => Err(error),
        }
    }

    /// Evaluates the final weights. `None` if a signal comes and this would take too long.
    pub(super) async fn of_final(
        &self,
        weights: Weights,
        signalled: impl Future<Output = ()>,
    ) -> Result<Option<TestResult>, TrainError> {
        let time_is_over = pin!(async {
            signalled.await;
            actix::clock::sleep(AFTER_SIGNAL).await;
        });
        match select(pin!(self.evaluate(weights, true)), time_is_over).await {
            Either::Left((result, _)) => result.map(Some),
            Either::Right(_) => {
                tracing::warn!(
                    "the final weights are not evaluated: it takes too long after a signal"
                );
                Ok(None)
            }
        }
    }

    /// Evaluates weights. If it is dropped, the evaluation ends after its current batch.
    async fn evaluate(&self, weights: Weights, is_final: bool) -> Result<TestResult, TrainError> {
        let (sender, result) = oneshot::channel();
        let request = Request {
            weights,
            is_final,
            result: sender,
        };
        // If it does not arrive, neither does a result.
        let _ = self.requests.send(request);
        match result.await {
            Ok(result) => Ok(result?),
            Err(_) => match self.thread.take().map(JoinHandle::join) {
                Some(Err(panic)) => resume_unwind(panic),
                _ => unreachable!("the thread ends only by a panic, which is passed on once"),
            },
        }
    }
}
