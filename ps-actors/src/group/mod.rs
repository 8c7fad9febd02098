//! The servers of one model, as one thing to push to and pull from.
//!
//! With several servers a push has two steps. First, the parts of the gradient are *staged* on all servers
//! but the first one, in parallel. Then the whole gradient is pushed to the first server, which tells it
//! that the others have their parts. Only then does the first server decide. So a worker that dies between
//! the two steps leaves no part of its gradient in the weights, and all servers go through the same
//! versions (PS-3, PS-5). If another server lacks its part, the first one sends it (S-9).

use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use actix::{Handler, Message};
use futures_util::future::{Either, select, try_join_all};
use ps_runtime::actor::{ActorRef, sleep};
use serde::{Deserialize, Serialize};

use crate::chaos::{self, reached, sent};
use crate::checkpoint::Checkpoint;
use crate::ids::{Incarnation, JoinRequest, WorkerId};
use crate::server::{
    ApplyGradients, Consistency, ForgetSavedStates, GetSavedState, GetStatus, GroupError,
    Heartbeat, Join, Leave, LostServer, Membership, Outcome, ParameterServer, Pull, PullVersion,
    Push, PushPull, Pushed, Reduction, ReportLost, ServerError, ServerStatus, SetConsistency,
    SetLearningRate, SetPaused, ShardError, Stage, TakeCheckpoint,
};
use crate::weights::{BadPart, GradientUpdate, Precision, Weights};

mod start;

pub use start::{GroupSpawnError, ServerArgs};

/// How often a pull of one version is tried, if the servers move on in the meantime.
const MAX_PULL_TRIES: usize = 100;

/// How often a server that cannot be reached is asked. Each try takes up to the lease of the connection. A
/// server that is known to have ended is not asked again.
const MAX_TRIES: usize = 10;

/// The first pause before a server is asked again, and the longest. Each pause is twice as long as the one
/// before. So a message that breaks every connection is given up after 4 s.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// How often the first server is asked whether the others are gone, while these are waited for. They are usually waited
/// for much shorter than this.
const LOOK: Duration = Duration::from_secs(2);

/// References to all servers of a model. A group is cheap to clone, and can be sent to workers.
///
/// ```
/// use ps_actors::actor::run;
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::{Version, WorkerId};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{Outcome, PullVersion, ServerConfig};
/// use ps_actors::session::Session;
/// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(40), vec![0.0; 40]);
/// let config = ServerConfig { learning_rate: 1.0, ..ServerConfig::default() };
/// let servers = ServerGroup::spawn(&initial, 2, config, |_| Box::new(Sgd::new()))?;
///
/// run(async {
///     let session = Session::join(&servers, WorkerId(0)).await?;
///     let weights = servers.pull(PullVersion::Latest).await?;
///     let update = GradientUpdate {
///         id: session.gradient_id(session.next_clock()),
///         computed_on: weights.version(),
///         loss: 0.0,
///         num_examples: 1,
///         gradient: Gradient::new(vec![-0.5; 40]),
///     };
///     let (outcome, weights) = servers.push_pull(update).await?;
///     assert_eq!(outcome, Outcome::Applied { version: Version(1), staleness: 0 });
///     assert_eq!(weights.to_vec(), [0.5; 40]);
///
///     let status = servers.status().await?;
///     assert_eq!(status[1].range, 32..40);
///     session.leave().await
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "Vec<Part>", into = "Vec<Part>")]
pub struct ServerGroup {
    servers: Arc<[Part]>,
    /// With how many bits weights travel to this handle's process.
    precision: Precision,
}

/// One server with its range.
type Part = (Range<usize>, ActorRef<ParameterServer>);

/// The ranges of a group from another process do not follow one another.
#[derive(Debug, thiserror::Error)]
#[error("a group needs servers whose ranges follow one another from 0")]
pub struct BadGroup;

impl TryFrom<Vec<Part>> for ServerGroup {
    type Error = BadGroup;

    fn try_from(parts: Vec<Part>) -> Result<Self, BadGroup> {
        let mut next = 0;
        for (range, _) in &parts {
            if range.start != next || range.end < next {
                return Err(BadGroup);
            }
            next = range.end;
        }
        match parts.is_empty() {
            true => Err(BadGroup),
            false => Ok(Self {
                servers: parts.into(),
                precision: Precision::F32,
            }),
        }
    }
}

