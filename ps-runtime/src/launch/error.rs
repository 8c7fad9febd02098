//! The errors of flags and variables, and of starting processes.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a process cannot find out which of N copies it is.
///
/// All of these are mistakes in a configuration, so trying again cannot help. End the program with
/// [`EXIT_CONFIG`](super::EXIT_CONFIG).
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// The value of a variable is not a number, or is too large.
    #[error("{variable}={value:?} is not a whole number from 0 to {largest}")]
    NotANumber {
        /// The name of the variable.
        variable: &'static str,
        /// The value that it has.
        value: String,
        /// The largest number that it may hold.
        largest: u64,
    },
    /// The rank is not below the world size.
    #[error(
        "{set_by}: rank {rank} of {world_size}: ranks count from 0, so the last is {}",
        world_size.saturating_sub(1)
    )]
    RankOutOfRange {
        /// The launcher whose variables were read, or the flags.
        set_by: &'static str,
        /// The rank that this process was given.
        rank: u32,
        /// How many copies there are.
        world_size: u32,
    },
    /// The world size is 0.
    #[error("{set_by} is 0, but this process is one: it must be at least 1")]
    NoProcesses {
        /// The variable or flag that says how many copies there are.
        set_by: &'static str,
    },
    /// A variable or flag needs another one, which is not set.
    #[error("{given} is set but {missing} is not")]
    Incomplete {
        /// The variable or flag that is set.
        given: &'static str,
        /// The variable or flag that must be set, too.
        missing: &'static str,
    },
    /// Rank and world size are known, but the address of rank 0 is not.
    #[error(
        "{set_by} makes this rank {rank} of {world_size}, but nothing says where rank 0 listens: set {needed}"
    )]
    NoAddress {
        /// The launcher whose variables were read, or the flags.
        set_by: &'static str,
        /// The rank that this process was given.
        rank: u32,
        /// How many copies there are.
        world_size: u32,
        /// The variables to choose from.
        needed: &'static str,
    },
    /// A host, or a host and port, cannot be read.
    #[error("{variable}={value:?} is no address: {problem}")]
    BadAddress {
        /// The variable or flag that was read.
        variable: &'static str,
        /// The value that it has.
        value: String,
        /// What is wrong with the value, and what it should be.
        problem: &'static str,
    },
    /// The port is 0, is not a number, or is above 65535.
    #[error("{variable}={value:?} is no port: {problem}")]
    BadPort {
        /// The variable or flag that was read.
        variable: &'static str,
        /// The value that it has.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Slurm's list of hosts cannot be read.
    #[error(
        "{variable}={value:?} is no list of hosts: {problem} (PS_RENDEZVOUS=host:port needs no list)"
    )]
    BadHostList {
        /// The name of the variable.
        variable: &'static str,
        /// The value that it has.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Two flags contradict each other.
    #[error("--processes starts all copies itself: leave out {other}")]
    Conflict {
        /// The flag that contradicts `--processes`.
        other: &'static str,
    },
    /// A launcher has started several copies, and a flag tells each of them to start copies of its own.
    #[error(
        "--processes starts all copies itself, but {launcher} has already started this one as rank {rank} of {world_size}: leave out --processes, or start one copy only"
    )]
    AlreadyLaunched {
        /// The launcher that has started this copy.
        launcher: &'static str,
        /// The rank that the launcher gave to this copy.
        rank: u32,
        /// How many copies the launcher started.
        world_size: u32,
    },
}

/// Why a process could not be started or reached.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The world size is 0.
    #[error("the world size is 0, but the driver is one of the processes: it must be at least 1")]
    NoProcesses,
    /// The system does not say which program this is.
    #[error("could not find the program that is running here")]
    CurrentExe(#[source] io::Error),
    /// The system gave no thread, or no event loop for the thread.
    #[error("could not start a thread to watch processes")]
    Thread(#[source] io::Error),
    /// The system did not start the process.
    #[error("could not start {} as rank {rank}", .program.display())]
    Spawn {
        /// The rank that the process was to have.
        rank: u32,
        /// The file of the program that was to be started.
        program: PathBuf,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },
    /// The signal could not be sent.
    #[error("could not kill rank {rank}")]
    Kill {
        /// The rank of the process.
        rank: u32,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },
    /// The group has no such rank.
    #[error(
        "the group has no rank {rank}: it started ranks 1 to {}, rank 0 is the driver",
        world_size - 1
    )]
    NoSuchRank {
        /// The rank asked for.
        rank: u32,
        /// How many processes there are, the driver included.
        world_size: u32,
    },
    /// The rank still runs, so it cannot be started again.
    #[error("rank {rank} is still running: kill it, and wait for its exit, before a restart")]
    StillRunning {
        /// The rank whose process has not ended.
        rank: u32,
    },
    /// The thread that watches the processes has panicked; they have been killed.
    #[error("the thread that watches processes has panicked, and its processes were killed")]
    WatcherLost,
}
