//! The events and effects of the [`Coordinator`](super::coordinator::Coordinator): plain data.

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::ledger::Outcome;
use crate::ids::{Clock, Epoch, GradientId, Incarnation, JoinRequest, Version, WorkerId};

/// How many pushes of one worker may be pending, and how many callers may wait for each.
pub(crate) const MAX_PENDING: usize = 16;

/// How many different workers a server keeps records of.
pub(crate) const MAX_WORKERS: usize = 1 << 16;

/// How far a gradient's clock may be ahead of the next clock of its worker. There may be gaps, because a
/// trainer of several models counts one clock for all of them, and a driver may drop gradients. But no
/// number from a peer may bring a worker's clock near its end.
pub(crate) const MAX_CLOCKS_AHEAD: u64 = 1 << 32;

/// How many examples a batch may have. This is more than any batch has, and few enough for exact sums.
pub(crate) const MAX_EXAMPLES: u64 = 1 << 32;

/// The caller that an answer is for. The caller of
/// [`Coordinator::step`](super::coordinator::Coordinator::step) chooses it. The answer may come much later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the coordinator knows about a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stamp {
    /// The id of the gradient.
    pub id: GradientId,
    /// The version of the weights that it was computed on.
    pub computed_on: Version,
    /// Its Euclidean norm.
    pub norm: f64,
    /// How many examples its batch had; 0 if that is not known.
    pub num_examples: u64,
}

impl Stamp {
    pub(crate) fn summand(&self) -> Summand {
        let Self {
            id,
            computed_on,
            norm,
            num_examples,
        } = *self;
        Summand {
            id,
            computed_on,
            norm,
            num_examples,
        }
    }

    /// How many updates there were between the weights that it was computed on and `version`.
    pub(crate) fn staleness(&self, version: Version) -> u64 {
        self.summand().staleness(version)
    }
}

/// What happened outside.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Event {
    /// A worker wants to join, in a new incarnation.
    Join {
        /// The caller to answer.
        ticket: Ticket,
        /// The worker that joins.
        worker: WorkerId,
        /// The number of this request.
        request: JoinRequest,
    },
    /// A worker leaves.
    Leave {
        /// The caller to answer.
        ticket: Ticket,
        /// The worker that leaves.
        worker: WorkerId,
        /// The incarnation that leaves.
        incarnation: Incarnation,
    },
    /// A member was silent for longer than its lease, or is known to be dead.
    Lost {
        /// The worker that is lost.
        worker: WorkerId,
    },
    /// A member pushes a gradient, to be applied as the consistency mode says.
    Push {
        /// The caller to answer.
        ticket: Ticket,
        /// What the coordinator knows of the gradient.
        stamp: Stamp,
        /// Whether the answer has to wait until the worker may start its next step.
        then_start: bool,
    },
    /// A driver applies some gradients as one update, at once and in any mode.
    Apply {
        /// The caller to answer.
        ticket: Ticket,
        /// What the coordinator knows of each gradient.
        stamps: Vec<Stamp>,
        /// How the gradients are combined into one.
        reduction: Reduction,
        /// The latest incarnation that a worker may have now that never joined.
        newest: Incarnation,
    },
    /// Another mode is used from now on.
    SetConsistency(Consistency),
    /// From now on no update is made of pushes, or they are made again.
    SetPaused(bool),
}

/// What the server must do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Effect {
    /// Apply these gradients to the weights.
    Update(Update),
    /// This gradient was settled without being applied. Nothing has to be done for that, but an update log
    /// must have it.
    Settled {
        /// The id of the gradient.
        id: GradientId,
        /// Why it was not applied.
        outcome: Outcome,
    },
    /// A worker has joined by this request. Nothing has to be done for that, but an update log must have it.
    Joined {
        /// The worker that has joined.
        worker: WorkerId,
        /// The request that began its incarnation.
        request: JoinRequest,
    },
    /// This gradient will not be applied. Forget its numbers.
    Discard(GradientId),
    /// Forget all gradients of earlier incarnations of this worker, and accept no more of them.
    Fence {
        /// The worker whose earlier incarnations are over.
        worker: WorkerId,
        /// The first incarnation that is still valid.
        below: Incarnation,
    },
    /// Answer a caller.
    Answer {
        /// The caller that gets the answer.
        ticket: Ticket,
        /// What it is told.
        answer: Result<Answer, Refusal>,
    },
}

/// One update of the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Update {
    /// The version that the update makes: one more than the version before it.
    pub version: Version,
    /// Its gradients, ordered by worker, so that their sum does not depend on the order of arrival (S-7).
    pub gradients: Vec<Summand>,
    /// How the gradients are combined into one.
    pub reduction: Reduction,
    /// How the combined gradient is clipped. The first server fills it in before anybody follows the update,
    /// because only this server has the whole gradients.
    pub clip: Clip,
}

/// How the combined gradient of one update is clipped. Each server does this to its own part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) enum Clip {
    /// Not at all.
    #[default]
    None,
    /// It is multiplied by this factor, from 0 to 1.
    Scale(f32),
    /// Its numbers are limited to the range from minus this positive number to this number.
    Value(f32),
}

impl Clip {
    /// Whether a first server can have decided this.
    pub(crate) fn is_possible(self) -> bool {
        match self {
            Self::None => true,
            Self::Scale(factor) => (0.0..=1.0).contains(&factor),
            Self::Value(limit) => limit > 0.0,
        }
    }
}

