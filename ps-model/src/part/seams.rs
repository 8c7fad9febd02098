//! Joins the autograd graph of this process with computations in other processes.
//!
//! At a seam, a computation leaves this process and comes back. The tensor that goes out ends one graph,
//! and the tensor that comes back begins another. [`Seams::backward`] goes through the seams in reverse
//! order. At each seam it names the gradient of the tensor that came back. The process that computed this
//! part answers with the gradient of the tensor that went out. This module does no input or output.

use std::fmt;
use std::mem;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Gradients, Tensor};

use super::{Activation, Array, PartError};
use crate::panic;

/// Why the backward pass of a loss failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SeamError {
    /// The answer is not the gradient of the tensor that went out.
    #[error("the gradient that came back does not fit what went out")]
    Answer(#[from] PartError),
    /// burn panicked, most likely because a tensor is used both before a seam and behind it.
    #[error(
        "the backward pass panicked: {0} (a tensor that is used on more than one side of a remote \
         call has to be cut first)"
    )]
    Panicked(String),
}

/// The seams of one computation, in the order in which they were made.
///
/// ```
/// use ps_model::burn::tensor::Tensor;
/// use ps_model::part::Activation;
/// use ps_model::{
///     ConvNet, LocalModel, Rng, Seams, StepSeed, default_device_name, nll_loss, seeded, select_device,
/// };
///
/// let device = select_device(default_device_name())?.autodiff();
/// // The part, which another process would compute.
/// let part = LocalModel::new(ConvNet::init(1, &device), &device)?;
/// let mut pass = part.begin(StepSeed::default())?;
///
/// let mut seams = Seams::new();
/// let images = Tensor::<4>::ones([2, 1, 28, 28], &device);
/// let output = pass.forward(0, images.to_array(), false)?;
/// let (_, output) = seams.cross::<_, Tensor<2>>(images, output)?;
/// // Layers of this process go on from there.
/// let head = seeded::linear(&mut Rng::new(2), [10, 1], &device);
/// let loss = head.forward(output).mean();
///
/// let mut backward = seams.backward(&loss)?;
/// while let Some(mut seam) = backward.next_seam()? {
///     let gradient = std::mem::take(&mut seam.output_gradient);
///     seam.resume(pass.backward(0, gradient)?)?;
/// }
/// assert_eq!(backward.finish().take(&head).len(), 2); // Weight and bias of the head.
/// assert_eq!(pass.gradient().map(<[f32]>::len), Some(part.num_weights()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Default)]
pub struct Seams {
    seams: Vec<Box<dyn Seam>>,
}

/// A seam with two tensors of any ranks.
trait Seam: Send {
    /// Whether the seam is only a cut, with no computation in between.
    fn is_cut(&self) -> bool;

    /// Returns the gradient of the tensor that came back.
    fn output_gradient(&self, gradients: &mut [Gradients]) -> Option<Array>;

    /// Continues the backward pass from the tensor that went out.
    fn resume(&self, input_gradient: Array) -> Result<Option<Gradients>, PartError>;
}

struct Between<I, O> {
    /// Present if its gradient is wanted.
    input: Option<I>,
    output: O,
    is_cut: bool,
}

impl<I: Activation, O: Activation> Seam for Between<I, O> {
    fn is_cut(&self) -> bool {
        self.is_cut
    }

    fn output_gradient(&self, gradients: &mut [Gradients]) -> Option<Array> {
        let parts = gradients.iter_mut();
        parts
            .filter_map(|gradients| self.output.take_gradient(gradients))
            .reduce(|mut sum, part| {
                let pairs = sum.values.iter_mut().zip(part.values);
                pairs.for_each(|(sum, part)| *sum += part);
                sum
            })
    }

    fn resume(&self, input_gradient: Array) -> Result<Option<Gradients>, PartError> {
        let Some(input) = &self.input else {
            return Ok(None);
        };
        let (expected, got) = (input.shape(), &input_gradient.shape);
        if *got != expected {
            let got = got.clone();
            return Err(PartError::WrongGradient { expected, got });
        }
        let gradient = I::from_array(input_gradient, &input.plain_device())?;
        Ok(Some(input.clone().dot(gradient).backward()))
    }
}

impl Seams {
    /// Begins a computation.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a seam for this tensor needs its gradient: whether the tensor depends on anything that can
    /// be trained here.
    #[must_use]
    pub fn wants_gradient(input: &impl Activation) -> bool {
        input.is_recorded()
    }

