//! Typed actors with replies, supervision and bounded queues on ordinary actix actors, in this process
//! and in others.
//!
//! An [`ActorRef`] calls an actor in the same way wherever the actor is: in this process, in another
//! process of this machine, or on another machine. Every call returns a [`Reply`], which is a future.
//!
//! ```text
//!  process A                                            process B
//!  ─────────                                            ─────────
//!  ActorRef::ask(message)                               an actor on a thread of its own:
//!      │                                                its handler runs, its result is the reply
//!      │ an actor here             ┌─────────┐              ▲
//!      ├──────────────────────────▶│  queue  │          ┌───┴───┐
//!      │                           └────┬────┘          │ queue │
//!      │                                ▼               └───▲───┘
//!      │                              actor                 │
//!      │ an actor elsewhere                                 │
//!      └──▶ remote ──▶ codec ──▶ net ═══ connection ═══▶ net ──▶ remote
//!            table      bytes    frames                        table
//! ```
//!
//! A [`Reply`] goes back the same way. `cluster` starts actors in other processes and finds them; `launch` starts
//! the processes.
//!
//! | module | what it holds |
//! |---|---|
//! | [`actor`] | actors of this process: [`spawn`], [`ActorRef`], [`Reply`], [`Pending`] |
//! | [`cluster`] | spawns actors in several processes, and finds them |
//! | [`remote`] | actors that other processes can call |
//! | [`net`] | connections between processes |
//! | [`launch`] | tells a process its rank; starts several copies of a program on this machine |
//! | [`codec`], [`buffer`] | messages as bytes: a header, and the bulk numbers beside it |
//! | [`parallel`] | runs a loop over many numbers on several threads |

#![warn(clippy::print_stdout)]

#[cfg(not(unix))]
compile_error!("ps-runtime uses Unix sockets, signals and processes: on Windows, build it in WSL");

pub mod actor;
pub mod buffer;
mod busy_poll;
pub mod cluster;
pub mod codec;
mod deadline;
pub mod launch;
pub mod net;
pub mod parallel;
pub mod remote;
mod schema;
mod sync;
#[cfg(any(test, feature = "test-util"))]
pub mod test_util;

pub use actor::{
    ActorId, ActorRef, CallError, Pending, Reply, RestartPolicy, Spawn, SpawnError, get_or_spawn,
    lookup, shutdown_all, spawn,
};
