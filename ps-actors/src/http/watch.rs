//! Tells somebody what the workers over HTTP do.

use std::fmt;

use crate::ids::{Clock, Epoch, GradientId, Incarnation, Version, WorkerId};
use crate::server::Outcome;
use crate::weights::GradientUpdate;

/// Something that a worker over HTTP did. It is reported before the worker gets its answer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Seen {
    /// A worker has joined. This is reported again if the worker repeats its request.
    Joined {
        /// The worker that has joined.
        worker: WorkerId,
        /// The incarnation that it began.
        incarnation: Incarnation,
        /// The clock of its first step.
        clock: Clock,
        /// The epoch of the membership that it began.
        epoch: Epoch,
    },
    /// Somebody said that this incarnation of a worker leaves. Anybody can say so: it has an effect only if the
    /// incarnation is a member.
    Left {
        /// The worker that is said to leave.
        worker: WorkerId,
        /// The incarnation that is said to leave.
        incarnation: Incarnation,
    },
    /// A gradient was settled. This is reported again if the worker repeats its push. It is not reported if the
    /// worker's connection ended before the answer.
    Settled(SettledPush),
}

/// A push of a worker over HTTP whose gradient was settled.
#[derive(Clone, Debug, PartialEq)]
pub struct SettledPush {
    /// Which gradient it is.
    pub id: GradientId,
    /// The version of the weights that the gradient was computed on, as the worker says.
    pub computed_on: Version,
    /// The mean loss of the batch, as the worker says.
    pub loss: f32,
    /// The Euclidean norm of the gradient.
    pub norm: f64,
    /// How many examples the batch had, as the worker says.
    pub num_examples: usize,
    /// What became of the gradient.
    pub outcome: Outcome,
}

/// A gradient whose outcome is not known yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnsettledPush {
    id: GradientId,
    computed_on: Version,
    loss: f32,
    norm: f64,
    num_examples: usize,
}

impl UnsettledPush {
    pub(super) fn of(gradients: &GradientUpdate) -> Self {
        Self {
            id: gradients.id,
            computed_on: gradients.computed_on,
            loss: gradients.loss,
            norm: gradients.gradient.norm(),
            num_examples: gradients.num_examples,
        }
    }

    pub(super) fn settled(self, outcome: Outcome) -> Seen {
        Seen::Settled(SettledPush {
            id: self.id,
            computed_on: self.computed_on,
            loss: self.loss,
            norm: self.norm,
            num_examples: self.num_examples,
            outcome,
        })
    }
}

type Watch = dyn Fn(&Seen) + Send + Sync;

/// The function that is told what the workers do, if there is one.
#[derive(Default)]
pub(super) struct Watcher(Option<Box<Watch>>);

impl Watcher {
    pub(super) fn new(watch: impl Fn(&Seen) + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(watch)))
    }

    pub(super) fn tell(&self, seen: impl FnOnce() -> Seen) {
        if let Self(Some(watch)) = self {
            watch(&seen());
        }
    }
}

impl fmt::Debug for Watcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watcher").field(&self.0.is_some()).finish()
    }
}
