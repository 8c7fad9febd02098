//! The report of a training run: its result, the evaluations during the run, and how the time was spent.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ps_actors::checkpoint::SaveReport;
use ps_actors::ids::{Version, WorkerId};
use ps_actors::launch::{Signal, exit_code};
use ps_actors::server::{Consistency, Histogram, Reduction};
use ps_actors::weights::Weights;
use ps_model::Evaluation;
use serde::{Serialize, Serializer};

use crate::observe::RunSummary;
pub use crate::resume::Resumed;
use crate::trainer::TrainError;

/// The quality of the weights at one moment of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct CurvePoint {
    /// The version of the weights: how many updates had been applied.
    pub version: Version,
    /// Time since the workers started.
    pub elapsed: Duration,
    /// The result on the whole test set.
    pub evaluation: Evaluation,
    /// The metrics of [`Trainer::metric`](crate::Trainer::metric) on the whole test set, by their names.
    pub metrics: BTreeMap<String, f64>,
}

/// The result of a [`Trainer`](crate::Trainer)'s run. Its `Display` is a summary of a few lines.
///
/// ```
/// use ps::prelude::*;
///
/// let device = select_device(default_device_name())?;
/// let mnist = Mnist::bundled_sample();
/// let report = Trainer::new(ConvNet::init(1, &device), mnist.train)
///     .device(&device)
///     .test_data(mnist.test)
///     .iterations(4)
///     .evaluate_every(2)
///     .on_evaluation(|point| println!("{}: {:?}", point.version, point.evaluation.accuracy()))
///     .run()?;
/// assert_eq!((report.num_updates, report.num_applied), (4, 4));
/// assert_eq!(report.losses[0].len(), 4); // The losses of worker 0.
/// assert!(report.final_accuracy().is_some());
/// println!("{report}");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// It implements serde's `Serialize`, for formats that name their fields, such as JSON. What is written is what a
/// [`RunSummary`] has, and the losses. A number that is not finite is `null` there. The weights
/// are left out: [write](Weights::write_safetensors) them to a file of their own.
///
/// ```
/// # use ps::prelude::*;
/// # let device = select_device(default_device_name())?;
/// # let report = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
/// #     .device(&device)
/// #     .iterations(2)
/// #     .run()?;
///
/// let json = serde_json::to_value(&report)?;
/// assert_eq!(json["num_updates"], 2);
/// assert_eq!(json["losses"][0].as_array().map(Vec::len), Some(2));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Report {
    /// The consistency mode of the run.
    pub consistency: Consistency,
    /// How the gradients of one update were combined.
    pub reduction: Reduction,
    /// The signal that ended the training before all steps were taken, if one did.
    pub interrupted: Option<Signal>,
    /// The version whose evaluation ended the training before all steps were taken, if one did. See
    /// [`Trainer::stop_when`](crate::Trainer::stop_when).
    pub stopped_early: Option<Version>,
    /// Whether [`Controls::end`](crate::controls::Controls::end) ended the training before all steps were taken.
    pub ended_by_controls: bool,
    /// Where the training went on, if it went on from a checkpoint. The counts below are those of the whole
    /// training. Times, losses and evaluations are those since then.
    pub resumed: Option<Resumed>,
    /// The checkpoints that were saved. `None` if none were asked for.
    pub checkpoints: Option<SaveReport>,
    /// How often the servers were lost, so that the training went on from its last checkpoint.
    pub num_recoveries: u32,
    /// How many gradients had been applied before this process went on with the training.
    pub num_applied_before: u64,
    /// The number of workers.
    pub num_workers: usize,
    /// The number of servers.
    pub num_servers: usize,
    /// The final weights; [`model_with_weights`](crate::source::model_with_weights) puts them into
    /// a burn module.
    pub weights: Weights,
    /// The result of the final weights on the whole test set. `None` without test data.
    pub final_evaluation: Option<Evaluation>,
    /// The metrics of [`Trainer::metric`](crate::Trainer::metric) of the final weights, by their names. Empty without
    /// test data.
    pub final_metrics: BTreeMap<String, f64>,
    /// The evaluations during the run, oldest first. The final evaluation is not included.
    pub curve: Vec<CurvePoint>,
    /// The mean loss of each batch, by worker and then by step. NaN if a worker was lost before it could
    /// report the loss. If the run failed or was interrupted, the last losses may be missing.
    pub losses: Vec<Vec<f32>>,
    /// How many updates were applied to the weights.
    pub num_updates: u64,
    /// How many gradients were applied.
    pub num_applied: u64,
    /// How many gradients were dropped because their round had already closed.
    pub num_dropped_late: u64,
    /// How many gradients were refused because of their norm.
    pub num_refused: u64,
    /// How many examples the batches of all gradients had together.
    pub num_examples: u64,
    /// How many gradients only the servers know of, because their workers were lost before they could
    /// report them.
    pub num_untold: u64,
    /// The staleness of the applied gradients: how many updates were applied between the weights that a
    /// gradient was computed on and its own update.
    pub staleness: Histogram,
    /// How often a worker had to be started again.
    pub num_worker_restarts: u32,
    /// How often a worker went on at another node, because its node left or another one joined.
    pub num_worker_moves: u32,
    /// The workers that somebody removed while the training ran. The others went on without them.
    pub removed_workers: Vec<WorkerId>,
    /// Time from the start of the workers to their end. It includes the evaluations during the run.
    pub elapsed: Duration,
    /// Total time that the workers spent computing gradients. `None` if a worker was lost before it could
    /// report its time.
    pub compute_time: Option<Duration>,
    /// Total time that the workers waited for servers and for each other. `None` in the same case.
    pub wait_time: Option<Duration>,
}

