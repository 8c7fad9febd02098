//! burn's optimizers that use a whole parameter at once (LAMB, Muon), as the update rule of a shard that is cut between
//! parameters.
//!
//! Each parameter is a tensor of its own shape, as in a module's optimizer, so the numbers are the same. The state is kept
//! as plain data between two steps: one vector per tensor of burn's state, with the numbers of all parameters one
//! after the other.

use std::fmt;
use std::ops::Range;

use burn::grad_clipping::GradientClipping;
use burn::optim::{
    Lamb, LambConfig, ModuleOptimizer, Muon, MuonConfig, Optimizer, RecordState, StateSink,
};
use burn::tensor::{Device, Tensor, TensorData};

use crate::panic;
use crate::rule::{RuleError, check_step, lost_state};
use crate::rule_state::{RuleState, StateTensor};

/// The configuration of a burn optimizer that uses a whole parameter at once.
///
/// It is implemented for LAMB and Muon. The trait is sealed.
pub trait WholeConfig: sealed::Sealed {
    /// The optimizer that the configuration describes.
    type Optimizer: Optimizer;

    #[doc(hidden)]
    const ONLY_MATRICES: bool;

    #[doc(hidden)]
    fn optimizer(&self) -> Self::Optimizer;

    #[doc(hidden)]
    fn module_optimizer(&self) -> ModuleOptimizer;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! whole {
    ($($config:ty => $optimizer:ty, $only_matrices:literal;)*) => {$(
        impl sealed::Sealed for $config {}
        impl WholeConfig for $config {
            type Optimizer = $optimizer;
            const ONLY_MATRICES: bool = $only_matrices;

            fn optimizer(&self) -> $optimizer {
                self.build()
            }

            fn module_optimizer(&self) -> ModuleOptimizer {
                self.init()
            }
        }
    )*};
}

whole! {
    LambConfig => Lamb, false;
    MuonConfig => Muon, true;
}

/// A parameter of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardParameter {
    /// The path in the model.
    pub name: String,
    /// The length of each axis.
    pub shape: Vec<usize>,
    /// The place in the shard, in row-major order.
    pub range: Range<usize>,
    /// Whether no optimizer updates it, because it is a statistic of the model.
    pub is_buffer: bool,
}

/// A burn optimizer that uses a whole parameter at once, as the update rule of one shard, with its state.
///
/// ```
/// use ps_model::burn::optim::LambConfig;
/// use ps_model::{ShardParameter, WholeRule, default_device_name, select_device};
///
/// let device = select_device(default_device_name())?;
/// let mut rule = WholeRule::new(&LambConfig::new(), &device);
/// rule.place(vec![ShardParameter {
///     name: "linear.weight".to_owned(),
///     shape: vec![2, 2],
///     range: 0..4,
///     is_buffer: false,
/// }])?;
/// let mut weights = [3.0, 0.0, 0.0, 4.0];
/// rule.step(&mut weights, &[0.5; 4], 0.1)?;
/// // LAMB's first step is as long as the parameter, 5, times the learning rate.
/// assert!(weights.iter().zip([2.75, -0.25, -0.25, 3.75]).all(|(a, b)| (a - b).abs() < 1e-4));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct WholeRule<O> {
    optimizer: O,
    only_matrices: bool,
    clipping: Option<GradientClipping>,
    device: Device,
    parameters: Vec<ShardParameter>,
    /// Without tensors and numbers before the first step. `None` after a step has panicked.
    state: Option<RuleState>,
}

impl<O: Optimizer> WholeRule<O> {
    /// Makes a rule without state that computes on `device`. Until it is told the parameters, it takes a shard for one
    /// matrix with one row.
    #[must_use]
    pub fn new<C>(config: &C, device: &Device) -> Self
    where
        C: WholeConfig<Optimizer = O>,
    {
        Self {
            optimizer: config.optimizer(),
            only_matrices: C::ONLY_MATRICES,
            clipping: config.module_optimizer().grad_clipping().cloned(),
            // An update is not differentiated.
            device: device.clone().inner(),
            parameters: Vec::new(),
            state: Some(RuleState::default()),
        }
    }

