//! Named points in the code at which a process can be harmed, and counted.
//!
//! This exists with the feature `chaos` only; without it, nothing of it is compiled into the code that trains. A
//! process has at most one [`Watch`]. It is told each time that the code reaches a [`Point`], on the thread that
//! reached it. It may do nothing, count, wait, or end the process: what it does at a point has happened before
//! anything that follows the point. So a test can kill a process between any two actions that matter, which it
//! cannot from outside.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use crate::ids::{Clock, GradientId, Version, WorkerId};
use crate::server::Outcome;

/// A point that the code of this process has reached.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Point<'a> {
    /// A worker is about to compute the gradient of a step.
    WorkerComputes {
        /// The worker that is about to compute.
        worker: WorkerId,
        /// The clock of its step, from 0.
        clock: Clock,
    },
    /// All servers but the first have their parts of a gradient. The first one knows nothing of it.
    WorkerStaged(GradientId),
    /// A gradient was handed to the connection to the first server. There is no answer yet.
    WorkerSent(GradientId),
    /// A worker knows what became of its gradient, and has done nothing with the answer.
    WorkerTold(GradientId, Outcome),
    /// The first server has decided an update. It is not in the log, and nothing was done.
    ServerDecided {
        /// The version of the weights after the update.
        version: Version,
    },
    /// A server is about to change its weights. The first server has written the update to its log, if it has one.
    ServerApplies {
        /// The server's part of the weights. That of the first server begins at 0.
        range: Range<usize>,
        /// The version of the weights after the update.
        version: Version,
    },
    /// A server has changed its weights. It has answered nobody, and told no other server.
    ServerApplied {
        /// The server's part of the weights.
        range: Range<usize>,
        /// How many weights all servers of the group have together.
        num_weights: usize,
        /// The version of the weights now.
        version: Version,
        /// The gradients of the update.
        gradients: &'a [GradientId],
    },
    /// A server was made, and has not started.
    ServerMade {
        /// The server's part of the weights.
        range: Range<usize>,
        /// The version of the weights that it begins with: that of a checkpoint, or 0.
        version: Version,
    },
    /// A half of an entry of the update log was written; see [`Watch::cuts_log`].
    LogCut,
    /// The files of a checkpoint are complete. Its directory does not have its name yet.
    CheckpointWritten(&'a Path),
    /// The directory of a checkpoint got its name, and is not on the disk for certain.
    CheckpointNamed(&'a Path),
    /// A checkpoint has followed an update of the log.
    LogFollowed(Version),
    /// A new log begins behind the one that was followed. What did not follow was removed.
    LogContinues,
}

/// What is told of the points that this process reaches.
pub trait Watch: Send + Sync {
    /// Is called each time that a point is reached, on the thread that reached it.
    fn reached(&self, point: &Point<'_>);

    /// Whether only a half of the log's next entry is written before [`Point::LogCut`]. The other half follows, if
    /// the process lives.
    fn cuts_log(&self) -> bool {
        false
    }

    /// Is called before each file of a checkpoint is written, on the thread that writes. It may wait, as a slow disk
    /// does.
    ///
    /// # Errors
    /// The error takes the place of that of the disk, and the file is not written.
    fn before_write(&self, _file: &Path) -> io::Result<()> {
        Ok(())
    }
}

static WATCH: OnceLock<Box<dyn Watch>> = OnceLock::new();

/// Lets `watch` be told of all points that this process reaches from now on.
///
/// # Errors
/// If this process has a watch already.
pub fn watch(watch: impl Watch + 'static) -> Result<(), AlreadyWatched> {
    WATCH.set(Box::new(watch)).map_err(|_| AlreadyWatched)
}

/// This process has a [`Watch`] already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this process is watched already")]
pub struct AlreadyWatched;

pub(crate) fn reached(point: &Point<'_>) {
    if let Some(watch) = WATCH.get() {
        watch.reached(point);
    }
}

pub(crate) fn cuts_log() -> bool {
    WATCH.get().is_some_and(|watch| watch.cuts_log())
}

pub(crate) fn before_write(file: &Path) -> io::Result<()> {
    WATCH.get().map_or(Ok(()), |watch| watch.before_write(file))
}

/// Whether somebody is told of points, so that it is worth collecting what they say.
pub(crate) fn is_watched() -> bool {
    WATCH.get().is_some()
}
