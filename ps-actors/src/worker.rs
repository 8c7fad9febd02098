//! The worker, which computes gradients.
//!
//! There are two ways to drive it. A Ray-style driver sends [`ComputeGradients`] and takes the result to
//! the server itself. With [`RunSteps`], the worker gets references to the servers, and pulls, computes and
//! pushes by itself. It joins the servers at the beginning and leaves them at the end. It also leaves if it
//! fails or panics, so that the other workers do not wait for it.

use std::cell::RefCell;
use std::error::Error;
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, Message, MessageResult, ResponseActFuture, WrapFuture};
use ps_runtime::actor::error_chain;
use ps_runtime::actor::{ActorRef, Spawn, sleep};
use ps_runtime::cluster::Hosted;
use ps_runtime::codec::Bulk;
use ps_runtime::remote::{Messages, Remote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::chaos::reached;
use crate::group::ServerGroup;
use crate::heartbeat::Heartbeats;
use crate::ids::{Clock, GradientId, Incarnation, WorkerId};
use crate::server::{GroupError, Outcome, PullVersion};
use crate::session::Session;
use crate::weights::{Gradient, GradientUpdate, Weights};

/// How often in a row a worker joins again without a settled gradient in between.
const MAX_REJOINS: usize = 10;

/// How long a push is repeated if the servers cannot take it for now.
const PATIENCE: Duration = Duration::from_secs(120);

/// The pause before a push is repeated.
const PAUSE: Duration = Duration::from_millis(100);

/// How many gradients in a row of one worker a [`RunSteps`] allows to be refused while no worker's gradient
/// is applied. With one more, the run ends with [`WorkerError::Diverged`]. The weights do not change in
/// this time, so if the gradients of 100 batches are refused, those of further batches will be refused too.
pub const MAX_REFUSED: u64 = 100;

/// The error of a [`GradientSource`].
pub type SourceError = Box<dyn Error + Send + Sync>;

/// Computes gradients, from a model and its data. It lives on its worker's thread.
///
/// The thread of a worker that a cluster makes has no sockets of tokio, because they would take four file
/// descriptors per worker. A source that needs them uses a runtime of its own, or is hosted with
/// [`Spawn::with_io`].
///
/// Any closure from clock and weights to a gradient is a `GradientSource`:
///
/// ```
/// use ps_actors::ids::{Clock, WorkerId};
/// use ps_actors::weights::{Gradient, Weights};
/// use ps_actors::worker::{DataWorker, LocalGradient};
///
/// /// Pulls each weight towards 1: the loss is the sum of (w − 1)² / 2.
/// fn towards_one(_: Clock, weights: &Weights) -> LocalGradient {
///     let errors: Vec<f32> = weights.to_vec().iter().map(|weight| weight - 1.0).collect();
///     let loss = errors.iter().map(|error| error * error / 2.0).sum();
///     LocalGradient { gradient: Gradient::new(errors), loss, num_examples: 1 }
/// }
///
/// let worker = DataWorker::new(WorkerId(0), |clock: Clock, weights: &Weights| {
///     Ok(towards_one(clock, weights))
/// });
/// # drop(worker);
/// ```
pub trait GradientSource: 'static {
    /// Computes the loss and the gradient of the batch of step `clock`, at `weights`.
    ///
    /// The batch must depend only on the clock. A worker that was lost may repeat a step after it has
    /// joined again, and the repeated step must use the same examples. The clocks usually come in order,
    /// from 0.
    ///
    /// # Errors
    /// If the gradient cannot be computed. The worker's run then ends with this error.
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError>;
}

impl<F> GradientSource for F
where
    F: FnMut(Clock, &Weights) -> Result<LocalGradient, SourceError> + 'static,
{
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        self(clock, weights)
    }
}

/// The result of [`GradientSource::gradient`].
#[derive(Clone, Debug)]
pub struct LocalGradient {
    /// The gradient of the loss with respect to all weights of the model.
    pub gradient: Gradient,
    /// The mean loss of the batch.
    pub loss: f32,
    /// How many examples the batch had.
    pub num_examples: usize,
}

