//! The update log: what the servers applied since the last checkpoint, in files beside the checkpoints.
//!
//! It is a write-ahead log. The first server of a group writes each decision to it before anything is done or
//! answered: the gradients of an update with their numbers, gradients that were dropped or refused, and
//! workers that joined. A run that goes on from a checkpoint follows the log from there
//! (`server/replay.rs`). So no gradient is lost that a worker was told was applied, and none is applied
//! twice.
//!
//! | module | what it holds |
//! |---|---|
//! | `segment` | one file of the log, and the names of the files |
//! | `writer` | what the first server writes to, and the thread that syncs it |
//! | `chain` | reading: which files follow a checkpoint, and how far |
//!
//! The log is cut into segments. Each checkpoint begins a new one. Segments that no checkpoint needs any more
//! are written over, because that is much faster than to write to a new file. A number in each segment tells
//! its entries from older ones.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use actix::Message;
use serde::{Deserialize, Serialize};

use crate::ids::Version;
use crate::server::ServerError;

mod chain;
mod segment;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use chain::{Chain, follow, remove_all};
pub(crate) use writer::{Replaced, UpdateLog};

/// The settings of an update log.
///
/// ```
/// use std::time::Duration;
///
/// use ps_actors::update_log::{LogConfig, LogSync};
///
/// let config = LogConfig::default();
/// assert_eq!(config.sync, LogSync::Every(Duration::from_secs(1)));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// When the log must be on the disk. Default: every second.
    pub sync: LogSync,
    /// When a segment has this many bytes, a checkpoint is taken, which begins a new segment. At most four
    /// segments exist. Default: 512 MiB. Too low: checkpoints are frequent. Too high: more of the disk and
    /// of the system's file cache is used, and a run that goes on has more to follow.
    pub max_bytes: u64,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            sync: LogSync::Every(Duration::from_secs(1)),
            max_bytes: 512 << 20,
        }
    }
}

/// What there is of an update log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LogStatus {
    /// The version of the weights from which on it has the updates. `None` if it has none at all.
    pub since: Option<Version>,
    /// How many bytes its entries have.
    pub bytes: u64,
    /// How many files have entries.
    pub num_segments: usize,
    /// Whether updates are written to it. After a failure they are not, until the next checkpoint.
    pub is_written: bool,
    /// How often it could not be written.
    pub num_failures: u64,
}

/// What an update log survives.
///
/// What was written survives the death of the process in every case: the system has it. If the machine
/// itself fails, what was not synced to the disk may be lost.
///
/// ```
/// use std::time::Duration;
///
/// use ps_actors::update_log::LogSync;
///
/// assert_eq!("0.5".parse(), Ok(LogSync::Every(Duration::from_millis(500))));
/// assert_eq!("always".parse(), Ok(LogSync::Always));
/// assert!("sometimes".parse::<LogSync>().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogSync {
    /// The operating system decides when to write the log to the disk. If the machine fails, what was not
    /// written by then is lost: up to half a minute on Linux.
    Never,
    /// The log is synced at these intervals. If the machine fails, at most the updates of the last
    /// interval are lost, and the updates that were made while the disk was writing.
    Every(Duration),
    /// The log is synced before each answer. If the machine fails, nothing is lost. Each update
    /// waits for the disk.
    Always,
}

/// A text is not a [`LogSync`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not `always`, `never`, or a number of seconds from 0.001 to 3600")]
pub struct BadLogSync(String);

impl FromStr for LogSync {
    type Err = BadLogSync;

    fn from_str(text: &str) -> Result<Self, BadLogSync> {
        let seconds = |text: &str| {
            let seconds: f64 = text.parse().ok()?;
            let is_usable = (0.001..=3600.0).contains(&seconds);
            is_usable.then(|| Duration::from_secs_f64(seconds))
        };
        match text {
            "never" => Ok(Self::Never),
            "always" => Ok(Self::Always),
            other => match seconds(other) {
                Some(interval) => Ok(Self::Every(interval)),
                None => Err(BadLogSync(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for LogSync {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Every(interval) => write!(f, "{}", interval.as_secs_f64()),
            Self::Always => f.write_str("always"),
        }
    }
}

/// Lets the first server of a group write all decisions from now on to this log. It works only for a server of
/// this process, because no other process may choose a file here.
#[derive(Debug, Message)]
#[rtype(result = "Result<(), ServerError>")]
pub(crate) struct LogUpdates(pub(crate) UpdateLog);
