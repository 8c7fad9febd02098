//! Any elementwise burn optimizer, as the update rule of a flat shard of parameters.
//!
//! Such an optimizer treats each weight by itself. So one flat tensor for a shard gives the same numbers as
//! one tensor for each parameter, wherever the shards are cut. (There is one difference: a module's
//! optimizer skips a parameter without a gradient. Here the parameter gets a gradient of zeros.)
//!
//! Optimizers that use a whole parameter at once and clipping by norm would compute something else on such a
//! shard. They are refused. For LAMB and Muon there is [`WholeRule`](crate::WholeRule).

use std::fmt;

use burn::grad_clipping::GradientClipping;
use burn::optim::{
    AdaGrad, AdaGradConfig, Adam, AdamConfig, AdamW, AdamWConfig, Adan, AdanConfig, Lion,
    LionConfig, ModuleOptimizer, Optimizer, RecordState, RmsProp, RmsPropConfig, Sgd, SgdConfig,
    StateSink,
};
use burn::tensor::{Device, Tensor, TensorData};

use crate::panic;
use crate::rule_state::RuleState;

/// Why an update rule cannot be made, or did not apply.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RuleError {
    /// The configuration asks for clipping by norm.
    #[error(
        "clipping by norm needs the norm over whole parameters, but a shard holds pieces of them: \
         let the server clip the whole gradient (`Trainer::clip_norm`, `ServerConfig::clipping`)"
    )]
    ClippingByNorm,
    /// The numbers of weights and of gradients differ.
    #[error("{weights} weights cannot take a gradient of length {gradient}")]
    GradientLength {
        /// The number of weights.
        weights: usize,
        /// The length of the gradient.
        gradient: usize,
    },
    /// The state of the rule belongs to a shard of another size.
    #[error("the state of the update rule is for {expected} weights, got {got}")]
    ShardLength {
        /// The number of weights in the steps before, or in the loaded state.
        expected: usize,
        /// The number of the given weights.
        got: usize,
    },
    /// The optimizer needs whole parameters, but the shard has only a part of one.
    #[error(
        "the optimizer needs whole parameters, but a server has only a part of `{name}`: set `ServerConfig::cut` to \
         `Cut::BetweenParameters` (`Trainer` does so by itself)"
    )]
    CutParameter {
        /// The path of the parameter.
        name: String,
    },
    /// The optimizer cannot update a parameter of this shape.
    #[error(
        "the optimizer cannot update `{name}`, which has the shape {shape:?}: Muon updates matrices only, so use it \
         for a group of matrices (`Trainer::optimizer_for`)"
    )]
    Shape {
        /// The path of the parameter.
        name: String,
        /// The length of each axis.
        shape: Vec<usize>,
    },
    /// The learning rate is infinite or NaN.
    #[error("the learning rate must be finite, not {0}")]
    LearningRate(f64),
    /// The state does not belong to this optimizer.
    #[error("the state is not one of this optimizer: {0}")]
    ForeignState(String),
    /// burn panicked, for example because the device failed. The weights did not change, but the
    /// optimizer's state is lost. Load a state, or make a new rule.
    #[error("the update rule panicked: {0}")]
    Panicked(String),
}

/// The configuration of an elementwise burn optimizer.
///
/// It is implemented for SGD (with momentum, Nesterov), Adam (AMSGrad), AdamW, RMSProp, AdaGrad, Lion and
/// Adan. The trait is sealed. For any other optimizer, use [`BurnRule::assume_elementwise`].
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not the configuration of an elementwise burn optimizer",
    note = "a shard holds pieces of parameters, so only optimizers that treat each weight by itself are supported: SGD, Adam, AdamW, RMSProp, AdaGrad, Lion and Adan"
)]
pub trait ElementwiseConfig: sealed::Sealed {
    /// The optimizer that the configuration describes.
    type Optimizer: Optimizer;

    #[doc(hidden)]
    fn optimizer(&self) -> Self::Optimizer;

