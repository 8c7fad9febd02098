//! Computations through a part with one version of its weights.

use burn::tensor::Device;

use super::{Activation, Array, MAX_CALLS, Part, PartError};
use crate::flat::FlatView;
use crate::local::LocalModel;
use crate::rng::Rng;
use crate::step::{Step, StepSeed};
use crate::{panic, stream};

impl<P: Part> LocalModel<P> {
    /// Starts a pass with the current weights. Weights that are loaded later do not change it.
    ///
    /// `seed` decides dropout in the calls of the pass.
    ///
    /// # Errors
    ///
    /// If the part has a layer with running statistics that is not frozen, or if the device fails.
    pub fn begin(&self, seed: StepSeed) -> Result<Pass<P>, PartError> {
        // Several calls of a pass, and several passes, would change them in turn.
        if let Some(first) = self.view.buffers().first() {
            let name = first.name.clone();
            return Err(PartError::RunningStatistics { name });
        }
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
    /// The device of the part, with autodiff switched on.
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
