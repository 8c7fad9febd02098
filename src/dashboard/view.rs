//! The state of a training as JSON: what `GET /api/state` and the stream of events send. Pure.

use ps_actors::ids::WorkerId;
use ps_actors::update_log::LogStatus;
use serde::Serialize;

use super::curve::{Curve, Mark, Point};
use super::state::{Incident, Saved, State};
use crate::observe::WorkerTally;

/// How many workers, servers and nodes have a line of their own.
const MAX_LINES: usize = 64;

/// Staleness from here on is shown as one.
const MAX_STALENESS: usize = 24;

/// Whether and how the training can be controlled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Control {
    /// Whether the dashboard has a token.
    pub(super) is_allowed: bool,
    /// Whether the training listens.
    pub(super) is_running: bool,
    pub(super) is_paused: bool,
    pub(super) saves_checkpoints: bool,
    pub(super) changes_consistency: bool,
    pub(super) removes_workers: bool,
    pub(super) can_end: bool,
}

#[derive(Serialize)]
pub(super) struct View<'a> {
    status: &'static str,
    error: Option<&'a str>,
    interrupted: Option<&'a str>,
    run: Run<'a>,
    seconds: f64,
    /// When the servers were last looked at, in seconds since the run started.
    looked: Option<f64>,
    version: u64,
    steps_done: u64,
    steps_all: u64,
    seconds_left: Option<f64>,
    loss: Option<f64>,
    evaluation: Option<Evaluation>,
    /// The part of the evaluation that is under way, from 0 to 1.
    evaluating: Option<f64>,
    gradients_per_second: f64,
    num_applied: u64,
    learning_rate: Option<f64>,
    consistency: &'a str,
    num_pending: usize,
    awaited: Vec<u32>,
    staleness: Staleness,
    num_workers: usize,
    num_workers_lost: usize,
    workers: Vec<Worker>,
    straggler: Option<Slow>,
    num_servers: usize,
    servers: Vec<Server>,
    num_nodes: usize,
    nodes: Vec<Node<'a>>,
    num_checkpoints: u64,
    num_checkpoints_failed: u64,
    checkpoints: Vec<&'a Saved>,
    /// The update log.
    log: Option<&'a LogStatus>,
    incidents: Vec<&'a Incident>,
    num_skipped: u64,
    control: Control,
}

#[derive(Serialize)]
struct Run<'a> {
    name: &'a str,
    model: &'a str,
    num_weights: usize,
    num_examples: usize,
    batch_size: usize,
    optimizer: &'a str,
    reduction: &'a str,
    device: &'a str,
    seed: u64,
    started: f64,
    first_version: u64,
    ps: &'a str,
    burn: &'a str,
}

#[derive(Serialize)]
struct Evaluation {
    version: u64,
    loss: Option<f64>,
    accuracy: Option<f64>,
    best_accuracy: Option<f64>,
}

#[derive(Serialize)]
struct Staleness {
    mean: f64,
    max: u64,
    counts: Vec<u64>,
    /// Whether the last count is that of all larger ones.
    is_cut: bool,
}

#[derive(Serialize)]
struct Worker {
    worker: u32,
    place: String,
    state: &'static str,
    steps: u64,
    gradients_per_second: f64,
    mean_staleness: f64,
    max_staleness: u64,
    /// The parts of its time: data, compute, wire, waiting, apply. Each is from 0 to 1.
    shares: Option<[f32; 5]>,
    num_losses: u64,
    num_moves: u64,
    num_late: u64,
    num_refused: u64,
}

#[derive(Serialize)]
struct Slow {
    worker: u32,
    text: String,
}

#[derive(Serialize)]
struct Server {
    place: String,
    version: u64,
    num_weights: usize,
    bytes: usize,
    num_staged: usize,
    num_waiting: usize,
}

#[derive(Serialize)]
struct Node<'a> {
    node: String,
    host: &'a str,
    num_workers: usize,
}

fn finite(number: f64) -> Option<f64> {
    number.is_finite().then_some(number)
}

