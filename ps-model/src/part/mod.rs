//! A model, or a part of one, that other processes compute through: forward now, backward later.
//!
//! The caller has neither the weights nor the graph. It sends an input and gets an output. It computes a
//! loss, sends the gradient of the output, and gets the gradient of the input. All of these are [`Array`]s.
//! In between, a [`Pass`] holds the graph and the weights that it was computed with, whatever weights are
//! loaded meanwhile. The caller joins what it gets with its own graph at [`Seams`].
//!
//! Nothing here sends anything. The actors that do are in `ps::served`.
//!
//! | module | what it holds |
//! |---|---|
//! | `pass` | computations of others through a part, with one version of its weights |
//! | `seams` | how a graph of this process continues behind a computation elsewhere |
//! | `activation` | the tensors that travel |

use burn::module::Module;
use serde::{Deserialize, Serialize};

use crate::step::Step;

mod activation;
mod pass;
mod seams;

pub use activation::{Activation, Array};
pub use pass::Pass;
pub use seams::{AtSeam, Backward, LocalGradients, SeamError, Seams};

/// A burn module that turns one tensor into another: a whole model without its loss, or a part.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::Linear;
/// use burn::tensor::{Tensor, activation::relu};
/// use ps_model::{Part, Step, burn};
///
/// #[derive(Module, Debug)]
/// struct Hidden {
///     linear: Linear,
/// }
///
/// impl Part for Hidden {
///     type Input = Tensor<2>;
///     type Output = Tensor<2>;
///
///     fn forward(&self, x: Tensor<2>, step: &mut Step) -> Tensor<2> {
///         step.dropout(relu(self.linear.forward(x)), 0.5)
///     }
/// }
/// ```
pub trait Part: Module + 'static {
    /// The type of the input.
    type Input: Activation;
    /// The type of the output.
    type Output: Activation;

    /// Computes the output. Take random choices, such as dropout, from `step`.
    fn forward(&self, input: Self::Input, step: &mut Step) -> Self::Output;

    /// Checks the shape of an input before the computation, so that a wrong shape gets an error that says
    /// what is expected. If a wrong input is accepted here and fails in [`forward`](Self::forward), that is
    /// an error too, but it shows as a panic in the log.
    ///
    /// # Errors
    ///
    /// If the shape is wrong. The text says what is wrong and what would be right.
    fn check_input(&self, shape: &[usize]) -> Result<(), String> {
        let _ = shape;
        Ok(())
    }
}

/// How many forward computations one [`Pass`] may hold.
pub const MAX_CALLS: usize = 64;

/// Why a part did not compute. The content of the pass did not change.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum PartError {
    /// The array has another number of dimensions than the tensor.
    #[error("expected {expected} dimensions, got {got:?}")]
    WrongRank {
        /// The number of dimensions of the tensor.
        expected: usize,
        /// The shape of the array.
        got: Vec<usize>,
    },
    /// The number of an array's values is not the product of its shape.
    #[error("an array of shape {shape:?} cannot have {got} numbers")]
    WrongCount {
        /// The shape of the array.
        shape: Vec<usize>,
        /// The number of its values.
        got: usize,
    },
    /// The part does not accept inputs of this shape.
    #[error("the part does not accept an input of shape {got:?}: {reason}")]
    WrongInput {
        /// The shape of the input.
        got: Vec<usize>,
        /// What is wrong with the shape.
        reason: String,
    },
    /// The gradient of an output does not have the shape of the output.
    #[error("the output has shape {expected:?}, its gradient {got:?}")]
    WrongGradient {
        /// The shape of the output.
        expected: Vec<usize>,
        /// The shape of the gradient.
        got: Vec<usize>,
    },
    /// `forward` was already called with this number.
    #[error("forward was already called for call {call}: give each call a new number")]
    CallRepeated {
        /// The number of the call.
        call: u32,
    },
    /// `forward` was not called with this number.
    #[error("forward was not called for call {call}")]
    NoSuchCall {
        /// The number of the call.
        call: u32,
    },
    /// `backward` was already called for this call, and its graph is gone.
    #[error("backward was already called for call {call}: call forward again, with a new number")]
    AlreadyBackward {
        /// The number of the call.
        call: u32,
    },
    /// The part has a layer with running statistics, which only a whole model can train.
    #[error(
        "`{name}` is a running statistic, and a model that lives with a server cannot train it: freeze the \
         layer (`training` off), or use a normalization without it, such as GroupNorm or LayerNorm"
    )]
    RunningStatistics {
        /// The path of the field.
        name: String,
    },
    /// The pass already holds as many calls as it may.
    #[error("one pass holds at most {MAX_CALLS} calls")]
    TooManyCalls,
    /// burn or the part panicked.
    #[error("the part panicked: {0}")]
    Panicked(String),
}
