//! Events as entries of a trace.
//!
//! The format: <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>. Times are in
//! microseconds.

use std::collections::{BTreeMap, BTreeSet};

use ps_actors::cluster::NodeId;
use ps_actors::ids::{Version, WorkerId};
use serde_json::{Value, json};

use crate::observe::{Event, SettledStep, StepOutcome, StepTimes};

/// The "process" of the first server as long as nobody has said where it is. Ranks are those of the others.
const SERVERS: u64 = 1 << 30;

/// The "thread" of the first server's updates. Those with its pushes follow, one for each worker. The process may have
/// workers, too. Both numbers fit into 31 bits, which is what readers of the format may take.
const UPDATES: u64 = 1 << 30;

/// The "thread" of a process for what is no worker's.
const MAIN: u64 = 0;

/// How many versions are remembered, for the other gradients of their updates.
const MAX_VERSIONS: usize = 1024;

/// What is known of a training so far.
#[derive(Debug, Default)]
pub(super) struct Entries {
    /// Where each worker computes.
    ranks: BTreeMap<WorkerId, u32>,
    /// Where the first server is.
    first_server: Option<u32>,
    /// The threads of the first server that have names, by process.
    named: BTreeSet<(u64, u64)>,
    /// When updates were made.
    updates: BTreeMap<Version, f64>,
    pub(super) num_steps: u64,
}

/// Names the driver.
pub(super) fn driver() -> Value {
    named("process_name", (0, MAIN), "driver".to_owned())
}

fn micros(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e3
}

fn thread(worker: WorkerId) -> u64 {
    u64::from(worker.0) + 1
}

/// Something that took some time.
fn slice(name: &str, (pid, tid): (u64, u64), from: f64, seconds: f64, args: Value) -> Value {
    json!({
        "ph": "X", "cat": "ps", "name": name, "pid": pid, "tid": tid,
        "ts": micros(from), "dur": micros(seconds.max(0.0)), "args": args,
    })
}

/// Something that happened at a moment.
fn instant(name: &str, time: f64, args: Value) -> Value {
    json!({
        "ph": "i", "s": "g", "cat": "ps", "name": name, "pid": 0, "tid": MAIN, "ts": micros(time), "args": args,
    })
}

