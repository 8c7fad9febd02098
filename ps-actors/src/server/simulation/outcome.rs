//! What a simulated run gives.

use std::fmt;
use std::time::Duration;

use super::messages::Micros;
use super::settings::Settings;
use super::states::{Coverage, State};
use super::truth::Truth;
use super::world::{Kind, World};
use crate::chaos::{Report, Work};
use crate::server::shard::Shard;
use crate::weights::Weights;

/// What a run did, if it kept all guarantees.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// A number that two runs with the same settings share.
    pub trace_hash: u64,
    /// How often each interesting state was reached.
    pub coverage: Coverage,
    /// The faults, and what was done under them.
    pub report: Report,
    /// The share of the workers' time in which they did not compute: 0 to 1.
    pub idle: f64,
    /// The mean number of updates between the weights of a gradient and its own update.
    pub mean_staleness: f64,
    /// The largest such number.
    pub max_staleness: u64,
    /// The virtual time from which on the loss was below the target.
    pub time_to_target: Option<Duration>,
    /// How long the first server's code took for a push: real time.
    pub time_per_push: Duration,
}

/// What went wrong in a run.
#[derive(Clone, Debug)]
pub struct Failure {
    /// What was simulated.
    pub settings: Settings,
    /// Which guarantee was broken, and how.
    pub reason: String,
    pub(super) at: Micros,
    /// The events until then, if they were kept.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.trace {
            writeln!(f, "{line}")?;
        }
        let (settings, millis) = (&self.settings, self.at as f64 / 1000.0);
        writeln!(f, "after {millis:.3} ms of virtual time: {}", self.reason)?;
        let Settings {
            num_workers,
            num_servers,
            consistency,
            saving,
            plan,
            ..
        } = settings;
        write!(
            f,
            "{num_workers} workers, {num_servers} servers, {consistency}, {saving:?}, faults: {plan}"
        )
    }
}

impl std::error::Error for Failure {}

impl World {
    /// Checks what is left when all workers have taken their steps.
    pub(super) fn check_end(&mut self) -> Result<(), String> {
        let group = self
            .group
            .clone()
            .ok_or("there are no servers at the end")?;
        let mut shards = Vec::new();
        for index in 0..group.ranges.len() {
            let shard = match self.processes.get(&group.server(index)).map(|p| &p.kind) {
                Some(Kind::First(first)) => first.shard(),
                Some(Kind::Follower(follower)) => follower.shard(),
                _ => return Err(format!("server {index} is missing at the end")),
            };
            shards.push(shard);
        }
        check_end(&shards, &self.truth)
    }

    pub(super) fn outcome(mut self) -> Outcome {
        let counts = self.network.counts;
        for _ in 0..counts.num_dropped {
            self.report.happened("drop");
        }
        for _ in 0..counts.num_doubled {
            self.report.happened("dup");
        }
        for _ in 0..counts.num_follow_answers_lost {
            self.coverage.count(State::LostFollowAnswer);
        }
        let time = Duration::from_micros(self.now);
        let (sum, max_staleness) = self.truth.staleness;
        let num_applied = self.truth.num_applied;
        self.report.work = Work { num_applied, time };
        self.report.num_lost = Some(self.truth.num_lost);
        // One that is applied twice ends the run as a failure.
        self.report.num_doubled = Some(0);
        let worker_time = self.now as f64 * f64::from(self.settings.num_workers);
        Outcome {
            trace_hash: self.trace.hash(),
            coverage: self.coverage,
            report: self.report,
            idle: 1.0 - self.compute_time as f64 / worker_time.max(1.0),
            mean_staleness: sum as f64 / (num_applied as f64).max(1.0),
            max_staleness,
            time_to_target: self.reached_target_at.map(Duration::from_micros),
            time_per_push: self.push_time
                / u32::try_from(self.num_pushes.max(1)).unwrap_or(u32::MAX),
        }
    }
}

/// Checks that all servers agree with the truth and with each other.
pub(super) fn check_end(shards: &[&Shard], truth: &Truth) -> Result<(), String> {
    for (index, shard) in shards.iter().enumerate() {
        let num_staged = shard.num_staged();
        if num_staged > 0 {
            return Err(format!(
                "server {index} keeps {num_staged} gradients at the end"
            ));
        }
    }
    let parts: Vec<Weights> = shards.iter().map(|shard| shard.weights().clone()).collect();
    let weights = Weights::join(&parts).map_err(|bad| {
        format!(
            "the servers do not agree: server {}: {}",
            bad.index, bad.reason
        )
    })?;
    truth.check_end(&weights)
}