impl From<ServerGroup> for Vec<Part> {
    fn from(group: ServerGroup) -> Self {
        group.servers.to_vec()
    }
}

impl ServerGroup {
    /// Makes a group of one server, which holds all weights.
    #[must_use]
    pub fn single(server: ActorRef<ParameterServer>) -> Self {
        Self {
            servers: Arc::new([(0..usize::MAX, server)]),
            precision: Precision::F32,
        }
    }

    /// Returns a handle whose [`pull`](Self::pull) and [`push_pull`](Self::push_pull) get weights from other processes with
    /// so many bits, rounded. It is for a worker whose model rounds them anyway ([`GradientSource::precision`]).
    ///
    /// ```
    /// # use ps_actors::actor::run;
    /// # use ps_actors::group::ServerGroup;
    /// # use ps_actors::rule::Sgd;
    /// # use ps_actors::server::{PullVersion, ServerConfig};
    /// # use ps_actors::weights::{Layout, Precision, Weights};
    /// # let initial = Weights::initial(Layout::flat(1), vec![0.1]);
    /// # let config = ServerConfig::default();
    /// let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new()))?;
    /// let for_bf16 = servers.with_precision(Precision::Bf16);
    /// // These servers are in this process, so nothing travels, and nothing is rounded.
    /// assert_eq!(run(for_bf16.pull(PullVersion::Latest))?.to_vec(), [0.1]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// [`GradientSource::precision`]: crate::worker::GradientSource::precision
    #[must_use]
    pub fn with_precision(&self, precision: Precision) -> Self {
        Self {
            servers: Arc::clone(&self.servers),
            precision,
        }
    }

    fn pull_of(&self, wanted: PullVersion) -> Pull {
        Pull {
            wanted,
            precision: self.precision,
        }
    }

    /// Returns the servers in the order of their ranges. The first one decides which gradients make which
    /// update.
    pub fn servers(&self) -> impl ExactSizeIterator<Item = &ActorRef<ParameterServer>> {
        self.servers.iter().map(|(_, server)| server)
    }

    /// Asks a server. If the connection is lost, it asks again. This is safe: whether or not the server has
    /// handled the message already, the same message gets the same answer.
    async fn ask<M, T>(&self, index: usize, message: M) -> Result<T, GroupError>
    where
        ParameterServer: Handler<M>,
        M: Message<Result = Result<T, ServerError>> + Clone + Send + 'static,
        T: Send + 'static,
    {
        let answer = self.call(index, message).await?;
        answer.map_err(|source| GroupError::Server { index, source })
    }

    async fn call<M>(&self, index: usize, mut message: M) -> Result<M::Result, GroupError>
    where
        ParameterServer: Handler<M>,
        M: Message + Clone + Send + 'static,
        M::Result: Send,
    {
        let server = &self.servers[index].1;
        let mut tries = 1;
        let (mut pause, longest) = PAUSES;
        let answer = loop {
            let again = (!server.is_local() && tries < MAX_TRIES).then(|| message.clone());
            match (chaos::ask(server, message).await, again) {
                (Err(lost), Some(again)) if lost.is_connection_lost() => {
                    tracing::warn!(server = server.name(), %lost, "asking again");
                    message = again;
                    tries += 1;
                    sleep(pause).await;
                    pause = (2 * pause).min(longest);
                }
                (answer, _) => break answer,
            }
        };
        answer.map_err(|source| GroupError::Call { index, source })
    }

    /// Makes a worker a member, in the incarnation that the answer names. This ends an earlier membership
    /// of the same worker. The same request again gets the same answer.
    ///
    /// # Errors
    /// If the membership that this request began is already over, or the server cannot be reached.
    pub async fn join(
        &self,
        worker: WorkerId,
        request: JoinRequest,
    ) -> Result<Membership, GroupError> {
        self.ask(0, Join { worker, request }).await
    }

    /// Ends a worker's membership. Its pending gradients are not applied.
    ///
    /// # Errors
    /// If the server cannot be reached.
    pub async fn leave(
        &self,
        worker: WorkerId,
        incarnation: Incarnation,
    ) -> Result<(), GroupError> {
        self.ask(
            0,
            Leave {
                worker,
                incarnation,
            },
        )
        .await
    }

