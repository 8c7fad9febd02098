//! burn's learning-rate schedulers as the schedule of a server.

use std::fmt;

use ps_actors::ids::Version;
use ps_actors::learning_rate::{BadRate, LearningRateSchedule};
use ps_model::burn::lr_scheduler::module_lr_scheduler::{
    ModuleLrScheduler, ModuleLrSchedulerConfig,
};
use ps_model::burn::lr_scheduler::{LrScheduler, LrSchedulerConfig};

/// A scheduler of burn that says the learning rate of each update.
///
/// The scheduler is stepped once for each *update*, whichever worker's gradients are in it. A step of a
/// worker is not always an update: in `Bsp`, an update has a gradient of each worker.
///
/// A schedule depends only on the number of the update, so nothing of it is saved. When a run goes on from
/// a checkpoint, the scheduler begins again and is stepped up to the first update that follows. Its rates
/// have the same bits then.
///
/// ```
/// use ps::actors::learning_rate::{LearningRateSchedule, Scheduled};
/// use ps::learning_rate::BurnSchedule;
/// use ps::model::burn::lr_scheduler::LrSchedulerConfig;
/// use ps::model::burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
/// use ps::model::burn::lr_scheduler::linear::LinearLrSchedulerConfig;
/// use ps::model::burn::lr_scheduler::sequential::SequentialLrSchedulerConfig;
/// use ps::prelude::*;
///
/// // A linear warm-up over 100 updates, then a cosine over 900.
/// let warm_up = LinearLrSchedulerConfig::new(1e-5, 0.1, 100);
/// let cosine = CosineAnnealingLrSchedulerConfig::new(0.1, 900);
/// let parts = vec![LrSchedulerConfig::Linear(warm_up), LrSchedulerConfig::Cosine(cosine)];
/// let mut schedule = BurnSchedule::new(SequentialLrSchedulerConfig::new(parts, vec![100]))?;
/// let is_about = |rate: f64, expected: f64| (rate / expected - 1.0).abs() < 1e-9;
/// assert!(is_about(schedule.learning_rate(Version(1)), 1e-5));
/// assert!(is_about(schedule.learning_rate(Version(101)), 0.1));
///
/// let rule = Scheduled::new(Sgd::new(), schedule);
/// # let initial = Weights::initial(Layout::flat(1), vec![0.0]);
/// let server = ParameterServer::new(&initial, rule, ServerConfig::default())?.spawn()?;
/// assert!(is_about(server.ask(GetStatus).wait()?.learning_rate, 1e-5));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BurnSchedule {
    /// Describes the scheduler and its settings.
    description: String,
    /// The scheduler before its first step.
    fresh: ModuleLrScheduler,
    scheduler: ModuleLrScheduler,
    num_steps: u64,
    /// The rate of the last step.
    rate: f64,
}

/// Why a schedule of the learning rate cannot be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// burn does not accept the settings.
    #[error("the learning-rate schedule {schedule} cannot be used: {problem}")]
    Settings {
        /// The name of burn's scheduler, and its settings.
        schedule: String,
        /// What burn says about them.
        problem: String,
    },
    /// The schedule gives a rate that no server can use.
    #[error(transparent)]
    Rate(#[from] BadRate),
}

impl BurnSchedule {
    /// Makes a schedule of a configuration of burn, such as `CosineAnnealingLrSchedulerConfig`, or of a
    /// constant rate.
    ///
    /// # Errors
    /// If burn does not accept the settings. Among other things, most of its schedulers accept no rate
    /// above 1.
    pub fn new(config: impl Into<LrSchedulerConfig>) -> Result<Self, ScheduleError> {
        let config = config.into();
        let description = describe(&config);
        match ModuleLrSchedulerConfig::new(config).init() {
            Ok(scheduler) => Ok(Self::with(description, scheduler)),
            Err(problem) => Err(ScheduleError::Settings {
                schedule: description,
                problem,
            }),
        }
    }

    /// Makes a schedule of any scheduler that has taken no step. `description` tells it from others: it is
    /// what `Debug` prints, and what the processes of a training compare.
    #[must_use]
    pub fn of_scheduler(
        description: impl Into<String>,
        scheduler: impl LrScheduler + 'static,
    ) -> Self {
        Self::with(description.into(), ModuleLrScheduler::new(scheduler))
    }

    fn with(description: String, fresh: ModuleLrScheduler) -> Self {
        Self {
            description,
            scheduler: fresh.clone(),
            fresh,
            num_steps: 0,
            rate: f64::NAN,
        }
    }
}

impl LearningRateSchedule for BurnSchedule {
    fn learning_rate(&mut self, version: Version) -> f64 {
        if version.0 < self.num_steps {
            self.scheduler = self.fresh.clone();
            self.num_steps = 0;
        }
        while self.num_steps < version.0 {
            self.rate = self.scheduler.step().base();
            self.num_steps += 1;
        }
        self.rate
    }
}

impl fmt::Debug for BurnSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.description)
    }
}

/// Describes the settings of a scheduler in one line.
fn describe(config: &LrSchedulerConfig) -> String {
    format!("{config:?}")
}