impl<'a> View<'a> {
    pub(super) fn of(state: &'a State, control: Control) -> Self {
        let tally = &state.tally;
        let settings = &tally.settings;
        let (steps_done, steps_all) = tally.steps_done();
        let end = state.end.as_ref();
        let seen = state.servers.as_ref();
        let versions = state.versions.as_ref();
        let straggler = tally.straggler();
        let num_servers = seen.map_or(settings.num_servers, |seen| seen.servers.len());
        let consistency = seen.map_or("", |seen| seen.consistency.as_str());
        let place_of = |node| state.place(node);
        Self {
            status: match end {
                Some(end) if end.error.is_some() => "failed",
                Some(end) if end.interrupted.is_some() => "interrupted",
                Some(_) => "ended",
                None if versions.is_none() => "starting",
                None if state.is_recovering => "recovering",
                None if control.is_paused => "paused",
                None => "training",
            },
            error: end.and_then(|end| end.error.as_deref()),
            interrupted: end.and_then(|end| end.interrupted.as_deref()),
            run: Run {
                name: &settings.name,
                model: &settings.model,
                num_weights: settings.num_weights,
                num_examples: settings.num_examples,
                batch_size: settings.batch_size,
                optimizer: &settings.optimizer,
                reduction: &settings.reduction,
                device: &settings.device,
                seed: settings.seed,
                started: state.started,
                first_version: tally.first_version.0,
                ps: versions.map_or("", |versions| versions.ps.as_str()),
                burn: versions.map_or("", |versions| versions.burn.as_str()),
            },
            seconds: tally.seconds,
            looked: seen.map(|seen| seen.time),
            version: tally.version.0,
            steps_done,
            steps_all,
            seconds_left: match (end, control.is_paused) {
                (None, false) => tally.seconds_left(),
                _ => None,
            },
            loss: tally.loss(),
            evaluation: tally
                .evaluation
                .map(|(version, loss, accuracy)| Evaluation {
                    version: version.0,
                    loss: finite(loss),
                    accuracy,
                    best_accuracy: tally.best_accuracy,
                }),
            evaluating: tally.evaluating,
            gradients_per_second: tally.gradients_per_second(tally.seconds),
            num_applied: tally.num_applied(),
            learning_rate: finite(match (seen, state.learning_rate) {
                (Some(seen), _) => seen.learning_rate,
                (None, Some(set)) => set,
                (None, None) => settings.learning_rate,
            }),
            consistency: match consistency {
                "" => settings.consistency.as_str(),
                known => known,
            },
            num_pending: seen.map_or(0, |seen| seen.num_pending),
            awaited: seen.map_or_else(Vec::new, |seen| {
                seen.awaited
                    .iter()
                    .take(MAX_LINES)
                    .map(|worker| worker.0)
                    .collect()
            }),
            staleness: staleness(state),
            num_workers: tally.workers.len(),
            num_workers_lost: tally.num_workers_lost(),
            workers: workers(state, straggler.map(|slow| slow.worker)),
            straggler: straggler.map(|slow| Slow {
                worker: slow.worker.0,
                text: slow.to_string(),
            }),
            num_servers,
            servers: seen.map_or_else(Vec::new, |seen| {
                let servers = seen.servers.iter().take(MAX_LINES);
                let server = servers.map(|server| Server {
                    place: place_of(server.node),
                    version: server.version.0,
                    num_weights: server.num_weights,
                    bytes: 4 * server.num_weights,
                    num_staged: server.num_staged,
                    num_waiting: server.num_waiting,
                });
                server.collect()
            }),
            num_nodes: tally.nodes.len(),
            nodes: nodes(state),
            num_checkpoints: tally.num_checkpoints,
            num_checkpoints_failed: tally.num_checkpoints_failed,
            checkpoints: state.checkpoints.iter().rev().collect(),
            log: seen.and_then(|seen| seen.log.as_ref()),
            incidents: state.incidents.iter().rev().collect(),
            num_skipped: tally.num_skipped,
            control,
        }
    }
}

fn staleness(state: &State) -> Staleness {
    let all = &state.tally.staleness;
    let counts = all.counts();
    let mut shown: Vec<u64> = counts.iter().copied().take(MAX_STALENESS).collect();
    let more: u64 = counts.iter().skip(MAX_STALENESS).sum();
    if more > 0 {
        shown.push(more);
    }
    while shown.last() == Some(&0) {
        shown.pop();
    }
    Staleness {
        mean: if all.num_values() > 0 {
            all.mean()
        } else {
            0.0
        },
        max: all.max(),
        counts: shown,
        is_cut: more > 0,
    }
}

