//! The end of a training, as an event: the report without the weights and the losses.

use std::collections::BTreeMap;

use ps_actors::ids::{Version, WorkerId};
use serde::{Deserialize, Serialize};

use super::number;
use crate::report::{CurvePoint, Report};

/// The training has ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunEnded {
    /// Seconds since the run started.
    pub time: f64,
    /// Why the training failed, with all causes. `None` if it did not.
    pub error: Option<String>,
    /// The report. `None` if there is none: the training failed before its first update, or a driver's own
    /// loop makes no report.
    pub report: Option<RunSummary>,
}

impl RunEnded {
    /// Makes the event of a driver's own loop that has ended. `time` is in seconds since the run started.
    #[must_use]
    pub fn new(time: f64, error: Option<String>) -> Self {
        Self {
            time,
            error,
            report: None,
        }
    }
}

/// What a [`Report`] says, without the weights and the losses of all steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunSummary {
    /// The signal that ended the training before all steps were taken, if one did.
    pub interrupted: Option<String>,
    /// The version whose evaluation ended the training before all steps were taken, if one did.
    #[serde(default)]
    pub stopped_early: Option<Version>,
    /// Whether [`Controls::end`](crate::controls::Controls::end) ended the training before all steps were taken.
    #[serde(default)]
    pub ended_by_controls: bool,
    /// The version from which the training went on, if it went on from a checkpoint.
    pub resumed_from: Option<Version>,
    /// The number of workers.
    pub num_workers: usize,
    /// The number of servers.
    pub num_servers: usize,
    /// The consistency mode, such as `ssp:3`.
    pub consistency: String,
    /// How the gradients of one update were combined, such as `mean`.
    pub reduction: String,
    /// How many updates were applied to the weights.
    pub num_updates: u64,
    /// How many gradients were applied.
    pub num_applied: u64,
    /// How many gradients were dropped because their round had already closed.
    pub num_dropped_late: u64,
    /// How many gradients were refused because of their norm.
    pub num_refused: u64,
    /// How many gradients only the servers know of.
    pub num_untold: u64,
    /// How many examples the batches of all gradients had together.
    pub num_examples: u64,
    /// How often a worker had to be started again.
    pub num_worker_restarts: u32,
    /// How often a worker went on at another node.
    pub num_worker_moves: u32,
    /// The workers that somebody removed while the training ran.
    #[serde(default)]
    pub removed_workers: Vec<WorkerId>,
    /// How often the servers were lost.
    pub num_recoveries: u32,
    /// How many checkpoints were saved.
    pub num_checkpoints: u64,
    /// The directory of the latest checkpoint.
    pub latest_checkpoint: Option<String>,
    /// How many applied gradients had each staleness: item n is the number of those with staleness n. The
    /// item at 256 counts all larger ones.
    pub staleness: Vec<u64>,
    /// The mean staleness.
    #[serde(with = "number")]
    pub mean_staleness: f64,
    /// The largest staleness.
    pub max_staleness: u64,
    /// Seconds from the start of the workers to their end.
    pub seconds: f64,
    /// How many gradients were applied per second.
    #[serde(with = "number")]
    pub gradients_per_second: f64,
    /// How many examples were used per second.
    #[serde(with = "number")]
    pub examples_per_second: f64,
    /// Total time of all workers that was spent computing, in seconds. `None` if it is not known.
    pub compute_seconds: Option<f64>,
    /// Total time of all workers that was spent waiting, in seconds. `None` if it is not known.
    pub wait_seconds: Option<f64>,
    /// The result of the final weights on the test data.
    pub final_evaluation: Option<EvaluationSummary>,
    /// The evaluations during the run, oldest first. The final one is not included.
    pub curve: Vec<EvaluationSummary>,
}

/// The result of weights on the test data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EvaluationSummary {
    /// The version of the weights.
    pub version: Version,
    /// The time of the evaluation, in seconds since the workers started.
    pub seconds: f64,
    /// The mean loss of the examples.
    #[serde(with = "number")]
    pub loss: f64,
    /// The fraction of right answers, from 0 to 1. `None` if the model does not classify.
    pub accuracy: Option<f64>,
    /// The metrics of the user's program, by their names.
    #[serde(
        default,
        with = "number::map",
        skip_serializing_if = "BTreeMap::is_empty"
    )]
    pub metrics: BTreeMap<String, f64>,
}

impl From<&CurvePoint> for EvaluationSummary {
    fn from(point: &CurvePoint) -> Self {
        Self {
            version: point.version,
            seconds: point.elapsed.as_secs_f64(),
            loss: point.evaluation.mean_loss(),
            accuracy: point.evaluation.accuracy(),
            metrics: point.metrics.clone(),
        }
    }
}

impl From<&Report> for RunSummary {
    fn from(report: &Report) -> Self {
        let saved = report.checkpoints.as_ref();
        let latest = saved.and_then(|saved| saved.latest.as_ref());
        let seconds = |time: std::time::Duration| time.as_secs_f64();
        let final_evaluation = report.final_evaluation.map(|evaluation| {
            EvaluationSummary::from(&CurvePoint {
                version: report.weights.version(),
                elapsed: report.elapsed,
                evaluation,
                metrics: report.final_metrics.clone(),
            })
        });
        Self {
            interrupted: report.interrupted.map(|signal| signal.to_string()),
            stopped_early: report.stopped_early,
            ended_by_controls: report.ended_by_controls,
            resumed_from: report.resumed.map(|resumed| resumed.version),
            num_workers: report.num_workers,
            num_servers: report.num_servers,
            consistency: report.consistency.to_string(),
            reduction: report.reduction.to_string(),
            num_updates: report.num_updates,
            num_applied: report.num_applied,
            num_dropped_late: report.num_dropped_late,
            num_refused: report.num_refused,
            num_untold: report.num_untold,
            num_examples: report.num_examples,
            num_worker_restarts: report.num_worker_restarts,
            num_worker_moves: report.num_worker_moves,
            removed_workers: report.removed_workers.clone(),
            num_recoveries: report.num_recoveries,
            num_checkpoints: saved.map_or(0, |saved| saved.num_saved),
            latest_checkpoint: latest.map(|(_, path)| path.display().to_string()),
            staleness: report.staleness.counts().to_vec(),
            mean_staleness: report.staleness.mean(),
            max_staleness: report.staleness.max(),
            seconds: report.elapsed.as_secs_f64(),
            gradients_per_second: report.gradients_per_second(),
            examples_per_second: report.examples_per_second(),
            compute_seconds: report.compute_time.map(seconds),
            wait_seconds: report.wait_time.map(seconds),
            final_evaluation,
            curve: report.curve.iter().map(EvaluationSummary::from).collect(),
        }
    }
}
