//! Takes steps: joins the servers, and pulls, computes and pushes until all steps are taken. If the servers allow it, the
//! next gradient is computed while a push is on its way (S-24).

use std::cell::RefCell;
use std::time::{Duration, Instant};

use ps_runtime::actor::{Background, error_chain, in_background, sleep};
use tokio::sync::oneshot;
use tokio::task::yield_now;

use super::steps::UnsettledStep;
use super::{GradientSource, RunReport, State, WorkerError};
use crate::chaos::reached;
use crate::group::ServerGroup;
use crate::heartbeat::Heartbeats;
use crate::ids::{Version, WorkerId};
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

/// A step whose gradient is computed, and what else a report needs of it.
struct Computed {
    step: UnsettledStep,
    loss: f32,
    num_examples: u64,
    #[cfg(feature = "chaos")]
    id: crate::ids::GradientId,
}

impl Computed {
    /// `took` is the time of the gradient, of which `data` was spent on waiting for the batch.
    fn new(gradients: &GradientUpdate, took: Duration, data: Duration) -> Self {
        Self {
            step: UnsettledStep::new(gradients, took, data),
            loss: gradients.loss,
            num_examples: gradients.num_examples as u64,
            #[cfg(feature = "chaos")]
            id: gradients.id,
        }
    }
}

/// A push on its way, while the worker's thread computes.
struct InFlight {
    computed: Computed,
    answer: oneshot::Receiver<Result<Pushed, GroupError>>,
    /// Ends the push when it is dropped.
    _pushing: Background,
}

impl InFlight {
    fn begin(servers: &ServerGroup, gradients: GradientUpdate, computed: Computed) -> Self {
        let (sender, answer) = oneshot::channel();
        let servers = servers.clone();
        let pushing = in_background(async move {
            // Nobody waits for it if the run has ended.
            let _ = sender.send(push_patiently(&servers, gradients).await);
        });
        Self {
            computed,
            answer,
            _pushing: pushing,
        }
    }
}

/// A worker's run: its membership, and what it has done.
struct Run<'a, S> {
    state: &'a RefCell<State<S>>,
    worker: WorkerId,
    session: Session,
    beating: Heartbeats,
    report: RunReport,
    num_rejoins: usize,
    /// How many gradients in a row were refused, and at which version.
    refused_in_a_row: (u64, Version),
    /// Whether the servers let the next gradient be computed while a push is on its way.
    may_overlap: bool,
}

