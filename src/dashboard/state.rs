//! What the page shows, counted from the events: pure, and bounded in memory whatever the length of the run.

use std::collections::{BTreeMap, VecDeque};

use ps_actors::cluster::NodeId;
use ps_actors::ids::WorkerId;

use super::curve::Curve;
use crate::observe::{Change, Event, ServersSeen, Tally, Versions};

/// How many checkpoints and how many incidents are remembered.
const MAX_CHECKPOINTS: usize = 20;
const MAX_INCIDENTS: usize = 50;

/// How old a step must be before it becomes part of the curve, in seconds: steps of different workers come in
/// turns, each with some of the latest ones.
const SORTED_AFTER: f64 = 0.6;

/// How often the rate of a driver's own loop becomes part of its curve, in seconds. That of a `Trainer` does when its
/// servers are looked at.
const RATE_EVERY: f64 = 1.0;

/// How many steps may wait for that.
const MAX_WAITING: usize = 4096;

/// How many characters of a text from elsewhere are kept.
const MAX_TEXT: usize = 500;

/// A training as the page shows it.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) tally: Tally,
    pub(super) versions: Option<Versions>,
    /// When the run started, in seconds since 1970.
    pub(super) started: f64,
    pub(super) loss: Curve,
    /// Version, time and loss of steps that are not part of the curve yet.
    waiting: Vec<(u64, f64, f64)>,
    /// When steps were last sorted.
    sorted: f64,
    pub(super) accuracy: Curve,
    /// Gradients per second, over time.
    pub(super) rate: Curve,
    /// When a rate was last added, in seconds since the run started.
    rated: f64,
    pub(super) recent: BTreeMap<WorkerId, Recent>,
    pub(super) servers: Option<ServersSeen>,
    /// What somebody has set, for a driver's own loop, which does not look at its server.
    pub(super) learning_rate: Option<f64>,
    pub(super) checkpoints: VecDeque<Saved>,
    pub(super) incidents: VecDeque<Incident>,
    pub(super) is_recovering: bool,
    pub(super) end: Option<End>,
    /// How many events were counted.
    pub(super) revision: u64,
}

/// What became of a checkpoint.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(super) struct Saved {
    pub(super) time: f64,
    pub(super) version: Option<u64>,
    pub(super) seconds: Option<f64>,
    pub(super) path: Option<String>,
    /// The size of its files.
    pub(super) bytes: Option<u64>,
    /// Why it was not saved.
    pub(super) problem: Option<String>,
}

/// Something that somebody who watches wants to read.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub(super) struct Incident {
    pub(super) time: f64,
    pub(super) kind: Kind,
    pub(super) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// Something was lost.
    Fault,
    /// Something is as it should be again.
    Repair,
    /// Somebody changed something.
    Control,
    /// Something came or moved.
    Notice,
}

/// How the training ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct End {
    pub(super) error: Option<String>,
    pub(super) interrupted: Option<String>,
}

/// How many steps a worker took in each of the latest seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct Recent {
    counts: [u32; Self::SECONDS as usize],
    /// The second of the newest count.
    newest: u64,
    first: Option<f64>,
}

impl Recent {
    const SECONDS: u64 = 8;

    fn count(&mut self, time: f64) {
        self.first.get_or_insert(time);
        let second = time.max(0.0) as u64;
        self.move_to(second);
        if self.newest - second < Self::SECONDS {
            let count = &mut self.counts[(second % Self::SECONDS) as usize];
            *count = count.saturating_add(1);
        }
    }

    /// Forgets what is too old at this second.
    fn move_to(&mut self, second: u64) {
        if second <= self.newest {
            return;
        }
        for passed in (self.newest + 1..=second).take(Self::SECONDS as usize) {
            self.counts[(passed % Self::SECONDS) as usize] = 0;
        }
        if second - self.newest >= Self::SECONDS {
            self.counts = [0; Self::SECONDS as usize];
        }
        self.newest = second;
    }

    /// Returns the steps per second of about the latest seconds before `now`.
    pub(super) fn per_second(&self, now: f64) -> f64 {
        let mut at = self.clone();
        at.move_to(now.max(0.0) as u64);
        let sum: u64 = at.counts.iter().map(|&count| u64::from(count)).sum();
        let from = (at.newest as f64 - (Self::SECONDS - 1) as f64).max(at.first.unwrap_or(now));
        sum as f64 / (now - from).max(0.5)
    }
}