/// An actor that computes gradients with its [`GradientSource`].
///
/// ```
/// use ps_actors::ids::{Clock, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ApplyGradients, GetWeights, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Gradient, Layout, Weights};
/// use ps_actors::worker::{ComputeGradients, DataWorker, LocalGradient};
///
/// let initial = Weights::initial(Layout::flat(3), vec![0.0; 3]);
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// let worker = ps_actors::spawn(|| {
///     DataWorker::new(WorkerId(0), |_: Clock, weights: &Weights| {
///         let gradient = Gradient::new(vec![-100.0; weights.len()]);
///         Ok(LocalGradient { gradient, loss: 1.0, num_examples: 32 })
///     })
/// });
///
/// let weights = server.ask(GetWeights).wait()?;
/// let update = worker.ask(ComputeGradients(weights)).wait()??;
/// let weights = server.ask(ApplyGradients::mean([update])).wait()??;
/// assert_eq!(weights.to_vec(), [1.0; 3]); // The default learning rate is 0.01.
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DataWorker<S> {
    state: Rc<RefCell<State<S>>>,
}

struct State<S> {
    id: WorkerId,
    incarnation: Incarnation,
    next_clock: Clock,
    source: S,
    progress: Progress,
    is_running: bool,
    stop_requested: bool,
    /// Whether another worker goes on if this run is stopped.
    keeps_membership: bool,
}

impl<S: GradientSource> DataWorker<S> {
    /// Makes the worker with rank `id`. It gets an incarnation that no other worker of this process has
    /// had.
    #[must_use]
    pub fn new(id: WorkerId, source: S) -> Self {
        let state = State {
            id,
            incarnation: Session::new_incarnation(Incarnation(0)),
            next_clock: Clock(0),
            source,
            progress: Progress::default(),
            is_running: false,
            stop_requested: false,
            keeps_membership: false,
        };
        Self {
            state: Rc::new(RefCell::new(state)),
        }
    }
}

impl<S> fmt::Debug for DataWorker<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DataWorker").finish_non_exhaustive()
    }
}

impl<S: GradientSource> State<S> {
    fn compute(&mut self, weights: Weights) -> Result<GradientUpdate, WorkerError> {
        let (worker, clock) = (self.id, self.next_clock);
        reached!(WorkerComputes { worker, clock });
        let computed = self.source.gradient(clock, &weights);
        let LocalGradient {
            gradient,
            loss,
            num_examples,
        } = computed.map_err(|source| WorkerError::Source {
            worker,
            clock,
            source,
        })?;
        self.next_clock = clock.next();
        self.progress.num_computed += 1;
        self.progress.latest_loss = loss;
        let id = GradientId {
            worker,
            incarnation: self.incarnation,
            clock,
        };
        Ok(GradientUpdate {
            id,
            computed_on: weights.version(),
            loss,
            num_examples,
            gradient,
        })
    }
}

/// Computes the gradient of the worker's next batch at these weights, and returns it.
///
/// For an example, see [`DataWorker`].
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<GradientUpdate, WorkerError>")]
pub struct ComputeGradients(pub Weights);

/// Takes `num_steps` steps with these servers. Each step pulls the weights, computes the gradient and
/// pushes it.
///
/// A step counts once its gradient has been applied, dropped as late, or refused.
///
/// ```
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::{Clock, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::ServerConfig;
/// use ps_actors::weights::{Gradient, Layout, Weights};
/// use ps_actors::worker::{DataWorker, LocalGradient, RunSteps};
///
/// let initial = Weights::initial(Layout::flat(1), vec![4.0]);
/// let config = ServerConfig { learning_rate: 0.5, ..ServerConfig::default() };
/// let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new()))?;
/// let worker = ps_actors::spawn(|| {
///     DataWorker::new(WorkerId(0), |_: Clock, weights: &Weights| {
///         // The loss is w² / 2, so the gradient is w.
///         let weight = weights.to_vec()[0];
///         let gradient = Gradient::new(vec![weight]);
///         Ok(LocalGradient { gradient, loss: weight * weight / 2.0, num_examples: 1 })
///     })
/// });
///
/// let report = worker.ask(RunSteps { servers, num_steps: 3 }).wait()??;
/// assert_eq!(report.losses, [8.0, 2.0, 0.5]);
/// assert_eq!(report.num_applied, 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<RunReport, WorkerError>")]
pub struct RunSteps {
    /// The servers that hold the weights.
    pub servers: ServerGroup,
    /// How many steps to take.
    pub num_steps: u64,
}

/// Sets the step of the next [`ComputeGradients`]. Send it to a worker that replaces a lost worker. It has
/// no effect while the worker runs steps.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct GoOnAt {
    /// The clock of the next step.
    pub clock: Clock,
    /// The incarnation of the lost worker. The gradients of this worker get a later one.
    pub after: Incarnation,
}

