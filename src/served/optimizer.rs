//! Has the gradients of a step applied, wherever they are, once.

use futures_util::future::try_join_all;
use ps_actors::actor::{ActorId, ActorRef, CallError};
use ps_actors::heartbeat::Heartbeats;
use ps_actors::ids::{Clock, Incarnation, WorkerId};
use ps_actors::server::{GroupError, Outcome};
use ps_actors::session::Session;
use ps_model::{Part, StepSeed};

use super::context::{Context, UsedPart};
use super::contexts::ContextId;
use super::messages::{ApplyContext, GetServers, ServedError};
use super::server::PartServer;

/// How often a step is tried on one part: when the connection was lost, or the servers had given the
/// trainer up.
const MAX_TRIES: usize = 4;

/// Why a step was not taken on all parts. Trying again with another context of the same clock applies
/// it only where it was not.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OptimizerError {
    /// A part server could not be reached, or did not answer.
    #[error("the part server {part} did not answer")]
    Call {
        /// Its name.
        part: String,
        /// What became of the call.
        #[source]
        source: CallError,
    },
    /// A part server refused, or has no gradient.
    #[error("the part server {part} did not take the step")]
    Served {
        /// Its name.
        part: String,
        /// Why.
        #[source]
        source: ServedError,
    },
    /// The servers that hold a part's weights refused, or were not to be reached.
    #[error("the servers of {part} do not take this trainer")]
    Servers {
        /// The name of the part server.
        part: String,
        /// Why.
        #[source]
        source: GroupError,
    },
    /// Two parts would push different gradients under one name.
    #[error("the weights of {part} are those of another part that was added before")]
    SharedServers {
        /// The name of the part server.
        part: String,
    },
    /// No part of this optimizer was used in the step.
    #[error("the context used none of the parts that were added to the optimizer")]
    NothingToStep,
}

/// One trainer's steps, over all parts whose weights it trains.
///
/// Which rule changes the weights, at which learning rate and when, is a matter of the servers of each
/// part. A part that is not added computes and passes gradients on, but is not trained.
pub struct DistributedOptimizer {
    trainer: WorkerId,
    life: Incarnation,
    seed: u64,
    parts: Vec<Trained>,
    next_clock: Clock,
    num_contexts: u64,
}

struct Trained {
    id: ActorId,
    name: String,
    session: Session,
    _heartbeats: Heartbeats,
    /// So that its id stays.
    _part: Box<dyn UsedPart>,
}

impl DistributedOptimizer {
    /// Makes the optimizer of a trainer; `seed` decides dropout, and is the same for all trainers of
    /// a run.
    #[must_use]
    pub fn new(trainer: WorkerId, seed: u64) -> Self {
        Self {
            trainer,
            life: Session::new_incarnation(Incarnation(0)),
            seed,
            parts: Vec::new(),
            next_clock: Clock(0),
            num_contexts: 0,
        }
    }

    /// Trains this part, too: makes the trainer a member of its servers. One that was a member in an
    /// earlier life goes on at the clock after its last step.
    ///
    /// # Errors
    /// When the part server or its servers cannot be reached or refuse, or their weights are those of
    /// another part.
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
            _part: Box::new(part.clone()),
        });
        Ok(())
    }

    /// The number of the next step, counted over the trainer's lives.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.next_clock
    }

    /// Begins the computation of the next step. There may be several attempts at one.
    pub fn begin(&mut self) -> Context {
        let id = ContextId {
            trainer: self.trainer,
            life: self.life,
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

    /// Has the gradients of a context applied, on all its parts at the same time, and returns what
    /// became of each, in the order in which the context used them.
    ///
    /// Each is applied once, whatever has to be tried again. In the synchronous modes it waits for the
    /// other trainers.
    ///
    /// # Errors
    /// When a part has no gradient or has forgotten the context, or cannot be reached. The clock then
    /// stays, and the step may be tried again with another context.
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

    /// Ends the trainer's membership, and waits until all servers know.
    ///
    /// # Errors
    /// When servers cannot be reached.
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
                    let rejoined = self.session.rejoin(error).await;
                    rejoined.map_err(|source| OptimizerError::Servers { part: name, source })?;
                    self._heartbeats = Heartbeats::of(&self.session);
                }
                Ok(Err(source)) => return Err(OptimizerError::Served { part: name, source }),
                Err(source) => return Err(OptimizerError::Call { part: name, source }),
            }
            tries += 1;
        }
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
