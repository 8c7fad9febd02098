//! What a [`PartServer`](super::PartServer) can be asked.

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

/// A tensor on its way; its numbers travel as they are.
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

/// Computes the part's output for an input, and remembers how until [`Backward`].
///
/// The first call of a context takes the latest weights; its later ones see the same.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ArrayMessage, ServedError>")]
pub struct Forward {
    /// Whose computation it belongs to.
    pub context: ContextId,
    /// Its number among the context's calls, on all parts.
    pub call: u32,
    /// Decides dropout. The same for all calls of a context.
    pub seed: StepSeed,
    /// What goes in.
    pub input: ArrayMessage,
    /// Whether [`Backward`] is to return the gradient of the input.
    pub wants_input_gradient: bool,
}

/// Goes back through a [`Forward`]: adds to the context's gradient of the weights, and returns that
/// of the input if it was wanted.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Option<ArrayMessage>, ServedError>")]
pub struct Backward {
    /// Whose computation it belongs to.
    pub context: ContextId,
    /// The number of the call.
    pub call: u32,
    /// The gradient of the loss with respect to what came out.
    pub output_gradient: ArrayMessage,
}

/// Computes an output at the latest weights, without dropout, and remembers nothing.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ArrayMessage, ServedError>")]
pub struct Infer(pub ArrayMessage);

/// Returns a context's gradient of the part's weights so far, and leaves it there.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Gradient, ServedError>")]
pub struct GetGradient(pub ContextId);

/// Pushes a context's gradient to the servers of the part's weights, and says what became of it. The
/// context takes no further part in computations. The same message again gets the same answer.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Outcome, ServedError>")]
pub struct ApplyContext {
    /// Whose gradient.
    pub context: ContextId,
    /// The name under which the servers know it.
    pub id: GradientId,
    /// The loss that it is the gradient of.
    pub loss: f32,
    /// How many examples that loss is the mean of: the gradient's weight in a mean. 0 if that is not known;
    /// see [`Reduction::Mean`](ps_actors::server::Reduction::Mean).
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

/// Returns some of the latest weights, as one row.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<ArrayMessage, ServedError>")]
pub struct GetParameter(pub Range<usize>);

/// Returns the servers that hold the part's weights.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct GetServers;

impl Message for GetServers {
    type Result = ServerGroup;
}

/// Returns what a part server knows about itself.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "PartStatus")]
pub struct GetPartStatus;

/// A part server's view of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartStatus {
    /// How many contexts it remembers now.
    pub num_contexts: usize,
    /// How many it has forgotten because their trainers were not heard of.
    pub num_expired: u64,
    /// The version of the weights that it computed with last.
    pub version: Option<Version>,
}

/// Why a part server did not do what it was asked to.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ServedError {
    /// It does not know the context.
    #[error(
        "{context} is not known here: it was released, or not used for longer than {lease_ms} ms \
         (`PartConfig::context_lease`), or the part server was started anew; begin another one"
    )]
    UnknownContext {
        /// Which.
        context: ContextId,
        /// How long contexts are remembered that nobody uses, in milliseconds.
        lease_ms: u64,
    },
    /// There are too many contexts.
    #[error(
        "{context} cannot begin: {limit} contexts {whose} are remembered already; step or drop \
         them, or raise `PartConfig::{setting}`"
    )]
    TooManyContexts {
        /// Which.
        context: ContextId,
        /// How many there may be.
        limit: usize,
        /// Of whom.
        whose: String,
        /// The setting with the limit.
        setting: String,
    },
    /// The context's gradient is with the servers already.
    #[error("{context} takes no more computations: its gradient was handed to the servers")]
    Stepped {
        /// Which.
        context: ContextId,
    },
    /// Nobody has gone back through the context's computations.
    #[error("{context} has no gradient here: call backward on a loss that depends on this part")]
    NoGradient {
        /// Which.
        context: ContextId,
    },
    /// The input or gradient does not fit, or the part failed.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The servers' weights are not those of this part.
    #[error("the weights of the servers are not those of this part: {reason}")]
    Weights {
        /// What is wrong with them.
        reason: String,
    },
    /// Nobody waited for the answer any more. What was pushed stays, and the same message again gets its
    /// answer.
    #[error("the trainer of {context} has gone: send the same message again for what became of it")]
    CallerGone {
        /// Which.
        context: ContextId,
    },
    /// The servers of the part's weights refused, or were not to be reached.
    #[error("the servers of the part's weights failed")]
    Servers(#[from] GroupError),
}