impl State {
    /// Counts an event.
    pub(super) fn count(&mut self, event: &Event) {
        if let Event::RunStarted(run) = event {
            *self = Self {
                versions: Some(run.versions.clone()),
                started: run.unix_time,
                revision: self.revision,
                ..Self::default()
            };
        }
        self.revision += 1;
        self.tally.count(event);
        let time = event.time();
        match event {
            Event::Step(step) => {
                self.recent.entry(step.worker).or_default().count(time);
                self.waiting
                    .push((step.version.0, time, f64::from(step.loss)));
                if self.servers.is_none() && self.tally.seconds >= self.rated + RATE_EVERY {
                    self.add_rate(self.tally.seconds);
                }
            }
            Event::Evaluated(evaluated) => {
                let shown = evaluated.accuracy.unwrap_or(evaluated.loss);
                self.accuracy.add(evaluated.version.0, time, shown);
            }
            Event::ServersSeen(seen) => {
                self.add_rate(time);
                self.servers = Some(seen.clone());
            }
            Event::WorkerJoined(joined) => {
                let was_lost = (self.tally.workers.get(&joined.worker))
                    .is_some_and(|worker| worker.num_losses > 0);
                let text = match joined.node {
                    Some(node) => format!("{} is at work on {}", joined.worker, self.place(node)),
                    None => format!("{} has joined over HTTP", joined.worker),
                };
                self.tell(
                    time,
                    if was_lost { Kind::Repair } else { Kind::Notice },
                    text,
                );
            }
            Event::WorkerLost(lost) => {
                let place = match lost.node {
                    Some(node) => format!(" on {}", self.place(node)),
                    None => String::new(),
                };
                let text = format!("{}{place} is lost: {}", lost.worker, lost.reason);
                self.tell(time, Kind::Fault, text);
            }
            Event::WorkerLeft(left) => {
                self.tell(time, Kind::Notice, format!("{} has left", left.worker));
            }
            Event::WorkerMoved(moved) => {
                let (from, to) = (self.place(moved.from), self.place(moved.to));
                let text = format!("{} moved from {from} to {to}", moved.worker);
                self.tell(time, Kind::Notice, text);
            }
            Event::NodeJoined(joined) => {
                let text = format!(
                    "{} joined: {}, process {}",
                    joined.node, joined.host, joined.pid
                );
                self.tell(time, Kind::Notice, text);
            }
            Event::NodeLost(lost) => {
                self.tell(time, Kind::Fault, format!("{} left or is lost", lost.node));
            }
            Event::CheckpointSaved(saved) => self.remember(Saved {
                time,
                version: Some(saved.version.0),
                seconds: Some(saved.seconds),
                path: Some(short(&saved.path)),
                bytes: Some(saved.bytes),
                problem: None,
            }),
            Event::CheckpointFailed(failed) => {
                self.remember(Saved {
                    time,
                    version: None,
                    seconds: None,
                    path: None,
                    bytes: None,
                    problem: Some(short(&failed.reason)),
                });
                let text = format!("no checkpoint was saved: {}", failed.reason);
                self.tell(time, Kind::Fault, text);
            }
            Event::ServersLost(lost) => {
                self.is_recovering = true;
                self.tell(
                    time,
                    Kind::Fault,
                    format!("the servers are lost: {}", lost.reason),
                );
            }
            Event::ServersRecovered(recovered) => {
                self.is_recovering = false;
                let version = recovered.version;
                self.waiting.clear();
                for curve in [&mut self.loss, &mut self.accuracy, &mut self.rate] {
                    curve.go_back_to(version.0);
                }
                let text = format!(
                    "the training goes on from update {} after {:.1} s",
                    version.0, recovered.seconds
                );
                self.tell(time, Kind::Repair, text);
            }
            Event::Controlled(controlled) => {
                if let Change::LearningRate { learning_rate } = controlled.change {
                    self.learning_rate = Some(learning_rate);
                }
                self.tell(time, Kind::Control, described(&controlled.change));
            }
            Event::EventsSkipped(skipped) => {
                let text = format!("{} steps are missing on this page", skipped.num_events);
                self.tell(time, Kind::Notice, text);
            }
            Event::RunEnded(end) => {
                self.end = Some(End {
                    error: end.error.as_deref().map(short),
                    interrupted: end
                        .report
                        .as_ref()
                        .and_then(|report| report.interrupted.clone()),
                });
            }
            _ => {}
        }
        self.sort(matches!(event, Event::RunEnded(_)));
    }

    fn add_rate(&mut self, time: f64) {
        self.rated = self.tally.seconds;
        let rate = self.tally.gradients_per_second(self.tally.seconds);
        self.rate.add(self.tally.version.0, time, rate);
    }

    /// Adds steps to the curve in the order of their versions, when none of an earlier version can be expected.
    fn sort(&mut self, is_over: bool) {
        let now = self.tally.seconds;
        let until = match is_over || self.waiting.len() >= MAX_WAITING {
            true => f64::INFINITY,
            false => now - SORTED_AFTER,
        };
        if now < self.sorted + SORTED_AFTER && until.is_finite() {
            return;
        }
        self.sorted = now;
        self.waiting.sort_unstable_by_key(|&(version, ..)| version);
        self.waiting.retain(|&(version, time, loss)| {
            if time <= until {
                self.loss.add(version, time, loss);
            }
            time > until
        });
    }

