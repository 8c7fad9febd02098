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
use std::time::Duration;

use actix::{Actor, Context, Handler, MessageResult, ResponseActFuture, WrapFuture};
use ps_runtime::actor::{ActorRef, Spawn};
use ps_runtime::cluster::Hosted;
use ps_runtime::remote::{Messages, Remote};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::chaos::reached;
use crate::ids::{Clock, GradientId, Incarnation, WorkerId};
use crate::session::Session;
use crate::weights::{Gradient, GradientUpdate, Precision, Weights};

mod error;
mod messages;
mod run;
mod steps;
#[cfg(test)]
mod tests;

pub use error::WorkerError;
pub use messages::{
    ComputeGradients, GetProgress, GoOnAt, KeepMembership, Progress, RunReport, RunSteps, StopSteps,
};
pub use run::MAX_REFUSED;
pub use steps::{GetSteps, MAX_RECORDS, StepRecord, Steps};

use steps::Recorder;

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

    /// Returns whether there is a batch for step `clock`. If not, a [`RunSteps`] ends before it, as if all steps
    /// were taken. It is asked before each step. The default is that there always is.
    fn has_step(&mut self, clock: Clock) -> bool {
        let _ = clock;
        true
    }

    /// Returns how long the latest [`gradient`](Self::gradient) waited for its batch. Observers of a
    /// training see this part of a step separately. The default is zero.
    fn data_time(&self) -> Duration {
        Duration::ZERO
    }

    /// Returns the type to which [`gradient`](Self::gradient) rounds all weights before it computes. A [`RunSteps`] gets
    /// them from other processes in this type, so fewer bytes travel. The default is that it rounds none.
    fn precision(&self) -> Precision {
        Precision::F32
    }
}

impl<F> GradientSource for F
where
    F: FnMut(Clock, &Weights) -> Result<LocalGradient, SourceError> + 'static,
{
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        self(clock, weights)
    }
}

/// The result of [`GradientSource::gradient`]. For examples, see [`GradientSource`] and [`DataWorker`].
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
    recorder: Recorder,
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
            recorder: Recorder::default(),
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
    fn has_next(&mut self) -> bool {
        self.source.has_step(self.next_clock)
    }

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
            .add::<GetProgress>()
            .add::<GetSteps>();
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
            let result = run::run(&state, &message.servers, message.num_steps).await;
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

impl<S: GradientSource> Handler<GetSteps> for DataWorker<S> {
    type Result = MessageResult<GetSteps>;

    fn handle(&mut self, GetSteps { from }: GetSteps, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.state.borrow_mut().recorder.from(from))
    }
}

impl<S: GradientSource> Handler<GetProgress> for DataWorker<S> {
    type Result = MessageResult<GetProgress>;

    fn handle(&mut self, _: GetProgress, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.state.borrow().progress)
    }
}