impl Report {
    /// Returns the fraction of right answers of the final weights on the whole test set, from 0 to 1.
    /// `None` without test data, or if the model does not classify.
    #[must_use]
    pub fn final_accuracy(&self) -> Option<f64> {
        self.final_evaluation?.accuracy()
    }

    /// Returns the exit code for the program: success, or [the signal's code](Signal::exit_code) if the
    /// training was interrupted and its result is not in a checkpoint. So a launcher does not take a lost
    /// training for a finished one.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self.saved_all() {
            Some(_) => ExitCode::SUCCESS,
            None => exit_code(self.interrupted),
        }
    }

    /// Returns the checkpoint that has the final weights, if there is one.
    #[must_use]
    pub fn saved_all(&self) -> Option<&Path> {
        let saved = self.checkpoints.as_ref()?;
        let (_, path) = saved.latest.as_ref()?;
        saved.has(self.weights.version()).then_some(path)
    }

    /// Returns how many gradients this process applied per second.
    #[must_use]
    pub fn gradients_per_second(&self) -> f64 {
        let before = self.resumed.map_or(0, |resumed| resumed.num_applied);
        self.num_applied.saturating_sub(before) as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns how many examples this process used per second.
    #[must_use]
    pub fn examples_per_second(&self) -> f64 {
        let before = self.resumed.map_or(0, |resumed| resumed.num_examples);
        self.num_examples.saturating_sub(before) as f64 / self.elapsed.as_secs_f64()
    }

    /// Returns the fraction of the workers' time that was spent computing gradients, from 0 to 1. `None` if
    /// it is not known.
    #[must_use]
    pub fn compute_fraction(&self) -> Option<f64> {
        let (compute, wait) = (self.compute_time?, self.wait_time?);
        // The times may come from peers, so adding them must not overflow.
        let total = compute.saturating_add(wait);
        (!total.is_zero()).then(|| compute.as_secs_f64() / total.as_secs_f64())
    }

    /// Returns what a run under a plan of faults compares, for a training in which each worker takes so many steps.
    #[cfg(feature = "cli")]
    #[must_use]
    pub fn done(&self, num_steps: u64) -> crate::chaos::Done {
        let num_expected = num_steps.saturating_mul(self.num_workers as u64);
        let is_cut_short =
            self.interrupted.is_some() || self.stopped_early.is_some() || self.ended_by_controls;
        crate::chaos::Done {
            num_expected: (!is_cut_short).then_some(num_expected),
            num_settled: self.num_applied + self.num_dropped_late + self.num_refused,
            num_applied: self.num_applied,
            num_applied_before: self.num_applied_before,
            weights: self.weights.clone(),
            is_repeatable: self.consistency == Consistency::Bsp,
        }
    }

    pub(crate) fn has_finite_weights(&self) -> bool {
        let mut numbers = self.weights.segments().iter().flat_map(|part| part.data());
        numbers.all(|weight| weight.is_finite())
    }

    /// Returns how the result shows that the training has diverged, if it does.
    pub(crate) fn find_divergence(&self) -> Option<String> {
        let loss = self
            .final_evaluation
            .map(|evaluation| evaluation.mean_loss());
        if !self.has_finite_weights() {
            Some("the weights are not finite".to_owned())
        } else if let Some(loss) = loss.filter(|loss| !loss.is_finite()) {
            Some(format!("the loss on the test data is {loss}"))
        } else if self.num_untold == 0 && end_without_number(&self.losses) {
            // If losses are missing, NaN may mean that one was not reported.
            Some("the losses of every worker's last batches are not finite".to_owned())
        } else if self.num_applied == 0 && self.num_refused > 0 {
            let num_refused = self.num_refused;
            Some(format!("all {num_refused} gradients were refused"))
        } else {
            None
        }
    }

    /// Returns the error of a training that refused more than half of its gradients, if this is one.
    pub(crate) fn most_refused(&self) -> Option<TrainError> {
        let num_all = self.num_applied + self.num_dropped_late + self.num_refused;
        let num_refused = self.num_refused;
        (num_refused > num_all / 2).then_some(TrainError::MostRefused {
            num_refused,
            num_all,
        })
    }

    pub(crate) fn incomplete(self, error: TrainError) -> TrainError {
        TrainError::Incomplete {
            report: Box::new(self),
            source: Box::new(error),
        }
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Written<'a> {
            #[serde(flatten)]
            summary: RunSummary,
            losses: &'a [Vec<f32>],
        }
        let (summary, losses) = (RunSummary::from(self), &self.losses[..]);
        Written { summary, losses }.serialize(serializer)
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
        if let Some(version) = self.stopped_early {
            writeln!(
                f,
                "Stopped early after {} updates: the evaluation of {version} met the condition",
                self.num_updates
            )?;
        }
        if self.ended_by_controls {
            writeln!(f, "Ended as asked after {} updates", self.num_updates)?;
        }
        if let Some(resumed) = self.resumed {
            let version = resumed.version.0;
            writeln!(f, "Went on from a checkpoint after {version} updates")?;
        }
        if self.num_recoveries > 0 {
            let times = counted(self.num_recoveries as usize, "time");
            writeln!(f, "The servers were lost {times}")?;
        }
        if let Some(saved) = &self.checkpoints {
            let num_saved = counted(saved.num_saved as usize, "checkpoint");
            write!(f, "Saved {num_saved}")?;
            if let Some((_, path)) = &saved.latest {
                write!(f, ", the latest is {}", path.display())?;
            }
            match (saved.num_failed, saved.num_skipped) {
                (0, 0) => writeln!(f)?,
                (failed, skipped) => writeln!(f, "; {failed} failed, {skipped} were skipped")?,
            }
            if saved.num_log_failures > 0 {
                let times = counted(saved.num_log_failures as usize, "time");
                writeln!(f, "The update log could not be written {times}")?;
            }
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
            "Staleness: {:.2} updates on average, {} at most; {} gradients late, {} refused, {}, {}",
            self.staleness.mean(),
            self.staleness.max(),
            self.num_dropped_late,
            self.num_refused,
            counted(self.num_worker_restarts as usize, "worker restart"),
            counted(self.num_worker_moves as usize, "worker move"),
        )?;
        if !self.removed_workers.is_empty() {
            let removed = self.removed_workers.iter().map(WorkerId::to_string);
            let removed = removed.collect::<Vec<_>>().join(", ");
            writeln!(f, "Removed while it ran: {removed}")?;
        }
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

/// Whether the last three losses of every worker are not finite, or all of them if there are fewer. One batch without a
/// usable loss, whose gradient was refused, is no divergence.
fn end_without_number(losses: &[Vec<f32>]) -> bool {
    let last = |losses: &Vec<f32>| losses[losses.len().saturating_sub(3)..].to_vec();
    let last: Vec<f32> = losses.iter().flat_map(last).collect();
    !last.is_empty() && last.iter().all(|loss| !loss.is_finite())
}

fn counted(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loss_that_is_not_finite_is_no_divergence() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let ends = |losses: &[&[f32]]| {
            let losses: Vec<_> = losses.iter().map(|losses| losses.to_vec()).collect();
            end_without_number(&losses)
        };
        assert!(!ends(&[&[2.0, 1.0, nan]]));
        assert!(!ends(&[&[2.0, nan, nan], &[]]));
        assert!(!ends(&[&[2.0, nan, nan, nan], &[2.0, 1.0]]));
        assert!(ends(&[&[2.0, nan, inf, nan], &[nan], &[]]));
        // Nothing was computed.
        assert!(!ends(&[&[], &[]]));
    }
}
