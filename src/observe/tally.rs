//! Counts the events of a training: pure, and in memory that does not grow with the number of steps.

use std::collections::BTreeMap;

use ps_actors::cluster::NodeId;
use ps_actors::ids::{Clock, Version, WorkerId};
use ps_actors::server::Histogram;

use super::event::{Change, Event, Settings, SettledStep, StepOutcome, StepTimes};

/// By how much a straggler's own part of a step must be longer than that of the others.
const SLOWER: f64 = 1.3;

/// How many steps of a worker must be known before it is judged.
const MIN_STEPS: u64 = 5;

/// How long ago a step may be that counts for the current rate, in seconds.
const RATE_WINDOW: f64 = 5.0;

/// The numbers that a progress display or a table shows, counted from the events.
///
/// ```
/// use ps::observe::{Event, Tally};
///
/// # fn events() -> Vec<Event> { Vec::new() }
/// let mut tally = Tally::default();
/// for event in events() {
///     tally.count(&event);
/// }
/// assert_eq!(tally.num_steps(), 0);
/// assert!(tally.straggler().is_none());
/// ```
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// The settings, once the run has started.
    pub settings: Settings,
    /// What is known of each worker.
    pub workers: BTreeMap<WorkerId, WorkerTally>,
    /// The latest version of the weights that is known.
    pub version: Version,
    /// The version from which the training went on.
    pub first_version: Version,
    /// The staleness of the applied gradients.
    pub staleness: Histogram,
    /// The latest evaluation: the version, the mean loss, and the fraction of right answers.
    pub evaluation: Option<(Version, f64, Option<f64>)>,
    /// The largest fraction of right answers until now.
    pub best_accuracy: Option<f64>,
    /// The part of the evaluation that is under way, from 0 to 1, if it takes long.
    pub evaluating: Option<f64>,
    /// The nodes that are in the cluster now, with the names of their hosts.
    pub nodes: BTreeMap<NodeId, String>,
    /// How many nodes left or were lost.
    pub num_nodes_lost: u64,
    /// How many checkpoints were saved.
    pub num_checkpoints: u64,
    /// How many checkpoints failed or were skipped.
    pub num_checkpoints_failed: u64,
    /// How often servers were lost.
    pub num_recoveries: u64,
    /// How many events were not seen, because the observer was too slow.
    pub num_skipped: u64,
    /// The time of the latest event, in seconds.
    pub seconds: f64,
    /// The mean loss of the latest batches, weighted towards the newest.
    smooth_loss: Option<f64>,
    rate: Rate,
    /// As `rate`, of all settled steps.
    settled: Rate,
}

/// What is known of one worker.
#[derive(Clone, Debug, Default)]
pub struct WorkerTally {
    /// The node on which it computes. `None` until the worker has joined.
    pub node: Option<NodeId>,
    /// Whether it has joined, now or earlier. Until then nobody has heard of it.
    pub has_joined: bool,
    /// Whether it is lost now.
    pub is_lost: bool,
    /// Whether it was removed for good.
    pub is_removed: bool,
    /// Whether it has left in order, as a worker that came by itself.
    pub has_left: bool,
    /// How often it was lost.
    pub num_losses: u64,
    /// How often it went on at another node.
    pub num_moves: u64,
    /// How many of its gradients were applied.
    pub num_applied: u64,
    /// How many of its gradients came too late.
    pub num_late: u64,
    /// How many of its gradients were refused.
    pub num_refused: u64,
    /// How many of its steps only the servers know of.
    pub num_missed: u64,
    /// The clock of its next step.
    pub next_clock: Clock,
    /// How many examples its batches had.
    pub num_examples: u64,
    /// The mean loss of its latest batch.
    pub loss: f32,
    /// The staleness of its applied gradients.
    pub staleness: Histogram,
    /// The total times of the steps whose times are known, in seconds.
    pub times: StepTimes,
    /// How many steps' times are known.
    pub num_timed: u64,
    /// When its first known step began and its latest one ended, in seconds since the run started. If the times of
    /// the first one are not known, it begins when that one ended.
    pub active: Option<(f64, f64)>,
    /// Whether its first known step is not within this time.
    begins_late: bool,
    /// When its latest step since it joined ended, in seconds since the run started. `None` if it has taken none
    /// since then.
    pub latest_step: Option<f64>,
    /// The times of its first step, which is not typical: caches are cold.
    first: StepTimes,
}

