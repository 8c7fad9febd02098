//! Any burn optimizer that servers can have, as their update rule.

use std::fmt;
use std::ops::Range;

use ps_actors::rule::{PlaceError, RuleState, RuleStateError, Scalar, UpdateRule};
use ps_actors::weights::Layout;
use ps_model::burn::tensor::Device;
use ps_model::{
    OptimizerConfig, RuleError, ShardParameter, ShardRule, StateScalar, StateTensor, StateValue,
};

/// A burn optimizer that a server can use as its update rule.
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
///
/// LAMB and Muon need whole parameters. A group of several servers with one of them needs
/// [`Cut::BetweenParameters`](ps_actors::server::Cut) in its [`ServerConfig`](ps_actors::server::ServerConfig).
pub struct OptimizerRule {
    rule: Box<dyn ShardRule>,
    /// The type of the configuration, for messages.
    name: &'static str,
}

impl OptimizerRule {
    /// Makes a rule of the optimizer that `config` describes. It computes on `device`.
    ///
    /// # Errors
    /// If an elementwise optimizer clips gradients by their norm. This is refused because a server has only a part of
    /// each gradient.
    pub fn new<C: OptimizerConfig>(config: &C, device: &Device) -> Result<Self, RuleError> {
        Ok(Self {
            rule: config.shard_rule(device)?,
            name: std::any::type_name::<C>(),
        })
    }
}

impl UpdateRule for OptimizerRule {
    fn place(&mut self, layout: &Layout, range: Range<usize>) -> Result<(), PlaceError> {
        let num_trainable = layout.num_trainable();
        let parts = layout.parameters().iter().filter_map(|parameter| {
            let start = parameter.range.start.max(range.start);
            let end = parameter.range.end.min(range.end);
            (start < end).then(|| ShardParameter {
                name: parameter.name.clone(),
                shape: parameter.shape.clone(),
                range: start - range.start..end - range.start,
                is_buffer: parameter.range.start >= num_trainable,
            })
        });
        self.rule
            .place(parts.collect())
            .map_err(|error| PlaceError {
                problem: error.to_string(),
            })
    }

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

impl fmt::Debug for OptimizerRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OptimizerRule<{}>", self.name)
    }
}
