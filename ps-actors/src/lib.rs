//! The parameter server and its workers, as actors of [`ps_runtime`].
//!
//! This crate knows no tensor library: weights and gradients are flat `f32` buffers, an
//! [`UpdateRule`](rule::UpdateRule) changes the weights by the gradients, and a
//! [`GradientSource`](worker::GradientSource) computes gradients.
//!
//! ```text
//!  DataWorker                        first server                       other servers
//!  GradientSource                    decides which gradients            each has a range
//!      │                             make which update                  of the weights
//!      ▼
//!   Session ──▶ ServerGroup ── 1. Stage: the parts of a gradient ──────────▶ Shard
//!                   │
//!                   └── 2. PushPull: the whole gradient ──▶ Coordinator
//!                                                               │ 3. Update
//!                                      Shard ◀──────────────────┴──────────▶ Shard
//!                                      UpdateRule                            UpdateRule
//! ```
//!
//! With one server, there is only step 2, and its answer brings the new weights.
//!
//! | module | what it holds |
//! |---|---|
//! | [`server`] | the parameter server: consistency, exactly-once ledger, shards |
//! | [`worker`] | the worker and its loop |
//! | [`session`], [`heartbeat`] | a worker's membership in a group of servers; the heartbeats that keep it |
//! | [`group`] | the servers of one model as one thing to push to and pull from |
//! | [`weights`] | snapshots and gradients |
//! | [`chaos`] | plans of faults, as text, and what a run under one did |
//! | [`checkpoint`] | the state of a run in files, and how a run goes on from it |
//! | [`schedule`] | which gradients made which update, in a file, so that a run can be replayed |
//! | [`update_log`] | the updates since the last checkpoint, in files, so that a run that goes on loses none |
//! | [`http`] | the parameter server for workers in any language |
//! | [`rule`] | update rules, which change the weights by a gradient; SGD |
//! | [`learning_rate`] | learning rates that change during a run |
//! | [`ids`] | worker, incarnation, clock, version, epoch |
//!
//! The modules of the actor runtime are re-exported, so a program needs only this crate: [`actor`],
//! [`cluster`], [`launch`], [`remote`], [`net`], [`codec`], [`buffer`].

#![warn(clippy::print_stdout)]

pub mod chaos;
pub mod checkpoint;
mod frames;
pub mod group;
pub mod heartbeat;
pub mod http;
pub mod ids;
pub mod learning_rate;
pub mod rule;
pub mod schedule;
pub mod server;
pub mod session;
pub mod update_log;
pub mod weights;
pub mod worker;

#[cfg(any(test, feature = "simulation"))]
pub use server::simulation;

pub use ps_runtime::{
    ActorId, ActorRef, CallError, Pending, Reply, RestartPolicy, Spawn, SpawnError, actor, buffer,
    cluster, codec, get_or_spawn, launch, lookup, net, remote, shutdown_all, spawn,
};
