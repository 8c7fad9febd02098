//! Flags for the learning rate of each update, and for clipping.

use std::fmt;
use std::str::FromStr;

use ps_model::Model;
use ps_model::burn::lr_scheduler::LrSchedulerConfig;
use ps_model::burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use ps_model::burn::lr_scheduler::exponential::ExponentialLrSchedulerConfig;
use ps_model::burn::lr_scheduler::linear::LinearLrSchedulerConfig;
use ps_model::burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
use ps_model::burn::lr_scheduler::step::StepLrSchedulerConfig;

use crate::data::Examples;
use crate::trainer::Trainer;

// No doc comments on this type: `--help` would take them for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Schedule")]
pub struct ScheduleArgs {
    /// How the learning rate changes from update to update: constant, linear, linear:END, cosine, cosine:END,
    /// exponential:FACTOR, or step:UPDATES:FACTOR. Linear and cosine go down to END (0) at the end of the run.
    #[arg(long, default_value_t = LrSchedule::Constant)]
    pub lr_schedule: LrSchedule,
    /// Let the learning rate rise from 0 over this many updates at the start.
    #[arg(long, default_value_t = 0, value_name = "UPDATES")]
    pub warmup: u64,
    /// Scale the gradient of an update down to this norm if it is larger.
    #[arg(long, value_name = "NORM")]
    pub clip_norm: Option<f64>,
}

/// A schedule of the learning rate, as a flag names it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum LrSchedule {
    /// The rate stays the same.
    Constant,
    /// The rate goes down to this one in equal steps.
    Linear(f64),
    /// The rate goes down to this one along half a wave of a cosine.
    Cosine(f64),
    /// The rate is multiplied by this factor after each update.
    Exponential(f64),
    /// The rate is multiplied by a factor every so many updates.
    Step(usize, f64),
}

/// A text that names no schedule.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error(
    "`{0}` is no schedule: give constant, linear, linear:END, cosine, cosine:END, exponential:FACTOR or \
     step:UPDATES:FACTOR"
)]
pub struct NoSchedule(String);

/// A warm-up that is as long as the run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("a warm-up of {warmup} updates is too long for a run of {num_updates} updates")]
pub struct LongWarmup {
    warmup: u64,
    num_updates: u64,
}

impl FromStr for LrSchedule {
    type Err = NoSchedule;

    fn from_str(text: &str) -> Result<Self, NoSchedule> {
        let none = || NoSchedule(text.to_owned());
        let number = |text: &str| text.parse().map_err(|_| none());
        match text.split(':').collect::<Vec<_>>()[..] {
            ["constant"] => Ok(Self::Constant),
            ["linear"] => Ok(Self::Linear(0.0)),
            ["linear", end] => Ok(Self::Linear(number(end)?)),
            ["cosine"] => Ok(Self::Cosine(0.0)),
            ["cosine", end] => Ok(Self::Cosine(number(end)?)),
            ["exponential", factor] => Ok(Self::Exponential(number(factor)?)),
            ["step", every, factor] => {
                let every = every.parse().map_err(|_| none())?;
                Ok(Self::Step(every, number(factor)?))
            }
            _ => Err(none()),
        }
    }
}

impl fmt::Display for LrSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Constant => f.write_str("constant"),
            Self::Linear(end) => write!(f, "linear:{end}"),
            Self::Cosine(end) => write!(f, "cosine:{end}"),
            Self::Exponential(factor) => write!(f, "exponential:{factor}"),
            Self::Step(every, factor) => write!(f, "step:{every}:{factor}"),
        }
    }
}

impl ScheduleArgs {
    /// Sets the learning rate of a training, its schedule and its clipping. `num_updates` is the length of
    /// the run.
    ///
    /// # Errors
    /// If the warm-up is as long as the run.
    pub fn apply<M, E>(
        &self,
        trainer: Trainer<M, E>,
        learning_rate: f64,
        num_updates: u64,
    ) -> Result<Trainer<M, E>, LongWarmup>
    where
        M: Model,
        E: Examples<Batch = M::Batch>,
    {
        let trainer = match self.scheduler(learning_rate, num_updates)? {
            Some(scheduler) => trainer.lr_scheduler(scheduler),
            None => trainer.learning_rate(learning_rate),
        };
        Ok(match self.clip_norm {
            Some(limit) => trainer.clip_norm(limit),
            None => trainer,
        })
    }

