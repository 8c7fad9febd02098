//! Which segments follow a checkpoint, and how a checkpoint follows them.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use super::segment::{Segment, SegmentReader, list};
use crate::chaos::reached;
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::rule::UpdateRule;
use crate::server::Replay;

/// The part of a log that a checkpoint has followed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chain {
    /// How many updates the checkpoint did not have yet.
    pub(crate) num_updates: u64,
    pub(super) segments: Vec<Segment>,
    /// Where the entries of the last segment end that were followed, in bytes.
    end: u64,
    /// Files that do not follow.
    pub(super) unused: Vec<PathBuf>,
    /// The greatest number of a file.
    pub(super) last_number: u64,
}

/// Lets a checkpoint follow the log that continues it, as far as it does. `rule` is a new one of the kind
/// that the servers have.
///
/// # Errors
/// If the rule does not accept the saved state, or a file cannot be read.
pub(crate) fn follow(
    directory: &Path,
    checkpoint: Checkpoint,
    rule: Box<dyn UpdateRule>,
) -> Result<(Checkpoint, Chain), CheckpointError> {
    let unreadable = |source| CheckpointError::Read {
        path: directory.to_owned(),
        source,
    };
    let from = checkpoint.version();
    let mut chain = Chain::default();
    let files = list(directory).map_err(unreadable)?;
    chain.last_number = files.last().map_or(0, |(number, _)| *number);
    let mut readers = Vec::new();
    for (number, path) in files {
        match SegmentReader::open(number, &path).map_err(unreadable)? {
            Some(reader) => readers.push(reader),
            None => chain.unused.push(path),
        }
    }
    // Each checkpoint begins a segment. If none begins here, the log was not written at that time.
    let first = readers
        .iter()
        .position(|reader| reader.segment.start == from);
    let Some(first) = first else {
        let paths = readers.into_iter().map(|reader| reader.segment.path);
        chain.unused.extend(paths);
        return Ok((checkpoint, chain));
    };
    let before = readers.drain(..first).map(|reader| reader.segment);
    chain.segments.extend(before);
    let mut replay = Replay::new(checkpoint, rule).map_err(|error| CheckpointError::Foreign {
        path: directory.to_owned(),
        reason: error.to_string(),
    })?;
    let mut readers = readers.into_iter();
    for mut reader in readers.by_ref() {
        let (start, have) = (reader.segment.start, replay.version());
        if start != have {
            let path = reader.segment.path.display();
            tracing::warn!(%path, %start, %have, "updates are missing; the rest of the log is not used");
            chain.unused.push(reader.segment.path);
            break;
        }
        let is_whole = follow_segment(&mut reader, &mut replay, &mut chain).map_err(unreadable)?;
        let num_bytes = chain.end;
        chain.segments.push(Segment {
            num_bytes,
            ..reader.segment
        });
        if !is_whole {
            break;
        }
    }
    let rest = readers.map(|reader| reader.segment.path);
    chain.unused.extend(rest);
    let checkpoint = replay.finish();
    if chain.num_updates > 0 {
        let (num_updates, version) = (chain.num_updates, checkpoint.version());
        tracing::info!(num_updates, %from, %version, "followed the update log");
    }
    Ok((checkpoint, chain))
}

/// Returns `false` if an entry could not be followed, so that no later one can be.
fn follow_segment(
    reader: &mut SegmentReader,
    replay: &mut Replay,
    chain: &mut Chain,
) -> io::Result<bool> {
    chain.end = reader.position();
    while let Some((entry, numbers)) = reader.next()? {
        match replay.follow(entry, &numbers) {
            Ok(is_new) => {
                chain.num_updates += u64::from(is_new);
                reached!(LogFollowed(replay.version()));
            }
            Err(error) => {
                let path = reader.segment.path.display();
                tracing::warn!(%path, %error, "the rest of the update log is not used");
                return Ok(false);
            }
        }
        chain.end = reader.position();
    }
    Ok(true)
}

impl Chain {
    /// Makes the chain of a run that begins anew. No file that is there belongs to it.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub(crate) fn of_nothing(directory: &Path) -> Result<Self, CheckpointError> {
        let files = list(directory).map_err(|source| CheckpointError::Read {
            path: directory.to_owned(),
            source,
        })?;
        Ok(Self {
            last_number: files.last().map_or(0, |(number, _)| *number),
            unused: files.into_iter().map(|(_, path)| path).collect(),
            ..Self::default()
        })
    }

    /// Removes what does not follow, so that nobody takes it for a continuation of what comes now.
    ///
    /// # Errors
    /// If a file cannot be changed.
    pub(crate) fn cut(&self) -> io::Result<()> {
        for path in &self.unused {
            fs::remove_file(path)?;
        }
        if let Some(last) = self.segments.last().filter(|_| self.end > 0) {
            let file = OpenOptions::new().write(true).open(&last.path)?;
            file.set_len(self.end)?;
        }
        Ok(())
    }
}

/// Removes a log that no checkpoint needs any more.
pub(crate) fn remove_all(directory: &Path) {
    let files = list(directory).unwrap_or_default();
    for (_, path) in files {
        if let Err(error) = fs::remove_file(&path) {
            tracing::warn!(path = %path.display(), %error, "an old part of the update log cannot be removed");
        }
    }
}
