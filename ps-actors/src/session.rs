//! A worker's membership in a group of servers.
//!
//! A [`DataWorker`](crate::worker::DataWorker) has one during each run; whoever pushes gradients
//! in another way needs one, too.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::group::ServerGroup;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, WorkerId};
use crate::server::{GroupError, Leave, Refusal, ServerError, ShardError};
use ps_runtime::actor::error_chain;

/// How often joining is tried.
const MAX_JOINS: usize = 4;

/// A membership, which ends when this is dropped, whatever the reason: so that others do not wait
/// for a worker that has failed.
#[derive(Debug)]
pub struct Session {
    servers: ServerGroup,
    next_clock: Clock,
    leave: Option<Leave>,
    worker: WorkerId,
    incarnation: Incarnation,
}

impl Session {
    /// Makes a worker a member, in a life of its own: an earlier one of the same worker is over.
    ///
    /// # Errors
    /// When the servers refuse or cannot be reached.
    ///
    /// # Panics
    /// When the system gives no random numbers.
    pub async fn join(servers: &ServerGroup, worker: WorkerId) -> Result<Self, GroupError> {
        let mut tries = 1;
        loop {
            let request = getrandom::u64().expect("the system gives random numbers");
            let membership = match servers.join(worker, JoinRequest(request)).await {
                Ok(membership) => membership,
                // The answer was lost, and the membership was over when it was asked for again.
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
                leave: Some(Leave {
                    worker,
                    incarnation,
                }),
                worker,
                incarnation,
            });
        }
    }

    /// Joins again, if `error` says that this membership is over and another one possible.
    ///
    /// # Errors
    /// The same error, if it says something else; or another one, of the new attempt.
    ///
    /// # Panics
    /// As [`Session::join`].
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

    /// The servers.
    #[must_use]
    pub fn servers(&self) -> &ServerGroup {
        &self.servers
    }

    /// The clock of the first step to take: the one after the last settled in earlier lives.
    #[must_use]
    pub fn next_clock(&self) -> Clock {
        self.next_clock
    }

    /// The name of this membership's gradient of a step.
    #[must_use]
    pub fn gradient_id(&self, clock: Clock) -> GradientId {
        GradientId {
            worker: self.worker,
            incarnation: self.incarnation,
            clock,
        }
    }

    /// Ends the membership, and waits until the servers know.
    ///
    /// # Errors
    /// When the servers cannot be reached.
    pub async fn leave(mut self) -> Result<(), GroupError> {
        self.leave = None;
        self.servers.leave(self.worker, self.incarnation).await
    }

    /// Returns a number that no life of any worker in this process had, and at least `least`.
    ///
    /// It names the gradients of a worker that is no member: those that a driver applies, or that belong
    /// to a context. The first one is the time at which the process first asks (in microseconds since
    /// 1970), so that a worker that was lost with its process is followed by one with a higher
    /// number in another. A member's life is the servers' to number.
    #[must_use]
    pub fn new_incarnation(least: Incarnation) -> Incarnation {
        static LATEST: LazyLock<AtomicU64> = LazyLock::new(|| {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
            AtomicU64::new(since_1970.map_or(0, |time| time.as_micros() as u64))
        });
        // The highest number there is must not wrap to the lowest.
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

/// Says whether a worker that was told so may come back as another life.
fn may_rejoin(error: &GroupError) -> bool {
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
