//! Brings a module to a device and to rest: with autodiff on, but with nothing that burn would keep a
//! graph of. A step makes leaves of its own ([`FlatView::with_leaves`](crate::flat::FlatView)).
//!
//! burn registers every tensor that requires a gradient in a table of the process, and clears that
//! table in `backward` only. A process that never goes backward, because it evaluates or serves, must
//! make no such tensors.

use std::collections::HashSet;

use burn::module::{Flag, Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Bool, Device, GradientCheckpointingStrategy, Int, Tensor};

use crate::flat::FlatError;
use crate::survey::{Survey, survey};

/// Returns the module in training mode, on `device`, which has autodiff, and what its fields say.
pub(crate) fn to_rest<M: Module>(model: &M, device: &Device) -> Result<(M, Survey), FlatError> {
    // Whatever device the model was made on, and for whatever kind of autodiff.
    let model = model.valid().fork(&device.clone().inner()).train();
    let survey = survey(&model);
    let model = survey.map(|survey| match device.gradient_checkpointing_strategy() {
        Some(strategy) if strategy != GradientCheckpointingStrategy::default() => {
            let flags = &survey.enabled_flags;
            // Tensors that are no parameters cannot be reached, and burn refuses to compute with two
            // strategies at a time. Without autodiff they go together with everything.
            let model = model.valid().map(&mut Checkpointed { strategy, flags });
            (model, survey)
        }
        _ => (model.map(&mut AtRest), survey),
    });
    sweep(device);
    model
}

/// Lets burn forget the tensors that required a gradient and are gone.
fn sweep(device: &Device) {
    let leaf = Tensor::<1>::zeros([1], device).require_grad();
    // It goes through the table of the whole process at the end of each way back.
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
