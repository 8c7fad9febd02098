//! Names of our own environment variables, which win over every other launcher's.

/// This process's rank, from 0. Needs [`WORLD_SIZE`].
pub const RANK: &str = "PS_RANK";
/// How many copies there are, the driver among them.
pub const WORLD_SIZE: &str = "PS_WORLD_SIZE";
/// How often this rank has been started again, from 0; 0 where it is not set.
pub const ATTEMPT: &str = "PS_ATTEMPT";
/// Where rank 0 listens, as `host:port`. Wins over what other launchers say.
pub const RENDEZVOUS: &str = "PS_RENDEZVOUS";
/// The secret that copies show each other; a variable because anyone can read a command line.
pub const TOKEN: &str = "PS_TOKEN";
/// Which run of the program this is; nodes of another run are not let in.
pub const RUN_ID: &str = "PS_RUN_ID";
/// The driver that started this copy, and with which it must end; only
/// [`ProcessGroup`](super::ProcessGroup) sets it.
pub const PARENT_PID: &str = "PS_PARENT_PID";

/// Reads a variable of this process.
///
/// A value that is no Unicode is returned with replacement characters, so that it is refused where
/// it is used, rather than taken for a variable that is not set.
pub fn read(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}
