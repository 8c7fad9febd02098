//! What goes in and out of the [`Coordinator`](super::coordinator::Coordinator): plain data.

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::ledger::Outcome;
use crate::ids::{Clock, Epoch, GradientId, Incarnation, Version, WorkerId};

/// How many pushes of one worker may be pending, and how many callers may wait for each.
pub(crate) const MAX_PENDING: usize = 16;

/// How many different workers a server keeps books of.
pub(crate) const MAX_WORKERS: usize = 1 << 16;

/// Whom an answer is for. Chosen by the caller of [`Coordinator::step`](super::coordinator::Coordinator::step); answers may come much later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

/// What the coordinator needs to know of a gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stamp {
    /// Which gradient it is.
    pub id: GradientId,
    /// The version of the weights that it was computed on.
    pub computed_on: Version,
    /// Its Euclidean norm.
    pub norm: f64,
}

/// What happened outside.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A worker wants to take part, in a life that it did not take part in before.
    Join {
        /// Whom to answer.
        ticket: Ticket,
        /// Who.
        worker: WorkerId,
        /// Which life; higher than any before.
        incarnation: Incarnation,
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
    },
    /// Another mode is to be used from now on.
    SetConsistency(Consistency),
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
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
pub struct Update {
    /// The version that it makes: one more than the last.
    pub version: Version,
    /// Its gradients, ordered by worker, so that their sum does not depend on arrival.
    pub gradients: Vec<GradientId>,
    /// How they become one.
    pub reduction: Reduction,
}

/// What a caller gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Answer {
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
    /// The epoch that began with the worker's coming.
    pub epoch: Epoch,
    /// The clock of the first step to take: the one after the last settled in earlier lives.
    pub next_clock: Clock,
    /// The version of the weights.
    pub version: Version,
}

/// Why an event changed nothing.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// The worker has not joined, or has left or been lost.
    #[error(
        "{worker} is not a member: it must join (again) with an incarnation of at least {least}"
    )]
    NotMember {
        /// Who.
        worker: WorkerId,
        /// The lowest incarnation that may join.
        least: Incarnation,
    },
    /// The worker was a member and silent for too long.
    #[error(
        "{worker} is no longer a member: it was silent for longer than the lease of {lease:?}; it must \
         join again with an incarnation of at least {least}, and send heartbeats while it computes, or the \
         server needs a longer `ServerConfig::lease`"
    )]
    Silent {
        /// Who.
        worker: WorkerId,
        /// The lowest incarnation that may join.
        least: Incarnation,
        /// The server's lease.
        lease: std::time::Duration,
    },
    /// A later life of the worker is known: this one is over.
    #[error("{worker} is fenced off: {got} is over, the valid one is at least {least}")]
    Fenced {
        /// Who.
        worker: WorkerId,
        /// The life that asked.
        got: Incarnation,
        /// The lowest incarnation that is still valid.
        least: Incarnation,
    },
    /// The gradient is older than what is remembered; it may or may not have been applied.
    #[error("the outcome of {id} is forgotten; it is not applied again")]
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
