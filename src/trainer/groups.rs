//! Groups of parameters with an optimizer or a learning rate of their own.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::sync::Arc;

use ps_actors::rule::{Groups, UpdateRule};
use ps_actors::server::Cut;
use ps_actors::weights::Layout;
use ps_model::burn::module::{Module, ModuleVisitor, Param, ParamGroup};
use ps_model::burn::tensor::{Device, Tensor};
use ps_model::{Model, OptimizerConfig};
use sha2::{Digest, Sha256};

use super::{MakeRule, TrainError, Trainer};
use crate::data::Examples;
use crate::rule::OptimizerRule;

/// A description names so many parameters, and has a checksum of the names beyond that.
const MAX_NAMED: usize = 16;

/// What is different for some parameters.
#[derive(Clone)]
pub(super) struct Group {
    /// The paths of the parameters.
    names: Arc<BTreeSet<String>>,
    role: Role,
    /// Describes the optimizer or the rate.
    what: String,
}

#[derive(Clone)]
enum Role {
    Optimizer { make: MakeRule, needs_whole: bool },
    Rate(f64),
}

impl Group {
    fn of<M: Module>(model: &M, group: &ParamGroup, role: Role, what: String) -> Self {
        let mut members = Members {
            group,
            path: Vec::new(),
            names: BTreeSet::new(),
        };
        model.visit(&mut members);
        let names = Arc::new(members.names);
        Self { names, role, what }
    }

    /// Whether its optimizer needs whole parameters.
    fn needs_whole(&self) -> bool {
        matches!(
            self.role,
            Role::Optimizer {
                needs_whole: true,
                ..
            }
        )
    }

    /// Describes the group, for people and for the other processes.
    pub(super) fn describe(&self) -> String {
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        let of = match names.len() {
            0..=MAX_NAMED => names.join(", "),
            len => {
                let digest = Sha256::digest(names.join("\n"));
                let digest: String = digest.iter().take(8).map(|b| format!("{b:02x}")).collect();
                format!("{len} parameters ({digest})")
            }
        };
        format!("{} for {of}", self.what)
    }

    /// Adds the group to a rule that computes on `device`.
    ///
    /// # Errors
    /// If the optimizer cannot be used.
    pub(super) fn add_to(&self, rule: Groups, device: &Device) -> Result<Groups, TrainError> {
        let names = Arc::clone(&self.names);
        let is_member = move |name: &str| names.contains(name);
        match &self.role {
            Role::Rate(factor) => Ok(rule.with_rate(is_member, *factor)),
            Role::Optimizer { make, .. } => Ok(rule.with_rule(is_member, checked(make, device)?)),
        }
    }
}

/// Returns a function that makes rules, after making one to see that it can.
///
/// # Errors
/// If it cannot.
pub(super) fn checked(
    make: &MakeRule,
    device: &Device,
) -> Result<impl Fn() -> Box<dyn UpdateRule> + Send + 'static, TrainError> {
    make(device)?;
    let (make, device) = (Arc::clone(make), device.clone());
    Ok(move || make(&device).expect("the same call succeeded before"))
}

/// Collects the paths of a group's parameters.
struct Members<'a> {
    group: &'a ParamGroup,
    path: Vec<String>,
    names: BTreeSet<String>,
}

impl ModuleVisitor for Members<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        if self.group.matches(&param.id, Some(&path)) {
            self.names.insert(path);
        }
    }
}

