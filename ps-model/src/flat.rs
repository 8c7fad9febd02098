//! Flat views: the trainable parameters and the buffers of any burn module as one sequence of `f32`.
//!
//! *Buffers* are the running statistics that a layer such as `BatchNorm` changes while it trains. They stand
//! behind all parameters. The order of each is that of the module's fields, depth first, and each tensor is in
//! row-major order of its shape. It depends only on the module's type and configuration, so every process that builds the same
//! model has the same order. A server can cut the sequence anywhere.
//!
//! A parameter that is in several fields, which then have the same [`ParamId`](burn::module::ParamId), is in the
//! sequence once, at the place and under the name of the first of these fields. The others are *tied* to it.
//!
//! What is not trainable is not in the sequence: frozen parameters, integers, booleans, and quantized
//! weights under a LoRA adapter. No update rule sees them, so none changes them, not even by weight decay.
//! Each process keeps its own copy of them.
//!
//! Tensors of 16-bit floats are converted from and to `f32`. So a server's weights are exact, and a model computes with
//! rounded ones.
//!
//! The weights are copied from and to the tensors as they are, without the transformations that burn
//! applies to saved records. (So a `Linear` of layout `Col` is seen as `[inputs, outputs]` too.)

use std::any::Any;
use std::ops::Range;
use std::slice;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{AllocationProperty, Bytes, DType, Gradients, Shape, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::survey;

/// The place of one trainable parameter, or of one buffer, in the flat sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterSpec {
    /// The path of field names, such as `conv1.weight`.
    pub name: String,
    /// The dimensions of the tensor.
    pub shape: Vec<usize>,
    /// The place of its numbers. The ranges of a layout follow each other without gaps, from 0.
    pub range: Range<usize>,
}

/// Why a module has no flat view, or numbers do not fit it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FlatError {
    /// A trainable parameter, or a running statistic, is of a type that cannot be trained.
    #[error(
        "`{name}` is of type {dtype}, only f32, f16 and bf16 can be trained: cast it to one of them, or freeze it"
    )]
    ElementType {
        /// The path of the parameter.
        name: String,
        /// Its element type.
        dtype: String,
    },
    /// Two fields have one parameter id, and at least one of them is trainable, but they do not hold one parameter.
    #[error(
        "`{first}` and `{second}` have the same parameter id, but {difference}: to tie them, put clones of one `Param` \
         into both; otherwise give one of them its own id, by `Param::from_tensor`"
    )]
    NotTied {
        /// The path of the first field.
        first: String,
        /// The path of the second field.
        second: String,
        /// In what they differ.
        difference: String,
    },
    /// Two fields hold the same running statistic.
    #[error(
        "`{first}` and `{second}` have the same id, and a running statistic cannot be in several fields: keep it in \
         one, or make another"
    )]
    SharedStatistic {
        /// The path of the first field.
        first: String,
        /// The path of the second field.
        second: String,
    },
    /// The module has no parameters.
    #[error("the module has no parameters")]
    Empty,
    /// All parameters are frozen, or not made of floats.
    #[error(
        "none of the module's parameters is trainable (`{first}` is the first of {count}): unfreeze \
         some, or make them by `Param::from_tensor` or `Param::from_data`"
    )]
    NothingTrainable {
        /// The path of the first parameter.
        first: String,
        /// How many parameters there are.
        count: usize,
    },
    /// The function that reads weights gave too many or too few numbers for a range.
    #[error("weights {range:?} have {expected} numbers, got {got}", expected = range.len())]
    WrongCount {
        /// The range that was asked for.
        range: Range<usize>,
        /// How many numbers the function gave.
        got: usize,
    },
}

/// The numbers of a parameter or a buffer, in row-major order, for [`FlatView::write_weights`].
#[derive(Debug)]
pub struct Numbers(Bytes);

