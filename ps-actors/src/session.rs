//! A worker's membership in a group of servers.
//!
//! A [`DataWorker`](crate::worker::DataWorker) has one during each run; whoever pushes gradients
//! in another way needs one, too.

use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::group::ServerGroup;
use crate::ids::{Clock, GradientId, Incarnation, WorkerId};
use crate::server::{GroupError, Leave, Refusal, ServerError, ShardError};

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
    pub async fn join(servers: &ServerGroup, worker: WorkerId) -> Result<Self, GroupError> {
        Self::join_as(servers, worker, Incarnation(0)).await
    }

    async fn join_as(
        servers: &ServerGroup,
        worker: WorkerId,
        mut least: Incarnation,
    ) -> Result<Self, GroupError> {
        loop {
            let incarnation = Self::new_life(least);
            let membership = match servers.join(worker, incarnation).await {
                Ok(membership) => membership,
                // Another process counts its lives by itself: go beyond its number.
                Err(error) => match error.refusal() {
                    Some(Refusal::Fenced { least: wanted, .. }) if *wanted > incarnation => {
                        least = *wanted;
                        continue;
                    }
                    _ => return Err(error),
                },
            };
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
    pub async fn rejoin(&mut self, error: GroupError) -> Result<(), GroupError> {
        let Some(least) = may_rejoin(&error) else {
            return Err(error);
        };
        tracing::warn!(worker = %self.worker, %least, "no longer a member; joining again");
        self.leave = None;
        *self = Self::join_as(&self.servers, self.worker, least).await?;
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
    /// The first one is the time at which the process first asks (in microseconds since 1970), so
    /// that a worker that was lost with its process is followed by one with a higher number in
    /// another. Where clocks are far apart, the server says what the number must be at least.
    #[must_use]
    pub fn new_life(least: Incarnation) -> Incarnation {
        static LATEST: LazyLock<AtomicU64> = LazyLock::new(|| {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
            AtomicU64::new(since_1970.map_or(0, |time| time.as_micros() as u64))
        });
        // A server may ask for the highest number there is: it must not wrap to the lowest.
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

/// Says with which incarnation a worker may come back that is no longer a member.
fn may_rejoin(error: &GroupError) -> Option<Incarnation> {
    let GroupError::Server { source, .. } = error else {
        return None;
    };
    match source {
        ServerError::Refused(Refusal::NotMember { least, .. } | Refusal::Silent { least, .. })
        | ServerError::Shard(ShardError::Fenced { least, .. }) => Some(*least),
        ServerError::Refused(Refusal::Fenced { least, .. }) => Some(least.next()),
        _ => None,
    }
}
