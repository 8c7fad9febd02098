//! Looks at the fields of a module: which are trainable, which are tied to others, which are buffers, which are fixed,
//! and which layers draw random numbers from the device.

use std::any::Any;
use std::collections::{HashMap, HashSet};

use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Bool, DType, Int, Tensor, TensorData};

use crate::flat::{FlatError, FlatView, Kind, ParameterSpec, TiedField};

/// The result of a survey of a module's fields.
#[derive(Debug)]
pub(crate) struct Survey {
    pub(crate) view: FlatView,
    /// The flags that are on, such as the `training` of a dropout layer.
    pub(crate) enabled_flags: HashSet<ParamId>,
    /// The paths and types of burn's layers that draw from the device's stream of random numbers.
    pub(crate) random_layers: Vec<String>,
}

/// burn's layers that draw random numbers from the device while they train.
const RANDOM_LAYERS: [&str; 3] = ["Struct:Dropout", "Struct:GaussianNoise", "Struct:RRelu"];

/// The name of the field that tells burn's layers, and any that follow their example, whether they may
/// change their statistics and their input. `Module::freeze` switches it off.
const TRAINING_FLAG: &str = "training";

/// Looks at a module in training mode.
pub(crate) fn survey<M: Module>(module: &M) -> Result<Survey, FlatError> {
    let mut probed = Probed::default();
    module.clone().map(&mut Probe).visit(&mut probed);
    let mut visitor = Surveyor {
        is_parameter: probed.is_parameter.into_iter(),
        ..Surveyor::default()
    };
    module.visit(&mut visitor);
    visitor.finish()
}

/// Tries to make everything trainable. A parameter becomes trainable. A running statistic does not; burn
/// shows it as if it were a frozen parameter.
struct Probe;

impl ModuleMapper for Probe {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.set_require_grad(true)
    }
}

#[derive(Default)]
struct Probed {
    is_parameter: Vec<bool>,
}

impl ModuleVisitor for Probed {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base();
        let is_quantized = matches!(tensor.dtype(), DType::QFloat(_));
        // Quantized tensors never require a gradient. They are parameters and not statistics, because a
        // layer adds to those.
        self.is_parameter
            .push(tensor.is_require_grad() || is_quantized);
    }
}

#[derive(Default)]
struct Surveyor {
    is_parameter: std::vec::IntoIter<bool>,
    /// The names of the fields on the path, each with the type that contains the field.
    path: Vec<(String, String)>,
    /// Of the trainable parameters.
    specs: Vec<ParameterSpec>,
    /// The types of their numbers.
    dtypes: Vec<DType>,
    kinds: Vec<Kind>,
    /// The names of all parameters, including the fixed ones.
    names: Vec<String>,
    /// The first field of each parameter.
    seen: HashMap<ParamId, Seen>,
    tied: Vec<TiedField>,
    statistics: Vec<Statistic>,
    /// The layers whose flag says that they must not train.
    frozen_layers: HashSet<String>,
    enabled_flags: HashSet<ParamId>,
    random_layers: Vec<String>,
    error: Option<FlatError>,
}

/// The first field that holds a parameter.
struct Seen {
    name: String,
    /// The parameter's number among the trainable ones, if it is one of them.
    number: Option<usize>,
    shape: Vec<usize>,
    /// A `Tensor<D>`.
    tensor: Box<dyn Any>,
}

impl Seen {
    /// Returns the parameter's number if another field with the same id holds the same parameter, otherwise the
    /// difference. One of them is trainable.
    fn tie<const D: usize>(&self, tensor: &Tensor<D>, is_trainable: bool) -> Result<usize, String> {
        let shape = tensor.dims();
        let first = match self.tensor.downcast_ref::<Tensor<D>>() {
            Some(first) if self.shape == shape => first,
            _ => return Err(format!("their shapes are {:?} and {shape:?}", self.shape)),
        };
        let [dtype, other] = [first, tensor].map(|one| one.dtype());
        if dtype != other {
            let (dtype, other) = (dtype.name(), other.name());
            return Err(format!("their types are {dtype} and {other}"));
        }
        let number = self.number.filter(|_| is_trainable);
        let number = number.ok_or("one of them is frozen")?;
        if first.device() != tensor.device() {
            return Err("they are on different devices".to_owned());
        }
        let [data, other] = [first, tensor].map(|one| one.clone().inner().into_data());
        match data.as_bytes() == other.as_bytes() {
            true => Ok(number),
            false => Err("their numbers differ".to_owned()),
        }
    }
}