impl WorkerTally {
    /// Returns how many of its steps were settled.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.num_applied + self.num_late + self.num_refused + self.num_missed
    }

    /// Returns how many gradients it computed per second, from its first step to its latest one.
    #[must_use]
    pub fn gradients_per_second(&self) -> f64 {
        match self.active {
            Some((from, to)) if to > from => {
                let num_outside = u64::from(self.begins_late);
                self.num_steps().saturating_sub(num_outside) as f64 / (to - from)
            }
            _ => 0.0,
        }
    }

    /// Returns the parts of its time, each from 0 to 1. `None` if nothing is known.
    #[must_use]
    pub fn shares(&self) -> Option<StepTimes> {
        let total = self.times.total();
        (total > 0.0).then(|| scaled(self.times, 1.0 / total))
    }

    /// Returns the mean times of its steps, in seconds, without its first step. `None` if too few are known.
    fn typical(&self) -> Option<StepTimes> {
        let num = self.num_timed.checked_sub(1)?;
        if self.num_timed < MIN_STEPS {
            return None;
        }
        let (all, first) = (self.times.parts(), self.first.parts());
        let rest = StepTimes::new(std::array::from_fn(|part| all[part] - first[part]));
        Some(scaled(rest, 1.0 / num as f64))
    }

    fn count(&mut self, step: &SettledStep) {
        match step.outcome {
            StepOutcome::Applied => {
                self.num_applied += 1;
                self.staleness.record(step.staleness);
            }
            StepOutcome::Late => self.num_late += 1,
            StepOutcome::Refused => self.num_refused += 1,
        }
        // The numbers may come from a file.
        self.num_examples = self.num_examples.saturating_add(step.num_examples);
        self.loss = step.loss;
        self.next_clock = step.clock.next();
        (self.is_lost, self.has_joined) = (false, true);
        self.latest_step = Some(step.time);
        let mut began = step.time;
        if let Some(times) = step.times {
            if self.num_timed == 0 {
                self.first = times;
            }
            self.num_timed += 1;
            let (all, new) = (self.times.parts(), times.parts());
            self.times = StepTimes::new(std::array::from_fn(|part| all[part] + new[part]));
            began -= times.total();
        }
        self.begins_late |= self.active.is_none() && step.times.is_none();
        let (from, to) = self.active.unwrap_or((began.max(0.0), step.time));
        self.active = Some((from, to.max(step.time)));
    }
}

fn scaled(times: StepTimes, by: f64) -> StepTimes {
    StepTimes::new(times.parts().map(|part| part * by))
}

/// Why a worker is slower than the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Cause {
    /// It computes slowly.
    Compute,
    /// Its link to the servers is slow.
    Link,
    /// It waits for its data.
    Data,
}

/// A worker that is slower than the others.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Straggler {
    /// The worker that is slower.
    pub worker: WorkerId,
    /// Why it is slow.
    pub cause: Cause,
    /// The worker's own part of a step, divided by the median of the others' own parts. The own part is
    /// the whole step without the waiting at the server.
    pub times_slower: f64,
    /// How long the part that is slow takes, in seconds per step.
    pub seconds: f64,
    /// How long this part takes for the others (their median), in seconds per step.
    pub others_seconds: f64,
}

impl std::fmt::Display for Straggler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.cause {
            Cause::Compute => "it computes slowly",
            Cause::Link => "its link is slow",
            Cause::Data => "its data are slow",
        };
        write!(
            f,
            "{} takes {:.1} times as long as the others: {what} ({} per step, others {})",
            self.worker,
            self.times_slower,
            short(self.seconds),
            short(self.others_seconds),
        )
    }
}

/// Writes a short time.
fn short(seconds: f64) -> String {
    match seconds {
        seconds if seconds >= 1.0 => format!("{seconds:.1} s"),
        seconds if seconds >= 1e-3 => format!("{:.1} ms", 1e3 * seconds),
        seconds => format!("{:.0} µs", 1e6 * seconds),
    }
}

