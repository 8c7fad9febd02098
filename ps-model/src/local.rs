//! One worker's copy of a model, with flat weights and gradients.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use burn::module::Module;
use burn::tensor::{DType, Device};

use crate::flat::{FlatError, FlatView, Numbers, ParameterSpec, TiedField};
use crate::model::{Evaluation, Model};
use crate::step::{Step, StepSeed};
use crate::{panic, rest, stream, survey};

/// Why a model did not compute.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The model or the weights cannot be used.
    #[error(transparent)]
    Flat(#[from] FlatError),
    /// There are more or fewer weights than the model has.
    #[error("the model has {expected} weights, got {got}")]
    WeightCount {
        /// The number of the model's weights.
        expected: usize,
        /// The number of the given weights.
        got: usize,
    },
    /// The loss of a batch is not a single number.
    #[error(
        "the loss must be one number, a tensor of shape [1], but has shape {got:?}: return the mean \
         over the examples, `.mean()`"
    )]
    LossShape {
        /// The dimensions of what the model returned.
        got: Vec<usize>,
    },
    /// The loss has no gradient.
    #[error(
        "the loss depends on no trainable parameter, so there is nothing to learn from it: compute it \
         from the model's parameters, on tensors that were not detached"
    )]
    LossWithoutGradient,
    /// The weights belong to a model with other parameters.
    #[error(
        "the weights are of another model: parameter number {index} is {expected} in this one, \
         {got} in theirs"
    )]
    OtherModel {
        /// The position of the first difference, from 0.
        index: usize,
        /// The name and shape in this model, or that there is none.
        expected: String,
        /// The name and shape in the weights, or that there is none.
        got: String,
    },
    /// burn or the model panicked, for example because of a wrong shape. The weights did not change, and
    /// the next call works.
    #[error("the model panicked: {0}")]
    Panicked(String),
    /// The data set gave no batch to evaluate.
    #[error("there is no batch to evaluate: {0}")]
    NoBatch(String),
}

/// A model on a device, with flat weights and gradients.
///
/// The weights are those of the trainable parameters and of the buffers ([`FlatView`]). All other parameters keep
/// the values of the given model.
///
/// Buffers are running statistics, such as those of `BatchNorm`. A server keeps them, like weights. So
/// [`gradient`](Self::gradient) leaves them as they were loaded, and tells in place of their gradient what the batch
/// would make of them.
///
/// ```
/// use ps_model::{ConvNet, ImageBatch, LocalModel, StepSeed, default_device_name, select_device};
///
/// let device = select_device(default_device_name())?;
/// let mut model = LocalModel::new(ConvNet::init(42, &device), &device)?;
/// assert_eq!(model.num_weights(), 1_960);
///
/// let batch = ImageBatch::new(vec![0.5; 2 * 28 * 28], vec![3, 7], [2, 1, 28, 28], 10)?;
/// let mut gradient = vec![0.0; model.num_weights()];
/// let before = model.gradient(&batch, StepSeed::default(), &mut gradient)?;
///
/// // One step of plain gradient descent.
/// let mut weights = model.weights()?;
/// for (weight, slope) in weights.iter_mut().zip(&gradient) {
///     *weight -= 0.1 * slope;
/// }
/// model.load(&weights)?;
/// assert!(model.evaluate(&batch)?.mean_loss() < f64::from(before));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LocalModel<M: Module> {
    /// In training mode, but without leaves of a graph: see [`rest`].
    pub(crate) model: M,
    /// The device of the model, with autodiff switched on.
    pub(crate) device: Device,
    pub(crate) view: FlatView,
    pub(crate) random_layers: Vec<String>,
    /// The buffers that were loaded last. Clones of a module share its statistics, so the lock is held while they
    /// may differ from these.
    buffers: Mutex<Vec<f32>>,
}

