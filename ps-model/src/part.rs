//! A model, or a part of one, that other processes compute through: forward now, backward later.
//!
//! The caller has neither the weights nor the graph. It sends an input and gets an output. It computes a
//! loss, sends the gradient of the output, and gets the gradient of the input. All of these are [`Array`]s.
//! In between, a [`Pass`] holds the graph and the weights that it was computed with, whatever weights are
//! loaded meanwhile.

use burn::module::Module;
use burn::tensor::Device;
use serde::{Deserialize, Serialize};

use crate::activation::{Activation, Array};
use crate::flat::FlatView;
use crate::local::LocalModel;
use crate::rng::Rng;
use crate::step::{Step, StepSeed};
use crate::{panic, stream};

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
    /// The pass already holds as many calls as it may.
    #[error("one pass holds at most {MAX_CALLS} calls")]
    TooManyCalls,
    /// burn or the part panicked.
    #[error("the part panicked: {0}")]
    Panicked(String),
}

impl<P: Part> LocalModel<P> {
    /// Starts a pass with the current weights. Weights that are loaded later do not change it.
    ///
    /// `seed` decides dropout in the calls of the pass.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn begin(&self, seed: StepSeed) -> Result<Pass<P>, PartError> {
        // The graphs of different passes share nothing.
        let part = panic::catch(|| self.view.with_leaves(self.model.clone()));
        Ok(Pass {
            part: part.map_err(PartError::Panicked)?,
            device: self.device.clone(),
            view: self.view.clone(),
            random_layers: self.random_layers.clone(),
            seed,
            calls: Vec::new(),
            gradient: None,
        })
    }

    /// Computes an output, without dropout and without recording anything for gradients.
    ///
    /// # Errors
    ///
    /// If the part does not accept the input, or if it panics.
    pub fn infer(&self, input: Array) -> Result<Array, PartError> {
        check_input(&self.model, &input)?;
        let device = self.device.clone().inner();
        let input = P::Input::from_array(input, &device)?;
        panic::catch(|| {
            let mut step = Step::evaluation(&device);
            self.model.valid().forward(input, &mut step).to_array()
        })
        .map_err(PartError::Panicked)
    }
}

fn check_input<P: Part>(part: &P, input: &Array) -> Result<(), PartError> {
    part.check_input(&input.shape)
        .map_err(|reason| PartError::WrongInput {
            got: input.shape.clone(),
            reason,
        })
}

/// Computations through a part with one version of its weights, and their gradient.
#[derive(Debug)]
pub struct Pass<P: Part> {
    part: P,
    /// With autodiff.
    device: Device,
    view: FlatView,
    random_layers: Vec<String>,
    seed: StepSeed,
    calls: Vec<(u32, Call<P>)>,
    gradient: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Call<P: Part> {
    Forward {
        /// Kept if the gradient of the input is wanted.
        input: Option<P::Input>,
        output: P::Output,
    },
    Backward,
}

impl<P: Part> Pass<P> {
    /// Computes the output for an input, and keeps the graph under the number `call`.
    ///
    /// Call 0 draws the same dropout masks as [`LocalModel::gradient`] with the seed of the pass. Every
    /// other number draws other masks. If `wants_input_gradient` is false, [`backward`](Self::backward)
    /// does not compute the gradient of the input. A batch of images, for example, needs none.
    ///
    /// # Errors
    ///
    /// If the part does not accept the input, if the number was used before, or if the part panics.
    pub fn forward(
        &mut self,
        call: u32,
        input: Array,
        wants_input_gradient: bool,
    ) -> Result<Array, PartError> {
        if self.calls.iter().any(|(other, _)| *other == call) {
            return Err(PartError::CallRepeated { call });
        }
        if self.calls.len() == MAX_CALLS {
            return Err(PartError::TooManyCalls);
        }
        check_input(&self.part, &input)?;
        let input = P::Input::from_array(input, &self.device)?;
        let seed = seed_of_call(self.seed, call);
        let (input, output, array) = panic::catch(|| {
            let input = match wants_input_gradient {
                true => input.into_leaf(),
                false => input,
            };
            let mut step = Step::training(&self.device, seed);
            let output = stream::seeded(&self.random_layers, &self.device, seed, || {
                self.part.forward(input.clone(), &mut step)
            });
            let array = output.to_array();
            (wants_input_gradient.then_some(input), output, array)
        })
        .map_err(PartError::Panicked)?;
        self.calls.push((call, Call::Forward { input, output }));
        Ok(array)
    }

    /// Computes the backward pass of a call, from the gradient of a loss with respect to its output. Adds
    /// the gradient of the weights to [`gradient`](Self::gradient). Returns the gradient of the input, if
    /// it was wanted.
    ///
    /// # Errors
    ///
    /// If there was no such call, if `backward` was already called for it, if the gradient has another
    /// shape than the output, or if burn panics.
    pub fn backward(
        &mut self,
        call: u32,
        output_gradient: Array,
    ) -> Result<Option<Array>, PartError> {
        let state = self.calls.iter_mut().find(|(other, _)| *other == call);
        let Some((_, state)) = state else {
            return Err(PartError::NoSuchCall { call });
        };
        let Call::Forward { output, .. } = &*state else {
            return Err(PartError::AlreadyBackward { call });
        };
        let expected = output.shape();
        if output_gradient.shape != expected {
            return Err(PartError::WrongGradient {
                expected,
                got: output_gradient.shape,
            });
        }
        let output_gradient = P::Output::from_array(output_gradient, &output.plain_device())?;
        // Whatever happens below, the graph can be used only once.
        let Call::Forward { input, output } = std::mem::replace(state, Call::Backward) else {
            unreachable!("it was just looked at");
        };
        let mut gradient = vec![0.0; self.view.num_weights()];
        let input_gradient = panic::catch(|| {
            // If nothing can be trained, there is no graph.
            if !output.is_recorded() {
                return None;
            }
            let mut gradients = output.dot(output_gradient).backward();
            let input_gradient = input.and_then(|input| input.take_gradient(&mut gradients));
            self.view
                .read_gradients(&self.part, gradients, &mut gradient);
            input_gradient
        })
        .map_err(PartError::Panicked)?;
        match &mut self.gradient {
            Some(sum) => sum.iter_mut().zip(gradient).for_each(|(sum, g)| *sum += g),
            none => *none = Some(gradient),
        }
        Ok(input_gradient)
    }

    /// Returns the sum of the gradients of all calls whose backward pass was computed. It is flat, in the
    /// order of [`LocalModel::layout`]. `None` before the first backward pass.
    #[must_use]
    pub fn gradient(&self) -> Option<&[f32]> {
        self.gradient.as_deref()
    }

    /// Takes the gradient out of the pass. The next backward pass begins another sum.
    pub const fn take_gradient(&mut self) -> Option<Vec<f32>> {
        self.gradient.take()
    }
}

/// Each call gets its own random numbers. Otherwise two dropout layers would draw the same mask.
fn seed_of_call(seed: StepSeed, call: u32) -> StepSeed {
    match call {
        0 => seed,
        _ => StepSeed {
            seed: Rng::from_parts(&[seed.seed, call.into()]).next_u64(),
            ..seed
        },
    }
}