impl Numbers {
    /// Uses memory that others read, too, and that never changes: `f32` in the byte order of this machine. Before anything
    /// is written to a tensor with this memory, burn copies it.
    ///
    /// ```
    /// use ps_model::burn::module::Module;
    /// use ps_model::burn::nn::{Linear, LinearConfig};
    /// use ps_model::{FlatView, Numbers, default_device_name, select_device};
    ///
    /// let model: Linear = LinearConfig::new(1, 1).init(&select_device(default_device_name())?);
    /// let view = FlatView::new(&model)?;
    /// let weights: Vec<u8> = [0.5_f32, 2.0].iter().flat_map(|weight| weight.to_ne_bytes()).collect();
    /// let shared = bytes::Bytes::from(weights);
    /// let read = |range: std::ops::Range<usize>| Numbers::shared(shared.slice(4 * range.start..4 * range.end));
    /// let model = view.write_weights(model, read)?;
    /// assert_eq!(view.read_weights(&model), [0.5, 2.0]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn shared(bytes: bytes::Bytes) -> Self {
        Self(Bytes::from_shared(bytes, AllocationProperty::Native))
    }
}

impl From<Vec<f32>> for Numbers {
    fn from(numbers: Vec<f32>) -> Self {
        Self(Bytes::from_elems(numbers))
    }
}

/// The places of the trainable parameters and the buffers of a module in their flat sequence.
///
/// ```
/// use ps_model::burn::module::Module;
/// use ps_model::{ConvNet, FlatView, default_device_name, select_device};
///
/// let model = ConvNet::init(0, &select_device(default_device_name())?);
/// let view = FlatView::new(&model)?;
/// assert_eq!(view.num_weights(), model.num_params());
/// let weights = view.read_weights(&model);
/// let model = view.write_weights(model, |range| weights[range].to_vec())?;
/// assert_eq!(view.read_weights(&model), weights);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlatView {
    /// The trainable parameters, then the buffers.
    pub(crate) specs: Vec<ParameterSpec>,
    /// How many of them are trainable.
    pub(crate) num_parameters: usize,
    pub(crate) common_dtype: Option<DType>,
    /// The kind of each float tensor that a visit of the module shows, in order. The tensors themselves do
    /// not tell, because without autodiff none requires a gradient.
    pub(crate) kinds: Vec<Kind>,
    pub(crate) tied: Vec<TiedField>,
}

/// A field that holds a trainable parameter that another field held before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TiedField {
    /// The path of this field.
    pub name: String,
    /// The path of the first field with this parameter. The parameter has this name.
    pub first: String,
}

/// What training does to a float tensor of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Nothing. It is not in the view.
    Fixed,
    /// The rule changes it by its gradient.
    Trainable,
    /// It is the trainable parameter of this number, in one more field.
    Tied(usize),
    /// Its layer changes it, without a gradient.
    Buffer,
}

impl FlatView {
    /// Makes the view of a module. Parameters are trainable if the user has not frozen them, whether or not
    /// the module is in training mode or on a device with autodiff now.
    ///
    /// # Errors
    ///
    /// If there is nothing to train, if a trainable parameter or a buffer is not a tensor of `f32`, `f16` or `bf16`, if
    /// fields with one parameter id differ, or if a buffer is in several fields.
    pub fn new<M: Module>(module: &M) -> Result<Self, FlatError> {
        Ok(survey::survey(&module.clone().train())?.view)
    }

    /// Returns the names, shapes and places of the trainable parameters, and behind them those of the buffers.
    #[must_use]
    pub fn parameters(&self) -> &[ParameterSpec] {
        &self.specs
    }

    /// Returns the number of weights in the sequence, those of the buffers included.
    #[must_use]
    pub fn num_weights(&self) -> usize {
        self.specs.last().map_or(0, |spec| spec.range.end)
    }

    /// Returns how many weights are trainable. The buffers stand behind them.
    #[must_use]
    pub fn num_trainable(&self) -> usize {
        let last = self.specs[..self.num_parameters].last();
        last.map_or(0, |spec| spec.range.end)
    }

    /// Returns the names, shapes and places of the buffers.
    #[must_use]
    pub fn buffers(&self) -> &[ParameterSpec] {
        &self.specs[self.num_parameters..]
    }