/// Ends a [`RunSteps`] after the current step.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct StopSteps;

/// Lets the next [`RunSteps`] keep its membership when it ends before all steps are taken: when [`StopSteps`] ends
/// it, when it fails, and when the worker is killed or panics. Another worker goes on in its place, so no round
/// closes without it. Whoever sends this must start that worker, [report](crate::server::ReportLost) this one
/// lost, or end the servers.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct KeepMembership;

/// Returns what the worker has done so far.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Progress")]
pub struct GetProgress;

/// What a worker has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// How many gradients the worker has computed.
    pub num_computed: u64,
    /// The mean loss of the latest batch.
    pub latest_loss: f32,
}

/// The result of a [`RunSteps`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// The mean loss of each step's batch, at the weights before the step's update.
    #[serde(with = "losses")]
    pub losses: Vec<f32>,
    /// How many gradients were applied.
    pub num_applied: u64,
    /// How many gradients were dropped because their round had already closed.
    pub num_dropped_late: u64,
    /// How many gradients were refused because of their norm.
    pub num_refused: u64,
    /// How many examples the batches of all steps had together.
    pub num_examples: u64,
    /// Whether [`StopSteps`] ended the run before all steps were taken.
    pub was_stopped: bool,
    /// Total time of computing gradients.
    pub compute_time: Duration,
    /// Total time of waiting for the servers. This includes transfers, queues, updates, and waiting for
    /// other workers.
    pub wait_time: Duration,
}

impl RunReport {
    /// Adds the report of a later run of the same worker to this one.
    pub fn append(&mut self, later: Self) {
        let Self {
            losses,
            num_applied,
            num_dropped_late,
            num_refused,
            num_examples,
            was_stopped,
            compute_time,
            wait_time,
        } = later;
        // The numbers may come from a peer, so adding them must not overflow.
        let add = |sum: &mut u64, number| *sum = sum.saturating_add(number);
        let add_time = |sum: &mut Duration, time| *sum = sum.saturating_add(time);
        self.losses.extend(losses);
        add(&mut self.num_applied, num_applied);
        add(&mut self.num_dropped_late, num_dropped_late);
        add(&mut self.num_refused, num_refused);
        add(&mut self.num_examples, num_examples);
        self.was_stopped = was_stopped;
        add_time(&mut self.compute_time, compute_time);
        add_time(&mut self.wait_time, wait_time);
    }
}

/// Writes the losses as bulk data, because those of a long run would not fit into a header.
mod losses {
    use super::{Bulk, Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(
        losses: &[f32],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        Bulk::from(losses.to_vec()).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<f32>, D::Error> {
        Bulk::deserialize(deserializer).map(|losses| losses.to_vec())
    }
}

/// Why a worker could not do what a message asked.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum WorkerError {
    /// The worker's [`GradientSource`] failed.
    #[error("{worker} could not compute the gradient of {clock}")]
    Source {
        /// The worker that failed.
        worker: WorkerId,
        /// The step whose gradient was being computed.
        clock: Clock,
        /// The error of the [`GradientSource`]. If it comes from another process, it is only a text, which
        /// includes the sources.
        #[source]
        #[serde(with = "source_text")]
        source: SourceError,
    },
    /// The servers refused a call of the worker, or could not be reached.
    #[error("{worker} could not use its servers")]
    Servers {
        /// The worker that made the call.
        worker: WorkerId,
        /// The error of the call.
        #[source]
        source: GroupError,
    },
    /// Too many gradients in a row were refused; see [`MAX_REFUSED`].
    #[error(
        "training has diverged: {num_refused} gradients of {worker} in a row were refused, and nobody's \
         was applied; the last one's norm was {norm} (the limit is {limit}). A lower learning rate helps \
         most often; check the data for NaN; a limit below infinity may be too low"
    )]
    Diverged {
        /// The worker whose gradients were refused.
        worker: WorkerId,
        /// How many gradients were refused in a row.
        num_refused: u64,
        /// The norm of the last refused gradient.
        norm: f64,
        /// The largest norm that the servers accept.
        limit: f64,
    },
    /// The worker already runs steps.
    #[error("{worker} runs steps already; stop them first")]
    Busy {
        /// The worker that is busy.
        worker: WorkerId,
    },
}

/// Writes an error of any type as the text of it and its sources, and reads it as that text.
mod source_text {
    use super::{Deserialize, Deserializer, Serializer, SourceError};
    use ps_runtime::actor::error_chain;

