//! Events as entries of a trace.
//!
//! The format: <https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>. Times are in
//! microseconds. Perfetto draws an arrow only if its id is a number or a hexadecimal text, and if its points come in the
//! order of their times.

use std::borrow::Cow;
use std::collections::BTreeMap;

use ps_actors::cluster::NodeId;
use ps_actors::ids::{GradientId, Version, WorkerId};
use serde::Serialize;
use serde_json::{Value, json};

use crate::observe::{
    Computed, Event, Latest, PartApplied, SettledStep, StepOutcome, StepTimes, UpdateMade,
};

#[cfg(test)]
mod tests;

/// The "process" of the first server as long as nobody has said where it is. Ranks are those of the others.
const SERVERS: u64 = 1 << 30;

/// The first "thread" of servers in a process, which may have workers, too. Processes and threads fit into 31 bits, which is
/// what readers of the format may take.
const OF_SERVERS: u64 = 1 << 30;

/// The "thread" of the calls that a driver's own loop makes to its servers.
const OF_LOOP: u64 = OF_SERVERS - 1;

/// The "thread" of a process for what is no worker's.
const MAIN: u64 = 0;

/// How many versions of each server are remembered, for the other gradients of their updates.
const MAX_VERSIONS: usize = 1024;

/// How many gradients are remembered, for their ways to the other servers.
const MAX_GRADIENTS: usize = 1 << 14;

/// How much of the file a step takes. A part of its gradient at another server takes 1, and so do a step and a call of a
/// driver's own loop.
const STEP: u64 = 3;

/// What is known of a training so far.
#[derive(Debug)]
pub(super) struct Entries {
    /// Where each worker computes.
    ranks: BTreeMap<WorkerId, u32>,
    /// Where the first server is.
    first_server: Option<u32>,
    /// The threads of servers, by process and server: that of its updates, and one for each worker.
    threads: BTreeMap<(u64, usize, Option<WorkerId>), u64>,
    /// When the slices of updates begin and end, by server.
    updates: BTreeMap<usize, Latest<Version, (f64, f64)>>,
    /// Where gradients come from.
    origins: Latest<GradientId, Origin>,
    /// When the last slice of a server's thread ends.
    ends: BTreeMap<(u64, u64), f64>,
    has_loop: bool,
    num_arrows: u64,
    /// How much has been drawn.
    size: u64,
}

/// Where an arrow from a gradient begins.
#[derive(Clone, Copy, Debug)]
struct Origin {
    thread: (u64, u64),
    /// When the gradient was sent. When it was asked for, if a driver's own loop did.
    sent: f64,
}

impl Default for Entries {
    fn default() -> Self {
        Self {
            ranks: BTreeMap::new(),
            first_server: None,
            threads: BTreeMap::new(),
            updates: BTreeMap::new(),
            origins: Latest::new(MAX_GRADIENTS),
            ends: BTreeMap::new(),
            has_loop: false,
            num_arrows: 0,
            size: 0,
        }
    }
}

/// An entry of the file. It has types, and is no tree of values: a step has ten entries, and with trees for them, all observers
/// of a training together took 1.7 times as much processor time.
#[derive(Debug, Default, Serialize)]
pub(super) struct Entry {
    ph: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    cat: Option<&'static str>,
    name: Cow<'static, str>,
    pid: u64,
    tid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    /// How long a slice is.
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    /// Where a moment is drawn: everywhere (`g`), or in its thread (`t`).
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'static str>,
    /// To what a point of an arrow binds.
    #[serde(skip_serializing_if = "Option::is_none")]
    bp: Option<&'static str>,
    /// Which arrow it is a point of.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Args::is_nothing")]
    args: Args,
}

/// What is said about an entry.
#[derive(Debug, Default, Serialize)]
#[serde(untagged)]
enum Args {
    #[default]
    Nothing,
    Name {
        name: String,
    },
    Step {
        gradient: String,
        #[serde(rename = "computed on")]
        computed_on: u64,
        outcome: StepOutcome,
        version: u64,
        staleness: u64,
        loss: String,
        norm: String,
        examples: u64,
    },
    Push {
        #[serde(rename = "the update took")]
        took: String,
    },
    Part {
        version: u64,
        #[serde(rename = "waited for the update")]
        held: String,
        #[serde(rename = "the update took")]
        took: String,
    },
    /// What does not come with each step.
    Rare(Value),
}

impl Args {
    fn is_nothing(&self) -> bool {
        matches!(self, Self::Nothing)
    }
}