    /// Returns the type that all these tensors have, or `None` if they have several.
    #[must_use]
    pub fn common_dtype(&self) -> Option<DType> {
        self.common_dtype
    }

    /// Returns the fields whose parameter is that of another field before them. Their numbers are not in the sequence
    /// again. When weights are written, all fields of a parameter get the same tensor.
    ///
    /// ```
    /// use ps_model::burn;
    /// use ps_model::burn::module::{Module, Param};
    /// use ps_model::burn::tensor::Tensor;
    /// use ps_model::{FlatView, default_device_name, select_device};
    ///
    /// #[derive(Module, Debug)]
    /// struct Autoencoder {
    ///     encoder: Param<Tensor<2>>,
    ///     decoder: Param<Tensor<2>>,
    /// }
    ///
    /// let device = select_device(default_device_name())?;
    /// let encoder = Param::from_tensor(Tensor::ones([3, 2], &device));
    /// let model = Autoencoder { decoder: encoder.clone(), encoder };
    /// let view = FlatView::new(&model)?;
    /// assert_eq!(view.num_weights(), 6);
    /// assert_eq!((&*view.tied()[0].name, &*view.tied()[0].first), ("decoder", "encoder"));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn tied(&self) -> &[TiedField] {
        &self.tied
    }

    pub(crate) fn has_buffers(&self) -> bool {
        !self.buffers().is_empty()
    }

    /// Copies the weights of a module.
    ///
    /// # Panics
    ///
    /// If the view is of a module with other fields.
    #[must_use]
    pub fn read_weights<M: Module>(&self, module: &M) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.num_weights());
        self.read(module, Kind::Trainable, &mut out);
        if self.has_buffers() {
            out.extend(self.read_buffers(module));
        }
        assert_eq!(out.len(), self.num_weights(), "a module of this view");
        out
    }

    /// Copies the buffers of a module.
    pub(crate) fn read_buffers<M: Module>(&self, module: &M) -> Vec<f32> {
        let mut out = Vec::with_capacity(self.num_weights() - self.num_trainable());
        // burn keeps what a forward pass made of a statistic beside it. `valid` brings it in.
        self.read(&module.valid(), Kind::Buffer, &mut out);
        out
    }

    fn read<M: Module>(&self, module: &M, kind: Kind, out: &mut Vec<f32>) {
        let kinds = self.kinds.iter();
        module.visit(&mut ReadWeights { kinds, kind, out });
    }

    /// Replaces the weights of a module.
    ///
    /// Calls `read` for each parameter in order. It returns the numbers of the range: in a vector, or as shared memory. On
    /// the backend `flex`, this becomes the memory of the tensor, without a copy. The source may be in pieces, for example
    /// one per server. Ids, devices and gradient settings of the parameters do not change, and nothing changes that is
    /// not in the view.
    ///
    /// Clones of a burn module share its running statistics, so these change in the clones, too.
    ///
    /// # Errors
    ///
    /// If `read` gives another number of weights than the range has.
    pub fn write_weights<M: Module, N: Into<Numbers>>(
        &self,
        module: M,
        mut read: impl FnMut(Range<usize>) -> N,
    ) -> Result<M, FlatError> {
        let mut read = |range| read(range).into();
        let mut mapper = WriteWeights {
            kinds: self.kinds.iter(),
            kind: Kind::Trainable,
            read: &mut read,
            offset: 0,
            firsts: Firsts::of(self),
            error: None,
        };
        let module = module.map(&mut mapper);
        if let Some(error) = mapper.error {
            return Err(error);
        }
        // Those are written in place, so all of them are read first.
        let mut buffers = Vec::with_capacity(self.num_weights() - self.num_trainable());
        for ParameterSpec { range, .. } in self.buffers() {
            let values = data_of(range.clone(), [range.len()].into(), &mut read)?;
            buffers.extend(values.iter::<f32>());
        }
        Ok(match self.has_buffers() {
            true => self.write_buffers(module, &buffers),
            false => module,
        })
    }

    /// Replaces the buffers of a module and of its clones.
    pub(crate) fn write_buffers<M: Module>(&self, module: M, values: &[f32]) -> M {
        // What burn keeps beside a statistic would replace it later. This takes it away.
        drop(module.valid());
        module.map(&mut WriteWeights {
            kinds: self.kinds.iter(),
            kind: Kind::Buffer,
            read: |range: Range<usize>| values[range].to_vec().into(),
            offset: 0,
            firsts: Firsts::default(),
            error: None,
        })
    }

    /// Writes the gradients of a module's parameters to `out`. The gradient of a parameter that the loss
    /// does not depend on is zero, and so are the numbers of buffers. That of a parameter in several fields is the sum of
    /// theirs. Returns whether the loss depends on any parameter.
    ///
    /// # Panics
    ///
    /// If the length of `out` is not [`num_weights`](Self::num_weights), or if the view is of a module with
    /// other fields.
    pub fn read_gradients<M: Module>(
        &self,
        module: &M,
        gradients: Gradients,
        out: &mut [f32],
    ) -> bool {
        assert_eq!(out.len(), self.num_weights(), "a number for each weight");
        let mut visitor = ReadGradients {
            kinds: self.kinds.iter(),
            gradients,
            specs: &self.specs,
            num_read: 0,
            out,
            found_any: false,
        };
        module.visit(&mut visitor);
        let found_any = visitor.found_any;
        out[self.num_trainable()..].fill(0.0);
        found_any
    }

    /// Makes the trainable parameters leaves of a new graph, with the same numbers.
    pub(crate) fn with_leaves<M: Module>(&self, module: M) -> M {
        module.map(&mut Leaves {
            kinds: self.kinds.iter(),
            firsts: Firsts::of(self),
        })
    }
}