    #[doc(hidden)]
    fn module_optimizer(&self) -> ModuleOptimizer;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elementwise {
    ($($config:ty => $optimizer:ty),* $(,)?) => {$(
        impl sealed::Sealed for $config {}
        impl ElementwiseConfig for $config {
            type Optimizer = $optimizer;

            fn optimizer(&self) -> $optimizer {
                self.build()
            }

            fn module_optimizer(&self) -> ModuleOptimizer {
                self.init()
            }
        }
    )*};
}

elementwise! {
    SgdConfig => Sgd,
    AdamConfig => Adam,
    AdamWConfig => AdamW,
    RmsPropConfig => RmsProp,
    AdaGradConfig => AdaGrad,
    LionConfig => Lion,
    AdanConfig => Adan,
}

/// A burn optimizer as the update rule of one shard, with its state.
///
/// ```
/// use ps_model::burn::optim::AdamConfig;
/// use ps_model::{BurnRule, default_device_name, select_device};
///
/// let device = select_device(default_device_name())?;
/// let mut rule = BurnRule::new(&AdamConfig::new(), &device)?;
/// let mut weights = [1.0, 2.0, 3.0];
/// rule.step(&mut weights, &[0.5, 0.0, -0.5], 0.1)?;
/// // Adam's first step is of the length of the learning rate, whatever the gradient's.
/// assert!(weights.iter().zip([0.9, 2.0, 3.1]).all(|(a, b)| (a - b).abs() < 1e-4));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// Optimizers that are not elementwise do not compile:
///
/// ```compile_fail
/// # use ps_model::burn::optim::LambConfig;
/// # use ps_model::{BurnRule, select_device};
/// let rule = BurnRule::new(&LambConfig::new(), &select_device("flex").unwrap());
/// ```
#[derive(Clone)]
pub struct BurnRule<O: Optimizer> {
    optimizer: O,
    clipping: Option<GradientClipping>,
    device: Device,
    state: State<O>,
}

#[derive(Clone)]
enum State<O: Optimizer> {
    /// No step has been taken.
    Fresh,
    /// After a step on a shard of this many weights. (Some optimizers need no state.)
    Stepped(usize, Option<O::State<1>>),
    /// A step has panicked, and the state is lost.
    Lost,
}

impl<O: Optimizer> BurnRule<O> {
    /// Makes a rule without state that computes on `device`.
    ///
    /// # Errors
    ///
    /// If the configuration asks for clipping by norm.
    pub fn new<C>(config: &C, device: &Device) -> Result<Self, RuleError>
    where
        C: ElementwiseConfig<Optimizer = O>,
    {
        let clipping = config.module_optimizer().grad_clipping().cloned();
        if let Some(GradientClipping::Norm(_)) = clipping {
            return Err(RuleError::ClippingByNorm);
        }
        let rule = Self::assume_elementwise(config.optimizer(), device);
        Ok(Self { clipping, ..rule })
    }

    /// Makes a rule of a burn optimizer that is elementwise, although the type system does not know it.
    ///
    /// Each new weight must depend only on the gradient and the state of this same weight. Otherwise the
    /// results depend on where the shards are cut. The state must have the same parts after each step.
    /// Otherwise it cannot be loaded.
    #[must_use]
    pub fn assume_elementwise(optimizer: O, device: &Device) -> Self {
        Self {
            optimizer,
            clipping: None,
            // An update is not differentiated.
            device: device.clone().inner(),
            state: State::Fresh,
        }
    }

