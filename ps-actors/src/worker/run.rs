//! Takes steps: joins the servers, and pulls, computes and pushes until all steps are taken.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use ps_runtime::actor::{error_chain, sleep};

use super::steps::UnsettledStep;
use super::{GradientSource, RunReport, State, WorkerError};
use crate::chaos::reached;
use crate::group::ServerGroup;
use crate::heartbeat::Heartbeats;
use crate::server::{GroupError, Outcome, PullVersion, Pushed};
use crate::session::Session;
use crate::weights::{GradientUpdate, Weights};

/// How often in a row a worker joins again without a settled gradient in between.
const MAX_REJOINS: usize = 10;

/// How long a push is repeated if the servers cannot take it for now.
const PATIENCE: Duration = Duration::from_secs(120);

/// The pause before a push is repeated.
const PAUSE: Duration = Duration::from_millis(100);

/// How many gradients in a row of one worker a [`RunSteps`](super::RunSteps) allows to be refused while no worker's gradient
/// is applied. With one more, the run ends with [`WorkerError::Diverged`]. The weights do not change in
/// this time, so if the gradients of 100 batches are refused, those of further batches will be refused too.
pub const MAX_REFUSED: u64 = 100;

/// Sets the worker to the incarnation and the clock with which the membership begins, and pulls the
/// weights.
async fn begin<S>(state: &RefCell<State<S>>, session: &mut Session) -> Result<Weights, GroupError> {
    {
        let mut state = state.borrow_mut();
        if state.keeps_membership {
            session.keep();
        }
        let first = session.gradient_id(session.next_clock());
        state.incarnation = first.incarnation;
        state.next_clock = first.clock;
    }
    session.servers().pull(PullVersion::Latest).await
}

/// Pushes a gradient. Repeats the push after a pause if the servers say that this may help. The pauses are
/// waiting at the servers, too.
async fn push_patiently(
    servers: &ServerGroup,
    gradients: GradientUpdate,
) -> Result<Pushed, GroupError> {
    let mut refused_since: Option<Instant> = None;
    let mut paused = Duration::ZERO;
    loop {
        match servers.push_pull_timed(gradients.clone()).await {
            Err(error) if error.is_for_now() => {
                let since = *refused_since.get_or_insert_with(Instant::now);
                if since.elapsed() > PATIENCE {
                    return Err(error);
                }
                tracing::debug!(%error, "pushing again");
                sleep(PAUSE).await;
                paused = since.elapsed();
            }
            Ok(pushed) => {
                let held = pushed.held.saturating_add(paused);
                return Ok(Pushed { held, ..pushed });
            }
            Err(error) => return Err(error),
        }
    }
}

/// Takes `num_steps` steps, or fewer if it is asked to stop or if the source has no more.
pub(super) async fn run<S: GradientSource>(
    state: &RefCell<State<S>>,
    servers: &ServerGroup,
    num_steps: u64,
) -> Result<RunReport, WorkerError> {
    let worker = state.borrow().id;
    let failed = |source| WorkerError::Servers { worker, source };
    let mut report = RunReport::default();
    let started = Instant::now();
    let servers = &servers.with_precision(state.borrow().source.precision());
    let mut session = Session::join(servers, worker).await.map_err(failed)?;
    let mut _beating = Heartbeats::of(&session);
    let mut weights = begin(state, &mut session).await.map_err(failed)?;
    report.wait_time += started.elapsed();
    let last_clock = state.borrow().next_clock.0.saturating_add(num_steps);
    let mut num_rejoins = 0;
    // How many gradients in a row were refused, and at which version.
    let mut refused_in_a_row = (0, weights.version());
    let mut is_at_end = false;
    while state.borrow().next_clock.0 < last_clock && !state.borrow().stop_requested {
        if !state.borrow_mut().has_next() {
            is_at_end = true;
            break;
        }
        let started = Instant::now();
        // `compute` drops the snapshot at its end, so that the server can then update in place.
        let gradients = state.borrow_mut().compute(weights)?;
        let computed = started.elapsed();
        report.compute_time += computed;
        let (loss, num_examples) = (gradients.loss, gradients.num_examples as u64);
        let step = UnsettledStep::new(&gradients, computed, state.borrow().source.data_time());
        #[cfg(feature = "chaos")]
        let id = gradients.id;
        let started = Instant::now();
        let pushed = push_patiently(servers, gradients).await;
        weights = match pushed {
            Ok(Pushed {
                outcome,
                weights: next,
                held,
                applied,
            }) => {
                reached!(WorkerTold(id, outcome));
                num_rejoins = 0;
                let record = step.settled(outcome, started.elapsed(), held, applied);
                state.borrow_mut().recorder.record(record);
                report.losses.push(loss);
                report.num_examples += num_examples;
                match outcome {
                    Outcome::Applied { .. } => report.num_applied += 1,
                    Outcome::DroppedLate { .. } => report.num_dropped_late += 1,
                    Outcome::RefusedNorm { norm, limit, .. } => {
                        report.num_refused += 1;
                        tracing::warn!(%worker, norm, "gradient refused: NaN, infinite or too large");
                        let (num_refused, since) = &mut refused_in_a_row;
                        if *since != next.version() {
                            (*num_refused, *since) = (0, next.version());
                        }
                        *num_refused += 1;
                        if *num_refused > MAX_REFUSED {
                            return Err(WorkerError::Diverged {
                                worker,
                                num_refused: *num_refused,
                                norm,
                                limit,
                            });
                        }
                    }
                }
                next
            }
            Err(error) => {
                if num_rejoins == MAX_REJOINS {
                    return Err(failed(error));
                }
                num_rejoins += 1;
                session.rejoin(error).await.map_err(failed)?;
                // It may have been settled, and only the answer was lost.
                if let Some(outcome) = step.outcome_in(&session) {
                    let record =
                        step.settled(outcome, started.elapsed(), Duration::ZERO, Duration::ZERO);
                    state.borrow_mut().recorder.record(record);
                }
                _beating = Heartbeats::of(&session);
                begin(state, &mut session).await.map_err(failed)?
            }
        };
        report.wait_time += started.elapsed();
    }
    report.was_stopped = !is_at_end && state.borrow().next_clock.0 < last_clock;
    report.unfetched = state.borrow().recorder.kept();
    if report.was_stopped && state.borrow().keeps_membership {
        session.stay();
        return Ok(report);
    }
    // All steps are taken. Their report is worth more than an orderly end.
    if let Err(error) = session.leave().await {
        let error = error_chain(&error);
        tracing::warn!(%worker, error, "could not leave after the last step");
    }
    Ok(report)
}