/// Returns the kind of the next float tensor of a visit.
pub(crate) fn next(kinds: &mut slice::Iter<'_, Kind>) -> Kind {
    *kinds
        .next()
        .expect("the module has the fields that the view was made of")
}

/// Passes the numbers of a tensor to `take`, in row-major order, converted to `f32` if need be.
pub(crate) fn with_values<const D: usize>(tensor: Tensor<D>, take: impl FnOnce(&[f32])) {
    let data = tensor.into_data();
    match data.as_slice::<f32>() {
        Ok(values) => take(values),
        Err(_) => {
            let data = data.convert::<f32>();
            take(data.as_slice::<f32>().expect("it was just converted"));
        }
    }
}

/// Makes a tensor a leaf of a new graph. The graph shares nothing with those of other tensors with the same
/// numbers.
pub(crate) fn new_leaf<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    let strategy = tensor.gradient_checkpointing_strategy();
    let leaf = tensor.inner().autodiff();
    let leaf = match strategy {
        Some(strategy) => leaf.with_gradient_checkpointing_strategy(strategy),
        None => leaf,
    };
    leaf.require_grad()
}

/// The tensors of the trainable parameters that a mapper has passed, for the fields that are tied to them. So these share
/// the memory, and in a graph the leaf: burn adds up the gradients of all uses of a parameter, in whichever field.
#[derive(Default)]
struct Firsts {
    /// A `Tensor<D>` each, in order. `None` if no field needs them.
    tensors: Option<Vec<Box<dyn Any>>>,
}

impl Firsts {
    fn of(view: &FlatView) -> Self {
        let tensors = (!view.tied.is_empty()).then(Vec::new);
        Self { tensors }
    }

    /// Takes note of the next parameter's tensor.
    fn add<const D: usize>(&mut self, tensor: &Tensor<D>) {
        if let Some(tensors) = &mut self.tensors {
            tensors.push(Box::new(tensor.clone()));
        }
    }

    /// Gives a field the tensor of the parameter of this number.
    fn share<const D: usize>(&self, number: usize, field: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let tensor = self.tensors.as_ref().and_then(|all| all.get(number));
        let tensor = tensor.and_then(|tensor| tensor.downcast_ref::<Tensor<D>>());
        let tensor = tensor.expect("the first field comes before, with a tensor of the same rank");
        field.map(|_| tensor.clone())
    }
}

