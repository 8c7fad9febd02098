//! The update rule of a training's servers, with the schedule of its learning rate.

use ps_actors::ids::Version;
use ps_actors::learning_rate::{LearningRateSchedule, Scheduled, check_rates};
use ps_actors::rule::{Groups, UpdateRule};
use ps_model::Model;
use ps_model::burn::tensor::Device;

use super::groups::{Group, checked};
use super::{MakeRule, MakeSchedule, TrainError, Trainer};
use crate::data::Examples;
use crate::learning_rate::ScheduleError;

/// The rates of at most so many updates are checked before a run. It takes up to half a second.
const MAX_CHECKED: u64 = 10_000_000;

/// Makes the rule of one server.
#[derive(Clone)]
pub(super) struct ServerRule {
    make_rule: MakeRule,
    groups: Vec<Group>,
    schedule: Option<MakeSchedule>,
}

impl ServerRule {
    /// # Errors
    /// If the optimizer or the schedule cannot be used.
    pub(super) fn make(&self, device: &Device) -> Result<Box<dyn UpdateRule>, TrainError> {
        let rule = self.make_without_schedule(device)?;
        Ok(match &self.schedule {
            Some(schedule) => Box::new(Scheduled::new(rule, schedule()?)),
            None => rule,
        })
    }

    /// Makes a rule for updates whose learning rates are known.
    ///
    /// # Errors
    /// If the optimizer cannot be used.
    pub(super) fn make_without_schedule(
        &self,
        device: &Device,
    ) -> Result<Box<dyn UpdateRule>, TrainError> {
        if self.groups.is_empty() {
            return Ok((self.make_rule)(device)?);
        }
        let mut rule = Groups::new(checked(&self.make_rule, device)?);
        for group in &self.groups {
            rule = group.add_to(rule, device)?;
        }
        Ok(Box::new(rule))
    }
}

impl<M, E> Trainer<M, E>
where
    M: Model,
    E: Examples<Batch = M::Batch>,
{
    pub(super) fn server_rule(&self) -> ServerRule {
        ServerRule {
            make_rule: self.make_rule.clone(),
            groups: self.groups.clone(),
            schedule: self.schedule.clone(),
        }
    }

    /// Describes the optimizer and those of groups, for people and for the other processes.
    pub(super) fn describe_optimizer(&self) -> String {
        let groups = self.groups.iter().map(Group::describe);
        let all: Vec<String> = [(self.describe_rule)()].into_iter().chain(groups).collect();
        all.join("; ")
    }

    /// # Errors
    /// If the schedule has settings that cannot work.
    pub(super) fn make_schedule(
        &self,
    ) -> Result<Option<Box<dyn LearningRateSchedule>>, ScheduleError> {
        self.schedule.as_ref().map(|make| make()).transpose()
    }

    /// Describes the learning rate, for people and for the other processes.
    pub(super) fn describe_rate(&self) -> String {
        match self.make_schedule() {
            Ok(Some(schedule)) => format!("{schedule:?}"),
            Ok(None) | Err(_) => self.server.learning_rate.to_string(),
        }
    }

    /// Returns the learning rate of the first update.
    pub(super) fn first_rate(&self) -> f64 {
        match self.make_schedule() {
            Ok(Some(mut schedule)) => schedule.learning_rate(Version(1)),
            Ok(None) | Err(_) => self.server.learning_rate,
        }
    }

    /// Checks the rates of all updates that the run can make.
    ///
    /// # Errors
    /// If one of them is no learning rate.
    pub(super) fn check_schedule(&self, num_steps: u64) -> Result<(), ScheduleError> {
        let most = num_steps.saturating_mul(self.num_workers as u64);
        match self.make_schedule()? {
            Some(mut schedule) => Ok(check_rates(&mut schedule, most.min(MAX_CHECKED))?),
            None => Ok(()),
        }
    }
}