impl Tally {
    /// Counts an event.
    pub fn count(&mut self, event: &Event) {
        self.seconds = self.seconds.max(event.time());
        match event {
            Event::RunStarted(run) => {
                self.settings = run.settings.clone();
                (self.version, self.first_version) = (run.first_version, run.first_version);
                for rank in 0..run.settings.num_workers.min(usize::from(u16::MAX)) {
                    self.workers.entry(WorkerId(rank as u32)).or_default();
                }
            }
            Event::Step(step) => self.count_step(step),
            Event::StepsMissed(missed) => {
                let worker = self.workers.entry(missed.worker).or_default();
                worker.num_missed = worker.num_missed.saturating_add(missed.num_steps);
                worker.next_clock = Clock(missed.first.0.saturating_add(missed.num_steps));
            }
            Event::Evaluating(evaluating) => {
                let all = evaluating.num_batches.max(1) as f64;
                self.evaluating = Some((evaluating.num_done as f64 / all).min(1.0));
            }
            Event::Evaluated(evaluated) => {
                self.evaluating = None;
                let accuracy = evaluated.accuracy;
                self.evaluation = Some((evaluated.version, evaluated.loss, accuracy));
                self.best_accuracy = match (self.best_accuracy, accuracy) {
                    (Some(best), Some(now)) => Some(best.max(now)),
                    (best, now) => best.or(now),
                };
                self.version = self.version.max(evaluated.version);
            }
            Event::WorkerJoined(joined) => {
                let worker = self.workers.entry(joined.worker).or_default();
                (worker.node, worker.is_lost, worker.has_left) = (joined.node, false, false);
                (worker.has_joined, worker.latest_step) = (true, None);
                worker.next_clock = worker.next_clock.max(joined.next_clock);
            }
            Event::WorkerLost(lost) => {
                let worker = self.workers.entry(lost.worker).or_default();
                worker.is_lost = true;
                worker.num_losses += 1;
            }
            Event::WorkerLeft(left) => {
                let worker = self.workers.entry(left.worker).or_default();
                (worker.has_left, worker.is_lost) = (true, false);
            }
            Event::WorkerMoved(moved) => {
                let worker = self.workers.entry(moved.worker).or_default();
                worker.node = Some(moved.to);
                worker.num_moves += 1;
            }
            Event::NodeJoined(joined) => {
                self.nodes.insert(joined.node, joined.host.clone());
            }
            Event::NodeLost(lost) => {
                self.nodes.remove(&lost.node);
                self.num_nodes_lost += 1;
            }
            Event::CheckpointSaved(_) => self.num_checkpoints += 1,
            Event::CheckpointFailed(_) => self.num_checkpoints_failed += 1,
            Event::ServersLost(_) => self.num_recoveries += 1,
            Event::ServersRecovered(recovered) => self.version = recovered.version,
            Event::ServersSeen(seen) => {
                let first = seen.servers.first().map(|first| first.version);
                self.version = self.version.max(first.unwrap_or_default());
            }
            Event::Controlled(controlled) => {
                if let Change::WorkerRemoved { worker } = controlled.change {
                    self.workers.entry(worker).or_default().is_removed = true;
                }
            }
            Event::EventsSkipped(skipped) => {
                self.num_skipped = self.num_skipped.saturating_add(skipped.num_events);
            }
            // The steps have been counted.
            Event::PartApplied(_) | Event::Computed(_) | Event::UpdateMade(_) => {}
            Event::StepsThinned(_) | Event::RunEnded(_) => {}
        }
    }

    fn count_step(&mut self, step: &SettledStep) {
        self.workers.entry(step.worker).or_default().count(step);
        self.version = self.version.max(step.version);
        self.settled.count(step.time);
        if step.outcome == StepOutcome::Applied {
            self.staleness.record(step.staleness);
            self.rate.count(step.time);
        }
        if step.loss.is_finite() {
            let loss = f64::from(step.loss);
            // About the latest 20 batches.
            self.smooth_loss = Some(
                self.smooth_loss
                    .map_or(loss, |mean| mean + (loss - mean) / 20.0),
            );
        }
    }

    /// Returns how many steps were settled since the run started.
    #[must_use]
    pub fn num_steps(&self) -> u64 {
        self.workers.values().map(WorkerTally::num_steps).sum()
    }

    /// Returns how many gradients were applied since the run started.
    #[must_use]
    pub fn num_applied(&self) -> u64 {
        self.workers.values().map(|worker| worker.num_applied).sum()
    }

    /// Returns how many workers are lost now.
    #[must_use]
    pub fn num_workers_lost(&self) -> usize {
        self.workers
            .values()
            .filter(|worker| worker.is_lost)
            .count()
    }

    /// Returns how many workers take part now: those that have joined, and are neither lost nor gone for good.
    #[must_use]
    pub fn num_workers_live(&self) -> usize {
        let is_gone = |worker: &WorkerTally| worker.is_lost || worker.is_removed || worker.has_left;
        let is_live = |worker: &&WorkerTally| worker.has_joined && !is_gone(worker);
        self.workers.values().filter(is_live).count()
    }

    /// Returns the mean loss of about the latest 20 batches. `None` before the first step.
    #[must_use]
    pub fn loss(&self) -> Option<f64> {
        self.smooth_loss
    }

    /// Returns how many gradients were applied per second in the last seconds before `now`, which is in
    /// seconds since the run started.
    #[must_use]
    pub fn gradients_per_second(&self, now: f64) -> f64 {
        self.rate.per_second(now)
    }