impl<M, E> Trainer<M, E>
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    /// Uses another optimizer for the parameters of `group`, as burn's `ModuleOptimizer::with_group` does. If a
    /// parameter is in several groups, the last one that was added counts.
    ///
    /// ```
    /// use ps::model::burn::module::ParamGroup;
    /// use ps::model::burn::optim::AdamWConfig;
    /// use ps::prelude::*;
    ///
    /// let device = select_device(default_device_name())?;
    /// let report = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
    ///     .device(&device)
    ///     .optimizer(AdamWConfig::new().with_weight_decay(0.1))
    ///     .optimizer_for(&ParamGroup::from_predicate("bias"), AdamWConfig::new().with_weight_decay(0.0))
    ///     .learning_rate_for(&ParamGroup::from_predicate("fc"), 0.5)
    ///     .learning_rate(1e-3)
    ///     .iterations(4)
    ///     .run()?;
    /// assert_eq!(report.num_updates, 4);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// A group without a trainable parameter is an error of the run.
    #[must_use]
    pub fn optimizer_for<C>(mut self, group: &ParamGroup, config: C) -> Self
    where
        C: OptimizerConfig + Debug + Send + Sync + 'static,
    {
        let what = format!("{config:?}");
        let make: MakeRule =
            Arc::new(move |device| Ok(Box::new(OptimizerRule::new(&config, device)?)));
        let needs_whole = C::NEEDS_WHOLE_PARAMETERS;
        let role = Role::Optimizer { make, needs_whole };
        let group = Group::of(&self.model, group, role, what);
        self.groups.push(group);
        self
    }

    /// Multiplies the learning rate of the parameters of `group` by `factor`, in each update. So their rate follows
    /// the schedule, too. If a parameter is in several groups, the last factor that was added counts.
    ///
    /// A factor that is negative or not finite is an error of the run, and so is a group without a trainable
    /// parameter.
    #[must_use]
    pub fn learning_rate_for(mut self, group: &ParamGroup, factor: f64) -> Self {
        let what = format!("{factor} times the learning rate");
        let group = Group::of(&self.model, group, Role::Rate(factor), what);
        self.groups.push(group);
        self
    }

    /// Returns where the weights may be cut to split them over servers.
    pub(super) fn cut(&self) -> Cut {
        match self.needs_whole || self.groups.iter().any(Group::needs_whole) {
            true => Cut::BetweenParameters,
            false => Cut::Anywhere,
        }
    }

    /// # Errors
    /// If a group has no trainable parameter, or a factor is no factor.
    pub(super) fn check_groups(&self, layout: &Layout) -> Result<(), TrainError> {
        let num_buffers = layout.num_buffers();
        let trainable = &layout.parameters()[..layout.parameters().len() - num_buffers];
        for Group { names, role, what } in &self.groups {
            match role {
                Role::Rate(factor) if !(factor.is_finite() && *factor >= 0.0) => {
                    return Err(TrainError::RateFactor(*factor));
                }
                Role::Rate(_) | Role::Optimizer { .. } => {}
            }
            if !trainable.iter().any(|one| names.contains(&one.name)) {
                let first = trainable.first().map_or("", |first| &first.name);
                return Err(TrainError::EmptyGroup {
                    what: what.clone(),
                    example: first.to_owned(),
                });
            }
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "mnist"))]
mod tests {
    use ps_data::Mnist;
    use ps_model::burn::optim::{LambConfig, SgdConfig};
    use ps_model::{ConvNet, default_device_name, select_device};

    use super::*;

    #[test]
    fn only_the_optimizers_that_are_used_decide_where_weights_are_cut() {
        let device = select_device(default_device_name()).unwrap();
        let data = Mnist::bundled_sample().train;
        let new = || Trainer::new(ConvNet::init(1, &device), data.clone());
        let biases = ParamGroup::from_predicate("bias");
        assert_eq!(new().cut(), Cut::Anywhere);
        let whole = new().optimizer(LambConfig::new());
        assert_eq!(whole.cut(), Cut::BetweenParameters);
        let replaced = new()
            .optimizer(LambConfig::new())
            .optimizer(SgdConfig::new());
        assert_eq!(replaced.cut(), Cut::Anywhere);
        let in_group = new()
            .optimizer_for(&biases, LambConfig::new())
            .optimizer(SgdConfig::new());
        assert_eq!(in_group.cut(), Cut::BetweenParameters);
    }
}
