//! Flat views: the parameters of any burn module as one sequence of `f32`.
//!
//! The order is that of the module's fields, depth first, each parameter in row-major order of its
//! shape. It depends on the module's type and configuration only, so every process that builds the
//! same model agrees on it. A server can cut the sequence anywhere.
//!
//! Weights go in and out of the tensors as they are, without the transformations that burn applies
//! to saved records (a `Linear` of layout `Col` is seen as `[inputs, outputs]` too).

use std::collections::HashMap;
use std::ops::Range;

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Gradients, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

/// One parameter's place in the flat sequence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterSpec {
    /// The path of field names, such as `conv1.weight`.
    pub name: String,
    /// The dimensions of the tensor.
    pub shape: Vec<usize>,
    /// Where its numbers are; the ranges of a layout follow each other without gaps, from 0.
    pub range: Range<usize>,
    /// Whether it requires a gradient. The flat gradient of a frozen parameter is zero, so it
    /// stays as it is under any update rule that leaves a zero gradient alone; one with weight
    /// decay shrinks it nevertheless.
    pub trainable: bool,
}

/// Why a module has no flat view, or numbers do not fit it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FlatError {
    /// Integer and boolean parameters have no gradient.
    #[error("parameter `{name}` is not a float tensor")]
    NotFloat {
        /// The path of the parameter.
        name: String,
    },
    /// Only 32-bit floats travel.
    #[error("parameter `{name}` is of type {dtype}, only f32 is supported")]
    NotF32 {
        /// The path of the parameter.
        name: String,
        /// Its element type.
        dtype: String,
    },
    /// Two fields hold the same parameter, which a flat view would tear into two.
    #[error("parameters `{first}` and `{second}` are one and the same, keep it in one field only")]
    Tied {
        /// The path of the first.
        first: String,
        /// The path of the second.
        second: String,
    },
    /// Batch normalization changes running statistics outside of any gradient, so a server would
    /// never learn of them and every pull would reset them.
    #[error(
        "`{name}` is a batch normalization, whose running statistics are not trained by gradients: \
         use a normalization without them, such as GroupNorm or LayerNorm"
    )]
    RunningStatistics {
        /// The path of the layer.
        name: String,
    },
    /// The module has no parameters.
    #[error("the module has no parameters")]
    Empty,
    /// The source of the weights gave too many or too few numbers for a range.
    #[error("weights {range:?} have {expected} numbers, got {got}", expected = range.len())]
    WrongCount {
        /// The range that was asked for.
        range: Range<usize>,
        /// How many numbers came.
        got: usize,
    },
}

/// Lists the parameters of a module in the order of their flat view.
///
/// # Errors
///
/// If the module has no parameters, a parameter is not an `f32` tensor or occurs twice, or a layer
/// keeps statistics of its own.
pub fn layout<M: Module>(module: &M) -> Result<Vec<ParameterSpec>, FlatError> {
    let mut visitor = Layout::default();
    module.visit(&mut visitor);
    match visitor.error {
        Some(error) => Err(error),
        None if visitor.specs.is_empty() => Err(FlatError::Empty),
        None => Ok(visitor.specs),
    }
}

/// Copies the weights of a module, in the order of [`layout`].
///
/// # Panics
///
/// If [`layout`] refuses the module.
#[must_use]
pub fn read_weights<M: Module>(module: &M) -> Vec<f32> {
    let mut weights = Vec::with_capacity(module.num_params());
    module.visit(&mut ReadWeights { out: &mut weights });
    weights
}

/// Replaces the weights of a module.
///
/// Calls `read` for each parameter in the order of [`layout`]; it appends the numbers of the range
/// to the (empty) vector, which becomes the tensor's memory on the CPU: one copy in all. The
/// source may be in pieces, say one for each server. Ids, devices and gradient settings of the
/// parameters stay.
///
/// # Errors
///
/// If `read` gave another number of weights than asked for.
pub fn write_weights<M: Module>(
    module: M,
    read: impl FnMut(Range<usize>, &mut Vec<f32>),
) -> Result<M, FlatError> {
    let mut mapper = WriteWeights {
        read,
        offset: 0,
        error: None,
    };
    let module = module.map(&mut mapper);
    match mapper.error {
        Some(error) => Err(error),
        None => Ok(module),
    }
}

/// Writes the gradients of a module's parameters to `out`, in the order of [`layout`].
///
/// Parameters that got no gradient (frozen, or without part in the loss) give zeros.
///
/// # Panics
///
/// If [`layout`] refuses the module, or `out` is not as long as the module has weights.
pub fn read_gradients<M: Module>(module: &M, gradients: Gradients, out: &mut [f32]) {
    assert_eq!(out.len(), module.num_params(), "a number for each weight");
    module.visit(&mut ReadGradients {
        gradients,
        rest: out,
    });
}