impl<M: Module> LocalModel<M> {
    /// Copies a model to a device, in training mode.
    ///
    /// Frozen parameters stay frozen. If gradient checkpointing is on for `device`, it is also on for the
    /// model.
    ///
    /// # Errors
    ///
    /// If the model has no flat view ([`FlatView::new`]) or cannot be moved to the device.
    pub fn new(model: M, device: &Device) -> Result<Self, ModelError> {
        let device = device.clone().autodiff();
        let at_rest = panic::catch(|| {
            let (model, survey) = rest::to_rest(&model, &device)?;
            let buffers = match survey.view.has_buffers() {
                true => survey.view.read_buffers(&model),
                false => Vec::new(),
            };
            Ok::<_, FlatError>((model, survey, buffers))
        });
        let (model, survey, buffers) = at_rest.map_err(ModelError::Panicked)??;
        say_ties(survey.view.tied());
        Ok(Self {
            model,
            device,
            view: survey.view,
            random_layers: survey.random_layers,
            buffers: Mutex::new(buffers),
        })
    }

    /// Returns the names, shapes and places of the trainable parameters, and behind them those of the buffers.
    #[must_use]
    pub fn layout(&self) -> &[ParameterSpec] {
        self.view.parameters()
    }

    /// Returns the number of weights, those of the buffers included. It is at least 1.
    #[must_use]
    pub fn num_weights(&self) -> usize {
        self.view.num_weights()
    }

    /// Returns how many weights are trainable, at least 1. The buffers stand behind them.
    #[must_use]
    pub fn num_trainable(&self) -> usize {
        self.view.num_trainable()
    }

    /// Returns the type that all trainable parameters and buffers have, or `None` if they have several.
    #[must_use]
    pub fn common_dtype(&self) -> Option<DType> {
        self.view.common_dtype()
    }

    /// Returns the names, shapes and places of the buffers.
    #[must_use]
    pub fn buffers(&self) -> &[ParameterSpec] {
        self.view.buffers()
    }

    /// Returns the fields whose parameter is that of another field before them ([`FlatView::tied`]).
    #[must_use]
    pub fn tied(&self) -> &[TiedField] {
        self.view.tied()
    }

    pub(crate) fn lock_buffers(&self) -> MutexGuard<'_, Vec<f32>> {
        // The vector is replaced as a whole, so it is valid after a panic.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the statistics that were loaded back, and writes those of now behind the trainable part of `out`.
    pub(crate) fn restore(&self, loaded: &[f32], out: &mut [f32]) {
        let new = self.view.read_buffers(&self.model);
        self.view.write_buffers(self.model.clone(), loaded);
        out[self.num_trainable()..].copy_from_slice(&new);
    }

    /// Returns the model with the weights loaded last, in training mode. Its parameters record nothing for
    /// gradients. Those of `model().clone().train()` do.
    #[must_use]
    pub const fn model(&self) -> &M {
        &self.model
    }

    /// Copies the weights.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn weights(&self) -> Result<Vec<f32>, ModelError> {
        panic::catch(|| self.view.read_weights(&self.model)).map_err(ModelError::Panicked)
    }

    /// Passes on what training does not change: the values of all parameters that are not trainable, of the
    /// running statistics of frozen layers, and of flags such as the `training` of a dropout layer. Each comes with its
    /// path, its dimensions, and its bytes in row-major order. The order of the tensors is always the same. The bytes
    /// do not depend on the backend: integers come as `i32` if all of the tensor fit, otherwise as `i64`.
    ///
    /// They do not travel, so processes that train one model together must agree on them. Fields of type
    /// `Tensor` (not `Param`) are not included, because burn does not show them.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn fixed_tensors(
        &self,
        visit: impl FnMut(&str, &[usize], &[u8]),
    ) -> Result<(), ModelError> {
        panic::catch(|| survey::fixed_tensors(&self.model, &self.view, visit))
            .map_err(ModelError::Panicked)
    }

    /// Replaces all weights.
    ///
    /// # Errors
    ///
    /// If the number of `weights` is not [`num_weights`](Self::num_weights), or if the device fails. The
    /// weights then do not change.
    pub fn load(&mut self, weights: &[f32]) -> Result<(), ModelError> {
        if weights.len() != self.num_weights() {
            return Err(ModelError::WeightCount {
                expected: self.num_weights(),
                got: weights.len(),
            });
        }
        self.load_with(|range| weights[range].to_vec())
    }

    /// Replaces all weights. Calls `read` for the range of each parameter in order, which returns the numbers.
    ///
    /// Use it for weights that come in pieces, or whose memory the model may share; see [`FlatView::write_weights`].
    ///
    /// # Errors
    ///
    /// If `read` gives a wrong number of weights or panics, or if the device fails. The weights then do not
    /// change.
    pub fn load_with<N: Into<Numbers>>(
        &mut self,
        read: impl FnMut(Range<usize>) -> N,
    ) -> Result<(), ModelError> {
        // The clone shares the tensors; it keeps the old weights in case this fails.
        let (model, view) = (self.model.clone(), &self.view);
        let written = panic::catch(|| {
            let model = view.write_weights(model, read)?;
            let buffers = view.has_buffers().then(|| view.read_buffers(&model));
            Ok::<_, FlatError>((model, buffers.unwrap_or_default()))
        });
        let (model, buffers) = written.map_err(ModelError::Panicked)??;
        self.model = model;
        self.buffers = Mutex::new(buffers);
        Ok(())
    }
}

