//! The events that follow each gradient, for observers that ask for them
//! ([`follows_gradients`](crate::observe::Observer::follows_gradients)).

use ps_actors::cluster::NodeId;
use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use ps_actors::server::AppliedPart;
use serde::{Deserialize, Serialize};

/// Another server than the first one has applied its part of a gradient. It comes after the [step](super::SettledStep) of the
/// gradient, unless that is missed or [skipped](super::EventsSkipped), or more than 16,384 parts wait for their steps. As the
/// times of a step, these are measured by the server's own clock, and placed in the run when they arrive: late by the way
/// of the answer.
///
/// A server keeps the records of its latest 8,192 parts, and is asked four times per second. Parts of which the
/// records are lost have no event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct PartApplied {
    /// When the server had made the update, in seconds since the run started.
    pub time: f64,
    /// The index of the server in its group. The first one, which decides, is 0.
    pub server: usize,
    /// Where the server is.
    pub node: NodeId,
    /// The worker that computed the gradient.
    pub worker: WorkerId,
    /// The incarnation that the worker had.
    pub incarnation: Incarnation,
    /// The clock of the step.
    pub clock: Clock,
    /// The version of the weights that the update made.
    pub version: Version,
    /// How long the server had the part before it began the update, in seconds. 0 if it does not know when the part came.
    pub held: f64,
    /// How long the server took to make the update, in seconds. If several updates waited for the same part, this is the
    /// time of all of them.
    pub took: f64,
}

impl PartApplied {
    /// `time` is when the update was made, in seconds since the run started. The other times come from a peer, so they are
    /// cut to what can be.
    pub(crate) fn of(server: usize, node: NodeId, part: &AppliedPart, time: f64) -> Self {
        let took = part.took.as_secs_f64().min(time);
        Self {
            time,
            server,
            node,
            worker: part.id.worker,
            incarnation: part.id.incarnation,
            clock: part.id.clock,
            version: part.version,
            held: part.held.as_secs_f64().min(time - took),
            took,
        }
    }

    /// Returns the name of the gradient.
    #[must_use]
    pub fn gradient(&self) -> GradientId {
        GradientId {
            worker: self.worker,
            incarnation: self.incarnation,
            clock: self.clock,
        }
    }
}

/// A driver's own loop has got a gradient that it asked a worker for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Computed {
    /// When the loop took the gradient, in seconds since the run started.
    pub time: f64,
    /// How long that was after it had asked for it, in seconds. If it took the gradient of another worker first, it may
    /// have been there earlier.
    pub seconds: f64,
    /// The worker that computed the gradient.
    pub worker: WorkerId,
    /// The incarnation of the worker.
    pub incarnation: Incarnation,
    /// The clock of the step.
    pub clock: Clock,
    /// The version of the weights that the gradient was computed on.
    pub computed_on: Version,
}

impl Computed {
    /// Returns the name of the gradient.
    #[must_use]
    pub fn gradient(&self) -> GradientId {
        GradientId {
            worker: self.worker,
            incarnation: self.incarnation,
            clock: self.clock,
        }
    }
}

/// A driver's own loop has got the weights of an update that it asked the servers for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct UpdateMade {
    /// When the loop got the weights, in seconds since the run started.
    pub time: f64,
    /// How long that was after it had asked for the update, in seconds.
    pub seconds: f64,
    /// The version of the weights that the update made.
    pub version: Version,
    /// How many gradients the update has.
    pub num_gradients: usize,
}
