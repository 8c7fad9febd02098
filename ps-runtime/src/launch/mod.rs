//! Says which of N copies of one program this process is, and starts N copies on this machine.
//!
//! There is no cluster manager of our own. An engine (torchrun, Open MPI, Slurm, Kubernetes, …)
//! starts the copies and tells each its rank through variables of its own, or [`ProcessGroup`]
//! starts them here. Rank 0 is the driver, every other rank is a node. [`resolve`] reads flags and
//! variables and opens nothing; what the copies then say to each other is not this module's concern.
//!
//! | module | what it holds |
//! |---|---|
//! | `rank` | [`Place`]: rank, world size, attempt, and rank 0's address |
//! | `launchers` | the variables of all launchers, and how they are read |
//! | `rendezvous` | [`Rendezvous`]: a host and a port |
//! | `host_list` | the first host of Slurm's compressed list |
//! | `flags` | [`LaunchOptions`]: flags win over variables |
//! | `processes` | [`ProcessGroup`]: copies on this machine that end with their driver |
//! | `supervisor` | the thread that starts, watches and ends them |
//! | `restarts` | how often and how soon a copy that has failed is started again |
//! | `signals` | being asked to leave, and exit codes |
//! | `stop_signal` | [`StopSignal`]: a driver that is asked to end |
//! | [`env`](mod@env) | our own variables |
//!
//! What a program does with it:
//!
//! ```
//! use ps_runtime::launch::{self, Launch, LaunchOptions};
//!
//! launch::die_with_parent()?; // First thing in `main`: only a `ProcessGroup`'s copies do anything.
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
pub use rank::{Place, from_env, log_prefix};
pub use rendezvous::{DEFAULT_PORT, Rendezvous};
pub use signals::{EXIT_CONFIG, EXIT_OK, Signal, exit_code, terminated};
pub use stop_signal::StopSignal;