    /// Adds a seam: `input` went out, and the array came back. Returns it as a new tensor, on the device of
    /// `input` and with autodiff, together with the number of the seam.
    ///
    /// # Errors
    ///
    /// If the array is not a tensor of this rank.
    pub fn cross<I: Activation, O: Activation>(
        &mut self,
        input: I,
        output: Array,
    ) -> Result<(usize, O), PartError> {
        let output = O::from_array(output, &input.training_device())?.into_leaf();
        let number = self.seams.len();
        self.seams.push(Box::new(Between {
            input: input.is_recorded().then_some(input),
            output: output.clone(),
            is_cut: false,
        }));
        Ok((number, output))
    }

    /// Cuts a graph at a tensor that is used several times, one of them outside of this process. Use the
    /// returned tensor instead of `input`. Then the backward pass goes through each piece of the graph
    /// once.
    #[must_use]
    pub fn cut<A: Activation>(&mut self, input: A) -> A {
        let output = input.clone().into_leaf();
        self.seams.push(Box::new(Between {
            input: input.is_recorded().then_some(input),
            output: output.clone(),
            is_cut: true,
        }));
        output
    }

    /// Begins the backward pass of a loss. This can be done once.
    ///
    /// # Errors
    ///
    /// If burn panics, for example because nothing in the loss can be trained.
    pub fn backward(&mut self, loss: &Tensor<1>) -> Result<Backward, SeamError> {
        let first = panic::catch(|| loss.backward()).map_err(SeamError::Panicked)?;
        Ok(Backward {
            seams: mem::take(&mut self.seams),
            gradients: vec![first],
        })
    }
}

/// A backward pass that has begun.
pub struct Backward {
    /// The remaining seams. The last one is next.
    seams: Vec<Box<dyn Seam>>,
    gradients: Vec<Gradients>,
}

/// One seam of a backward pass.
pub struct AtSeam<'a> {
    /// The number of the seam.
    pub number: usize,
    /// The gradient of the loss with respect to the tensor that came back.
    pub output_gradient: Array,
    seam: Box<dyn Seam>,
    gradients: &'a mut Vec<Gradients>,
}

impl Backward {
    /// Returns the next seam that the loss depends on, from the last to the first. After an error the
    /// backward pass cannot go on.
    ///
    /// # Errors
    ///
    /// If burn panics.
    pub fn next_seam(&mut self) -> Result<Option<AtSeam<'_>>, SeamError> {
        while let Some(seam) = self.seams.pop() {
            let Some(output_gradient) = seam.output_gradient(&mut self.gradients) else {
                continue;
            };
            if seam.is_cut() {
                let resumed = resume(&*seam, output_gradient)?;
                self.gradients.extend(resumed);
                continue;
            }
            return Ok(Some(AtSeam {
                number: self.seams.len(),
                output_gradient,
                seam,
                gradients: &mut self.gradients,
            }));
        }
        Ok(None)
    }

    /// Returns the gradients of everything that is trained in this process.
    ///
    /// # Panics
    ///
    /// If seams remain.
    #[must_use]
    pub fn finish(self) -> LocalGradients {
        assert!(self.seams.is_empty(), "there are seams left to go through");
        LocalGradients {
            gradients: self.gradients,
        }
    }
}

impl AtSeam<'_> {
    /// Continues with the gradient of the loss with respect to the tensor that went out; `None` if it was
    /// not wanted.
    ///
    /// # Errors
    ///
    /// If the gradient has another shape than the tensor that went out, or if burn panics.
    pub fn resume(self, input_gradient: Option<Array>) -> Result<(), SeamError> {
        let Some(input_gradient) = input_gradient else {
            return Ok(());
        };
        self.gradients.extend(resume(&*self.seam, input_gradient)?);
        Ok(())
    }
}

fn resume(seam: &dyn Seam, input_gradient: Array) -> Result<Option<Gradients>, SeamError> {
    let resumed = panic::catch(|| seam.resume(input_gradient));
    Ok(resumed.map_err(SeamError::Panicked)??)
}

/// The gradients of a loss with respect to everything trained in this process.
pub struct LocalGradients {
    gradients: Vec<Gradients>,
}

impl LocalGradients {
    /// Takes out the gradients of a module's parameters, for a burn optimizer. Empty if the loss does not
    /// depend on the module.
    pub fn take<M: Module>(&mut self, module: &M) -> GradientsParams {
        let mut sum = GradientsAccumulator::new();
        for gradients in &mut self.gradients {
            let part = GradientsParams::from_module(gradients, module);
            sum.accumulate(module, part);
        }
        sum.grads()
    }
}

impl fmt::Debug for Seams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seams")
            .field("num_seams", &self.seams.len())
            .finish()
    }
}

impl fmt::Debug for Backward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backward")
            .field("num_ahead", &self.seams.len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for AtSeam<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtSeam")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LocalGradients {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalGradients").finish_non_exhaustive()
    }
}
