//! What a training run tells its user: the result, the way there, and where the time went.

use std::fmt;
use std::process::ExitCode;
use std::time::Duration;

use ps_actors::ids::Version;
use ps_actors::launch::{Signal, exit_code};
use ps_actors::server::{Consistency, Histogram, Reduction};
use ps_actors::weights::Weights;
use ps_model::Evaluation;

use crate::trainer::TrainError;

/// The weights' quality at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CurvePoint {
    /// How many updates had been applied.
    pub version: Version,
    /// Time since the workers started.
    pub elapsed: Duration,
    /// The result on the whole test set.
    pub evaluation: Evaluation,
}

/// The result of a [`Trainer`](crate::Trainer)'s run.
#[derive(Clone, Debug)]
pub struct Report {
    /// When gradients were applied.
    pub consistency: Consistency,
    /// How gradients of one update became one.
    pub reduction: Reduction,
    /// The signal that ended the training before all steps were taken, if one did.
    pub interrupted: Option<Signal>,
    /// The number of workers.
    pub num_workers: usize,
    /// The number of servers.
    pub num_servers: usize,
    /// The final weights; [`model_with_weights`](crate::source::model_with_weights) puts them into
    /// a burn module.
    pub weights: Weights,
    /// The final weights on the whole test set; `None` without test data.
    pub final_evaluation: Option<Evaluation>,
    /// The evaluations on the way, oldest first. The final one is not among them.
    pub curve: Vec<CurvePoint>,
    /// The mean loss of each worker's batches, by worker and step. NaN where a worker was lost before
    /// it could tell; if the run failed or was interrupted, the last ones may be missing.
    pub losses: Vec<Vec<f32>>,
    /// How many updates the weights went through.
    pub num_updates: u64,
    /// How many gradients were applied.
    pub num_applied: u64,
    /// How many were dropped because their round had closed without them.
    pub num_dropped_late: u64,
    /// How many were refused because of their norm.
    pub num_refused: u64,
    /// How many examples were used in gradients.
    pub num_examples: u64,
    /// Of how many gradients only the servers know, because their workers were lost before they could
    /// tell about them.
    pub num_untold: u64,
    /// How many updates lay between the weights of a gradient and its own update.
    pub staleness: Histogram,
    /// How often a worker had to be started again.
    pub num_worker_restarts: u32,
    /// From the workers' start to their end, evaluations on the way included.
    pub elapsed: Duration,
    /// Time that all workers together spent computing gradients; `None` if a worker was lost before it
    /// could tell.
    pub compute_time: Option<Duration>,
    /// Time that all workers together waited for servers and for each other; `None` as above.
    pub wait_time: Option<Duration>,
}

impl Report {
    /// Returns the fraction of right answers of the final weights on the whole test set, 0 to 1.
    #[must_use]
    pub fn final_accuracy(&self) -> Option<f64> {
        self.final_evaluation?.accuracy()
    }

    /// Returns what a program ends with whose training this was: success, or, if it was interrupted,
    /// [the signal's code](Signal::exit_code), so that a launcher does not take it for done.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        exit_code(self.interrupted)
    }

    /// Returns gradients applied per second.
    #[must_use]
    pub fn gradients_per_second(&self) -> f64 {
        self.num_applied as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns examples used per second.
    #[must_use]
    pub fn examples_per_second(&self) -> f64 {
        self.num_examples as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns the fraction of the workers' time that went into computing gradients, 0 to 1; `None` if
    /// it is not known.
    #[must_use]
    pub fn compute_fraction(&self) -> Option<f64> {
        let (compute, wait) = (self.compute_time?, self.wait_time?);
        // Both may be sums of what peers said.
        let total = compute.saturating_add(wait);
        (!total.is_zero()).then(|| compute.as_secs_f64() / total.as_secs_f64())
    }

    /// Says how the result shows that it is of no use.
    pub(crate) fn find_divergence(&self) -> Option<String> {
        let losses = self.losses.iter();
        // NaN may also stand for a loss that was not told.
        let mut last = losses.filter_map(|losses| losses.last()).peekable();
        let loss = self
            .final_evaluation
            .map(|evaluation| evaluation.mean_loss());
        if self
            .weights
            .to_vec()
            .iter()
            .any(|weight| !weight.is_finite())
        {
            Some("the weights are not finite".to_owned())
        } else if let Some(loss) = loss.filter(|loss| !loss.is_finite()) {
            Some(format!("the loss on the test data is {loss}"))
        } else if self.num_untold == 0
            && last.peek().is_some()
            && last.all(|loss| !loss.is_finite())
        {
            Some("the loss of every worker's last batch is not finite".to_owned())
        } else if self.num_applied == 0 && self.num_refused > 0 {
            let num_refused = self.num_refused;
            Some(format!("all {num_refused} gradients were refused"))
        } else {
            None
        }
    }

    pub(crate) fn incomplete(self, error: TrainError) -> TrainError {
        TrainError::Incomplete {
            report: Box::new(self),
            source: Box::new(error),
        }
    }
}

/// A summary of a few lines.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(signal) = self.interrupted {
            writeln!(
                f,
                "Interrupted by {signal} after {} updates",
                self.num_updates
            )?;
        }
        writeln!(
            f,
            "{} updates of {} gradients in {:.1} s ({:.0} gradients/s, {:.0} examples/s): \
             {} with {}, {}, {}",
            self.num_updates,
            self.num_applied,
            self.elapsed.as_secs_f64(),
            self.gradients_per_second(),
            self.examples_per_second(),
            self.consistency,
            self.reduction,
            counted(self.num_workers, "worker"),
            counted(self.num_servers, "server"),
        )?;
        writeln!(
            f,
            "Staleness: {:.2} updates on average, {} at most; {} gradients late, {} refused, {}",
            self.staleness.mean(),
            self.staleness.max(),
            self.num_dropped_late,
            self.num_refused,
            counted(self.num_worker_restarts as usize, "worker restart"),
        )?;
        match self.compute_fraction() {
            Some(fraction) => write!(
                f,
                "Workers computed for {:.0} % of their time and waited for {:.0} %",
                100.0 * fraction,
                100.0 * (1.0 - fraction),
            ),
            None => write!(
                f,
                "How long workers computed and waited is not known: they were lost before they could \
                 tell it of {} gradients",
                self.num_untold,
            ),
        }
    }
}

fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}
