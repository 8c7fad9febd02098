//! A worker's membership in a group of servers.
//!
//! A [`DataWorker`](crate::worker::DataWorker) has a session during each run. A program that pushes
//! gradients in another way must make a [`Session`] itself.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use ps_runtime::actor::error_chain;

use crate::group::ServerGroup;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, WorkerId};
use crate::server::{GroupError, Leave, Outcome, Refusal, ServerError, ShardError};

/// How often one call of [`Session::join`] tries to join.
const MAX_JOINS: usize = 4;

/// A worker's membership in a group of servers.
///
/// The membership ends when the session is dropped, for whatever reason. So the other workers do not wait
/// for a worker that has failed.
///
/// This is the loop of a worker that pulls, computes and pushes by itself:
///
/// ```
/// use ps_actors::actor::run;
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::WorkerId;
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{PullVersion, ServerConfig};
/// use ps_actors::session::Session;
/// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(2), vec![1.0, 2.0]);
/// let config = ServerConfig { learning_rate: 0.5, ..ServerConfig::default() };
/// let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new()))?;
///
/// run(async {
///     let session = Session::join(&servers, WorkerId(0)).await?;
///     let mut weights = servers.pull(PullVersion::Latest).await?;
///     let mut clock = session.next_clock();
///     for _ in 0..2 {
///         let update = GradientUpdate {
///             id: session.gradient_id(clock),
///             computed_on: weights.version(),
///             loss: 0.0,
///             num_examples: 1,
///             gradient: Gradient::new(vec![1.0, -1.0]),
///         };
///         let (_outcome, next) = servers.push_pull(update).await?;
///         weights = next;
///         clock = clock.next();
///     }
///     assert_eq!(weights.to_vec(), [0.0, 3.0]);
///     session.leave().await
/// })?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Session {
    servers: ServerGroup,
    next_clock: Clock,
    latest_outcome: Option<Outcome>,
    leave: Option<Leave>,
    worker: WorkerId,
    incarnation: Incarnation,
}