/// Returns the workers. If there are too many: those that are lost, the straggler, and those that took the
/// fewest steps.
fn workers(state: &State, straggler: Option<WorkerId>) -> Vec<Worker> {
    let mut all: Vec<(WorkerId, &WorkerTally)> = state
        .tally
        .workers
        .iter()
        .map(|(&worker, tally)| (worker, tally))
        .collect();
    if all.len() > MAX_LINES {
        all.sort_by_cached_key(|&(worker, tally)| {
            let is_slow = Some(worker) == straggler;
            let matters = is_slow || ["lost", "fenced"].contains(&state_of(state, worker, tally));
            (!matters, tally.num_steps(), worker)
        });
        all.truncate(MAX_LINES);
        all.sort_by_key(|(worker, _)| *worker);
    }
    let now = state.tally.seconds;
    let shown = all.into_iter().map(|(worker, tally)| Worker {
        worker: worker.0,
        place: tally
            .node
            .map_or_else(String::new, |node| state.place(node)),
        state: state_of(state, worker, tally),
        steps: tally.num_steps(),
        gradients_per_second: (state.recent.get(&worker))
            .map_or(0.0, |recent| recent.per_second(now)),
        mean_staleness: match tally.staleness.num_values() {
            0 => 0.0,
            _ => tally.staleness.mean(),
        },
        max_staleness: tally.staleness.max(),
        shares: tally
            .shares()
            .map(|shares| shares.parts().map(|share| share as f32)),
        num_losses: tally.num_losses,
        num_moves: tally.num_moves,
        num_late: tally.num_late,
        num_refused: tally.num_refused,
    });
    shown.collect()
}

fn state_of(state: &State, worker: WorkerId, tally: &WorkerTally) -> &'static str {
    let steps_per_worker = state.tally.settings.steps_per_worker;
    // The servers have ended its membership, and it has taken no step since then.
    let is_fenced = || {
        let (seen, latest) = (state.servers.as_ref()?, tally.latest_step?);
        Some(seen.time > latest && !seen.members.contains(&worker))
    };
    match tally {
        _ if tally.is_removed => "removed",
        _ if steps_per_worker > 0 && tally.next_clock.0 >= steps_per_worker => "done",
        _ if tally.is_lost => "lost",
        _ if tally.has_left => "left",
        _ if !tally.has_joined => "starting",
        _ if is_fenced().unwrap_or(false) => "fenced",
        _ => "live",
    }
}

fn nodes(state: &State) -> Vec<Node<'_>> {
    let nodes = state.tally.nodes.iter().take(MAX_LINES);
    let nodes = nodes.map(|(node, host)| {
        let workers = state.tally.workers.values();
        let there = workers.filter(|worker| worker.node == Some(*node) && !worker.is_lost);
        Node {
            node: node.to_string(),
            host,
            num_workers: there.count(),
        }
    });
    nodes.collect()
}

/// How much of the curves somebody has. As text it is the id of an event, so that a browser that connects again
/// says what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) loss: Mark,
    pub(super) accuracy: Mark,
    pub(super) rate: Mark,
}

impl Marks {
    pub(super) fn write(&self, run: &str) -> String {
        let Self {
            loss,
            accuracy,
            rate,
        } = self;
        let parts =
            [loss, accuracy, rate].map(|mark| format!("{}.{}", mark.generation, mark.num_points));
        format!("{run}-{}", parts.join("-"))
    }

    /// Reads what [`write`](Self::write) wrote. Anything else, or the id of another run, is nothing.
    pub(super) fn read(text: &str, run: &str) -> Self {
        let read = || {
            let rest = text.strip_prefix(run)?.strip_prefix('-')?;
            let mut marks = rest.split('-').map(|part| {
                let (generation, num_points) = part.split_once('.')?;
                Some(Mark {
                    generation: generation.parse().ok()?,
                    num_points: num_points.parse().ok()?,
                })
            });
            Some(Self {
                loss: marks.next()??,
                accuracy: marks.next()??,
                rate: marks.next()??,
            })
        };
        read().unwrap_or_default()
    }
}

/// The curves, or what is new of them.
#[derive(Serialize)]
pub(super) struct Curves<'a> {
    loss: New<'a>,
    accuracy: New<'a>,
    rate: New<'a>,
}

#[derive(Serialize)]
struct New<'a> {
    /// Whether the points replace those before.
    replaces: bool,
    points: &'a [Point],
}

impl<'a> Curves<'a> {
    /// Returns what somebody with these marks does not have, and the new marks.
    pub(super) fn since(state: &'a State, marks: Marks) -> (Self, Marks) {
        fn new(curve: &Curve, mark: Mark) -> (New<'_>, Mark) {
            let (points, replaces, mark) = curve.since(mark);
            (New { replaces, points }, mark)
        }
        let (loss, loss_mark) = new(&state.loss, marks.loss);
        let (accuracy, accuracy_mark) = new(&state.accuracy, marks.accuracy);
        let (rate, rate_mark) = new(&state.rate, marks.rate);
        let marks = Marks {
            loss: loss_mark,
            accuracy: accuracy_mark,
            rate: rate_mark,
        };
        (
            Self {
                loss,
                accuracy,
                rate,
            },
            marks,
        )
    }
}