impl<S: GradientSource> Run<'_, S> {
    /// Takes note of what became of a step, whose push was waited for so long. Joins again if its membership is over.
    /// Returns the weights for the next step.
    async fn settle(
        &mut self,
        computed: Computed,
        pushed: Result<Pushed, GroupError>,
        waited_since: Instant,
    ) -> Result<Weights, WorkerError> {
        let Computed {
            step,
            loss,
            num_examples,
            ..
        } = computed;
        let Pushed {
            outcome,
            weights,
            held,
            applied,
            may_overlap,
        } = match pushed {
            Ok(pushed) => pushed,
            Err(error) => return self.rejoin(step, error, waited_since).await,
        };
        reached!(WorkerTold(computed.id, outcome));
        self.num_rejoins = 0;
        self.may_overlap = may_overlap;
        let record = step.settled(outcome, waited_since.elapsed(), held, applied);
        self.state.borrow_mut().recorder.record(record);
        let report = &mut self.report;
        report.losses.push(loss);
        report.num_examples += num_examples;
        match outcome {
            Outcome::Applied { .. } => report.num_applied += 1,
            Outcome::DroppedLate { .. } => report.num_dropped_late += 1,
            Outcome::RefusedNorm { norm, limit, .. } => {
                report.num_refused += 1;
                let worker = self.worker;
                tracing::warn!(%worker, norm, "gradient refused: NaN, infinite or too large");
                let (num_refused, since) = &mut self.refused_in_a_row;
                if *since != weights.version() {
                    (*num_refused, *since) = (0, weights.version());
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
        Ok(weights)
    }

    /// Joins again after a push that failed. Steps that are not settled are taken once more, also the one that may have been
    /// computed meanwhile.
    async fn rejoin(
        &mut self,
        step: UnsettledStep,
        error: GroupError,
        waited_since: Instant,
    ) -> Result<Weights, WorkerError> {
        let worker = self.worker;
        let failed = |source| WorkerError::Servers { worker, source };
        if self.num_rejoins == MAX_REJOINS {
            return Err(failed(error));
        }
        self.num_rejoins += 1;
        self.session.rejoin(error).await.map_err(failed)?;
        // It may have been settled, and only the answer was lost.
        if let Some(outcome) = step.outcome_in(&self.session) {
            let waited = waited_since.elapsed();
            let record = step.settled(outcome, waited, Duration::ZERO, Duration::ZERO);
            self.state.borrow_mut().recorder.record(record);
        }
        self.beating = Heartbeats::of(&self.session);
        let weights = begin(self.state, &mut self.session).await;
        weights.map_err(failed)
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
    let started = Instant::now();
    let servers = &servers.with_precision(state.borrow().source.precision());
    let session = Session::join(servers, worker).await.map_err(failed)?;
    let mut run = Run {
        state,
        worker,
        beating: Heartbeats::of(&session),
        session,
        report: RunReport::default(),
        num_rejoins: 0,
        refused_in_a_row: (0, Version(0)),
        may_overlap: false,
    };
    let weights = begin(state, &mut run.session).await.map_err(failed)?;
    run.refused_in_a_row.1 = weights.version();
    let mut weights = Some(weights);
    run.report.wait_time += started.elapsed();
    let last_clock = state.borrow().next_clock.0.saturating_add(num_steps);
    let mut in_flight: Option<InFlight> = None;
    let is_at_end = loop {
        if in_flight.is_some() {
            // If its answer is always there in time, nothing else lets the actor hear what it is told.
            yield_now().await;
        }
        let is_over = state.borrow().next_clock.0 >= last_clock || state.borrow().stop_requested;
        let is_at_end = !is_over && !state.borrow_mut().has_next();
        if in_flight.is_none() && (is_over || is_at_end) {
            break is_at_end;
        }
        let mut computed = None;
        if !is_over && !is_at_end {
            let started = Instant::now();
            // `compute` drops the snapshot at its end. If the source keeps it neither, the server can then update in
            // place.
            let snapshot = match run.may_overlap {
                true => weights.clone(),
                false => weights.take(),
            };
            let snapshot = snapshot.expect("each push brings weights, or is overlapped");
            let gradients = state.borrow_mut().compute(snapshot)?;
            let took = started.elapsed();
            run.report.compute_time += took;
            let data = state.borrow().source.data_time();
            computed = Some((Computed::new(&gradients, took, data), gradients));
        }
        let started = Instant::now();
        if let Some(InFlight {
            computed: before,
            answer,
            _pushing,
        }) = in_flight.take()
        {
            let num_rejoins = run.num_rejoins;
            let pushed = answer.await.expect("it is awaited, so it is answered");
            weights = Some(run.settle(before, pushed, started).await?);
            if run.num_rejoins > num_rejoins {
                // What was computed meanwhile belongs to the membership that is over.
                computed = None;
            }
        }
        if let Some((computed, gradients)) = computed {
            match run.may_overlap {
                true => in_flight = Some(InFlight::begin(servers, gradients, computed)),
                false => {
                    let pushed = push_patiently(servers, gradients).await;
                    weights = Some(run.settle(computed, pushed, started).await?);
                }
            }
        }
        run.report.wait_time += started.elapsed();
    };
    let Run {
        session,
        beating: _beating,
        mut report,
        ..
    } = run;
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