fn named(kind: &str, (pid, tid): (u64, u64), name: String) -> Value {
    json!({"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}})
}

impl Entries {
    /// Returns the entries of an event.
    pub(super) fn of(&mut self, event: &Event) -> Vec<Value> {
        match event {
            Event::RunStarted(started) => vec![
                driver(),
                named(
                    "thread_name",
                    (0, MAIN),
                    "evaluation, checkpoints".to_owned(),
                ),
                instant(
                    "the training begins",
                    started.time,
                    json!({"settings": started.settings, "versions": started.versions}),
                ),
            ],
            Event::WorkerJoined(joined) => self.worker_at(joined.worker, joined.node),
            Event::WorkerMoved(moved) => self.worker_at(moved.worker, Some(moved.to)),
            Event::Step(step) => self.step(step),
            Event::Evaluated(evaluated) => vec![slice(
                "evaluation",
                (0, MAIN),
                evaluated.time,
                evaluated.seconds,
                json!({
                    "version": evaluated.version.0, "loss": evaluated.loss, "accuracy": evaluated.accuracy,
                }),
            )],
            Event::CheckpointSaved(saved) => vec![slice(
                "checkpoint",
                (0, MAIN),
                saved.time - saved.seconds,
                saved.seconds,
                json!({"version": saved.version.0, "path": saved.path}),
            )],
            Event::NodeJoined(joined) => vec![
                named(
                    "process_name",
                    (joined.node.rank.into(), MAIN),
                    format!(
                        "{} on {} (process {})",
                        joined.node, joined.host, joined.pid
                    ),
                ),
                instant(
                    "a node joins",
                    joined.time,
                    json!({"node": joined.node.to_string()}),
                ),
            ],
            Event::ServersSeen(seen) => {
                let rank = seen.servers.first().map(|first| first.node.rank);
                if self.first_server != rank {
                    self.first_server = rank;
                    self.updates.clear();
                }
                Vec::new()
            }
            // What comes too often.
            Event::Evaluating(_) => Vec::new(),
            Event::RunEnded(ended) => vec![instant("the training ends", ended.time, Value::Null)],
            // The rest are rare, and their fields say all.
            other => {
                let args = serde_json::to_value(other).unwrap_or_default();
                let name = args["event"].as_str().unwrap_or("event").replace('_', " ");
                vec![instant(&name, other.time(), args)]
            }
        }
    }

    fn worker_at(&mut self, worker: WorkerId, node: Option<NodeId>) -> Vec<Value> {
        // A worker that speaks HTTP has no process of ours, and its steps have no times.
        let Some(node) = node else {
            return Vec::new();
        };
        self.ranks.insert(worker, node.rank);
        let (pid, tid) = (u64::from(node.rank), thread(worker));
        vec![named("thread_name", (pid, tid), worker.to_string())]
    }

    /// Returns the threads of the first server, wherever it is: that of its updates, and that of the worker's pushes.
    /// Adds the names of those that have none yet.
    fn server_threads(
        &mut self,
        worker: WorkerId,
        entries: &mut Vec<Value>,
    ) -> ((u64, u64), (u64, u64)) {
        let pid = self.first_server.map_or(SERVERS, u64::from);
        let (updates, pushes) = ((pid, UPDATES), (pid, UPDATES + thread(worker)));
        if self.named.insert(updates) {
            if pid == SERVERS {
                entries.push(named("process_name", updates, "servers".to_owned()));
            }
            let name = "first server: updates".to_owned();
            entries.push(named("thread_name", updates, name));
        }
        if self.named.insert(pushes) {
            let name = format!("first server: pushes of {worker}");
            entries.push(named("thread_name", pushes, name));
        }
        (updates, pushes)
    }

    fn step(&mut self, step: &SettledStep) -> Vec<Value> {
        let Some(times) = step.times else {
            // A driver's own loop does not know when the step began.
            return Vec::new();
        };
        self.num_steps += 1;
        let StepTimes {
            data,
            compute,
            wire,
            waiting,
            apply,
        } = times;
        let (way, held) = (wire / 2.0, waiting + apply);
        let began = step.time - times.total();
        let sent = began + data + compute;
        let (arrived, answered) = (sent + way, sent + way + held);
        let rank = self.ranks.get(&step.worker).copied().unwrap_or(0);
        let worker = (u64::from(rank), thread(step.worker));
        let mut entries = Vec::new();
        let (updates, pushes) = self.server_threads(step.worker, &mut entries);
        // The name of the gradient, which travels with each call about it.
        let gradient = format!("{}.{}.{}", step.worker.0, step.incarnation.0, step.clock.0);
        let about = json!({
            "gradient": gradient, "computed on": step.computed_on.0, "outcome": step.outcome,
            "version": step.version.0, "staleness": step.staleness, "loss": step.loss.to_string(),
            "norm": step.norm.to_string(), "examples": step.num_examples,
        });
        entries.extend([
            slice(
                &format!("step {}", step.clock.0),
                worker,
                began,
                times.total(),
                about,
            ),
            slice("batch", worker, began, data, Value::Null),
            slice("compute", worker, began + data, compute, Value::Null),
            slice("send", worker, sent, way, Value::Null),
            slice("the servers hold it", worker, arrived, held, Value::Null),
            slice("receive", worker, answered, way, Value::Null),
            slice(
                &format!("gradient {gradient}"),
                pushes,
                arrived,
                held,
                json!({"the update took": format!("{:.3} ms", 1e3 * apply)}),
            ),
        ]);
        // Arrows bind to the slices that are under way at these times.
        let arrow = |phase: &str, (pid, tid): (u64, u64), time: f64| {
            json!({
                "ph": phase, "bp": "e", "cat": "ps", "name": "gradient", "id": gradient,
                "pid": pid, "tid": tid, "ts": micros(time),
            })
        };
        entries.push(arrow("s", worker, sent));
        if step.outcome != StepOutcome::Applied {
            entries.push(arrow("f", pushes, arrived));
            return entries;
        }
        entries.push(arrow("t", pushes, arrived));
        let mut is_new = false;
        let updated = *self.updates.entry(step.version).or_insert_with(|| {
            is_new = true;
            answered
        });
        if is_new {
            let name = format!("version {}", step.version.0);
            entries.push(slice(&name, updates, updated, 1e-6, Value::Null));
            while self.updates.len() > MAX_VERSIONS {
                self.updates.pop_first();
            }
        }
        entries.push(arrow("f", updates, updated));
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::testing;

    fn step(worker: u32, clock: u64, time: f64) -> SettledStep {
        match testing::step(worker, clock, time) {
            Event::Step(step) => step,
            other => panic!("{other:?}"),
        }
    }

    fn slices<'a>(entries: &'a [Value], name: &str) -> Vec<&'a Value> {
        let is_it = |entry: &&Value| entry["ph"] == "X" && entry["name"] == name;
        entries.iter().filter(is_it).collect()
    }

    fn ends(slice: &Value) -> (f64, f64) {
        let from = slice["ts"].as_f64().unwrap();
        (from, from + slice["dur"].as_f64().unwrap())
    }

    /// Two workers, whose gradients make one update.
    #[test]
    fn a_gradient_is_followed_from_its_batch_to_the_update() {
        let mut entries = Entries::default();
        let mut all = Vec::new();
        for worker in 0..2 {
            let node = NodeId {
                rank: worker + 1,
                incarnation: 1,
            };
            all.extend(entries.worker_at(WorkerId(worker), Some(node)));
        }
        for worker in 0..2 {
            let mut step = step(worker, 0, 10.0 + f64::from(worker));
            step.times = Some(StepTimes::new([1.0, 2.0, 0.5, 0.125, 0.125]));
            all.extend(entries.step(&step));
        }
        assert_eq!(entries.num_steps, 2);
        assert_eq!(slices(&all, "version 1").len(), 1);
        for (worker, end) in [(0_u64, 10.0e6), (1, 11.0e6)] {
            let of = |entry: &&Value| entry["pid"] == worker + 1 && entry["tid"] == worker + 1;
            let mine: Vec<Value> = all.iter().filter(of).cloned().collect();
            let mut at = end - 3.75e6;
            assert_eq!(ends(slices(&mine, "step 0")[0]), (at, end));
            for (name, micros) in [
                ("batch", 1.0e6),
                ("compute", 2.0e6),
                ("send", 0.25e6),
                ("the servers hold it", 0.25e6),
                ("receive", 0.25e6),
            ] {
                assert_eq!(ends(slices(&mine, name)[0]), (at, at + micros), "{name}");
                at += micros;
            }
            let id = mine.iter().find(|entry| entry["ph"] == "s").unwrap()["id"].clone();
            let arrows: Vec<&Value> = all.iter().filter(|entry| entry["id"] == id).collect();
            let phases: Vec<&str> = arrows.iter().filter_map(|one| one["ph"].as_str()).collect();
            assert_eq!(phases, ["s", "t", "f"]);
            // Each is inside a slice of its thread.
            for arrow in arrows {
                let time = arrow["ts"].as_f64().unwrap();
                let holds = |slice: &&Value| {
                    let (from, to) = ends(slice);
                    slice["ph"] == "X"
                        && slice["pid"] == arrow["pid"]
                        && slice["tid"] == arrow["tid"]
                        && (from..=to).contains(&time)
                };
                assert!(
                    all.iter()
                        .filter(|one| one["dur"].is_f64())
                        .any(|one| holds(&one)),
                    "{arrow}"
                );
            }
        }
    }

    /// It may have workers, too, and after a loss it is elsewhere.
    #[test]
    fn the_first_server_is_in_the_process_that_has_it() {
        use crate::observe::{ServerSeen, ServersSeen};

        let node = |rank| NodeId {
            rank,
            incarnation: 1,
        };
        let seen = |rank| {
            let server = |rank| ServerSeen {
                node: node(rank),
                version: Version(0),
                num_weights: 1,
                num_staged: 0,
                num_waiting: 0,
            };
            Event::ServersSeen(ServersSeen {
                time: 1.0,
                learning_rate: 0.1,
                consistency: "bsp".to_owned(),
                num_pending: 0,
                awaited: Vec::new(),
                members: Vec::new(),
                servers: vec![server(rank), server(rank + 1)],
                log: None,
            })
        };
        let mut entries = Entries::default();
        entries.worker_at(WorkerId(0), Some(node(1)));
        for (rank, clock) in [(1, 0), (2, 1)] {
            assert!(entries.of(&seen(rank)).is_empty());
            let all = entries.step(&step(0, clock, 10.0));
            let at = |name: &str| {
                let slice = slices(&all, name)[0];
                let number = |key: &str| slice[key].as_u64().unwrap();
                (number("pid"), number("tid"))
            };
            let worker = at(&format!("step {clock}"));
            let pushes = at(&format!("gradient 0.1.{clock}"));
            let updates = at(&format!("version {}", clock + 1));
            assert_eq!([pushes.0, updates.0], [u64::from(rank); 2]);
            assert!(worker != pushes && worker != updates && pushes != updates);
            // Each thread of the server has a name.
            for (pid, tid) in [pushes, updates] {
                let is_name = |one: &&Value| {
                    one["name"] == "thread_name" && one["pid"] == pid && one["tid"] == tid
                };
                assert_eq!(all.iter().filter(is_name).count(), 1);
            }
        }
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut entries = Entries::default();
        for clock in 0..3_000 {
            entries.step(&step(0, clock, clock as f64));
        }
        assert_eq!(entries.updates.len(), MAX_VERSIONS);
    }
}
