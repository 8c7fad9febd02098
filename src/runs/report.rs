//! The final report of a run, as JSON.

use ps_actors::cluster::NodeId;
use ps_actors::ids::WorkerId;
use serde::{Deserialize, Serialize};

use crate::observe::{RunEnded, RunSummary, StepTimes, Tally, WorkerTally};

/// What `report.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct FinalReport {
    /// How long the run took, in seconds. If the run was resumed, this is the time since then.
    pub seconds: f64,
    /// Why it failed, with all causes. `None` if it did not.
    pub error: Option<String>,
    /// The report of the training. `None` if there is none.
    pub report: Option<RunSummary>,
    /// What each worker did.
    pub workers: Vec<WorkerSummary>,
    /// Which worker was slower than the others, and why, as a sentence. `None` if none was.
    pub straggler: Option<String>,
    /// The file `events.jsonl` has one in this many steps of each worker. The number is 1 if it has
    /// all of them.
    pub kept_every: u64,
    /// How many events are missing, because files could not be written fast enough, or not at all.
    pub num_events_lost: u64,
}

/// What one worker did.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct WorkerSummary {
    /// The worker that did this.
    pub worker: WorkerId,
    /// The node on which the worker was at the end.
    pub node: Option<NodeId>,
    /// How many of its gradients were applied.
    pub num_applied: u64,
    /// How many came too late.
    pub num_late: u64,
    /// How many were refused.
    pub num_refused: u64,
    /// How many steps only the servers know of.
    pub num_missed: u64,
    /// How many examples its batches had.
    pub num_examples: u64,
    /// How often it was lost.
    pub num_losses: u64,
    /// How often it went on at another node.
    pub num_moves: u64,
    /// How many gradients it computed per second.
    pub gradients_per_second: f64,
    /// The mean staleness of its applied gradients.
    pub mean_staleness: f64,
    /// The largest staleness of its applied gradients.
    pub max_staleness: u64,
    /// The total times of its steps, in seconds.
    pub times: StepTimes,
}

impl WorkerSummary {
    fn new(worker: WorkerId, tally: &WorkerTally) -> Self {
        Self {
            worker,
            node: tally.node,
            num_applied: tally.num_applied,
            num_late: tally.num_late,
            num_refused: tally.num_refused,
            num_missed: tally.num_missed,
            num_examples: tally.num_examples,
            num_losses: tally.num_losses,
            num_moves: tally.num_moves,
            gradients_per_second: tally.gradients_per_second(),
            mean_staleness: tally.staleness.mean(),
            max_staleness: tally.staleness.max(),
            times: tally.times,
        }
    }
}

impl FinalReport {
    pub(super) fn new(end: &RunEnded, tally: &Tally, kept_every: u64, num_lost: u64) -> Self {
        let workers = tally.workers.iter();
        Self {
            seconds: end.time,
            error: end.error.clone(),
            report: end.report.clone(),
            workers: workers
                .map(|(&worker, tally)| WorkerSummary::new(worker, tally))
                .collect(),
            straggler: tally.straggler().map(|straggler| straggler.to_string()),
            kept_every,
            num_events_lost: tally.num_skipped.saturating_add(num_lost),
        }
    }
}