    /// Returns burn's scheduler. `None` if the learning rate stays the same.
    fn scheduler(
        &self,
        rate: f64,
        num_updates: u64,
    ) -> Result<Option<LrSchedulerConfig>, LongWarmup> {
        let warmup = self.warmup;
        let rest = num_updates.checked_sub(warmup).filter(|&rest| rest > 0);
        // A run without steps has nothing to warm up.
        let Some(rest) = rest.or_else(|| (num_updates == 0).then_some(1)) else {
            return Err(LongWarmup {
                warmup,
                num_updates,
            });
        };
        let rest = usize::try_from(rest).unwrap_or(usize::MAX);
        let main: LrSchedulerConfig = match self.lr_schedule {
            LrSchedule::Constant if warmup == 0 => return Ok(None),
            LrSchedule::Constant => rate.into(),
            LrSchedule::Linear(end) => LinearLrSchedulerConfig::new(rate, end, rest).into(),
            LrSchedule::Cosine(end) => CosineAnnealingLrSchedulerConfig::new(rate, rest)
                .with_min_lr(end)
                .into(),
            LrSchedule::Exponential(factor) => {
                ExponentialLrSchedulerConfig::new(rate, factor).into()
            }
            LrSchedule::Step(every, factor) => StepLrSchedulerConfig::new(rate, every)
                .with_gamma(factor)
                .into(),
        };
        if warmup == 0 || num_updates == 0 {
            return Ok(Some(main));
        }
        let steps = usize::try_from(warmup).unwrap_or(usize::MAX);
        // Update k of the warm-up has k/(steps + 1) of the rate.
        let lowest = rate / (warmup as f64 + 1.0);
        let rising = LinearLrSchedulerConfig::new(lowest, rate, steps).into();
        let both = SequentialLrSchedulerConfig::new(vec![rising, main], vec![steps]);
        Ok(Some(both.into()))
    }
}

#[cfg(test)]
mod tests {
    use ps_actors::ids::Version;
    use ps_actors::learning_rate::LearningRateSchedule;

    use super::*;
    use crate::learning_rate::BurnSchedule;

    fn rates(schedule: &str, warmup: u64, num_updates: u64) -> Vec<f64> {
        let args = ScheduleArgs {
            lr_schedule: schedule.parse().unwrap(),
            warmup,
            clip_norm: None,
        };
        let config = args.scheduler(0.5, num_updates).unwrap().unwrap();
        let mut schedule = BurnSchedule::new(config).unwrap();
        let rates = (1..=num_updates).map(|update| schedule.learning_rate(Version(update)));
        rates.collect()
    }

    #[test]
    fn flags_name_the_rates_of_all_updates() {
        let half = 0.5;
        for (schedule, warmup, expected) in [
            ("linear", 0, [half, 0.4, 0.3, 0.2, 0.1]),
            ("linear:0.25", 0, [half, 0.45, 0.4, 0.35, 0.3]),
            ("linear", 1, [0.25, half, 0.375, 0.25, 0.125]),
            ("constant", 3, [0.125, 0.25, 0.375, half, half]),
            (
                "cosine",
                1,
                [0.25, half, 0.426_776_695, 0.25, 0.073_223_305],
            ),
            ("exponential:0.5", 0, [half, 0.25, 0.125, 0.0625, 0.03125]),
            ("step:2:0.5", 0, [half, half, 0.25, 0.25, 0.125]),
        ] {
            let got = rates(schedule, warmup, 5);
            for (got, expected) in got.iter().zip(expected) {
                assert!((got - expected).abs() < 1e-8, "{schedule}, {warmup}: {got}");
            }
            let parsed: LrSchedule = schedule.parse().unwrap();
            assert_eq!(parsed.to_string().parse(), Ok(parsed));
        }
    }

    #[test]
    fn flags_that_name_nothing_are_refused() {
        for text in [
            "",
            "cos",
            "linear:x",
            "step:1",
            "step:0.5:1",
            "exponential",
            "cosine:1:2",
        ] {
            let error = text.parse::<LrSchedule>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("`{text}` is no schedule")),
                "{error}"
            );
        }
        let args = |warmup| ScheduleArgs {
            lr_schedule: LrSchedule::Constant,
            warmup,
            clip_norm: None,
        };
        assert_eq!(args(0).scheduler(0.5, 5).unwrap().map(|_| ()), None);
        let error = args(5).scheduler(0.5, 5).unwrap_err().to_string();
        assert!(
            error.contains("5 updates is too long for a run of 5"),
            "{error}"
        );
    }
}
