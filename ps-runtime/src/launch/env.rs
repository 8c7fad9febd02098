//! The names of our own environment variables. They have priority over those of other launchers.

/// This process's rank, from 0. Needs [`WORLD_SIZE`].
pub const RANK: &str = "PS_RANK";
/// How many copies there are, including the driver.
pub const WORLD_SIZE: &str = "PS_WORLD_SIZE";
/// This process's number among the copies on its host, from 0. It decides which GPU is this process's.
pub const LOCAL_RANK: &str = "PS_LOCAL_RANK";
/// How often this rank has been started again. 0 if it is not set.
pub const ATTEMPT: &str = "PS_ATTEMPT";
/// The address that rank 0 listens on, as `host:port`. It has priority over the variables of other launchers.
pub const RENDEZVOUS: &str = "PS_RENDEZVOUS";
/// The secret that all processes share. It is a variable because all users can read a command line.
pub const TOKEN: &str = "PS_TOKEN";
/// The id of the run of the program. Nodes of another run are refused.
pub const RUN_ID: &str = "PS_RUN_ID";
/// The process id of the driver that started this child process, which ends with that driver. Only
/// [`ProcessGroup`](super::ProcessGroup) sets it.
pub const PARENT_PID: &str = "PS_PARENT_PID";

/// Reads a variable of this process.
///
/// A value that is not Unicode is returned with replacement characters. So it is refused where it is used,
/// and does not count as not set.
pub fn read(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}