/// Names the driver.
pub(super) fn driver() -> Entry {
    named("process_name", (0, MAIN), "driver".to_owned())
}

fn micros(seconds: f64) -> f64 {
    (seconds * 1e9).round() / 1e3
}

fn thread(worker: WorkerId) -> u64 {
    u64::from(worker.0) + 1
}

/// Something that took some time.
fn slice(
    name: impl Into<Cow<'static, str>>,
    (pid, tid): (u64, u64),
    from: f64,
    seconds: f64,
    args: Args,
) -> Entry {
    Entry {
        ph: "X",
        cat: Some("ps"),
        name: name.into(),
        pid,
        tid,
        ts: Some(micros(from)),
        dur: Some(micros(seconds.max(0.0))),
        args,
        ..Entry::default()
    }
}

/// Something that happened at a moment. It is drawn everywhere.
fn instant(name: impl Into<Cow<'static, str>>, time: f64, args: Args) -> Entry {
    Entry {
        ph: "i",
        cat: Some("ps"),
        name: name.into(),
        pid: 0,
        tid: MAIN,
        ts: Some(micros(time)),
        s: Some("g"),
        args,
        ..Entry::default()
    }
}

fn named(kind: &'static str, (pid, tid): (u64, u64), name: String) -> Entry {
    Entry {
        ph: "M",
        name: kind.into(),
        pid,
        tid,
        args: Args::Name { name },
        ..Entry::default()
    }
}

