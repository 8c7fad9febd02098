//! Applies the gradients of a step, on all part servers that have one, once.

use futures_util::future::try_join_all;
use ps_actors::actor::{ActorId, ActorRef, CallError};
use ps_actors::chaos::worker_computes;
use ps_actors::heartbeat::Heartbeats;
use ps_actors::ids::{Clock, Incarnation, WorkerId};
use ps_actors::server::{GroupError, Outcome};
use ps_actors::session::Session;
use ps_model::{Part, StepSeed};

use super::context::{Context, UsedPart};
use super::contexts::ContextId;
use super::messages::{ApplyContext, GetServers, ServedError};
use super::server::PartServer;

/// How often a step is tried on one part, if the connection was lost or if the servers had declared the
/// trainer lost.
const MAX_TRIES: usize = 4;

/// Why a step was not taken on all parts. If you try again with another context of the same clock, the step
/// is applied only where it was not applied before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptimizerError {
    /// A part server could not be reached, or did not answer.
    #[error("the part server {part} did not answer")]
    Call {
        /// The name of the part server.
        part: String,
        /// Why the call failed.
        #[source]
        source: CallError,
    },
    /// A part server refused the step, or has no gradient.
    #[error("the part server {part} did not take the step")]
    Served {
        /// The name of the part server.
        part: String,
        /// Why it did not take the step.
        #[source]
        source: ServedError,
    },
    /// The servers that hold a part's weights refused the trainer, or could not be reached.
    #[error("the servers of {part} do not accept this trainer")]
    Servers {
        /// The name of the part server.
        part: String,
        /// The error of the servers.
        #[source]
        source: GroupError,
    },
    /// Two parts have the same weights, so they would push different gradients under one id.
    #[error("the weights of {part} are those of another part that was added before")]
    SharedServers {
        /// The name of the part server.
        part: String,
    },
    /// No part of this optimizer was used in the step.
    #[error("the context used none of the parts that were added to the optimizer")]
    NothingToStep,
}

/// One trainer's steps, over all parts whose weights it trains. For an example, see the [module](super).
///
/// The servers of each part decide by which rule, at which learning rate and when the weights change. A
/// part that is not added computes outputs and gradients of its inputs, but is not trained.
///
/// ```
/// use ps::prelude::*;
/// use ps::served::{DistributedOptimizer, PartConfig, serve_part};
///
/// # let device = select_device(default_device_name())?;
/// # let net = ConvNet::init(1, &device);
/// # let config = ServerConfig { consistency: Consistency::Asp, ..ServerConfig::default() };
/// # let weights = initial_weights(&net, &device)?;
/// # let server = ParameterServer::new(&weights, Sgd::new(), config)?.spawn()?;
/// # let part = serve_part(&net, &device, &server.clone().into(), PartConfig::default())?;
/// let batch = Examples::batch(&Mnist::bundled_sample().train, &[0, 1, 2, 3]);
/// run(async {
///     let mut optimizer = DistributedOptimizer::new(WorkerId(0), 1);
///     optimizer.add(&part).await?;
///
///     let mut context = optimizer.begin();
///     let output = context.forward(&part, batch.images_on(&device)).await?;
///     let labels = batch.labels_on(&output.device());
///     context.backward(&nll_loss(output, labels)).await?;
///     let outcomes = optimizer.step(context).await?;
///     assert_eq!(outcomes[0].version(), Version(1));
///     optimizer.leave().await?;
///     Ok::<(), Box<dyn std::error::Error>>(())
/// })?;
/// assert_eq!(server.ask(GetWeights).wait()?.version(), Version(1));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DistributedOptimizer {
    trainer: WorkerId,
    incarnation: Incarnation,
    seed: u64,
    parts: Vec<Trained>,
    next_clock: Clock,
    num_contexts: u64,
}

struct Trained {
    id: ActorId,
    name: String,
    session: Session,
    /// The latest step whose outcome was told when the trainer joined again, and the outcome.
    taken: Option<(Clock, Outcome)>,
    _heartbeats: Heartbeats,
    /// Kept so that the actor's id stays in use.
    _part: Box<dyn UsedPart>,
}

impl DistributedOptimizer {
    /// Makes the optimizer of a trainer. `seed` decides dropout. It must be the same for all trainers of a
    /// run.
    #[must_use]
    pub fn new(trainer: WorkerId, seed: u64) -> Self {
        Self {
            trainer,
            incarnation: Session::new_incarnation(Incarnation(0)),
            seed,
            parts: Vec::new(),
            next_clock: Clock(0),
            num_contexts: 0,
        }
    }

