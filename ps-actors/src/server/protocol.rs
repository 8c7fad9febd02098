//! What goes in and out of the [`Coordinator`](super::coordinator::Coordinator): plain data.

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::ledger::Outcome;
use crate::ids::{Clock, Epoch, GradientId, Incarnation, JoinRequest, Version, WorkerId};

/// How many pushes of one worker may be pending, and how many callers may wait for each.
pub(crate) const MAX_PENDING: usize = 16;

/// How many different workers a server keeps books of.
pub(crate) const MAX_WORKERS: usize = 1 << 16;

/// How far a gradient's clock may be ahead of the next one of its worker. A trainer of several models
/// counts for all of them, and a driver may drop what it does not apply, so there are gaps; but no
/// number of a peer brings a worker's clock near its end.
pub(crate) const MAX_CLOCKS_AHEAD: u64 = 1 << 32;

/// How many examples a batch may have: more than any has, and few enough for exact sums of them.
pub(crate) const MAX_EXAMPLES: u64 = 1 << 32;

/// Whom an answer is for. Chosen by the caller of [`Coordinator::step`](super::coordinator::Coordinator::step); answers may come much later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the coordinator needs to know of a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Stamp {
    /// Which gradient it is.
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
            norm,
            num_examples,
            ..
        } = *self;
        Summand {
            id,
            norm,
            num_examples,
        }
    }

    /// How many updates there were between the weights that it was computed on and `version`.
    pub(crate) fn staleness(&self, version: Version) -> u64 {
        version.0.saturating_sub(self.computed_on.0)
    }
}

/// What happened outside.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Event {
    /// A worker wants to take part, in a new life.
    Join {
        /// Whom to answer.
        ticket: Ticket,
        /// Who.
        worker: WorkerId,
        /// Which request this is.
        request: JoinRequest,
    },
    /// A worker takes no further part.
    Leave {
        /// Whom to answer.
        ticket: Ticket,
        /// Who.
        worker: WorkerId,
        /// Which life.
        incarnation: Incarnation,
    },
    /// A member was not heard of within its lease, or is known to be dead.
    Lost {
        /// Who.
        worker: WorkerId,
    },
    /// A member pushes a gradient, to be applied as the consistency mode says.
    Push {
        /// Whom to answer.
        ticket: Ticket,
        /// The gradient.
        stamp: Stamp,
        /// Whether the answer has to wait until the worker may start its next step.
        then_start: bool,
    },
    /// A driver has some gradients applied as one update, at once, whatever the mode.
    Apply {
        /// Whom to answer.
        ticket: Ticket,
        /// The gradients.
        stamps: Vec<Stamp>,
        /// How they become one.
        reduction: Reduction,
        /// The latest life that a worker which never joined can be in by now.
        newest: Incarnation,
    },
    /// Another mode is to be used from now on.
    SetConsistency(Consistency),
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Effect {
    /// Apply these gradients to the weights.
    Update(Update),
    /// This gradient will not be applied: forget its numbers.
    Discard(GradientId),
    /// Forget all gradients of earlier lives of this worker, and accept no more of them.
    Fence {
        /// Whose.
        worker: WorkerId,
        /// The first life that is still valid.
        below: Incarnation,
    },
    /// Answer a caller.
    Answer {
        /// Whom.
        ticket: Ticket,
        /// What.
        answer: Result<Answer, Refusal>,
    },
}

/// One update of the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Update {
    /// The version that it makes: one more than the last.
    pub version: Version,
    /// Its gradients, ordered by worker, so that their sum does not depend on arrival.
    pub gradients: Vec<Summand>,
    /// How they become one.
    pub reduction: Reduction,
}

/// A gradient's part in an update.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summand {
    /// Which gradient.
    pub id: GradientId,
    /// The norm of the numbers that were judged: it tells them from others that somebody staged under the
    /// same name (PS-6).
    pub norm: f64,
    /// How many examples its batch had, which is its weight in a mean; see [`Reduction::Mean`].
    pub num_examples: u64,
}