/// A running statistic. Whether its layer is frozen may show later.
struct Statistic {
    layer: String,
    name: String,
    id: ParamId,
    dtype: DType,
    shape: Vec<usize>,
    /// Its place among the float tensors.
    index: usize,
}

impl Surveyor {
    fn name(&self) -> String {
        join(&self.path)
    }

    /// Returns the path of the layer that contains the current field.
    fn layer(&self) -> String {
        join(self.path.split_last().map_or(&[], |(_, layer)| layer))
    }

    /// Keeps the first error, because it says most about the cause.
    fn fail(&mut self, error: FlatError) {
        self.error.get_or_insert(error);
    }

    fn finish(mut self) -> Result<Survey, FlatError> {
        let num_parameters = self.specs.len();
        self.add_buffers();
        if let Some(error) = self.error {
            return Err(error);
        }
        if num_parameters == 0 {
            let count = self.names.len();
            return Err(match self.names.into_iter().next() {
                Some(first) => FlatError::NothingTrainable { first, count },
                None => FlatError::Empty,
            });
        }
        let first = self.dtypes.first().copied();
        Ok(Survey {
            view: FlatView {
                specs: self.specs,
                common_dtype: first.filter(|one| self.dtypes.iter().all(|other| other == one)),
                num_parameters,
                kinds: self.kinds,
                tied: self.tied,
            },
            enabled_flags: self.enabled_flags,
            random_layers: self.random_layers,
        })
    }

    /// Adds the statistics of all layers that are not frozen.
    fn add_buffers(&mut self) {
        let seen = std::mem::take(&mut self.seen).into_iter();
        let mut seen: HashMap<ParamId, String> = seen.map(|(id, one)| (id, one.name)).collect();
        for statistic in std::mem::take(&mut self.statistics) {
            if self.frozen_layers.contains(&statistic.layer) {
                continue;
            }
            let name = statistic.name;
            self.kinds[statistic.index] = Kind::Buffer;
            if let Some(first) = seen.insert(statistic.id, name.clone()) {
                let second = name;
                self.fail(FlatError::SharedStatistic { first, second });
            } else if !can_be_trained(statistic.dtype) {
                let dtype = statistic.dtype.name().to_owned();
                self.fail(FlatError::ElementType { name, dtype });
            } else {
                self.add_spec(name, statistic.shape, statistic.dtype);
            }
        }
    }

    /// Adds a field whose parameter, which is trainable here or there, was in another field before.
    fn add_tied<const D: usize>(
        &mut self,
        name: String,
        id: ParamId,
        tensor: &Tensor<D>,
        is_trainable: bool,
    ) {
        let seen = &self.seen[&id];
        let first = seen.name.clone();
        match seen.tie(tensor, is_trainable) {
            Ok(number) => {
                self.kinds.push(Kind::Tied(number));
                self.tied.push(TiedField { name, first });
            }
            Err(difference) => {
                let second = name;
                self.fail(FlatError::NotTied {
                    first,
                    second,
                    difference,
                });
            }
        }
    }

    fn add_spec(&mut self, name: String, shape: Vec<usize>, dtype: DType) {
        self.dtypes.push(dtype);
        let start = self.specs.last().map_or(0, |spec| spec.range.end);
        let range = start..start + shape.iter().product::<usize>();
        self.specs.push(ParameterSpec { name, shape, range });
    }
}

/// Whether a view converts numbers of this type from and to `f32`.
fn can_be_trained(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

fn join(path: &[(String, String)]) -> String {
    let names: Vec<&str> = path.iter().map(|(name, _)| name.as_str()).collect();
    names.join(".")
}

/// Whether the user wants a parameter to be trained, even if its present tensor cannot be.
fn is_active<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    // The parameter keeps the setting. It shows with a tensor that can be trained.
    let other = |tensor: Tensor<D>| Tensor::zeros([1; D], &tensor.device().inner());
    param.clone().map(other).train().base().is_require_grad()
}

