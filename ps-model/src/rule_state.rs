//! The state of an update rule as plain data, to be saved in a checkpoint.

use burn::optim::{StateSink, StateSource};
use burn::tensor::TensorData;
use serde::{Deserialize, Serialize};

use crate::rule::RuleError;

/// The state of a [`BurnRule`](crate::BurnRule) or [`WholeRule`](crate::WholeRule). It has some tensors, each with one number per weight of
/// the shard, such as the moments of Adam. And it has some single numbers, such as the count of steps.
///
/// The default is the state of a rule that has taken no step.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RuleState {
    /// The number of weights of the shard.
    pub num_weights: usize,
    /// The tensors, in the order of burn's fields.
    pub tensors: Vec<StateTensor>,
    /// The single numbers, in the order of burn's fields.
    pub scalars: Vec<StateScalar>,
}

/// One tensor of a rule's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateTensor {
    /// The name in burn, such as `momentum.moment_1`.
    pub name: String,
    /// The numbers, one for each weight of the shard.
    pub values: Vec<f32>,
}

/// One number of a rule's state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StateScalar {
    /// The name in burn, such as `momentum.time`.
    pub name: String,
    /// The number, in the type that burn's optimizer uses.
    pub value: StateValue,
}

/// A number of one of the types that burn's optimizers use.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum StateValue {
    /// An integer that is not negative, such as a step count.
    Unsigned(u64),
    /// A negative integer.
    Signed(i64),
    /// A real number.
    Float(f64),
    /// A truth value.
    Bool(bool),
}

impl RuleState {
    pub(crate) fn from_sink(num_weights: usize, sink: StateSink) -> Result<Self, RuleError> {
        let tensors = sink
            .tensors
            .into_iter()
            .map(|(name, data)| match data.try_into_vec::<f32>() {
                Ok(values) => Ok(StateTensor { name, values }),
                Err(error) => Err(RuleError::ForeignState(format!("tensor `{name}`: {error}"))),
            })
            .collect::<Result<_, _>>()?;
        let scalars = sink
            .scalars
            .into_iter()
            .map(|(name, scalar)| {
                // burn does not export the type of `scalar`, only its conversions. Integers are tried
                // first, because they convert to floats too.
                let value = u64::try_from(scalar)
                    .map(StateValue::Unsigned)
                    .or_else(|_| i64::try_from(scalar).map(StateValue::Signed))
                    .or_else(|_| f64::try_from(scalar).map(StateValue::Float))
                    .or_else(|_| bool::try_from(scalar).map(StateValue::Bool));
                match value {
                    Ok(value) => Ok(StateScalar { name, value }),
                    Err(error) => Err(RuleError::ForeignState(format!("`{name}`: {error}"))),
                }
            })
            .collect::<Result<_, _>>()?;
        Ok(Self {
            num_weights,
            tensors,
            scalars,
        })
    }

    /// `shape` is that of each tensor.
    pub(crate) fn into_source(self, shape: &[usize]) -> StateSource {
        let scalars = self.scalars.into_iter().map(|scalar| {
            let value = match scalar.value {
                StateValue::Unsigned(value) => value.into(),
                StateValue::Signed(value) => value.into(),
                StateValue::Float(value) => value.into(),
                StateValue::Bool(value) => value.into(),
            };
            (scalar.name, value)
        });
        let mut source = StateSource::new(scalars.collect());
        for StateTensor { name, values } in self.tensors {
            source.insert_tensor(name, TensorData::new(values, shape.to_vec()));
        }
        source
    }

    /// Checks that each tensor has a number for each weight.
    pub(crate) fn check_lengths(&self) -> Result<(), RuleError> {
        let len = self.num_weights;
        let mut tensors = self.tensors.iter();
        match tensors.find(|tensor| tensor.values.len() != len) {
            Some(StateTensor { name, values }) => Err(RuleError::ForeignState(format!(
                "tensor `{name}` has {} numbers, the shard {len}",
                values.len()
            ))),
            None => Ok(()),
        }
    }

    /// Returns all names in order, to compare two states.
    pub(crate) fn names(&self) -> Vec<String> {
        let tensors = self.tensors.iter().map(|tensor| &tensor.name);
        let scalars = self.scalars.iter().map(|scalar| &scalar.name);
        let mut names: Vec<String> = tensors.chain(scalars).cloned().collect();
        names.sort_unstable();
        names
    }
}