struct Leaves<'a> {
    kinds: slice::Iter<'a, Kind>,
    firsts: Firsts,
}

impl ModuleMapper for Leaves<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match next(&mut self.kinds) {
            Kind::Trainable => param.map(|tensor| {
                let leaf = new_leaf(tensor);
                self.firsts.add(&leaf);
                leaf
            }),
            Kind::Tied(number) => self.firsts.share(number, param),
            Kind::Fixed | Kind::Buffer => param,
        }
    }
}

struct ReadWeights<'a> {
    kinds: slice::Iter<'a, Kind>,
    /// The tensors to read.
    kind: Kind,
    out: &'a mut Vec<f32>,
}

impl ModuleVisitor for ReadWeights<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if next(&mut self.kinds) == self.kind {
            with_values(param.base().inner(), |values| {
                self.out.extend_from_slice(values);
            });
        }
    }
}

struct WriteWeights<'a, F> {
    kinds: slice::Iter<'a, Kind>,
    /// The tensors to write.
    kind: Kind,
    read: F,
    offset: usize,
    firsts: Firsts,
    error: Option<FlatError>,
}

/// Reads the numbers of a parameter.
fn data_of(
    range: Range<usize>,
    shape: Shape,
    read: impl FnOnce(Range<usize>) -> Numbers,
) -> Result<TensorData, FlatError> {
    let Numbers(bytes) = read(range.clone());
    if bytes.len() != range.len() * size_of::<f32>() {
        let got = bytes.len() / size_of::<f32>();
        return Err(FlatError::WrongCount { range, got });
    }
    Ok(TensorData::from_bytes(bytes, shape, DType::F32))
}

impl<F: FnMut(Range<usize>) -> Numbers> ModuleMapper for WriteWeights<'_, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match next(&mut self.kinds) {
            _ if self.error.is_some() => return param,
            Kind::Tied(number) if self.kind == Kind::Trainable => {
                return self.firsts.share(number, param);
            }
            kind if kind != self.kind => return param,
            _ => {}
        }
        let (id, old, mapper) = param.consume();
        let shape = old.shape();
        let range = self.offset..self.offset + shape.num_elements();
        self.offset = range.end;
        let data = match data_of(range, shape, &mut self.read) {
            Ok(data) => data,
            Err(error) => {
                self.error = Some(error);
                return Param::from_mapped_value(id, old, mapper);
            }
        };
        // `device()` carries autodiff and its settings along.
        let options = (&old.device(), old.dtype());
        let new = Tensor::<D>::from_data(data, options);
        let new = if old.is_require_grad() {
            new.require_grad()
        } else {
            new
        };
        self.firsts.add(&new);
        Param::from_mapped_value(id, new, mapper)
    }
}

struct ReadGradients<'a> {
    kinds: slice::Iter<'a, Kind>,
    gradients: Gradients,
    specs: &'a [ParameterSpec],
    /// How many parameters have been passed.
    num_read: usize,
    out: &'a mut [f32],
    found_any: bool,
}

impl ModuleVisitor for ReadGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (number, is_first) = match next(&mut self.kinds) {
            Kind::Trainable => (self.num_read, true),
            Kind::Tied(number) => (number, false),
            Kind::Fixed | Kind::Buffer => return,
        };
        self.num_read += usize::from(is_first);
        let own = &mut self.out[self.specs[number].range.clone()];
        // Fields that share a leaf have one gradient, which the first of them takes away.
        match (param.base().grad_remove(&mut self.gradients), is_first) {
            (Some(gradient), true) => with_values(gradient, |values| own.copy_from_slice(values)),
            (Some(gradient), false) => with_values(gradient, |values| {
                own.iter_mut()
                    .zip(values)
                    .for_each(|(sum, slope)| *sum += slope);
            }),
            (None, true) => return own.fill(0.0),
            (None, false) => return,
        }
        self.found_any = true;
    }
}