impl Entries {
    /// Returns the entries of an event.
    pub(super) fn of(&mut self, event: &Event) -> Vec<Entry> {
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
                    Args::Rare(json!({"settings": started.settings, "versions": started.versions})),
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
                Args::Rare(json!({
                    "version": evaluated.version.0, "loss": evaluated.loss, "accuracy": evaluated.accuracy,
                })),
            )],
            Event::CheckpointSaved(saved) => vec![slice(
                "checkpoint",
                (0, MAIN),
                saved.time - saved.seconds,
                saved.seconds,
                Args::Rare(json!({"version": saved.version.0, "path": saved.path})),
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
                    Args::Rare(json!({"node": joined.node.to_string()})),
                ),
            ],
            Event::ServersSeen(seen) => {
                self.first_server = seen.servers.first().map(|first| first.node.rank);
                Vec::new()
            }
            Event::PartApplied(part) => self.part(part),
            Event::Computed(computed) => self.computed(computed),
            Event::UpdateMade(made) => self.update_of_loop(made),
            // What comes too often.
            Event::Evaluating(_) => Vec::new(),
            Event::RunEnded(ended) => vec![instant("the training ends", ended.time, Args::Nothing)],
            // The rest are rare, and their fields say all.
            other => {
                if let Event::ServersLost(_) = other {
                    // Versions and steps since the checkpoint come again.
                    self.updates.clear();
                    self.origins = Latest::new(MAX_GRADIENTS);
                }
                let args = serde_json::to_value(other).unwrap_or_default();
                let name = args["event"].as_str().unwrap_or("event").replace('_', " ");
                vec![instant(name, other.time(), Args::Rare(args))]
            }
        }
    }

    fn worker_at(&mut self, worker: WorkerId, node: Option<NodeId>) -> Vec<Entry> {
        // A worker that speaks HTTP has no process of ours, and its steps have no times.
        let Some(node) = node else {
            return Vec::new();
        };
        self.ranks.insert(worker, node.rank);
        let (pid, tid) = (u64::from(node.rank), thread(worker));
        vec![named("thread_name", (pid, tid), worker.to_string())]
    }

    /// Whether so much has been drawn as this many steps take.
    pub(super) fn are_as_many_as(&self, num_steps: u64) -> bool {
        self.size >= STEP.saturating_mul(num_steps)
    }

    /// Returns the thread of a server in the process where it is: that of its updates, or that of a worker's gradients. Adds
    /// its name if it is new.
    fn server_thread(
        &mut self,
        pid: u64,
        server: usize,
        worker: Option<WorkerId>,
        entries: &mut Vec<Entry>,
    ) -> (u64, u64) {
        let next = OF_SERVERS + self.threads.len() as u64;
        let tid = *self.threads.entry((pid, server, worker)).or_insert(next);
        if tid == next {
            if (pid, worker) == (SERVERS, None) {
                entries.push(named("process_name", (pid, tid), "servers".to_owned()));
            }
            let name = match (server, worker) {
                (0, None) => "first server: updates".to_owned(),
                (0, Some(worker)) => format!("first server: pushes of {worker}"),
                (_, None) => format!("server {server}: updates"),
                (_, Some(worker)) => format!("server {server}: parts of {worker}"),
            };
            entries.push(named("thread_name", (pid, tid), name));
        }
        (pid, tid)
    }

    /// Draws arrows from each of these points to the next one, until one would go back in time. They bind to the slices
    /// that are under way there.
    fn arrows(
        &mut self,
        gradient: GradientId,
        points: &[((u64, u64), f64)],
        entries: &mut Vec<Entry>,
    ) {
        // The slice of an update is drawn once, for the first of its gradients. Others may seem to have come later.
        let are_in_order = |pair: &&[((u64, u64), f64)]| pair[0].1 <= pair[1].1;
        let num_arrows = points.windows(2).take_while(are_in_order).count();
        if num_arrows == 0 {
            return;
        }
        let points = &points[..=num_arrows];
        self.num_arrows += 1;
        let (id, name) = (format!("{:x}", self.num_arrows), name_of(gradient));
        for (index, &((pid, tid), time)) in points.iter().enumerate() {
            let phase = match index {
                0 => "s",
                index if index + 1 == points.len() => "f",
                _ => "t",
            };
            entries.push(Entry {
                ph: phase,
                cat: Some("ps"),
                name: name.clone().into(),
                pid,
                tid,
                ts: Some(micros(time)),
                bp: Some("e"),
                id: Some(id.clone()),
                ..Entry::default()
            });
        }
    }

    /// Returns when the slice of an update begins and ends.
    fn update_of(&self, server: usize, version: Version) -> Option<(f64, f64)> {
        self.updates.get(&server)?.get(&version).copied()
    }

    /// Draws the slice of an update.
    fn draw_update(
        &mut self,
        (server, version): (usize, Version),
        thread: (u64, u64),
        (from, to): (f64, f64),
        entries: &mut Vec<Entry>,
    ) {
        let updates = self.updates.entry(server);
        let updates = updates.or_insert_with(|| Latest::new(MAX_VERSIONS));
        updates.insert(version, (from, to));
        let name = format!("version {}", version.0);
        entries.push(slice(name, thread, from, to - from, Args::Nothing));
    }

    fn step(&mut self, step: &SettledStep) -> Vec<Entry> {
        let Some(times) = step.times else {
            return self.step_of_loop(step);
        };
        self.size += STEP;
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
        let worker = self.worker_thread(step.worker);
        let mut entries = Vec::new();
        let server = self.first_server.map_or(SERVERS, u64::from);
        let updates = self.server_thread(server, 0, None, &mut entries);
        let pushes = self.server_thread(server, 0, Some(step.worker), &mut entries);
        entries.extend([
            slice(
                format!("step {}", step.clock.0),
                worker,
                began,
                times.total(),
                about(step),
            ),
            slice("batch", worker, began, data, Args::Nothing),
            slice("compute", worker, began + data, compute, Args::Nothing),
            slice("send", worker, sent, way, Args::Nothing),
            slice("the servers hold it", worker, arrived, held, Args::Nothing),
            slice("receive", worker, answered, way, Args::Nothing),
            slice(
                name_of(step.gradient()),
                pushes,
                arrived,
                held,
                Args::Push {
                    took: millis(apply),
                },
            ),
        ]);
        let origin = Origin {
            thread: worker,
            sent,
        };
        self.origins.insert(step.gradient(), origin);
        let mut points = vec![(worker, sent), (pushes, arrived)];
        if step.outcome == StepOutcome::Applied {
            let updated = self.update_of(0, step.version).unwrap_or_else(|| {
                let now = (answered, answered + 1e-6);
                self.draw_update((0, step.version), updates, now, &mut entries);
                now
            });
            points.push((updates, updated.0));
        }
        self.arrows(step.gradient(), &points, &mut entries);
        entries
    }

    /// Another server has applied its part of a gradient.
    fn part(&mut self, part: &PartApplied) -> Vec<Entry> {
        let (pid, server) = (u64::from(part.node.rank), part.server);
        let mut entries = Vec::new();
        // Of a step that is missed, nobody knows where its gradient came from. And what a server says of gradients that
        // nobody has heard of must not fill the file.
        let Some(origin) = self.origins.get(&part.gradient()).copied() else {
            return entries;
        };
        self.size += 1;
        let updates = self.server_thread(pid, server, None, &mut entries);
        let parts = self.server_thread(pid, server, Some(part.worker), &mut entries);
        // It cannot have come before it was sent. If it seems so, the answers of the worker took longer than those of the
        // server.
        let late = (origin.sent - (part.time - part.took - part.held)).max(0.0);
        let made = part.time + late;
        let began = made - part.took;
        let updated = self.update_of(server, part.version).unwrap_or_else(|| {
            let updated = self.when_free(updates, (began, made));
            self.draw_update((server, part.version), updates, updated, &mut entries);
            updated
        });
        // Rounding must not put it before it was sent.
        let came = (began - part.held).max(origin.sent);
        let (came, left) = self.when_free(parts, (came, made));
        let about = Args::Part {
            version: part.version.0,
            held: millis(part.held),
            took: millis(part.took),
        };
        let name = name_of(part.gradient());
        entries.push(slice(name, parts, came, left - came, about));
        let points = [
            (origin.thread, origin.sent),
            (parts, came),
            (updates, came.max(updated.0).min(updated.1)),
        ];
        self.arrows(part.gradient(), &points, &mut entries);
        entries
    }

    /// Returns these times, or as much of them as is behind the last slice of the thread. Slices of one thread must not
    /// overlap, but the answers of a server take shorter and longer.
    fn when_free(&mut self, thread: (u64, u64), (from, to): (f64, f64)) -> (f64, f64) {
        let end = self.ends.entry(thread).or_insert(from);
        let from = from.max(*end);
        *end = to.max(from);
        (from, *end)
    }

    /// A driver's own loop has got a gradient.
    fn computed(&mut self, computed: &Computed) -> Vec<Entry> {
        self.size += 1;
        let (thread, gradient) = (self.worker_thread(computed.worker), computed.gradient());
        let call = (computed.time - computed.seconds, computed.time);
        let (began, taken) = self.when_free(thread, call);
        let origin = Origin {
            thread,
            sent: began,
        };
        self.origins.insert(gradient, origin);
        let about = Args::Rare(json!({"computed on": computed.computed_on.0}));
        let name = format!("compute {}", name_of(gradient));
        vec![slice(name, thread, began, taken - began, about)]
    }

    /// A driver's own loop has got the weights of an update.
    fn update_of_loop(&mut self, made: &UpdateMade) -> Vec<Entry> {
        self.size += 1;
        let (thread, mut entries) = ((0, OF_LOOP), Vec::new());
        if !std::mem::replace(&mut self.has_loop, true) {
            let name = "updates of the loop".to_owned();
            entries.push(named("thread_name", thread, name));
        }
        let call = self.when_free(thread, (made.time - made.seconds, made.time));
        self.draw_update((0, made.version), thread, call, &mut entries);
        entries
    }

    /// The calls of a driver's own loop that the step consists of have been drawn, if the loop has told of them.
    fn step_of_loop(&mut self, step: &SettledStep) -> Vec<Entry> {
        let Some(origin) = self.origins.get(&step.gradient()).copied() else {
            return Vec::new();
        };
        self.size += 1;
        let (pid, tid) = origin.thread;
        let name = format!("step {}", step.clock.0);
        let mut entries = vec![Entry {
            pid,
            tid,
            s: Some("t"),
            ..instant(name, step.time, about(step))
        }];
        if let Some((updated, _)) = self.update_of(0, step.version) {
            let points = [(origin.thread, origin.sent), ((0, OF_LOOP), updated)];
            self.arrows(step.gradient(), &points, &mut entries);
        }
        entries
    }

    fn worker_thread(&self, worker: WorkerId) -> (u64, u64) {
        let rank = self.ranks.get(&worker).copied().unwrap_or(0);
        (u64::from(rank), thread(worker))
    }
}

/// The name of a gradient, which travels with each call about it.
fn name_of(gradient: GradientId) -> String {
    let GradientId {
        worker,
        incarnation,
        clock,
    } = gradient;
    format!("gradient {}.{}.{}", worker.0, incarnation.0, clock.0)
}

fn about(step: &SettledStep) -> Args {
    Args::Step {
        gradient: name_of(step.gradient())
            .trim_start_matches("gradient ")
            .to_owned(),
        computed_on: step.computed_on.0,
        outcome: step.outcome,
        version: step.version.0,
        staleness: step.staleness,
        loss: step.loss.to_string(),
        norm: step.norm.to_string(),
        examples: step.num_examples,
    }
}

fn millis(seconds: f64) -> String {
    format!("{:.3} ms", 1e3 * seconds)
}
