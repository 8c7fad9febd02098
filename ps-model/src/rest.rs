//! Moves a module to a device and to a state in which autodiff is on, but burn keeps no graph of the
//! module. A step makes its own leaves ([`FlatView::with_leaves`](crate::flat::FlatView)).
//!
//! burn registers every tensor that requires a gradient in a table of the process. Only `backward` clears
//! that table. So a process that never calls `backward`, because it only evaluates or serves, must not make
//! such tensors.

use std::collections::HashSet;

use burn::module::{Flag, Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, Device, GradientCheckpointingStrategy, Int, Tensor};

use crate::flat::FlatError;
use crate::survey::{Survey, survey};

/// Returns the module in training mode on `device`, which has autodiff, together with a survey of its
/// fields.
pub(crate) fn to_rest<M: Module>(model: &M, device: &Device) -> Result<(M, Survey), FlatError> {
    // This works whatever device the model was made on, and whatever kind of autodiff that has.
    let model = model.valid().fork(&device.clone().inner()).train();
    let survey = survey(&model);
    let model = survey.map(|survey| match device.gradient_checkpointing_strategy() {
        Some(strategy) if strategy != GradientCheckpointingStrategy::default() => {
            let flags = &survey.enabled_flags;
            // Tensors that are not parameters cannot be reached, and burn refuses to compute with two
            // strategies at a time. Without autodiff they can be combined with everything.
            let model = model.valid().map(&mut Checkpointed { strategy, flags });
            (model, survey)
        }
        _ => (model.map(&mut AtRest), survey),
    });
    sweep(device);
    model
}

/// Makes burn forget the tensors that required a gradient and no longer exist.
fn sweep(device: &Device) {
    let leaf = Tensor::<1>::zeros([1], device).require_grad();
    // burn goes through the table of the whole process at the end of each backward pass.
    drop(leaf.backward());
}

struct AtRest;

impl ModuleMapper for AtRest {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.set_require_grad(false))
    }
}

struct Checkpointed<'a> {
    strategy: GradientCheckpointingStrategy,
    flags: &'a HashSet<ParamId>,
}

impl ModuleMapper for Checkpointed<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let strategy = self.strategy;
        param.map(|tensor| {
            tensor
                .autodiff()
                .with_gradient_checkpointing_strategy(strategy)
        })
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let strategy = self.strategy;
        param.map(|tensor| {
            tensor
                .autodiff()
                .with_gradient_checkpointing_strategy(strategy)
        })
    }

    fn map_bool<const D: usize>(
        &mut self,
        param: Param<Tensor<D, Bool>>,
    ) -> Param<Tensor<D, Bool>> {
        let strategy = self.strategy;
        param.map(|tensor| {
            tensor
                .autodiff()
                .with_gradient_checkpointing_strategy(strategy)
        })
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        let is_enabled = self.flags.contains(&flag.id);
        flag.with_value(is_enabled)
    }
}