/// A gradient's part in an update.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summand {
    /// The id of the gradient.
    pub id: GradientId,
    /// The version of the weights that it was computed on.
    pub computed_on: Version,
    /// The norm of the numbers that were checked. It tells them from other numbers that somebody staged
    /// under the same id (PS-6).
    pub norm: f64,
    /// How many examples the gradient's batch had. This is its weight in a mean; see [`Reduction::Mean`].
    pub num_examples: u64,
}

impl Summand {
    /// How many updates there were between the weights that it was computed on and `version`.
    pub(crate) fn staleness(&self, version: Version) -> u64 {
        version.0.saturating_sub(self.computed_on.0)
    }
}

/// The answer to a caller.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Answer {
    /// The worker has joined.
    Joined(Membership),
    /// The worker has left.
    Left,
    /// The outcome of the gradient, or of the latest one if there were several.
    Settled(Outcome),
}

/// The answer to a worker that joins.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Membership {
    /// The worker's incarnation, which is part of the id of each of its gradients.
    pub incarnation: Incarnation,
    /// The epoch that began when the worker joined.
    pub epoch: Epoch,
    /// The clock of the first step to take. It follows the last clock that was settled in an earlier
    /// incarnation.
    pub next_clock: Clock,
    /// The outcome of the step before `next_clock`, which an earlier incarnation took. `None` if there is no
    /// such step, or if its outcome is forgotten.
    pub latest_outcome: Option<Outcome>,
    /// The current version of the weights.
    pub version: Version,
}

/// Why the server refused a worker or its gradient. Nothing changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Refusal {
    /// The worker has not joined, or has left or been lost.
    #[error("{worker} is not a member: it must join (again)")]
    NotMember {
        /// The worker that is not a member.
        worker: WorkerId,
    },
    /// The worker was a member, but was silent for longer than the worker lease.
    #[error(
        "{worker} is no longer a member: it was silent for longer than the lease of {lease:?}; it must \
         join again, and send heartbeats while it computes, or the server needs a longer \
         `ServerConfig::worker_lease`"
    )]
    Silent {
        /// The worker that was silent.
        worker: WorkerId,
        /// The server's worker lease.
        lease: std::time::Duration,
    },
    /// A later incarnation of the worker is known, so this one is over.
    #[error(
        "{worker} is fenced off: {got} is over, the valid one is at least {least}; it must join again"
    )]
    Fenced {
        /// The worker whose incarnation is over.
        worker: WorkerId,
        /// The incarnation of the call.
        got: Incarnation,
        /// The lowest incarnation that is still valid.
        least: Incarnation,
    },
    /// The incarnation of a worker that never joined is too far in the future.
    #[error(
        "{worker} claims {got}, but at this time it can be at most {newest}: it is the time at which the \
         worker was made, in microseconds since 1970; compare the clocks of the machines"
    )]
    IncarnationAhead {
        /// The worker with this incarnation.
        worker: WorkerId,
        /// The incarnation of the call.
        got: Incarnation,
        /// The highest incarnation that is accepted now.
        newest: Incarnation,
    },
    /// The clock of the gradient is too far ahead of its worker's clock.
    #[error("{id} is too far ahead: its worker's clocks may go up to {most} now")]
    ClockAhead {
        /// The id of the gradient.
        id: GradientId,
        /// The highest clock that is accepted now.
        most: Clock,
    },
    /// The gradient says that its batch has more examples than any batch has.
    #[error("{id} claims a batch of {claimed} examples, more than {MAX_EXAMPLES}")]
    TooManyExamples {
        /// The id of the gradient.
        id: GradientId,
        /// The number of examples that the gradient names.
        claimed: u64,
    },
    /// A call has gradients of two incarnations of one worker.
    #[error(
        "{worker} has gradients of {one} and of {other}: only one of them can count; drop the \
         gradients of the other, or, if {one} is a member, let it leave first"
    )]
    TwoIncarnations {
        /// The worker with two incarnations.
        worker: WorkerId,
        /// The earlier incarnation.
        one: Incarnation,
        /// The later incarnation.
        other: Incarnation,
    },
    /// The gradient is older than what the server remembers, or than its worker's incarnation. A gradient
    /// with this clock may or may not have been applied earlier.
    #[error("{id} is over, and its outcome is forgotten; it is not applied")]
    Forgotten {
        /// The id of the gradient.
        id: GradientId,
    },
    /// The gradient has already been applied or refused, or is waiting for its round.
    #[error("{id} was pushed before; the other gradients of this call were not applied")]
    AlreadyPushed {
        /// The id of the gradient.
        id: GradientId,
    },
    /// The gradient names a version of the weights that does not exist yet.
    #[error("{id} claims to be computed on {claimed}, but the weights are at {version}")]
    FromTheFuture {
        /// The id of the gradient.
        id: GradientId,
        /// The version that the gradient names.
        claimed: Version,
        /// The current version.
        version: Version,
    },
    /// The worker has too many waiting pushes, or too many callers wait for one of its pushes.
    #[error("{worker} has {MAX_PENDING} pushes waiting already; wait for their answers first")]
    TooManyPending {
        /// The worker with the waiting pushes.
        worker: WorkerId,
    },
    /// The server already has records of as many workers as it may have.
    #[error("{worker} cannot take part: {MAX_WORKERS} different workers were seen already")]
    TooManyWorkers {
        /// The worker that is one too many.
        worker: WorkerId,
    },
    /// The call has no gradient.
    #[error("there is no gradient to apply")]
    Empty,
}