/// What a caller gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Answer {
    /// The worker takes part.
    Joined(Membership),
    /// The worker takes no further part.
    Left,
    /// What became of the gradient, or of the latest one if there were several.
    Settled(Outcome),
}

/// What a worker needs to know to take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The worker's life, which is part of the name of each of its gradients.
    pub incarnation: Incarnation,
    /// The epoch that began with the worker's coming.
    pub epoch: Epoch,
    /// The clock of the first step to take: the one after the last settled in earlier lives.
    pub next_clock: Clock,
    /// The version of the weights.
    pub version: Version,
}

/// Why an event changed nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Refusal {
    /// The worker has not joined, or has left or been lost.
    #[error("{worker} is not a member: it must join (again)")]
    NotMember {
        /// Who.
        worker: WorkerId,
    },
    /// The worker was a member and silent for too long.
    #[error(
        "{worker} is no longer a member: it was silent for longer than the lease of {lease:?}; it must \
         join again, and send heartbeats while it computes, or the server needs a longer \
         `ServerConfig::lease`"
    )]
    Silent {
        /// Who.
        worker: WorkerId,
        /// The server's lease.
        lease: std::time::Duration,
    },
    /// A later life of the worker is known: this one is over.
    #[error(
        "{worker} is fenced off: {got} is over, the valid one is at least {least}; it must join again"
    )]
    Fenced {
        /// Who.
        worker: WorkerId,
        /// The life that asked.
        got: Incarnation,
        /// The lowest incarnation that is still valid.
        least: Incarnation,
    },
    /// The life claims to have begun in the future.
    #[error(
        "{worker} claims {got}, but no life has a number above {newest} yet: it is the time at which the \
         worker was made, in microseconds since 1970; compare the clocks of the machines"
    )]
    LifeAhead {
        /// Who.
        worker: WorkerId,
        /// What it claims.
        got: Incarnation,
        /// The highest that is accepted now.
        newest: Incarnation,
    },
    /// The gradient's step is too far ahead of its worker's.
    #[error("{id} is too far ahead: its worker's clocks may go up to {most} now")]
    ClockAhead {
        /// Which.
        id: GradientId,
        /// The highest clock that is accepted now.
        most: Clock,
    },
    /// The batch claims to have more examples than any batch has.
    #[error("{id} claims a batch of {claimed} examples, more than {MAX_EXAMPLES}")]
    TooManyExamples {
        /// Which.
        id: GradientId,
        /// What it claims.
        claimed: u64,
    },
    /// Gradients of two lives of a worker would count at once.
    #[error(
        "{worker} has gradients of {one} and of {other}: only one life can count; drop the gradients \
         of the other one, or, if {one} is a member, let it leave first"
    )]
    TwoLives {
        /// Who.
        worker: WorkerId,
        /// The earlier life.
        one: Incarnation,
        /// The later life.
        other: Incarnation,
    },
    /// The gradient is older than what is remembered, or than its worker's life; what had that
    /// clock may or may not have been applied.
    #[error("{id} is over, and its outcome is forgotten; it is not applied")]
    Forgotten {
        /// Which.
        id: GradientId,
    },
    /// The gradient was already applied, or refused, or is waiting for its round.
    #[error("{id} was pushed before; the other gradients of this call were not applied")]
    AlreadyPushed {
        /// Which.
        id: GradientId,
    },
    /// The gradient names weights that do not exist yet.
    #[error("{id} claims to be computed on {claimed}, but the weights are at {version}")]
    FromTheFuture {
        /// Which.
        id: GradientId,
        /// What it says.
        claimed: Version,
        /// What is.
        version: Version,
    },
    /// A worker has more pushes, or more callers for one push, waiting than is allowed.
    #[error("{worker} has {MAX_PENDING} pushes waiting already; wait for their answers first")]
    TooManyPending {
        /// Who.
        worker: WorkerId,
    },
    /// More different workers than a server keeps books of.
    #[error("{worker} cannot take part: {MAX_WORKERS} different workers were seen already")]
    TooManyWorkers {
        /// Who.
        worker: WorkerId,
    },
    /// The call has no gradient.
    #[error("there is no gradient to apply")]
    Empty,
}
