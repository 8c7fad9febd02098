//! The JSON of the API. It is separate from the program's own types, which may change.

use serde::Serialize;

use crate::server::{CoordinatorStatus, ServerStatus};
use crate::weights;

#[derive(Serialize)]
struct Layout<'a> {
    num_weights: usize,
    /// Behind these are the numbers of buffers.
    num_trainable: usize,
    parameters: Vec<Parameter<'a>>,
}

#[derive(Serialize)]
struct Parameter<'a> {
    name: &'a str,
    shape: &'a [usize],
    /// The index of its first number.
    start: usize,
    /// How many numbers it has.
    len: usize,
}

#[derive(Serialize)]
struct Status {
    version: u64,
    num_weights: usize,
    num_servers: usize,
    learning_rate: f64,
    consistency: Option<String>,
    reduction: Option<String>,
    epoch: u64,
    num_pending: usize,
    /// How many workers must join before the first round closes.
    num_to_join: usize,
    /// The members whose gradients the others wait for.
    awaited: Vec<u32>,
    workers: Vec<Worker>,
}

#[derive(Serialize)]
struct Worker {
    worker: u32,
    is_member: bool,
    next_clock: u64,
    num_applied: u64,
    num_dropped_late: u64,
    num_refused: u64,
    num_duplicates: u64,
    mean_staleness: f64,
    max_staleness: u64,
}

pub(super) fn layout(layout: &weights::Layout) -> String {
    let parameters = layout.parameters().iter().map(|parameter| Parameter {
        name: &parameter.name,
        shape: &parameter.shape,
        start: parameter.range.start,
        len: parameter.range.len(),
    });
    json(&Layout {
        num_weights: layout.num_weights(),
        num_trainable: layout.num_trainable(),
        parameters: parameters.collect(),
    })
}

/// Writes the status of the first server, with the size of the weights of all servers.
pub(super) fn status(servers: &[ServerStatus]) -> String {
    let first = servers.first();
    let run = first.and_then(|first| first.coordinator.as_ref());
    json(&Status {
        version: first.map_or(0, |first| first.version.0),
        num_weights: servers.last().map_or(0, |last| last.range.end),
        num_servers: servers.len(),
        learning_rate: first.map_or(0.0, |first| first.learning_rate),
        consistency: run.map(|run| run.consistency.to_string()),
        reduction: run.map(|run| run.reduction.to_string()),
        epoch: run.map_or(0, |run| run.epoch.0),
        num_pending: run.map_or(0, |run| run.num_pending),
        num_to_join: run.map_or(0, |run| run.awaited.num_to_join),
        awaited: run.map_or_else(Vec::new, |run| {
            run.awaited.workers.iter().map(|worker| worker.0).collect()
        }),
        workers: run.map_or_else(Vec::new, workers),
    })
}

fn workers(run: &CoordinatorStatus) -> Vec<Worker> {
    let worker = |(id, worker): (&crate::ids::WorkerId, &crate::server::WorkerStatus)| Worker {
        worker: id.0,
        is_member: worker.is_member,
        next_clock: worker.next_clock.0,
        num_applied: worker.num_applied,
        num_dropped_late: worker.num_dropped_late,
        num_refused: worker.num_refused,
        num_duplicates: worker.num_duplicates,
        mean_staleness: worker.staleness.mean(),
        max_staleness: worker.staleness.max(),
    };
    run.workers.iter().map(worker).collect()
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain structs of numbers and text") + "\n"
}
