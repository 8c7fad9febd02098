//! Typed actors with replies, supervision and bounded queues on ordinary actix actors, and the
//! parameter server and its workers on top of them.
//!
//! This crate knows no tensor library: weights and gradients are flat `f32` buffers, an
//! [`UpdateRule`](rule::UpdateRule) changes the ones by the others, and a
//! [`GradientSource`](worker::GradientSource) computes gradients.
//!
//! | module | what it holds |
//! |---|---|
//! | [`actor`] | the runtime: [`spawn`], [`ActorRef`], [`Reply`], [`Pending`] |
//! | [`server`] | the parameter server: consistency, exactly-once ledger, shards |
//! | [`worker`] | the worker and its loop |
//! | [`session`], [`heartbeat`] | a worker's membership in a group of servers; how it lasts |
//! | [`group`] | the servers of one model as one thing to push to and pull from |
//! | [`weights`], [`buffer`] | snapshots, gradients, recycled buffers |
//! | [`cluster`] | several processes as one place to spawn actors in |
//! | [`remote`], [`net`] | actors that other processes can call; connections |
//! | [`launch`] | which of N copies this process is; N copies on this machine |
//! | [`codec`] | messages as bytes: a header, and the bulk numbers beside it |
//! | [`http`] | the parameter server for workers in any language |
//! | [`rule`] | how a gradient changes the weights; SGD |
//! | [`ids`] | worker, incarnation, clock, version, epoch |

#![warn(clippy::print_stdout)]

pub mod actor;
pub mod buffer;
pub mod cluster;
pub mod codec;
pub mod group;
pub mod heartbeat;
pub mod http;
pub mod ids;
pub mod launch;
pub mod net;
pub mod remote;
pub mod rule;
mod schema;
pub mod server;
pub mod session;
mod spread;
pub mod weights;
pub mod worker;

pub use actor::{
    ActorId, ActorRef, CallError, Pending, Reply, RestartPolicy, Spawn, SpawnError, get_or_spawn,
    lookup, shutdown_all, spawn,
};
