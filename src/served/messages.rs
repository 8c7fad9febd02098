//! The messages of a [`PartServer`](super::PartServer).

use std::ops::Range;

use actix::Message;
use ps_actors::codec::Bulk;
use ps_actors::group::ServerGroup;
use ps_actors::ids::{GradientId, Version};
use ps_actors::server::{GroupError, Outcome};
use ps_actors::weights::{Gradient, Layout};
use ps_model::{Array, PartError, StepSeed};
use serde::{Deserialize, Serialize};

use super::contexts::ContextId;

/// A tensor inside a message. Its numbers are sent as they are.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ArrayMessage {
    shape: Vec<usize>,
    values: Bulk,
}

impl From<Array> for ArrayMessage {
    fn from(Array { shape, values }: Array) -> Self {
        let values = values.into();
        Self { shape, values }
    }
}

impl From<ArrayMessage> for Array {
    fn from(ArrayMessage { shape, values }: ArrayMessage) -> Self {
        let values = values.into();
        Self { shape, values }
    }
}

/// Computes the part's output for an input. The part keeps the graph until [`Backward`].
///
/// The first call of a context takes the latest weights. Its later calls use the same weights.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ArrayMessage, ServedError>")]
pub struct Forward {
    /// The context of the computation.
    pub context: ContextId,
    /// The number of this call among all calls of the context, on all parts.
    pub call: u32,
    /// The seed of dropout. It is the same for all calls of a context.
    pub seed: StepSeed,
    /// The input, in the shape that the part expects.
    pub input: ArrayMessage,
    /// Whether [`Backward`] is to return the gradient of the input.
    pub wants_input_gradient: bool,
}

/// Computes the backward pass of a [`Forward`]. Adds to the context's gradient of the weights. Returns the
/// gradient of the input, if it was wanted.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Option<ArrayMessage>, ServedError>")]
pub struct Backward {
    /// The context of the computation.
    pub context: ContextId,
    /// The number of the [`Forward`] call.
    pub call: u32,
    /// The gradient of the loss with respect to the output.
    pub output_gradient: ArrayMessage,
}

/// Computes an output at the latest weights, without dropout. Remembers nothing.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ArrayMessage, ServedError>")]
pub struct Infer(pub ArrayMessage);

/// Returns a context's gradient of the part's weights so far. The part server keeps it.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Gradient, ServedError>")]
pub struct GetGradient(pub ContextId);

/// Pushes a context's gradient to the servers of the part's weights, and returns its outcome. The context
/// takes no further computations. The same message again gets the same answer.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Outcome, ServedError>")]
pub struct ApplyContext {
    /// The context whose gradient is pushed.
    pub context: ContextId,
    /// The id under which the gradient is pushed to the servers.
    pub id: GradientId,
    /// The loss that this is the gradient of.
    pub loss: f32,
    /// How many examples the loss is the mean of. This is the gradient's weight in a mean. 0 if it is not
    /// known; see [`Reduction::Mean`](ps_actors::server::Reduction::Mean).
    pub num_examples: usize,
}

/// Forgets a context.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub struct ReleaseContext(pub ContextId);

/// Returns the names and shapes of the part's parameters.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Layout")]
pub struct GetLayout;

/// Returns a range of the latest weights, as an array of one dimension.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ArrayMessage, ServedError>")]
pub struct GetParameter(pub Range<usize>);

/// Returns the servers that hold the part's weights.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct GetServers;

impl Message for GetServers {
    type Result = ServerGroup;
}

/// Returns the status of a part server.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "PartStatus")]
pub struct GetPartStatus;

/// The status of a part server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartStatus {
    /// How many contexts the part server remembers now.
    pub num_contexts: usize,
    /// How many contexts it has forgotten because they were not used for the length of the lease.
    pub num_expired: u64,
    /// The version of the weights that it loaded last. `None` before the first computation.
    pub version: Option<Version>,
}

/// Why a part server did not do what a message asked.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ServedError {
    /// The part server does not know the context.
    #[error(
        "{context} is not known here: it was released, or not used for longer than {lease_ms} ms \
         (`PartConfig::context_lease`), or the part server was started anew; begin another one"
    )]
    UnknownContext {
        /// The unknown context.
        context: ContextId,
        /// How long an unused context is remembered, in milliseconds.
        lease_ms: u64,
    },
    /// There are too many contexts.
    #[error(
        "{context} cannot begin: {limit} contexts {whose} are remembered already; step or drop \
         them, or raise `PartConfig::{setting}`"
    )]
    TooManyContexts {
        /// The context that was refused.
        context: ContextId,
        /// How many contexts there may be.
        limit: usize,
        /// Whether the limit is for all trainers or for one.
        whose: String,
        /// The name of the setting with the limit.
        setting: String,
    },
    /// The context's gradient has already been pushed to the servers.
    #[error("{context} takes no more computations: its gradient was pushed to the servers")]
    Stepped {
        /// The context that takes no more computations.
        context: ContextId,
    },
    /// There was no backward pass through the context's computations of this part.
    #[error("{context} has no gradient here: call backward on a loss that depends on this part")]
    NoGradient {
        /// The context without a gradient.
        context: ContextId,
    },
    /// The input or gradient does not fit, or the part failed.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The servers' weights are not those of this part.
    #[error("the weights of the servers are not those of this part: {reason}")]
    Weights {
        /// How the weights differ.
        reason: String,
    },
    /// The caller has gone before the answer was known. The pushed gradient stays, and the same message
    /// again gets its outcome.
    #[error("the trainer of {context} has gone: send the same message again to get the outcome")]
    CallerGone {
        /// The context of the message.
        context: ContextId,
    },
    /// The servers of the part's weights refused the call, or could not be reached.
    #[error("the servers of the part's weights failed")]
    Servers(#[from] GroupError),
}