    /// Tells the server that a member is alive. Returns the worker lease of the server, if it has one.
    ///
    /// # Errors
    /// If the worker is not a member in this incarnation, or the server cannot be reached.
    pub async fn heartbeat(
        &self,
        worker: WorkerId,
        incarnation: Incarnation,
    ) -> Result<Option<Duration>, GroupError> {
        let beat = Heartbeat {
            worker,
            incarnation,
        };
        self.ask(0, beat).await
    }

    /// Declares a worker dead, so that the others do not wait for it.
    ///
    /// # Errors
    /// If the server cannot be reached.
    pub async fn report_lost(&self, worker: WorkerId) -> Result<(), GroupError> {
        self.ask(0, ReportLost { worker }).await
    }

    /// Pulls a snapshot of all weights. All its parts have the same version.
    ///
    /// ```
    /// use ps_actors::actor::run;
    /// use ps_actors::group::ServerGroup;
    /// use ps_actors::ids::Version;
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::{PullVersion, ServerConfig};
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let initial = Weights::initial(Layout::flat(3), vec![0.5; 3]);
    /// let servers =
    ///     ServerGroup::spawn(&initial, 2, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
    /// let weights = run(servers.pull(PullVersion::Latest))?;
    /// assert_eq!(weights.version(), Version(0));
    /// assert_eq!(weights.to_vec(), [0.5; 3]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If [`PullVersion::Exactly`] names a version that is no longer kept, or a server cannot be reached.
    pub async fn pull(&self, wanted: PullVersion) -> Result<Weights, GroupError> {
        if let PullVersion::Exactly(_) = wanted {
            // All are asked at the same time, so that no server has passed the version when the last one is
            // asked.
            let parts = self.servers().enumerate();
            let parts = parts.map(|(index, _)| self.ask(index, self.pull_of(wanted)));
            return join_weights(&self.unless_lost(try_join_all(parts)).await?);
        }
        let mut tries = 1;
        loop {
            let first = self.ask(0, self.pull_of(wanted)).await?;
            match self.pull_rest(first).await {
                // The other servers moved on by more versions than they keep.
                Err(error) if is_version_gone(&error) && tries < MAX_PULL_TRIES => tries += 1,
                other => return other,
            }
        }
    }

    /// Pulls the other servers' parts of the first one's version, and joins them.
    async fn pull_rest(&self, first: Weights) -> Result<Weights, GroupError> {
        let same = self.pull_of(PullVersion::Exactly(first.version()));
        let rest = self.servers().enumerate().skip(1);
        let rest = rest.map(|(index, _)| self.ask(index, same));
        let mut parts = vec![first];
        parts.extend(self.unless_lost(try_join_all(rest)).await?);
        join_weights(&parts)
    }

    /// Waits for the answers of other servers. If the first server has lost one of them, it tells it no more
    /// decisions. That server can still be there for others, but it never makes the version that is waited for.
    async fn unless_lost<T>(
        &self,
        answers: impl Future<Output = Result<T, GroupError>>,
    ) -> Result<T, GroupError> {
        let lost = pin!(async {
            loop {
                sleep(LOOK).await;
                match self.call(0, GetStatus).await {
                    Ok(ServerStatus { lost: None, .. }) => {}
                    Ok(ServerStatus {
                        lost: Some(LostServer { index, reason }),
                        ..
                    }) => {
                        let source = ServerError::GroupBroken { index, reason };
                        return GroupError::Server { index: 0, source };
                    }
                    // Its answer at the next look will do.
                    Err(error) if error.is_for_now() => {}
                    Err(error) => return error,
                }
            }
        });
        match select(pin!(answers), lost).await {
            Either::Left((answers, _)) => answers,
            Either::Right((error, _)) => Err(error),
        }
    }

