//! A model, or a part of one, that others compute through: forward now, backward later.
//!
//! Who calls has neither the weights nor the graph; it sends an input and gets an output, computes
//! a loss, sends the gradient of the output and gets the gradient of the input, all as [`Array`]s.
//! In between, a [`Pass`] holds the graph and the weights that it was computed with, whatever is
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
    /// The tensor that goes in.
    type Input: Activation;
    /// The tensor that comes out.
    type Output: Activation;

    /// Computes the output. Random choices such as dropout come from `step`.
    fn forward(&self, input: Self::Input, step: &mut Step) -> Self::Output;

    /// Looks at the shape of an input before it is computed with, so that a wrong one gets an error
    /// that says what is expected. What is not refused here and fails in [`forward`](Self::forward)
    /// is an error, too, but shows as a panic in the log.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and what would be right.
    fn check_input(&self, shape: &[usize]) -> Result<(), String> {
        let _ = shape;
        Ok(())
    }
}

/// How many forward computations one [`Pass`] may hold.
pub const MAX_CALLS: usize = 64;

/// Why a part did not compute. What the pass had before is still there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum PartError {
    /// The array has another number of dimensions than the tensor.
    #[error("expected {expected} dimensions, got {got:?}")]
    WrongRank {
        /// The number of dimensions of the tensor.
        expected: usize,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// An array is not what it says.
    #[error("an array of shape {shape:?} cannot have {got} numbers")]
    WrongCount {
        /// The shape that it claims.
        shape: Vec<usize>,
        /// How many numbers it has.
        got: usize,
    },
    /// The part does not take inputs of this shape.
    #[error("an input of shape {got:?} cannot be taken: {reason}")]
    WrongInput {
        /// The shape that came.
        got: Vec<usize>,
        /// What is wrong with it.
        reason: String,
    },
    /// A gradient does not have the shape of the output that it is of.
    #[error("the output has shape {expected:?}, its gradient {got:?}")]
    WrongGradient {
        /// The shape of the output.
        expected: Vec<usize>,
        /// The shape that came.
        got: Vec<usize>,
    },
    /// There is a forward computation of that number already.
    #[error("call {call} was made before; number calls anew")]
    CallRepeated {
        /// The number.
        call: u32,
    },
    /// No forward computation of that number was made.
    #[error("there is no call {call} to go back through")]
    NoSuchCall {
        /// The number.
        call: u32,
    },
    /// The gradient of that call was computed already; its graph is gone.
    #[error("call {call} was gone back through before; its graph is gone: call forward again")]
    AlreadyBackward {
        /// The number.
        call: u32,
    },
    /// More calls than a pass may hold.
    #[error("one pass holds at most {MAX_CALLS} calls")]
    TooManyCalls,
    /// burn or the part panicked.
    #[error("the part panicked: {0}")]
    Panicked(String),
}

impl<P: Part> LocalModel<P> {
    /// Starts a pass on the weights loaded last. Weights loaded later do not change it.
    ///
    /// `seed` decides dropout in its calls.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn begin(&self, seed: StepSeed) -> Result<Pass<P>, PartError> {
        // Graphs of different passes have nothing in common.
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

    /// Computes an output for its own sake: without dropout, without recording for gradients.
    ///
    /// # Errors
    ///
    /// If the input does not fit, or the part panics.
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

/// Computations through a part at one state of its weights, and their gradient.
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
        /// If its gradient is wanted.
        input: Option<P::Input>,
        output: P::Output,
    },
    Backward,
}

impl<P: Part> Pass<P> {
    /// Computes the output for an input and keeps the graph under the number `call`.
    ///
    /// Call 0 draws the same dropout masks as [`LocalModel::gradient`] with the pass's seed; every
    /// other number draws its own. Without `wants_input_gradient`, [`backward`](Self::backward)
    /// saves the work for it, as for a batch of images.
    ///
    /// # Errors
    ///
    /// If the input does not fit, the number was used before, or the part panics.
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

    /// Goes back through a call, given the gradient of a loss with respect to its output. Adds to
    /// the [`gradient`](Self::gradient) of the weights, and returns that of the input if it was
    /// wanted.
    ///
    /// # Errors
    ///
    /// If there was no such call or it was gone back through before, the gradient has another shape
    /// than the output, or burn panics.
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
            // Where nothing can be trained there is no graph.
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

    /// Returns the sum of the gradients of all calls gone back through, flat in the order of
    /// [`LocalModel::layout`]; `None` before the first.
    #[must_use]
    pub fn gradient(&self) -> Option<&[f32]> {
        self.gradient.as_deref()
    }

    /// Takes the gradient out; the next call gone back through begins another.
    pub const fn take_gradient(&mut self) -> Option<Vec<f32>> {
        self.gradient.take()
    }
}

/// Each call has numbers of its own, or two dropout layers would draw the same mask.
fn seed_of_call(seed: StepSeed, call: u32) -> StepSeed {
    match call {
        0 => seed,
        _ => StepSeed {
            seed: Rng::from_parts(&[seed.seed, call.into()]).next_u64(),
            ..seed
        },
    }
}