    /// Changes the weights by one step of the optimizer.
    ///
    /// Copies weights and gradient to the device and the result back.
    ///
    /// # Errors
    ///
    /// If the lengths differ from each other or from those of the steps before, or if the learning rate is
    /// not finite. Then nothing has changed. Or if burn panics; see [`RuleError::Panicked`].
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
        if let State::Stepped(expected, _) = self.state
            && expected != len
        {
            return Err(RuleError::ShardLength { expected, got: len });
        }
        // Taken, not copied: burn updates the state in place where nobody else holds it.
        let state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Fresh => None,
            State::Stepped(_, state) => state,
            State::Lost => return Err(lost_state()),
        };
        let (updated, state) = panic::catch(|| {
            let weights = self.tensor(weights.to_vec());
            let gradient = self.tensor(gradient.to_vec());
            let gradient = match &self.clipping {
                Some(clipping) => clipping.clip_gradient(gradient),
                None => gradient,
            };
            let (weights, state) = self.optimizer.step(learning_rate, weights, gradient, state);
            (weights.into_data(), state)
        })
        .map_err(RuleError::Panicked)?;
        let updated = updated
            .as_slice::<f32>()
            .map_err(|error| RuleError::Panicked(error.to_string()))?;
        if updated.len() != len {
            return Err(RuleError::Panicked(format!(
                "the optimizer turned {len} weights into {}",
                updated.len()
            )));
        }
        weights.copy_from_slice(updated);
        self.state = State::Stepped(len, state);
        Ok(())
    }

    /// Copies the optimizer's state into plain data. It is empty before the first step.
    ///
    /// # Errors
    ///
    /// If the state was lost in a panic, is not of `f32`, or the device fails.
    pub fn save_state(&self) -> Result<RuleState, RuleError> {
        let (len, state) = match &self.state {
            State::Fresh => return Ok(RuleState::default()),
            State::Stepped(len, state) => (*len, state),
            State::Lost => return Err(lost_state()),
        };
        match state {
            Some(state) => Self::flatten(len, state),
            None => Ok(RuleState {
                num_weights: len,
                ..RuleState::default()
            }),
        }
    }

    /// Replaces the optimizer's state by one that [`save_state`](Self::save_state) returned.
    ///
    /// # Errors
    ///
    /// If the state is of another optimizer or is damaged: names are missing or superfluous, or a tensor
    /// has a wrong length. Then the old state stays.
    pub fn load_state(&mut self, saved: RuleState) -> Result<(), RuleError> {
        if saved == RuleState::default() {
            self.state = State::Fresh;
            return Ok(());
        }
        let len = saved.num_weights;
        let names = saved.names();
        saved.check_lengths()?;
        let mut source = saved.into_source(&[len]);
        let state = panic::catch(|| O::State::<1>::state_unflatten("", &mut source, &self.device))
            .map_err(RuleError::Panicked)?
            .ok_or_else(|| RuleError::ForeignState(format!("it has only {names:?}")))?;

        // burn does not notice optional parts that are missing or too many.
        let understood = Self::flatten(len, &state)?.names();
        let expected = self.names_after_a_step()?;
        if names != expected || names != understood {
            return Err(RuleError::ForeignState(format!(
                "it has {names:?}, expected are {expected:?}"
            )));
        }
        self.state = State::Stepped(len, Some(state));
        Ok(())
    }

    fn flatten(len: usize, state: &O::State<1>) -> Result<RuleState, RuleError> {
        let mut sink = StateSink::default();
        panic::catch(|| state.state_flatten("", &mut sink)).map_err(RuleError::Panicked)?;
        RuleState::from_sink(len, sink)
    }

    /// Lists the parts of the state after a first step, tried on a shard of one weight.
    fn names_after_a_step(&self) -> Result<Vec<String>, RuleError> {
        let mut trial = Self {
            state: State::Fresh,
            ..self.clone()
        };
        trial.step(&mut [1.0], &[1.0], 0.0)?;
        Ok(trial.save_state()?.names())
    }

    fn tensor(&self, values: Vec<f32>) -> Tensor<1> {
        let len = values.len();
        Tensor::from_data(TensorData::new(values, [len]), &self.device)
    }
}

impl<O: Optimizer> fmt::Debug for BurnRule<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BurnRule")
            .field("optimizer", &std::any::type_name::<O>())
            .field("device", &self.device)
            .field(
                "state",
                &match self.state {
                    State::Fresh => "fresh",
                    State::Stepped(..) => "stepped",
                    State::Lost => "lost",
                },
            )
            .finish_non_exhaustive()
    }
}

/// Checks what a step is given.
pub(crate) fn check_step(
    weights: &[f32],
    gradient: &[f32],
    learning_rate: f64,
) -> Result<(), RuleError> {
    if gradient.len() != weights.len() {
        return Err(RuleError::GradientLength {
            weights: weights.len(),
            gradient: gradient.len(),
        });
    }
    match learning_rate.is_finite() {
        true => Ok(()),
        false => Err(RuleError::LearningRate(learning_rate)),
    }
}

pub(crate) fn lost_state() -> RuleError {
    RuleError::Panicked("the state was lost in an earlier step".to_owned())
}
