//! The optimizers of burn that a shard can have: elementwise ones, and those of whole parameters.

use burn::optim::{
    AdaGradConfig, AdamConfig, AdamWConfig, AdanConfig, LambConfig, LionConfig, MuonConfig,
    Optimizer, RmsPropConfig, SgdConfig,
};
use burn::tensor::Device;

use crate::rule::{BurnRule, RuleError};
use crate::rule_state::RuleState;
use crate::whole_rule::{ShardParameter, WholeRule};

/// The configuration of a burn optimizer that servers can use.
///
/// It is implemented for SGD (with momentum, Nesterov), Adam (AMSGrad), AdamW, RMSProp, AdaGrad, Lion and Adan, which
/// treat each weight by itself, and for LAMB and Muon, which need whole parameters. The trait is sealed.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not the configuration of an optimizer that servers can use",
    note = "servers have parts of the model, with SGD, Adam, AdamW, RMSProp, AdaGrad, Lion, Adan, LAMB or Muon"
)]
pub trait OptimizerConfig: sealed::Sealed {
    /// Whether the weights must be cut between parameters.
    const NEEDS_WHOLE_PARAMETERS: bool;

    /// Makes the rule of one shard, which computes on `device`.
    ///
    /// # Errors
    /// If an elementwise optimizer clips gradients by their norm. This is refused because a shard has only a part of each
    /// gradient.
    fn shard_rule(&self, device: &Device) -> Result<Box<dyn ShardRule>, RuleError>;
}

/// A burn optimizer as the update rule of one shard: a [`BurnRule`] or a [`WholeRule`].
pub trait ShardRule: Send {
    /// Tells the rule the parameters of its shard, or the parts of them that the shard has.
    ///
    /// # Errors
    /// If the optimizer cannot update them.
    fn place(&mut self, parameters: Vec<ShardParameter>) -> Result<(), RuleError>;

    /// Changes the weights by one step of the optimizer.
    ///
    /// # Errors
    /// As [`BurnRule::step`].
    fn step(
        &mut self,
        weights: &mut [f32],
        gradient: &[f32],
        learning_rate: f64,
    ) -> Result<(), RuleError>;

    /// Copies the optimizer's state into plain data.
    ///
    /// # Errors
    /// As [`BurnRule::save_state`].
    fn save_state(&self) -> Result<RuleState, RuleError>;

    /// Replaces the optimizer's state.
    ///
    /// # Errors
    /// As [`BurnRule::load_state`].
    fn load_state(&mut self, saved: RuleState) -> Result<(), RuleError>;
}

impl<O> ShardRule for BurnRule<O>
where
    O: Optimizer + Send,
    O::State<1>: Send,
{
    fn place(&mut self, _: Vec<ShardParameter>) -> Result<(), RuleError> {
        Ok(())
    }

    fn step(
        &mut self,
        weights: &mut [f32],
        gradient: &[f32],
        learning_rate: f64,
    ) -> Result<(), RuleError> {
        Self::step(self, weights, gradient, learning_rate)
    }

    fn save_state(&self) -> Result<RuleState, RuleError> {
        Self::save_state(self)
    }

    fn load_state(&mut self, saved: RuleState) -> Result<(), RuleError> {
        Self::load_state(self, saved)
    }
}

impl<O: Optimizer + Send> ShardRule for WholeRule<O> {
    fn place(&mut self, parameters: Vec<ShardParameter>) -> Result<(), RuleError> {
        Self::place(self, parameters)
    }

    fn step(
        &mut self,
        weights: &mut [f32],
        gradient: &[f32],
        learning_rate: f64,
    ) -> Result<(), RuleError> {
        Self::step(self, weights, gradient, learning_rate)
    }

    fn save_state(&self) -> Result<RuleState, RuleError> {
        Self::save_state(self)
    }

    fn load_state(&mut self, saved: RuleState) -> Result<(), RuleError> {
        Self::load_state(self, saved)
    }
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! elementwise {
    ($($config:ty),*) => {$(
        impl sealed::Sealed for $config {}
        impl OptimizerConfig for $config {
            const NEEDS_WHOLE_PARAMETERS: bool = false;

            fn shard_rule(&self, device: &Device) -> Result<Box<dyn ShardRule>, RuleError> {
                Ok(Box::new(BurnRule::new(self, device)?))
            }
        }
    )*};
}

elementwise!(
    SgdConfig,
    AdamConfig,
    AdamWConfig,
    RmsPropConfig,
    AdaGradConfig,
    LionConfig,
    AdanConfig
);

macro_rules! whole {
    ($($config:ty),*) => {$(
        impl sealed::Sealed for $config {}
        impl OptimizerConfig for $config {
            const NEEDS_WHOLE_PARAMETERS: bool = true;

            fn shard_rule(&self, device: &Device) -> Result<Box<dyn ShardRule>, RuleError> {
                Ok(Box::new(WholeRule::new(self, device)))
            }
        }
    )*};
}

whole!(LambConfig, MuonConfig);