#[cfg(test)]
mod tests {
    use ps_actors::cluster::NodeId;
    use ps_actors::ids::Clock;

    use super::*;
    use crate::observe::{Event, ServersSeen, WorkerJoined, WorkerLeft, testing};

    #[test]
    fn the_view_has_what_happened_and_its_size_is_bounded() {
        let mut state = State::default();
        for number in 0..10_000_u32 {
            let (worker, clock) = (number % 1_000, u64::from(number / 1_000));
            state.count(&testing::step(worker, clock, f64::from(number) / 100.0));
        }
        state.count(&testing::worker_lost(100.0));
        let control = Control::default();
        let text = serde_json::to_string(&View::of(&state, control)).unwrap();
        assert!(text.len() < 40_000, "{} bytes", text.len());
        let view: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(view["num_workers"], 1_000);
        assert_eq!(view["workers"].as_array().unwrap().len(), MAX_LINES);
        assert_eq!(view["workers"][0]["state"], "lost");
        assert_eq!(view["num_applied"], 10_000);
        assert_eq!(view["staleness"]["counts"].as_array().unwrap().len(), 3);
        assert_eq!(view["incidents"][0]["kind"], "fault");
    }

    #[test]
    fn the_state_of_a_worker_follows_from_what_it_and_the_servers_did() {
        fn state_of_worker_0(state: &State) -> serde_json::Value {
            let view = serde_json::to_value(View::of(state, Control::default())).unwrap();
            view["workers"][0]["state"].clone()
        }
        fn seen(time: f64, members: &[u32]) -> Event {
            Event::ServersSeen(ServersSeen {
                time,
                learning_rate: 0.1,
                consistency: "asp".to_owned(),
                num_pending: 0,
                awaited: Vec::new(),
                members: members.iter().map(|&worker| WorkerId(worker)).collect(),
                servers: Vec::new(),
                log: None,
            })
        }
        fn joined(time: f64, node: Option<NodeId>) -> Event {
            Event::WorkerJoined(WorkerJoined {
                time,
                worker: WorkerId(0),
                node,
                next_clock: Clock(0),
            })
        }
        let mut state = State::default();
        state.tally.workers.entry(WorkerId(0)).or_default();
        for (event, expected) in [
            (seen(0.1, &[]), "starting"),
            // One over HTTP has no node.
            (joined(0.2, None), "live"),
            // It has not asked the servers yet.
            (seen(0.3, &[]), "live"),
            (testing::step(0, 0, 0.5), "live"),
            (seen(0.6, &[0, 1]), "live"),
            (seen(0.7, &[1]), "fenced"),
            // The look is older than the step.
            (testing::step(0, 1, 0.8), "live"),
            (seen(0.75, &[1]), "live"),
            (seen(0.9, &[1]), "fenced"),
            (testing::worker_lost(1.0), "lost"),
            (joined(1.1, Some(NodeId::DRIVER)), "live"),
            (seen(1.2, &[1]), "live"),
            (
                Event::WorkerLeft(WorkerLeft {
                    time: 1.3,
                    worker: WorkerId(0),
                }),
                "left",
            ),
        ] {
            state.count(&event);
            assert_eq!(state_of_worker_0(&state), expected, "{event:?}");
        }
    }

    #[test]
    fn whoever_connects_again_gets_only_what_is_new() {
        let mut state = State::default();
        (0..10).for_each(|clock| state.count(&testing::step(0, clock, clock as f64)));
        // The latest one may not be in its place yet.
        let (curves, marks) = Curves::since(&state, Marks::default());
        assert_eq!(curves.loss.points.len(), 9);
        let id = marks.write("run-1");
        state.count(&testing::step(0, 10, 10.0));
        let (curves, _) = Curves::since(&state, Marks::read(&id, "run-1"));
        assert_eq!((curves.loss.points.len(), curves.loss.replaces), (1, false));
        // The driver was started again, or the id is none of ours.
        for (id, run) in [
            (id.as_str(), "run-2"),
            ("run-1-9.9", "run-1"),
            ("", "run-1"),
            ("run-1-x.y-1.1-1.1", "run-1"),
        ] {
            let (curves, _) = Curves::since(&state, Marks::read(id, run));
            assert_eq!(
                (curves.loss.points.len(), curves.loss.replaces),
                (10, true),
                "{id}"
            );
        }
    }
}