    pub(super) fn serialize<S: Serializer>(
        error: &SourceError,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&error_chain(error.as_ref()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<SourceError, D::Error> {
        String::deserialize(deserializer).map(SourceError::from)
    }
}

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

/// Pushes a gradient. Repeats the push after a pause if the servers say that this may help.
async fn push_patiently(
    servers: &ServerGroup,
    gradients: GradientUpdate,
) -> Result<(Outcome, Weights), GroupError> {
    let mut refused_since: Option<Instant> = None;
    loop {
        match servers.push_pull(gradients.clone()).await {
            Err(error) if error.is_for_now() => {
                let since = *refused_since.get_or_insert_with(Instant::now);
                if since.elapsed() > PATIENCE {
                    return Err(error);
                }
                tracing::debug!(%error, "pushing again");
                sleep(PAUSE).await;
            }
            other => return other,
        }
    }
}

async fn run<S: GradientSource>(
    state: &RefCell<State<S>>,
    servers: &ServerGroup,
    num_steps: u64,
) -> Result<RunReport, WorkerError> {
    let worker = state.borrow().id;
    let failed = |source| WorkerError::Servers { worker, source };
    let mut report = RunReport::default();
    let started = Instant::now();
    let mut session = Session::join(servers, worker).await.map_err(failed)?;
    let mut _beating = Heartbeats::of(&session);
    let mut weights = begin(state, &mut session).await.map_err(failed)?;
    report.wait_time += started.elapsed();
    let last_clock = state.borrow().next_clock.0.saturating_add(num_steps);
    let mut num_rejoins = 0;
    // How many gradients in a row were refused, and at which version.
    let mut refused_in_a_row = (0, weights.version());
    while state.borrow().next_clock.0 < last_clock && !state.borrow().stop_requested {
        let started = Instant::now();
        // `compute` drops the snapshot at its end, so that the server can then update in place.
        let gradients = state.borrow_mut().compute(weights)?;
        report.compute_time += started.elapsed();
        let (loss, num_examples) = (gradients.loss, gradients.num_examples as u64);
        #[cfg(feature = "chaos")]
        let id = gradients.id;
        let started = Instant::now();
        let pushed = push_patiently(servers, gradients).await;
        weights = match pushed {
            Ok((outcome, next)) => {
                reached!(WorkerTold(id, outcome));
                num_rejoins = 0;
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
                _beating = Heartbeats::of(&session);
                begin(state, &mut session).await.map_err(failed)?
            }
        };
        report.wait_time += started.elapsed();
    }
    report.was_stopped = state.borrow().next_clock.0 < last_clock;
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

impl<S: GradientSource> Actor for DataWorker<S> {
    type Context = Context<Self>;
}

impl<S: GradientSource> Remote for DataWorker<S> {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<ComputeGradients>()
            .add::<RunSteps>()
            .add::<GoOnAt>()
            .add::<StopSteps>()
            .add::<KeepMembership>()
            .add::<GetProgress>();
    }
}

/// A [`GradientSource`] that a node can make from a few settings.
pub trait HostedSource: GradientSource {
    /// The settings that the node makes the source from. They are sent to the node.
    type Args: Serialize + DeserializeOwned + Send + 'static;
}

impl<S: HostedSource> Hosted for DataWorker<S> {
    type Args = S::Args;

    /// A source is not asynchronous, so it needs no sockets on the worker's thread, which would take four
    /// file descriptors. One that does asks for [`Spawn::with_io`].
    fn options(options: Spawn) -> Spawn {
        options.without_io()
    }

    /// Stops the run after the current step has been pushed. The caller that waits for the run gets a
    /// report that says that it was stopped.
    fn hand_over(actor: &ActorRef<Self>) -> bool {
        actor.tell(StopSteps).is_ok()
    }
}

impl<S: GradientSource> Handler<ComputeGradients> for DataWorker<S> {
    type Result = Result<GradientUpdate, WorkerError>;

    fn handle(&mut self, message: ComputeGradients, _: &mut Self::Context) -> Self::Result {
        self.state.borrow_mut().compute(message.0)
    }
}

impl<S: GradientSource> Handler<RunSteps> for DataWorker<S> {
    // Polled in the actor's context, so that a panic in it is the actor's panic.
    type Result = ResponseActFuture<Self, Result<RunReport, WorkerError>>;

    fn handle(&mut self, message: RunSteps, _: &mut Self::Context) -> Self::Result {
        let state = Rc::clone(&self.state);
        // This happens here and not in the future, because the next `StopSteps` may be handled before the
        // future begins.
        let was_running = {
            let mut state = state.borrow_mut();
            let was_running = std::mem::replace(&mut state.is_running, true);
            state.stop_requested &= was_running;
            was_running
        };
        let run = async move {
            if was_running {
                let worker = state.borrow().id;
                return Err(WorkerError::Busy { worker });
            }
            let result = run(&state, &message.servers, message.num_steps).await;
            let mut state = state.borrow_mut();
            (state.is_running, state.keeps_membership) = (false, false);
            // Gradients from now on belong to no membership. Their incarnation is later than that of the
            // ended one, and than any that other servers know.
            state.incarnation = Session::new_incarnation(state.incarnation.next());
            result
        };
        Box::pin(run.into_actor(self))
    }
}

impl<S: GradientSource> Handler<GoOnAt> for DataWorker<S> {
    type Result = ();

    fn handle(&mut self, GoOnAt { clock, after }: GoOnAt, _: &mut Self::Context) {
        let mut state = self.state.borrow_mut();
        // A run gets its clocks from the servers.
        if !state.is_running {
            state.next_clock = clock;
            state.incarnation = Session::new_incarnation(after.next());
        }
    }
}

impl<S: GradientSource> Handler<StopSteps> for DataWorker<S> {
    type Result = ();

    fn handle(&mut self, _: StopSteps, _: &mut Self::Context) {
        self.state.borrow_mut().stop_requested = true;
    }
}

impl<S: GradientSource> Handler<KeepMembership> for DataWorker<S> {
    type Result = ();

    fn handle(&mut self, _: KeepMembership, _: &mut Self::Context) {
        self.state.borrow_mut().keeps_membership = true;
    }
}

impl<S: GradientSource> Handler<GetProgress> for DataWorker<S> {
    type Result = MessageResult<GetProgress>;

    fn handle(&mut self, _: GetProgress, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.state.borrow().progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::Refusal;
    use ps_runtime::codec::MAX_HEADER;
    use ps_runtime::test_util::{check_error_crosses, transport};

    const WORKER: WorkerId = WorkerId(3);

    /// An error with a source, as a library's would be.
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Layered(&'static str, #[source] Option<Box<Self>>);

    fn failed(source: impl Into<SourceError>) -> WorkerError {
        WorkerError::Source {
            worker: WORKER,
            clock: Clock(7),
            source: source.into(),
        }
    }

    #[test]
    fn every_worker_error_crosses_a_wire() {
        let source = GroupError::Server {
            index: 0,
            source: Refusal::Empty.into(),
        };
        let worker = WORKER;
        for sent in [
            failed("the file is gone"),
            WorkerError::Servers { worker, source },
            WorkerError::Busy { worker },
            WorkerError::Diverged {
                worker,
                num_refused: 101,
                norm: f64::INFINITY,
                limit: 1e3,
            },
        ] {
            check_error_crosses(&sent);
        }
    }

    #[test]
    fn a_source_of_any_type_crosses_as_the_text_of_its_chain() {
        let disk = Layered("disk full", None);
        let file = Layered("cannot write a.bin", Some(Box::new(disk)));
        let got = transport(&failed(Layered("no batch", Some(Box::new(file))))).unwrap();
        let WorkerError::Source { source, .. } = check_error_crosses(&got) else {
            panic!("{got:?}");
        };
        assert_eq!(
            source.to_string(),
            "no batch: cannot write a.bin: disk full"
        );
        assert!(source.source().is_none());
    }

    #[test]
    fn a_report_of_more_steps_than_fit_into_a_header_crosses_a_wire() {
        let losses = (0..MAX_HEADER)
            .map(|step| 1.0 / (step + 1) as f32)
            .collect();
        let sent = RunReport {
            losses,
            num_applied: u64::MAX,
            num_dropped_late: 2,
            num_refused: 1,
            num_examples: 32,
            was_stopped: true,
            compute_time: Duration::MAX,
            wait_time: Duration::from_nanos(1),
        };
        assert_eq!(transport(&sent).unwrap(), sent);
        let empty = RunReport::default();
        assert_eq!(transport(&empty).unwrap(), empty);
    }

    #[test]
    fn progress_crosses_a_wire() {
        let sent = Progress {
            num_computed: 12,
            latest_loss: 0.25,
        };
        assert_eq!(transport(&sent).unwrap(), sent);
    }
}