    /// Names a node, with its machine if that is known.
    pub(super) fn place(&self, node: NodeId) -> String {
        match self.tally.nodes.get(&node) {
            Some(host) => format!("{node} ({host})"),
            None => node.to_string(),
        }
    }

    fn tell(&mut self, time: f64, kind: Kind, text: String) {
        let text = short(&text);
        push(
            &mut self.incidents,
            MAX_INCIDENTS,
            Incident { time, kind, text },
        );
    }

    fn remember(&mut self, saved: Saved) {
        push(&mut self.checkpoints, MAX_CHECKPOINTS, saved);
    }
}

fn described(change: &Change) -> String {
    match change {
        Change::Paused => "paused".to_owned(),
        Change::Resumed => "resumed".to_owned(),
        Change::CheckpointAsked => "a checkpoint was asked for".to_owned(),
        Change::LearningRate { learning_rate } => {
            format!("the learning rate is {learning_rate} now")
        }
        Change::Consistency { consistency } => format!("the consistency mode is {consistency} now"),
        Change::WorkerRemoved { worker } => format!("{worker} was told to leave for good"),
        Change::EndAsked => "the training was told to end".to_owned(),
    }
}

/// Adds one to the end, and forgets the oldest if there are too many.
fn push<T>(items: &mut VecDeque<T>, most: usize, item: T) {
    items.push_back(item);
    if items.len() > most {
        items.pop_front();
    }
}

/// Cuts a text that is too long.
fn short(text: &str) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::testing;

    #[test]
    fn rates_are_those_of_the_latest_seconds() {
        let mut recent = Recent::default();
        (0..1_000).for_each(|n| recent.count(100.0 + f64::from(n) / 50.0));
        // 50 per second, for 20 s.
        let rate = recent.per_second(120.0);
        assert!((rate - 50.0).abs() < 8.0, "{rate}");
        assert!(recent.per_second(124.0) < 40.0);
        assert_eq!(recent.per_second(140.0), 0.0);
        // A step that comes late counts where it belongs, or not at all.
        recent.count(1.0);
        assert_eq!(recent.per_second(140.0), 0.0);
    }

    #[test]
    fn steps_of_workers_that_come_in_turns_make_one_curve() {
        let mut state = State::default();
        // Each worker brings its steps of a quarter of a second.
        for part in 0..40_u64 {
            for worker in 0..2 {
                for step in 0..5 {
                    let version = 10 * part + 2 * step + worker;
                    let time = version as f64 / 40.0;
                    state.count(&testing::step(worker as u32, version, time));
                }
            }
        }
        let (points, ..) = state.loss.since(super::super::curve::Mark::default());
        let text = serde_json::to_string(points).unwrap();
        let read: Vec<(u64, f64, f64, f64, f64)> = serde_json::from_str(&text).unwrap();
        assert!(
            read.len() > 300 && read.is_sorted_by_key(|point| point.0),
            "{text}"
        );
        state.sort(true);
        assert!(state.waiting.is_empty());
    }

    /// Nobody looks at the servers of such a loop.
    #[test]
    fn the_rate_of_a_drivers_own_loop_becomes_a_curve_with_a_point_per_second() {
        let mut state = State::default();
        for clock in 0..200 {
            let time = clock as f64 / 20.0;
            state.count(&testing::step(0, clock, time));
        }
        let (points, ..) = state.rate.since(super::super::curve::Mark::default());
        let text = serde_json::to_string(points).unwrap();
        let points: Vec<(u64, f64, f64, f64, f64)> = serde_json::from_str(&text).unwrap();
        let times: Vec<f64> = points.iter().map(|point| point.1).collect();
        assert_eq!(times, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
        assert!(
            points.iter().all(|point| (point.2 - 20.0).abs() < 3.0),
            "{text}"
        );
    }

    #[test]
    fn a_long_run_with_many_faults_takes_bounded_memory() {
        let mut state = State::default();
        for number in 0..20_000 {
            let time = f64::from(number) / 10.0;
            state.count(&testing::step(number % 3, u64::from(number), time));
            state.count(&testing::worker_lost(time));
        }
        assert_eq!(state.incidents.len(), MAX_INCIDENTS);
        assert_eq!(state.recent.len(), 3);
        assert!(state.waiting.len() <= MAX_WAITING);
        let last = state.incidents.back().unwrap();
        assert_eq!((last.time, last.kind), (1999.9, Kind::Fault));
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_between_characters() {
        let long = "ü".repeat(MAX_TEXT + 1);
        assert_eq!(short(&long), format!("{}…", "ü".repeat(MAX_TEXT)));
        assert_eq!(short("ü"), "ü");
    }
}
