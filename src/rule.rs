//! Any elementwise burn optimizer as a server's update rule.

use std::fmt;

use ps_actors::rule::{RuleState, RuleStateError, Scalar, UpdateRule};
use ps_model::burn::optim::Optimizer;
use ps_model::burn::tensor::Device;
use ps_model::{BurnRule, ElementwiseConfig, RuleError, StateScalar, StateTensor, StateValue};

/// A [`BurnRule`] that a server can use.
///
/// ```
/// use ps::model::burn::optim::AdamConfig;
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let initial = initial_weights(&ConvNet::init(1, &device), &device)?;
/// let rule = OptimizerRule::new(&AdamConfig::new(), &device)?;
/// let server = ParameterServer::new(&initial, rule, ServerConfig::default())?.spawn()?;
/// assert_eq!(server.ask(GetWeights).wait()?.version(), Version(0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct OptimizerRule<O: Optimizer> {
    rule: BurnRule<O>,
}

impl<O: Optimizer> OptimizerRule<O> {
    /// Makes a rule of the optimizer that `config` describes. It computes on `device`.
    ///
    /// # Errors
    /// If the optimizer clips gradients by their norm. This is refused because a server has only a part of
    /// each gradient.
    pub fn new<C>(config: &C, device: &Device) -> Result<Self, RuleError>
    where
        C: ElementwiseConfig<Optimizer = O>,
    {
        Ok(Self {
            rule: BurnRule::new(config, device)?,
        })
    }
}

impl<O> UpdateRule for OptimizerRule<O>
where
    O: Optimizer + Send + 'static,
    O::State<1>: Send,
{
    /// # Panics
    /// If burn panics. The server then stops, and all calls to it fail.
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        if let Err(error) = self.rule.step(weights, gradient, learning_rate) {
            panic!("the optimizer failed: {error}");
        }
    }

    fn save(&self) -> RuleState {
        let saved = self.rule.save_state();
        let saved = saved.expect("it is lost only in a panic, which stops the server");
        let number = |value| match value {
            StateValue::Unsigned(value) => Scalar::Unsigned(value),
            StateValue::Signed(value) => Scalar::Signed(value),
            StateValue::Float(value) => Scalar::Float(value),
            StateValue::Bool(value) => Scalar::Bool(value),
        };
        RuleState {
            vectors: saved
                .tensors
                .into_iter()
                .map(|tensor| (tensor.name, tensor.values))
                .collect(),
            scalars: saved
                .scalars
                .into_iter()
                .map(|s| (s.name, number(s.value)))
                .collect(),
        }
    }

    fn restore(&mut self, state: RuleState) -> Result<(), RuleStateError> {
        let number = |value| match value {
            Scalar::Unsigned(value) => StateValue::Unsigned(value),
            Scalar::Signed(value) => StateValue::Signed(value),
            Scalar::Float(value) => StateValue::Float(value),
            Scalar::Bool(value) => StateValue::Bool(value),
        };
        let tensors = state.vectors.into_iter();
        let scalars = state.scalars.into_iter();
        let tensors: Vec<_> = tensors
            .map(|(name, values)| StateTensor { name, values })
            .collect();
        let saved = ps_model::RuleState {
            num_weights: tensors.first().map_or(0, |tensor| tensor.values.len()),
            tensors,
            scalars: scalars
                .map(|(name, value)| StateScalar {
                    name,
                    value: number(value),
                })
                .collect(),
        };
        self.rule.load_state(saved).map_err(|error| RuleStateError {
            rule: format!("{self:?}"),
            problem: error.to_string(),
        })
    }
}

impl<O: Optimizer> fmt::Debug for OptimizerRule<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OptimizerRule<{}>", std::any::type_name::<O>())
    }
}