/// Hands on what training does not change: the values of all parameters that are not trainable, of
/// running statistics and of flags such as the `training` of a dropout layer, each with its path, its
/// dimensions and its bytes in row-major order, in the order of the module's fields.
///
/// Processes that train one model must agree on these. Tensors that are no parameters (fields of type
/// `Tensor` rather than `Param`) are not among them: burn shows them to nobody.
pub(crate) fn fixed_tensors<M: Module>(module: &M, visit: impl FnMut(&str, &[usize], &[u8])) {
    module.visit(&mut FixedTensors {
        path: Vec::new(),
        visit,
    });
}

struct FixedTensors<F> {
    path: Vec<String>,
    visit: F,
}

impl<F: FnMut(&str, &[usize], &[u8])> FixedTensors<F> {
    fn data(&mut self, data: &TensorData) {
        (self.visit)(&self.path.join("."), data.shape(), data.as_bytes());
    }
}

impl<F: FnMut(&str, &[usize], &[u8])> ModuleVisitor for FixedTensors<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !param.base().is_require_grad() {
            self.data(&param.base().inner().into_data());
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.data(&param.base().inner().into_data());
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.data(&param.base().inner().into_data());
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        (self.visit)(&self.path.join("."), &[], &[flag.is_enabled().into()]);
    }
}

/// Hands on the numbers of a tensor in row-major order.
fn with_values<const D: usize>(tensor: Tensor<D>, take: impl FnOnce(&[f32])) {
    let data = tensor.into_data();
    let values = data.as_slice::<f32>();
    take(values.expect("the layout admits f32 parameters only"));
}

#[derive(Default)]
struct Layout {
    path: Vec<String>,
    specs: Vec<ParameterSpec>,
    names: HashMap<ParamId, String>,
    error: Option<FlatError>,
}

impl Layout {
    fn name(&self) -> String {
        self.path.join(".")
    }

    /// Keeps the first error, which says most about the cause.
    fn fail(&mut self, error: FlatError) {
        self.error.get_or_insert(error);
    }
}

impl ModuleVisitor for Layout {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push(name.to_owned());
        if container_type == "Struct:BatchNorm" {
            let [layer @ .., _field] = self.path.as_slice() else {
                unreachable!("a name has just been pushed");
            };
            let name = layer.join(".");
            self.fail(FlatError::RunningStatistics { name });
        }
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.name();
        let tensor = param.base();
        if tensor.dtype() != DType::F32 {
            let dtype = tensor.dtype().name().to_owned();
            return self.fail(FlatError::NotF32 { name, dtype });
        }
        if let Some(first) = self.names.insert(param.id, name.clone()) {
            return self.fail(FlatError::Tied {
                first,
                second: name,
            });
        }
        let start = self.specs.last().map_or(0, |spec| spec.range.end);
        let shape = tensor.dims();
        self.specs.push(ParameterSpec {
            name,
            shape: shape.to_vec(),
            range: start..start + shape.iter().product::<usize>(),
            trainable: param.is_require_grad(),
        });
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        let name = self.name();
        self.fail(FlatError::NotFloat { name });
    }

    fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
        let name = self.name();
        self.fail(FlatError::NotFloat { name });
    }
}

struct ReadWeights<'a> {
    out: &'a mut Vec<f32>,
}

impl ModuleVisitor for ReadWeights<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        with_values(param.base().inner(), |values| {
            self.out.extend_from_slice(values);
        });
    }
}

struct WriteWeights<F> {
    read: F,
    offset: usize,
    error: Option<FlatError>,
}

impl<F: FnMut(Range<usize>, &mut Vec<f32>)> ModuleMapper for WriteWeights<F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        let (id, old, mapper) = param.consume();
        let shape = old.shape();
        let range = self.offset..self.offset + shape.num_elements();
        let mut values = Vec::with_capacity(range.len());
        (self.read)(range.clone(), &mut values);
        if values.len() != range.len() {
            let got = values.len();
            self.error = Some(FlatError::WrongCount { range, got });
            return Param::from_mapped_value(id, old, mapper);
        }
        self.offset = range.end;
        // `device()` carries autodiff and its settings along, so the new tensor is a leaf like the
        // old one.
        let new = Tensor::<D>::from_data(TensorData::new(values, shape), &old.device());
        let new = if old.is_require_grad() {
            new.require_grad()
        } else {
            new
        };
        Param::from_mapped_value(id, new, mapper)
    }
}

struct ReadGradients<'a> {
    gradients: Gradients,
    /// What is still to be written.
    rest: &'a mut [f32],
}

impl ModuleVisitor for ReadGradients<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base();
        let (own, rest) =
            std::mem::take(&mut self.rest).split_at_mut(tensor.shape().num_elements());
        self.rest = rest;
        match tensor.grad_remove(&mut self.gradients) {
            Some(gradient) => with_values(gradient, |values| own.copy_from_slice(values)),
            None => own.fill(0.0),
        }
    }
}