impl Session {
    /// Makes a worker a member, in its next incarnation. This ends an earlier membership of the same
    /// worker.
    ///
    /// ```
    /// use ps_actors::actor::run;
    /// use ps_actors::group::ServerGroup;
    /// use ps_actors::ids::{Clock, WorkerId};
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::ServerConfig;
    /// use ps_actors::session::Session;
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// let initial = Weights::initial(Layout::flat(2), vec![1.0, 2.0]);
    /// let servers =
    ///     ServerGroup::spawn(&initial, 1, ServerConfig::default(), |_| Box::new(Sgd::new()))?;
    /// let first = run(Session::join(&servers, WorkerId(0)))?;
    /// assert_eq!(first.next_clock(), Clock(0));
    /// let again = run(Session::join(&servers, WorkerId(0)))?;
    /// let incarnation = |session: &Session| session.gradient_id(Clock(0)).incarnation;
    /// assert_eq!(incarnation(&again), incarnation(&first).next());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// If the servers refuse the worker or cannot be reached.
    ///
    /// # Panics
    /// If the operating system gives no random numbers.
    pub async fn join(servers: &ServerGroup, worker: WorkerId) -> Result<Self, GroupError> {
        let mut tries = 1;
        loop {
            let request = getrandom::u64().expect("the system gives random numbers");
            let membership = match servers.join(worker, JoinRequest(request)).await {
                Ok(membership) => membership,
                // The answer was lost, and the membership had ended before the same request was sent again.
                Err(error) if may_rejoin(&error) && tries < MAX_JOINS => {
                    tries += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let incarnation = membership.incarnation;
            return Ok(Self {
                servers: servers.clone(),
                next_clock: membership.next_clock,
                latest_outcome: membership.latest_outcome,
                leave: Some(Leave {
                    worker,
                    incarnation,
                }),
                worker,
                incarnation,
            });
        }
    }

    /// Joins again, if `error` says that this membership is over and that the worker may join again.
    ///
    /// # Errors
    /// Returns `error` itself if it says anything else. Returns another error if joining again fails.
    ///
    /// # Panics
    /// If the operating system gives no random numbers.
    pub async fn rejoin(&mut self, error: GroupError) -> Result<(), GroupError> {
        if !may_rejoin(&error) {
            return Err(error);
        }
        let reason = error_chain(&error);
        tracing::warn!(worker = %self.worker, %reason, "joining again");
        self.leave = None;
        *self = Self::join(&self.servers, self.worker).await?;
        Ok(())
    }

    /// Returns the servers of this membership.
    #[must_use]
    pub fn servers(&self) -> &ServerGroup {
        &self.servers
    }

    /// Returns the clock of the first step to take. It follows the last clock that was settled in an
    /// earlier incarnation of the worker.
    #[must_use]
    pub fn next_clock(&self) -> Clock {
        self.next_clock
    }

    /// Returns the outcome of the step before [`next_clock`](Self::next_clock), which an earlier incarnation
    /// of the worker took. `None` if there is no such step, or if the servers have forgotten its outcome.
    #[must_use]
    pub fn latest_outcome(&self) -> Option<Outcome> {
        self.latest_outcome
    }

    /// Returns the id of this membership's gradient at step `clock`.
    #[must_use]
    pub fn gradient_id(&self, clock: Clock) -> GradientId {
        GradientId {
            worker: self.worker,
            incarnation: self.incarnation,
            clock,
        }
    }

    /// Ends the membership, and waits until the servers have confirmed it.
    ///
    /// # Errors
    /// If the servers cannot be reached.
    pub async fn leave(mut self) -> Result<(), GroupError> {
        self.leave = None;
        self.servers.leave(self.worker, self.incarnation).await
    }

    /// Ends the session but keeps the membership, for another worker that goes on in this one's place. So no
    /// round closes without the worker. The caller must let the other worker [join](Self::join), or
    /// [report](ServerGroup::report_lost) this one lost.
    pub fn stay(mut self) {
        self.keep();
    }

    /// Keeps the membership when this is dropped.
    pub(crate) fn keep(&mut self) {
        self.leave = None;
    }

    /// Returns an incarnation that no worker of this process has had, and that is at least `least`.
    ///
    /// Use it for gradients of a worker that is not a member, such as those that a driver applies. The
    /// first one that a process gets is the current time, in microseconds since 1970. So if a worker is
    /// lost with its process and started in another process, its new incarnation has a higher number.
    /// Incarnations of members are assigned by the servers instead.
    #[must_use]
    pub fn new_incarnation(least: Incarnation) -> Incarnation {
        static LATEST: LazyLock<AtomicU64> = LazyLock::new(|| {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
            AtomicU64::new(since_1970.map_or(0, |time| time.as_micros() as u64))
        });
        // The highest number must not wrap to the lowest.
        let next = |latest: u64| latest.max(least.0.saturating_sub(1)).saturating_add(1);
        let before = LATEST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |latest| {
            Some(next(latest))
        });
        Incarnation(before.map_or(u64::MAX, next))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let first = self.servers.servers().next();
        if let (Some(leave), Some(first)) = (self.leave.take(), first)
            && let Err(error) = first.tell(leave)
        {
            tracing::warn!(worker = %leave.worker, %error, "could not leave");
        }
    }
}

/// Whether a worker that got this error may join again.
pub(crate) fn may_rejoin(error: &GroupError) -> bool {
    let GroupError::Server { source, .. } = error else {
        return false;
    };
    matches!(
        source,
        ServerError::Refused(
            Refusal::NotMember { .. } | Refusal::Silent { .. } | Refusal::Fenced { .. }
        ) | ServerError::Shard(ShardError::Fenced { .. } | ShardError::TooManyStrangers { .. })
    )
}