    /// Returns how many steps of all workers are done, and how many there will be in all. Both include those
    /// before the checkpoint from which the training went on. If nobody knows how many there will be, that number is 0,
    /// and the steps are those since the run started.
    #[must_use]
    pub fn steps_done(&self) -> (u64, u64) {
        let each = self.settings.steps_per_worker;
        if each == 0 {
            return (self.num_steps(), 0);
        }
        let steps_of = |worker: &WorkerTally| worker.next_clock.0.min(each);
        let done = self.workers.values().map(steps_of).sum();
        // A worker that was removed takes no more steps.
        let removed = self.workers.values().filter(|worker| worker.is_removed);
        let left_out: u64 = removed.map(|worker| each - steps_of(worker)).sum();
        let all = (self.settings.num_workers as u64).saturating_mul(each);
        (done, all.saturating_sub(left_out))
    }

    /// Returns how long the remaining steps will take if they come as fast as those of the last seconds.
    /// `None` if it is not known.
    #[must_use]
    pub fn seconds_left(&self) -> Option<f64> {
        let (done, all) = self.steps_done();
        if all == 0 {
            return None;
        }
        let rate = self.settled.per_second(self.seconds);
        (rate > 0.0 && done <= all).then(|| (all - done) as f64 / rate)
    }

    /// Returns the worker whose own part of a step is by far the longest, if there is one.
    #[must_use]
    pub fn straggler(&self) -> Option<Straggler> {
        let typical = self.workers.iter();
        let typical = typical.filter_map(|(&worker, tally)| Some((worker, tally.typical()?)));
        straggler(&typical.collect::<Vec<_>>())
    }
}

/// One of the times of a step.
type Part = fn(&StepTimes) -> f64;

/// Returns the worker whose own part of a step is by far the longest. `typical` has the mean times of each
/// worker's steps.
fn straggler(typical: &[(WorkerId, StepTimes)]) -> Option<Straggler> {
    let own = |times: &StepTimes| times.data + times.compute + times.wire;
    let slowest = typical
        .iter()
        .max_by(|(_, a), (_, b)| own(a).total_cmp(&own(b)));
    let &(worker, slow) = slowest?;
    let median = |part: Part| {
        let others = typical.iter().filter(|(other, _)| *other != worker);
        let mut parts: Vec<f64> = others.map(|(_, times)| part(times)).collect();
        parts.sort_by(f64::total_cmp);
        match parts.len() {
            0 => None,
            num if num % 2 == 1 => Some(parts[num / 2]),
            num => Some((parts[num / 2 - 1] + parts[num / 2]) / 2.0),
        }
    };
    let others_own = median(|times| times.data + times.compute + times.wire)?;
    if others_own <= 0.0 || own(&slow) < SLOWER * others_own {
        return None;
    }
    let parts: [(Cause, Part); 3] = [
        (Cause::Compute, |times| times.compute),
        (Cause::Link, |times| times.wire),
        (Cause::Data, |times| times.data),
    ];
    let parts = parts.into_iter().filter_map(|(cause, part)| {
        let (seconds, others_seconds) = (part(&slow), median(part)?);
        Some((cause, seconds, others_seconds))
    });
    let worst = parts.max_by(|a, b| (a.1 - a.2).total_cmp(&(b.1 - b.2)));
    let (cause, seconds, others_seconds) = worst?;
    Some(Straggler {
        worker,
        cause,
        times_slower: own(&slow) / others_own,
        seconds,
        others_seconds,
    })
}

/// How often something happened in the last seconds: counts by tenths of a second.
#[derive(Clone, Debug, Default)]
struct Rate {
    /// The first time that was counted.
    began: Option<f64>,
    counts: BTreeMap<u64, u64>,
}

impl Rate {
    const PER_SECOND: f64 = 10.0;

    fn count(&mut self, time: f64) {
        self.began.get_or_insert(time);
        let slot = (time * Self::PER_SECOND) as u64;
        *self.counts.entry(slot).or_default() += 1;
        let newest = self.counts.keys().next_back().copied().unwrap_or_default();
        let oldest = newest.saturating_sub((RATE_WINDOW * Self::PER_SECOND) as u64);
        self.counts = self.counts.split_off(&oldest);
    }

    fn per_second(&self, now: f64) -> f64 {
        let Some(began) = self.began else { return 0.0 };
        let from = (now - RATE_WINDOW).max(began);
        let slots = self.counts.range((from * Self::PER_SECOND) as u64..);
        let num: u64 = slots.map(|(_, count)| count).sum();
        num as f64 / (now - from).max(1.0 / Self::PER_SECOND)
    }
}

#[cfg(test)]
mod tests;