    /// Tells the rule the parameters of its shard, which follow one another from 0.
    ///
    /// # Errors
    /// If one is cut, so that the shard has only a part of it, or has a shape that the optimizer cannot update.
    pub fn place(&mut self, parameters: Vec<ShardParameter>) -> Result<(), RuleError> {
        for ShardParameter {
            name,
            shape,
            range,
            is_buffer,
        } in &parameters
        {
            if *is_buffer {
                continue;
            }
            if shape.iter().product::<usize>() != range.len() {
                return Err(RuleError::CutParameter { name: name.clone() });
            }
            let is_possible = match self.only_matrices {
                true => shape.len() == 2,
                false => (1..=MAX_AXES).contains(&shape.len()),
            };
            if !is_possible {
                let (name, shape) = (name.clone(), shape.clone());
                return Err(RuleError::Shape { name, shape });
            }
        }
        self.parameters = parameters;
        Ok(())
    }

    /// Changes the weights by one step of the optimizer, parameter by parameter.
    ///
    /// # Errors
    /// As [`BurnRule::step`](crate::BurnRule::step).
    pub fn step(
        &mut self,
        weights: &mut [f32],
        gradient: &[f32],
        learning_rate: f64,
    ) -> Result<(), RuleError> {
        check_step(weights, gradient, learning_rate)?;
        let len = weights.len();
        if len == 0 {
            return Ok(());
        }
        if self.parameters.is_empty() {
            self.parameters = vec![row(len)];
        }
        let expected = self.parameters.last().map_or(0, |last| last.range.end);
        if expected != len {
            return Err(RuleError::ShardLength { expected, got: len });
        }
        let state = self.state.as_ref().ok_or_else(lost_state)?;
        if !state.is_empty() && state.num_weights != len {
            let expected = state.num_weights;
            return Err(RuleError::ShardLength { expected, got: len });
        }
        let stepped = panic::catch(|| self.step_all(weights, gradient, learning_rate, state));
        let stepped = stepped.map_err(RuleError::Panicked).flatten();
        match stepped {
            Ok((updated, state)) => {
                weights.copy_from_slice(&updated);
                self.state = Some(state);
                Ok(())
            }
            Err(error) => {
                self.state = None;
                Err(error)
            }
        }
    }

    /// Returns the weights and the state after a step.
    fn step_all(
        &self,
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        state: &RuleState,
    ) -> Result<(Vec<f32>, RuleState), RuleError> {
        let mut updated = weights.to_vec();
        let mut next = RuleState::default();
        for parameter in &self.parameters {
            let range = parameter.range.clone();
            let old = state.part(range.clone());
            let now = match parameter.is_buffer {
                // It has a state like all others, but no optimizer moves it.
                true => self.step_buffer(range.len(), learning_rate, old)?.1,
                false => {
                    let (values, slope) = (&weights[range.clone()], &gradient[range.clone()]);
                    let (values, now) =
                        self.step_one(&parameter.shape, values, slope, learning_rate, old)?;
                    updated[range.clone()].copy_from_slice(&values);
                    now
                }
            };
            next.put(weights.len(), range, now)?;
        }
        Ok((updated, next))
    }

    fn step_buffer(
        &self,
        len: usize,
        learning_rate: f64,
        old: Option<RuleState>,
    ) -> Result<(Vec<f32>, RuleState), RuleError> {
        let zeros = vec![0.0; len];
        self.step_one(&[1, len], &zeros, &zeros, learning_rate, old)
    }

    /// Makes the step of one parameter, as a tensor of its own rank.
    fn step_one(
        &self,
        shape: &[usize],
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        old: Option<RuleState>,
    ) -> Result<(Vec<f32>, RuleState), RuleError> {
        match shape.len() {
            1 => self.step_ranked::<1>(shape, weights, gradient, learning_rate, old),
            2 => self.step_ranked::<2>(shape, weights, gradient, learning_rate, old),
            3 => self.step_ranked::<3>(shape, weights, gradient, learning_rate, old),
            4 => self.step_ranked::<4>(shape, weights, gradient, learning_rate, old),
            5 => self.step_ranked::<5>(shape, weights, gradient, learning_rate, old),
            MAX_AXES => self.step_ranked::<MAX_AXES>(shape, weights, gradient, learning_rate, old),
            _ => unreachable!("`place` has checked the shapes"),
        }
    }