/// Logs once that fields are tied. They may be clones of a layer, of which the user wanted several.
fn say_ties(tied: &[TiedField]) {
    static SAID: Once = Once::new();
    if let Some(TiedField { name, first }) = tied.first() {
        SAID.call_once(|| {
            tracing::info!(
                num_tied = tied.len(),
                "`{name}` and `{first}` have the same id, so they are trained as one parameter"
            );
        });
    }
}

impl<M: Model> LocalModel<M> {
    /// Computes the mean loss of a batch. Writes the gradient to `out`. In the places of buffers it writes the
    /// statistics that the layers made of the loaded ones with this batch.
    ///
    /// The loss and the gradient may be infinite or NaN. The server refuses such gradients.
    ///
    /// # Errors
    ///
    /// If the length of `out` is not [`num_weights`](Self::num_weights), if the loss is not a single number
    /// or does not depend on the weights, or if the model panics, for example because of a batch of a wrong
    /// shape. The content of `out` is then unspecified.
    pub fn gradient(
        &self,
        batch: &M::Batch,
        seed: StepSeed,
        out: &mut [f32],
    ) -> Result<f32, ModelError> {
        if out.len() != self.num_weights() {
            return Err(ModelError::WeightCount {
                expected: self.num_weights(),
                got: out.len(),
            });
        }
        let buffers = self.view.has_buffers().then(|| self.lock_buffers());
        let result = panic::catch(|| {
            let model = self.view.with_leaves(self.model.clone());
            let mut step = Step::training(&self.device, seed);
            let loss = stream::seeded(&self.random_layers, &self.device, seed, || {
                model.loss(batch, &mut step)
            });
            let got = loss.dims().to_vec();
            if got != [1] {
                return Err(ModelError::LossShape { got });
            }
            if !loss.is_tracked() {
                return Err(ModelError::LossWithoutGradient);
            }
            let gradients = loss.backward();
            if !self.view.read_gradients(&model, gradients, out) {
                return Err(ModelError::LossWithoutGradient);
            }
            Ok(loss.into_scalar::<f32>())
        });
        // Also after a failure, because the layers may have changed their statistics before it.
        let restored = match &buffers {
            Some(loaded) => panic::catch(|| self.restore(loaded, out)),
            None => Ok(()),
        };
        let loss = result.map_err(ModelError::Panicked)?;
        restored.map_err(ModelError::Panicked)?;
        loss
    }

    /// Evaluates the model on a batch, without dropout and without recording anything for gradients.
    ///
    /// # Errors
    ///
    /// If the model panics, for example because of a batch of a wrong shape.
    pub fn evaluate(&self, batch: &M::Batch) -> Result<Evaluation, ModelError> {
        self.measure(|model, device| model.evaluate(batch, device))
    }

    /// Calls `measure` with the model as it is evaluated: without dropout, and without recording anything for
    /// gradients. The device is the one to evaluate on.
    ///
    /// # Errors
    ///
    /// If `measure` panics, for example because of a batch of a wrong shape.
    pub fn measure<T>(&self, measure: impl FnOnce(&M, &Device) -> T) -> Result<T, ModelError> {
        panic::catch(|| {
            let device = self.device.clone().inner();
            let buffers = self.view.has_buffers().then(|| self.lock_buffers());
            // The copy has statistics of its own.
            let model = self.model.valid();
            drop(buffers);
            measure(&model, &device)
        })
        .map_err(ModelError::Panicked)
    }
}