    /// Adds a part to train: makes the trainer a member of the part's servers. If it was a member in an
    /// earlier incarnation, it goes on at the clock after its last step.
    ///
    /// # Errors
    /// If the part server or its servers refuse or cannot be reached, or if their weights are those of a
    /// part that was added before.
    pub async fn add<P: Part>(
        &mut self,
        part: &ActorRef<PartServer<P>>,
    ) -> Result<(), OptimizerError> {
        let name = part.name().to_owned();
        if self.parts.iter().any(|known| known.id == part.id()) {
            return Ok(());
        }
        let servers = match part.ask(GetServers).await {
            Ok(servers) => servers,
            Err(source) => return Err(OptimizerError::Call { part: name, source }),
        };
        let known = self.parts.iter().map(|part| part.session.servers());
        let firsts = known.filter_map(|servers| servers.servers().next());
        let first = servers.servers().next().map(ActorRef::id);
        if firsts.map(ActorRef::id).any(|id| Some(id) == first) {
            return Err(OptimizerError::SharedServers { part: name });
        }
        let session = match Session::join(&servers, self.trainer).await {
            Ok(session) => session,
            Err(source) => return Err(OptimizerError::Servers { part: name, source }),
        };
        self.next_clock = self.next_clock.max(session.next_clock());
        self.parts.push(Trained {
            id: part.id(),
            name,
            _heartbeats: Heartbeats::of(&session),
            session,
            taken: None,
            _part: Box::new(part.clone()),
        });
        Ok(())
    }

    /// Returns the clock of the next step. It also counts the steps of the trainer's earlier incarnations.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.next_clock
    }

    /// Begins the computation of the next step. A step may be computed several times.
    pub fn begin(&mut self) -> Context {
        worker_computes(self.trainer, self.next_clock);
        let id = ContextId {
            trainer: self.trainer,
            incarnation: self.incarnation,
            number: self.num_contexts,
        };
        self.num_contexts += 1;
        let seed = StepSeed {
            seed: self.seed,
            worker: self.trainer.0.into(),
            clock: self.next_clock.0,
        };
        Context::new(id, seed)
    }

    /// Applies the gradients of a context, on all its parts at the same time. Returns their outcomes, in
    /// the order in which the context used the parts.
    ///
    /// Each gradient is applied once, even if the step has to be tried again. In the synchronous modes the
    /// call waits for the other trainers.
    ///
    /// # Errors
    /// If a part has no gradient, has forgotten the context, or cannot be reached. The clock then stays,
    /// and you may try the step again with another context.
    pub async fn step(&mut self, context: Context) -> Result<Vec<Outcome>, OptimizerError> {
        let clock = self.next_clock;
        let steps = self.parts.iter_mut().filter_map(|trained| {
            let used = context.parts().iter();
            let part = used.into_iter().find(|used| used.id() == trained.id)?;
            Some(trained.step(&**part, &context, clock))
        });
        let outcomes = try_join_all(steps).await?;
        if outcomes.is_empty() {
            return Err(OptimizerError::NothingToStep);
        }
        self.next_clock = clock.next();
        Ok(outcomes)
    }

    /// Ends the trainer's membership, and waits until all servers have confirmed it.
    ///
    /// # Errors
    /// If servers cannot be reached.
    pub async fn leave(self) -> Result<(), OptimizerError> {
        let left = self
            .parts
            .into_iter()
            .map(|Trained { name, session, .. }| async move {
                let left = session.leave().await;
                left.map_err(|source| OptimizerError::Servers { part: name, source })
            });
        try_join_all(left).await.map(drop)
    }
}

impl Trained {
    async fn step(
        &mut self,
        part: &dyn UsedPart,
        context: &Context,
        clock: Clock,
    ) -> Result<Outcome, OptimizerError> {
        let mut tries = 1;
        loop {
            // The servers accept no push of a step that was taken before the trainer joined again.
            if let Some((_, outcome)) = self.taken.filter(|(taken, _)| *taken == clock) {
                return Ok(outcome);
            }
            let answer = part.apply(ApplyContext {
                context: context.id(),
                id: self.session.gradient_id(clock),
                loss: context.loss(),
                num_examples: context.num_examples(),
            });
            let name = self.name.clone();
            match answer.await {
                Ok(Ok(outcome)) => return Ok(outcome),
                Err(lost) if lost.is_connection_lost() && tries < MAX_TRIES => {
                    tracing::warn!(part = name, %lost, "stepping again");
                }
                Ok(Err(ServedError::Servers(error))) if tries < MAX_TRIES => {
                    let rejoined = self.rejoin(error, clock).await;
                    rejoined.map_err(|source| OptimizerError::Servers { part: name, source })?;
                }
                Ok(Err(source)) => return Err(OptimizerError::Served { part: name, source }),
                Err(source) => return Err(OptimizerError::Call { part: name, source }),
            }
            tries += 1;
        }
    }

    /// Joins again after an error at step `clock`, and finds out whether this step was taken before.
    async fn rejoin(&mut self, error: GroupError, clock: Clock) -> Result<(), GroupError> {
        let before = self.session.gradient_id(clock).incarnation;
        self.session.rejoin(error).await?;
        self._heartbeats = Heartbeats::of(&self.session);
        let session = &self.session;
        // If there was another incarnation in between, it took its own steps, in another process.
        let is_own = session.gradient_id(clock).incarnation == before.next();
        if is_own && session.next_clock() == clock.next() {
            self.taken = session.latest_outcome().map(|outcome| (clock, outcome));
        }
        Ok(())
    }
}

impl std::fmt::Debug for DistributedOptimizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let parts: Vec<_> = self.parts.iter().map(|part| &part.name).collect();
        f.debug_struct("DistributedOptimizer")
            .field("trainer", &self.trainer)
            .field("next_clock", &self.next_clock)
            .field("parts", &parts)
            .finish_non_exhaustive()
    }
}
