//! Between flat gradients and burn's [`GradientsParams`], which has a tensor for each parameter.

use std::ops::Range;
use std::slice;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, TensorData};

use crate::flat::{FlatView, Kind, next, with_values};
use crate::local::{LocalModel, ModelError};
use crate::step::StepSeed;
use crate::{panic, stream};

impl FlatView {
    /// Returns a flat gradient as burn's optimizers take it: one tensor for each trainable parameter, on the
    /// parameter's device. The numbers of buffers are left out.
    ///
    /// A parameter in several fields has one tensor. burn's optimizers then change the first of these fields only, so
    /// afterwards, [`write_weights`](Self::write_weights) with what [`read_weights`](Self::read_weights) gives is
    /// needed.
    ///
    /// ```
    /// use ps_model::burn::optim::{GradientsParams, SgdConfig};
    /// use ps_model::{ConvNet, FlatView, default_device_name, select_device};
    ///
    /// let model = ConvNet::init(0, &select_device(default_device_name())?.autodiff());
    /// let view = FlatView::new(&model)?;
    /// let before = view.read_weights(&model);
    ///
    /// let gradients = view.gradients_by_parameter(&model, &vec![2.0; view.num_weights()]);
    /// let model = SgdConfig::new().init().step(0.5, model, gradients);
    /// let after = view.read_weights(&model);
    /// assert!(before.iter().zip(after).all(|(before, after)| after == before - 1.0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Panics
    ///
    /// If the length of `gradient` is not [`num_weights`](Self::num_weights), or if the view is of a module
    /// with other fields.
    #[must_use]
    pub fn gradients_by_parameter<M: Module>(
        &self,
        module: &M,
        gradient: &[f32],
    ) -> GradientsParams {
        assert_eq!(gradient.len(), self.num_weights(), "a number per weight");
        let mut visitor = Split {
            kinds: self.kinds.iter(),
            rest: gradient,
            gradients: GradientsParams::new(),
        };
        module.visit(&mut visitor);
        visitor.gradients
    }

    /// Adds gradients that burn has collected by parameter to the trainable part of `sum`. A parameter without a gradient adds
    /// nothing. Returns whether any parameter has one.
    fn add_gradients<M: Module>(
        &self,
        module: &M,
        gradients: GradientsParams,
        sum: &mut [f32],
    ) -> bool {
        let mut visitor = Add {
            kinds: self.kinds.iter(),
            gradients,
            sum,
            range: 0..0,
            found_any: false,
        };
        module.visit(&mut visitor);
        visitor.found_any
    }
}

impl<M: Module> LocalModel<M> {
    /// Begins a sum of gradients for [`add_gradient_of`](Self::add_gradient_of): zeros, and in the places of buffers
    /// the statistics loaded last.
    ///
    /// # Panics
    ///
    /// If the length of `sum` is not [`num_weights`](Self::num_weights).
    pub fn begin_sum(&self, sum: &mut [f32]) {
        let (trainable, buffers) = sum.split_at_mut(self.num_trainable());
        trainable.fill(0.0);
        buffers.copy_from_slice(&self.lock_buffers());
    }

    /// Lets `step` compute gradients of the model by itself, as burn's `TrainStep` does, and adds them to `sum`.
    /// Returns what else `step` returns.
    ///
    /// The places of buffers have the statistics that the steps before made, or at first those of
    /// [`begin_sum`](Self::begin_sum). The layers go on from them, and what they make of them takes their place. So
    /// several batches change them one after the other, as they do in burn.
    ///
    /// The model that `step` gets has the weights loaded last, and records its operations. `seed` is for
    /// burn's layers that draw from the device's stream of random numbers.
    ///
    /// ```
    /// use ps_model::burn::optim::GradientsParams;
    /// use ps_model::burn::tensor::Tensor;
    /// use ps_model::{ConvNet, LocalModel, StepSeed, default_device_name, select_device};
    ///
    /// let device = select_device(default_device_name())?;
    /// let model = LocalModel::new(ConvNet::init(1, &device), &device)?;
    /// let mut sum = vec![0.0; model.num_weights()];
    /// model.begin_sum(&mut sum);
    /// let dims = model.add_gradient_of(StepSeed::default(), &mut sum, |model| {
    ///     let output = model.forward(Tensor::ones([2, 1, 28, 28], &device.clone().autodiff()));
    ///     let dims = output.dims();
    ///     (GradientsParams::from_grads(output.square().sum().backward(), model), dims)
    /// })?;
    /// assert_eq!(dims, [2, 10]);
    /// assert!(sum.iter().any(|slope| *slope != 0.0));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the length of `sum` is not [`num_weights`](Self::num_weights), if no trainable parameter has a
    /// gradient, or if `step` panics. The content of `sum` is then unspecified.
    pub fn add_gradient_of<T>(
        &self,
        seed: StepSeed,
        sum: &mut [f32],
        step: impl FnOnce(&M) -> (GradientsParams, T),
    ) -> Result<T, ModelError> {
        if sum.len() != self.num_weights() {
            return Err(ModelError::WeightCount {
                expected: self.num_weights(),
                got: sum.len(),
            });
        }
        let buffers = self.view.has_buffers().then(|| self.lock_buffers());
        let result = panic::catch(|| {
            if buffers.is_some() {
                let before = &sum[self.num_trainable()..];
                self.view.write_buffers(self.model.clone(), before);
            }
            let model = self.view.with_leaves(self.model.clone());
            let (gradients, other) =
                stream::seeded(&self.random_layers, &self.device, seed, || step(&model));
            match self.view.add_gradients(&model, gradients, sum) {
                true => Ok(other),
                false => Err(ModelError::LossWithoutGradient),
            }
        });
        // Also after a failure, because the layers may have changed their statistics before it.
        let restored = match &buffers {
            Some(loaded) => panic::catch(|| self.restore(loaded, sum)),
            None => Ok(()),
        };
        let other = result.map_err(ModelError::Panicked)?;
        restored.map_err(ModelError::Panicked)?;
        other
    }
}

struct Split<'a> {
    kinds: slice::Iter<'a, Kind>,
    /// The part that has no tensor yet.
    rest: &'a [f32],
    gradients: GradientsParams,
}

impl ModuleVisitor for Split<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if next(&mut self.kinds) != Kind::Trainable {
            return;
        }
        let tensor = param.base();
        let shape = tensor.shape();
        let (own, rest) = self.rest.split_at(shape.num_elements());
        self.rest = rest;
        let data = TensorData::new(own.to_vec(), shape);
        let options = (&tensor.device().inner(), tensor.dtype());
        let gradient = Tensor::<D>::from_data(data, options);
        self.gradients.register(param.id, gradient);
    }
}

struct Add<'a> {
    kinds: slice::Iter<'a, Kind>,
    gradients: GradientsParams,
    sum: &'a mut [f32],
    /// The place of the parameter visited last.
    range: Range<usize>,
    found_any: bool,
}

impl ModuleVisitor for Add<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if next(&mut self.kinds) != Kind::Trainable {
            return;
        }
        let start = self.range.end;
        self.range = start..start + param.base().shape().num_elements();
        let Some(gradient) = self.gradients.remove::<D>(param.id) else {
            return;
        };
        self.found_any = true;
        let own = &mut self.sum[self.range.clone()];
        with_values(gradient, |values| {
            for (sum, slope) in own.iter_mut().zip(values) {
                *sum += slope;
            }
        });
    }
}