impl ModuleVisitor for Surveyor {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.to_owned(), container_type.to_owned()));
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.name();
        let tensor = param.base();
        if !self.is_parameter.next().unwrap_or(true) {
            self.statistics.push(Statistic {
                layer: self.layer(),
                name,
                id: param.id,
                dtype: tensor.dtype(),
                shape: tensor.dims().to_vec(),
                index: self.kinds.len(),
            });
            self.kinds.push(Kind::Fixed);
            return;
        }
        self.names.push(name.clone());
        let is_trainable = is_active(param);
        if let Some(first) = self.seen.get(&param.id)
            && (is_trainable || first.number.is_some())
        {
            return self.add_tied(name, param.id, &tensor, is_trainable);
        }
        let number = is_trainable.then_some(self.specs.len());
        self.seen.entry(param.id).or_insert_with(|| Seen {
            name: name.clone(),
            number,
            shape: tensor.dims().to_vec(),
            tensor: Box::new(tensor.clone()),
        });
        if !is_trainable {
            return self.kinds.push(Kind::Fixed);
        }
        self.kinds.push(Kind::Trainable);
        if !can_be_trained(tensor.dtype()) {
            let dtype = tensor.dtype().name().to_owned();
            self.fail(FlatError::ElementType {
                name: name.clone(),
                dtype,
            });
        }
        self.add_spec(name, tensor.dims().to_vec(), tensor.dtype());
    }

    fn visit_int<const D: usize>(&mut self, _param: &Param<Tensor<D, Int>>) {
        self.names.push(self.name());
    }

    fn visit_bool<const D: usize>(&mut self, _param: &Param<Tensor<D, Bool>>) {
        self.names.push(self.name());
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        let layer = self.layer();
        let Some((field, layer_type)) = self.path.last() else {
            return;
        };
        if flag.is_enabled() {
            self.enabled_flags.insert(flag.id);
            if RANDOM_LAYERS.contains(&layer_type.as_str()) {
                let layer_type = layer_type.trim_start_matches("Struct:");
                self.random_layers.push(format!("{layer} ({layer_type})"));
            }
        } else if field == TRAINING_FLAG {
            self.frozen_layers.insert(layer);
        }
    }
}

/// Passes on what training does not change: the values of all parameters that are not trainable, of the running
/// statistics of frozen layers, and of flags such as the `training` of a dropout layer. Each comes with its path, its
/// dimensions, and its bytes in row-major order. They come in the order of the module's fields. The bytes do not depend
/// on the backend: integers come as `i32` if all of the tensor fit, otherwise as `i64`, and booleans as a byte each.
///
/// Processes that train one model must agree on them. Fields of type `Tensor` (not `Param`) are not
/// included, because burn does not show them.
pub(crate) fn fixed_tensors<M: Module>(
    module: &M,
    view: &FlatView,
    visit: impl FnMut(&str, &[usize], &[u8]),
) {
    module.visit(&mut FixedTensors {
        kinds: view.kinds.iter(),
        path: Vec::new(),
        visit,
    });
}

struct FixedTensors<'a, F> {
    kinds: std::slice::Iter<'a, Kind>,
    path: Vec<String>,
    visit: F,
}

impl<F: FnMut(&str, &[usize], &[u8])> FixedTensors<'_, F> {
    fn data(&mut self, data: &TensorData) {
        (self.visit)(&self.path.join("."), data.shape(), data.as_bytes());
    }
}

impl<F: FnMut(&str, &[usize], &[u8])> ModuleVisitor for FixedTensors<'_, F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if self.kinds.next() == Some(&Kind::Fixed) {
            self.data(&param.base().inner().into_data());
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let data = param.base().inner().into_data();
        let wide: Vec<i64> = data.iter::<i64>().collect();
        // The type is the backend's: of 32 bits on `flex`, of 64 on `ndarray`.
        let narrow: Result<Vec<i32>, _> = wide.iter().map(|&value| value.try_into()).collect();
        let bytes: Vec<u8> = match narrow {
            Ok(narrow) => narrow.into_iter().flat_map(i32::to_le_bytes).collect(),
            Err(_) => wide.into_iter().flat_map(i64::to_le_bytes).collect(),
        };
        (self.visit)(&self.path.join("."), data.shape(), &bytes);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        let data = param.base().inner().into_data();
        let bytes: Vec<u8> = data.iter::<bool>().map(u8::from).collect();
        (self.visit)(&self.path.join("."), data.shape(), &bytes);
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        (self.visit)(&self.path.join("."), &[], &[flag.is_enabled().into()]);
    }
}
