//! A simulator: a group of servers and its workers in virtual time, with faults, from one seed.
//!
//! The decisions are made by the code that real servers run: the coordinator, the shards, what the first
//! server remembers of each follower (`followers`), the worker leases, the entries of the update log and how a
//! checkpoint follows them (`replay`), and the checkpoint that all parts are joined to. What is written anew
//! here is what is asynchronous elsewhere: which message is sent in answer to which (`first`, `follower`,
//! `worker`, `driver`, modelled on `server/actor.rs`, `group/`, `worker/` and the trainer), the network, and
//! the disk. So the simulator does not find a mistake in an actor. The tests with real processes look for such
//! mistakes.
//!
//! An observer who sees everything (`truth`) checks at every step that
//!
//! - no step of a worker is applied twice, and no acknowledged one is lost, except for what the setting allows
//!   (PS-2, S-13),
//! - a version has the same weights for every reader, made of the gradients that were decided, in every number
//!   of servers (PS-3, PS-5),
//! - no worker is further ahead than the bound allows (PS-4),
//! - servers go on from weights and a record that existed,
//!
//! and at the end that all servers agree, nothing is left staged, and the weights count each gradient once. A
//! run that waits for ever is a failure too.
//!
//! ```
//! use ps_actors::server::Consistency;
//! use ps_actors::simulation::{Settings, simulate};
//!
//! let plan = "kill worker 1 @ step 3; kill server 0 @ version 12; drop 5%; seed 7".parse()?;
//! let settings = Settings::new(4, 3, Consistency::Ssp { bound: 2 }).with_plan(plan);
//! let outcome = simulate(settings.clone())?;
//! assert!(outcome.report.is_complete(), "both faults happened");
//! assert_eq!(outcome.report.num_lost, Some(0));
//! assert_eq!(outcome.trace_hash, simulate(settings)?.trace_hash);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod dice;
mod disk;
mod driver;
mod first;
mod follower;
mod messages;
#[cfg(test)]
mod model;
mod network;
mod outcome;
mod problem;
mod settings;
mod states;
#[cfg(test)]
mod tests;
mod trace;
mod truth;
mod worker;
mod world;

pub use outcome::{Failure, Outcome};
pub use settings::{Problem, Saving, Settings, Times};
pub use states::{Coverage, State};

use world::World;

/// Simulates a run.
///
/// # Errors
/// If a guarantee was broken.
pub fn simulate(settings: Settings) -> Result<Outcome, Box<Failure>> {
    World::new(settings, false).run()
}

/// Like [`simulate`], and keeps the events for the error.
///
/// # Errors
/// If a guarantee was broken.
pub fn simulate_with_trace(settings: Settings) -> Result<Outcome, Box<Failure>> {
    World::new(settings, true).run()
}