    fn step_ranked<const D: usize>(
        &self,
        shape: &[usize],
        weights: &[f32],
        gradient: &[f32],
        learning_rate: f64,
        old: Option<RuleState>,
    ) -> Result<(Vec<f32>, RuleState), RuleError> {
        let tensor = |values: &[f32]| -> Tensor<D> {
            Tensor::from_data(TensorData::new(values.to_vec(), shape), &self.device)
        };
        let old = match old {
            Some(old) => {
                let names = old.names();
                let mut source = old.into_source(shape);
                let state = O::State::<D>::state_unflatten("", &mut source, &self.device);
                let foreign = || RuleError::ForeignState(format!("it has only {names:?}"));
                Some(state.ok_or_else(foreign)?)
            }
            None => None,
        };
        let gradient = match &self.clipping {
            Some(clipping) => clipping.clip_gradient(tensor(gradient)),
            None => tensor(gradient),
        };
        let (updated, state) = self
            .optimizer
            .step(learning_rate, tensor(weights), gradient, old);
        let updated = updated.into_data().try_into_vec::<f32>();
        let updated = updated.map_err(|error| RuleError::Panicked(error.to_string()))?;
        let mut sink = StateSink::default();
        if let Some(state) = state {
            state.state_flatten("", &mut sink);
        }
        let state = RuleState::from_sink(weights.len(), sink)?;
        Ok((updated, state))
    }

    /// Copies the optimizer's state into plain data. It is empty before the first step.
    ///
    /// # Errors
    /// If the state was lost in a panic.
    pub fn save_state(&self) -> Result<RuleState, RuleError> {
        self.state.clone().ok_or_else(lost_state)
    }

    /// Replaces the optimizer's state by one that [`save_state`](Self::save_state) returned.
    ///
    /// # Errors
    /// If the state is of another optimizer or is damaged. Then the old state stays.
    pub fn load_state(&mut self, saved: RuleState) -> Result<(), RuleError> {
        if !saved.is_empty() {
            saved.check_lengths()?;
            let expected = self.row_after_a_step(None)?.names();
            let names = saved.names();
            if names != expected {
                return Err(RuleError::ForeignState(format!(
                    "it has {names:?}, expected are {expected:?}"
                )));
            }
            // The types of its numbers show when burn reads them.
            let tensors = saved.tensors.iter().map(|tensor| StateTensor {
                name: tensor.name.clone(),
                values: vec![0.0],
            });
            let one = RuleState {
                num_weights: 1,
                tensors: tensors.collect(),
                scalars: saved.scalars.clone(),
            };
            self.row_after_a_step(Some(one))?;
        }
        self.state = Some(saved);
        Ok(())
    }

    /// Returns the state of a parameter with a single weight after one more step.
    fn row_after_a_step(&self, old: Option<RuleState>) -> Result<RuleState, RuleError> {
        let stepped = panic::catch(|| self.step_buffer(1, 0.0, old));
        let (_, state) = stepped.map_err(RuleError::Panicked).flatten()?;
        Ok(state)
    }
}

/// burn has no parameters with more axes.
const MAX_AXES: usize = 6;

fn row(len: usize) -> ShardParameter {
    ShardParameter {
        name: String::new(),
        shape: vec![1, len],
        range: 0..len,
        is_buffer: false,
    }
}

impl RuleState {
    fn is_empty(&self) -> bool {
        self.tensors.is_empty() && self.scalars.is_empty()
    }

    /// The state of one parameter; `None` before the first step.
    fn part(&self, range: Range<usize>) -> Option<Self> {
        if self.is_empty() {
            return None;
        }
        let tensors = self.tensors.iter().map(|tensor| StateTensor {
            name: tensor.name.clone(),
            values: tensor.values[range.clone()].to_vec(),
        });
        Some(Self {
            num_weights: range.len(),
            tensors: tensors.collect(),
            scalars: self.scalars.clone(),
        })
    }

    /// Puts the state of one parameter into that of a shard of `len` weights.
    fn put(&mut self, len: usize, range: Range<usize>, part: Self) -> Result<(), RuleError> {
        if self.is_empty() {
            let tensors = part.tensors.iter().map(|tensor| StateTensor {
                name: tensor.name.clone(),
                values: vec![0.0; len],
            });
            *self = Self {
                num_weights: len,
                tensors: tensors.collect(),
                scalars: part.scalars.clone(),
            };
        }
        let is_alike = self.names() == part.names() && self.scalars == part.scalars;
        if !is_alike || part.tensors.iter().any(|t| t.values.len() != range.len()) {
            return Err(RuleError::ForeignState(
                "the optimizer keeps different states of different parameters".to_owned(),
            ));
        }
        for (all, part) in self.tensors.iter_mut().zip(part.tensors) {
            all.values[range.clone()].copy_from_slice(&part.values);
        }
        Ok(())
    }
}

impl<O> fmt::Debug for WholeRule<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WholeRule")
            .field("optimizer", &std::any::type_name::<O>())
            .field("device", &self.device)
            .field("num_parameters", &self.parameters.len())
            .finish_non_exhaustive()
    }
}