    /// Pushes a gradient, and waits until it has been applied, dropped as late, or refused because of its
    /// norm.
    ///
    /// ```
    /// use ps_actors::actor::run;
    /// use ps_actors::group::ServerGroup;
    /// use ps_actors::ids::{Version, WorkerId};
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::{Outcome, ServerConfig};
    /// use ps_actors::session::Session;
    /// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
    ///
    /// let initial = Weights::initial(Layout::flat(3), vec![0.5; 3]);
    /// let servers =
    ///     ServerGroup::spawn(&initial, 2, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
    /// run(async {
    ///     let session = Session::join(&servers, WorkerId(0)).await?;
    ///     let update = GradientUpdate {
    ///         id: session.gradient_id(session.next_clock()),
    ///         computed_on: Version(0),
    ///         loss: 0.0,
    ///         num_examples: 1,
    ///         gradient: Gradient::new(vec![1.0; 3]),
    ///     };
    ///     let outcome = servers.push(update.clone()).await?;
    ///     assert_eq!(outcome, Outcome::Applied { version: Version(1), staleness: 0 });
    ///     assert_eq!(servers.push(update).await?, outcome); // It is applied once.
    ///     session.leave().await
    /// })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the worker is not a member, or a server refuses the gradient or cannot be reached. You may then
    /// make the same push again: it is applied at most once.
    pub async fn push(&self, gradients: GradientUpdate) -> Result<Outcome, GroupError> {
        self.stage(&gradients).await?;
        self.ask(0, Push(gradients)).await
    }

    /// Pushes a gradient. Returns its outcome and the weights for the worker's next step, as soon as the
    /// consistency mode lets this step start. For an example, see [`ServerGroup`].
    ///
    /// # Errors
    /// If the worker is not a member, or a server refuses the gradient or cannot be reached. You may then
    /// make the same push again: it is applied at most once.
    pub async fn push_pull(
        &self,
        gradients: GradientUpdate,
    ) -> Result<(Outcome, Weights), GroupError> {
        let pushed = self.push_pull_timed(gradients).await?;
        Ok((pushed.outcome, pushed.weights))
    }

    /// As [`push_pull`](Self::push_pull). Also says how long the first server held the push.
    pub(crate) async fn push_pull_timed(
        &self,
        gradients: GradientUpdate,
    ) -> Result<Pushed, GroupError> {
        self.stage(&gradients).await?;
        let id = gradients.id;
        reached!(WorkerStaged(id));
        let message = PushPull {
            gradients,
            precision: self.precision,
        };
        let pushed = sent(id, self.ask(0, message)).await?;
        let weights = match self.pull_rest(pushed.weights).await {
            Err(error) if is_version_gone(&error) => self.pull(PullVersion::Latest).await?,
            other => other?,
        };
        Ok(Pushed { weights, ..pushed })
    }

    async fn stage(&self, gradients: &GradientUpdate) -> Result<(), GroupError> {
        if self.servers.len() == 1 {
            return Ok(());
        }
        let GradientUpdate { id, gradient, .. } = gradients;
        let whole = 0..self.servers.last().map_or(0, |(range, _)| range.end);
        if gradient.range() != whole {
            let (id, got, expected) = (*id, gradient.range(), whole);
            let source = ShardError::WrongRange { id, got, expected }.into();
            return Err(GroupError::Server { index: 0, source });
        }
        let staged = self
            .servers
            .iter()
            .enumerate()
            .skip(1)
            .map(|(index, (range, _))| {
                let (id, gradient) = (*id, gradient.slice(range.clone()));
                self.ask(index, Stage { id, gradient })
            });
        try_join_all(staged).await?;
        Ok(())
    }

    /// Applies gradients as one update, at once and in any consistency mode. Returns the new weights.
    ///
    /// # Errors
    /// If a gradient is not acceptable (then none of them is applied), or a server cannot be reached.
    pub async fn apply(
        &self,
        gradients: Vec<GradientUpdate>,
        reduction: Reduction,
    ) -> Result<Weights, GroupError> {
        let first = self
            .ask(
                0,
                ApplyGradients {
                    gradients,
                    reduction,
                },
            )
            .await?;
        match self.pull_rest(first).await {
            Err(error) if is_version_gone(&error) => self.pull(PullVersion::Latest).await,
            other => other,
        }
    }

    /// Changes the consistency mode from now on.
    ///
    /// # Errors
    /// If the mode cannot work, or the server cannot be reached.
    pub async fn set_consistency(&self, consistency: Consistency) -> Result<(), GroupError> {
        self.ask(0, SetConsistency(consistency)).await
    }

