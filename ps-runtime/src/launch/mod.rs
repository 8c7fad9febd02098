//! Finds out which of N copies of one program this process is, and starts N copies on this machine.
//!
//! There is no cluster manager. A launcher (torchrun, Open MPI, Slurm, Kubernetes, …) starts the copies
//! and gives each its rank through environment variables. Or [`ProcessGroup`] starts child processes on
//! this machine. Rank 0 is the driver; every other rank is a node. [`resolve`] reads flags and variables,
//! and opens nothing but the file of hosts that mpirun was given. This module does not connect the copies; [`cluster`](crate::cluster) does.
//!
//! | module | what it holds |
//! |---|---|
//! | `rank` | [`Place`]: rank, world size, attempt, and rank 0's address |
//! | `launchers` | reads the variables of all launchers |
//! | `rendezvous` | [`Rendezvous`]: a host and a port |
//! | `host_list` | the first host of Slurm's compressed list, or of a file of hosts |
//! | `flags` | [`LaunchOptions`]: flags have priority over variables |
//! | `processes` | [`ProcessGroup`]: child processes that end with their driver |
//! | `supervisor` | the thread that starts, watches and ends them |
//! | `restarts` | decides how often and how soon a child process that failed is started again |
//! | `signals` | the signals that ask a process to leave, and exit codes |
//! | `stop_signal` | [`StopSignal`]: lets a driver end in order |
//! | `harm` (feature `chaos`) | how a process kills or stops itself |
//! | [`env`](mod@env) | the names of our own variables |
//!
//! A program can use it like this:
//!
//! ```
//! use ps_runtime::launch::{self, Launch, LaunchOptions};
//!
//! launch::die_with_parent()?; // First in `main`. It does nothing except in a child process.
//! let options = LaunchOptions::default(); // Filled from the command line.
//! match launch::resolve(&options, launch::env::read)? {
//!     Launch::Alone => println!("all in this process"),
//!     Launch::StartProcesses { world_size } => println!("bind, then ProcessGroup::start"),
//!     Launch::Rank(place) if place.is_driver() => println!("bind at {:?}", place.rendezvous),
//!     Launch::Rank(place) => println!("join {:?}", place.rendezvous),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod env;
mod error;
mod flags;
#[cfg(feature = "chaos")]
pub mod harm;
mod host_list;
mod launchers;
mod processes;
mod rank;
mod rendezvous;
pub(crate) mod restarts;
mod signals;
mod stop_signal;
mod supervisor;

pub use error::{LaunchError, ProcessError};
pub use flags::{Launch, LaunchOptions, resolve};
pub use processes::{Exited, ProcessConfig, ProcessGroup, die_with_parent};
pub use rank::{Place, from_env, local_rank, log_prefix};
pub use rendezvous::{DEFAULT_PORT, Rendezvous};
pub(crate) use signals::terminated_again;
pub use signals::{EXIT_CONFIG, EXIT_OK, Signal, exit_code, terminated};
pub use stop_signal::StopSignal;