    /// Changes the learning rate from now on.
    ///
    /// # Errors
    /// If the rate is not a usable number (see [`ServerConfig::learning_rate`](crate::server::ServerConfig::learning_rate)), or the server cannot be
    /// reached.
    pub async fn set_learning_rate(&self, learning_rate: f64) -> Result<(), GroupError> {
        self.ask(0, SetLearningRate(learning_rate)).await
    }

    /// Pauses all updates, or lets them go on; see [`SetPaused`].
    ///
    /// # Errors
    /// If the server cannot be reached.
    pub async fn set_paused(&self, is_paused: bool) -> Result<(), GroupError> {
        self.ask(0, SetPaused(is_paused)).await
    }

    /// Takes a checkpoint: the state of all servers at one version, while workers push. The servers copy the
    /// state of their update rules. They do not wait until the checkpoint is written.
    ///
    /// ```
    /// use ps_actors::actor::run;
    /// use ps_actors::group::ServerGroup;
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::ServerConfig;
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let initial = Weights::initial(Layout::flat(40), vec![0.5; 40]);
    /// let config = ServerConfig::default();
    /// let servers = ServerGroup::spawn(&initial, 2, config, |_| Box::new(Sgd::new()))?;
    /// let checkpoint = run(servers.checkpoint())?;
    /// assert_eq!(checkpoint.weights().to_vec(), [0.5; 40]);
    ///
    /// // Another number of servers goes on from it.
    /// let servers = ServerGroup::spawn(&checkpoint, 3, config, |_| Box::new(Sgd::new()))?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If a server cannot be reached, or is too far behind the first one.
    pub async fn checkpoint(&self) -> Result<Checkpoint, GroupError> {
        let mut tries = 1;
        loop {
            let first = self.ask(0, TakeCheckpoint).await?;
            let version = first.weights.version();
            let rest = self.servers().enumerate().skip(1);
            let rest = rest.map(|(index, _)| self.ask(index, GetSavedState { version }));
            let rest = self.unless_lost(try_join_all(rest)).await;
            for server in self.servers().skip(1) {
                // If it does not arrive, the next checkpoint frees the memory.
                let _ = server.tell(ForgetSavedStates { until: version });
            }
            match rest {
                Ok(rest) => {
                    let states = [first].into_iter().chain(rest).collect();
                    return Checkpoint::join(states).map_err(bad_part);
                }
                // Another checkpoint was taken meanwhile, and its caller was faster.
                Err(error) if is_version_gone(&error) && tries < MAX_PULL_TRIES => tries += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns the status of each server, in the order of their ranges.
    ///
    /// ```
    /// use ps_actors::actor::run;
    /// use ps_actors::group::ServerGroup;
    /// use ps_actors::ids::Version;
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::ServerConfig;
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let initial = Weights::initial(Layout::flat(3), vec![0.5; 3]);
    /// let servers =
    ///     ServerGroup::spawn(&initial, 2, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
    /// let status = run(servers.status())?;
    /// assert_eq!(status[0].version, Version(0));
    /// assert_eq!(status[0].range.end, status[1].range.start);
    /// assert!(status[0].coordinator.is_some() && status[1].coordinator.is_none());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If a server cannot be reached.
    pub async fn status(&self) -> Result<Vec<ServerStatus>, GroupError> {
        let all = (0..self.servers.len()).map(|index| self.call(index, GetStatus));
        try_join_all(all).await
    }
}

impl From<ActorRef<ParameterServer>> for ServerGroup {
    fn from(server: ActorRef<ParameterServer>) -> Self {
        Self::single(server)
    }
}

fn join_weights(parts: &[Weights]) -> Result<Weights, GroupError> {
    Weights::join(parts).map_err(bad_part)
}

fn bad_part(BadPart { index, reason }: BadPart) -> GroupError {
    GroupError::BadWeights { index, reason }
}

pub(crate) fn is_version_gone(error: &GroupError) -> bool {
    let gone =
        |source: &ServerError| matches!(source, ServerError::Shard(ShardError::VersionGone { .. }));
    matches!(error, GroupError::Server { source, .. } if gone(source))
}
