//! The checkpoints of one run, in one directory: their names, the newest usable one, and how many are kept.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use ps_runtime::actor::error_chain;

use super::files::{PARTIAL, parent_of, remove, sync_directory};
use super::{Checkpoint, CheckpointError};
use crate::ids::Version;

const NAME: &str = "checkpoint-";
const LOCK: &str = ".lock";

/// The directory with the checkpoints of one run. Only one process at a time can use it.
///
/// The checkpoint of version 1200 is the directory `checkpoint-000000001200` in it.
///
/// ```
/// use ps_actors::actor::run;
/// use ps_actors::checkpoint::CheckpointDir;
/// use ps_actors::group::ServerGroup;
/// use ps_actors::ids::Version;
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::ServerConfig;
/// use ps_actors::weights::{Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(40), vec![0.5; 40]);
/// let config = ServerConfig::default();
/// let servers = ServerGroup::spawn(&initial, 2, config, |_| Box::new(Sgd::new()))?;
///
/// let temporary = tempfile::tempdir()?;
/// let directory = CheckpointDir::open(temporary.path())?;
/// assert!(directory.newest(|_| Ok(()))?.is_none());
/// directory.save(&run(servers.checkpoint())?, 3)?; // Keeps the newest three.
///
/// let found = directory.newest(|_| Ok(()))?.expect("it was saved");
/// assert_eq!(found.checkpoint.version(), Version(0));
/// let servers = ServerGroup::spawn(&found.checkpoint, 3, config, |_| Box::new(Sgd::new()))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CheckpointDir {
    path: PathBuf,
    /// Locked as long as it is open.
    _lock: Option<File>,
}

/// The newest checkpoint that can be used.
#[derive(Debug)]
pub struct Found {
    /// The directory of this checkpoint, inside the run's directory.
    pub path: PathBuf,
    /// The state of all servers at one version, with every checksum verified.
    pub checkpoint: Checkpoint,
    /// Newer checkpoints that cannot be used, with the reasons.
    pub refused: Vec<CheckpointError>,
}

impl CheckpointDir {
    /// Makes the directory if it does not exist, and locks it for this process. Removes what a killed
    /// process left half written.
    ///
    /// # Errors
    /// If the directory cannot be made or written to, or if another process uses it.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, CheckpointError> {
        let path = path.into();
        let unusable = |source| CheckpointError::Directory {
            path: path.clone(),
            source,
        };
        make(&path).map_err(unusable)?;
        let lock = File::create(path.join(LOCK)).map_err(unusable)?;
        let lock = match lock.try_lock() {
            Ok(()) => Some(lock),
            Err(TryLockError::WouldBlock) => return Err(CheckpointError::InUse { path }),
            Err(TryLockError::Error(error)) => {
                // Some network file systems have no locks.
                let path = path.display();
                tracing::warn!(%path, %error, "cannot lock the directory; no other run may use it");
                None
            }
        };
        for entry in fs::read_dir(&path).map_err(unusable)? {
            let entry = entry.map_err(unusable)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(&format!(".{NAME}")) && name.ends_with(PARTIAL) {
                remove(&entry.path()).map_err(unusable)?;
            }
        }
        Ok(Self { path, _lock: lock })
    }

    /// Returns the path of the directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the checkpoints in the directory, oldest first, without reading them.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn list(&self) -> Result<Vec<(Version, PathBuf)>, CheckpointError> {
        let unreadable = |source| CheckpointError::Read {
            path: self.path.clone(),
            source,
        };
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            let name = entry.file_name();
            let version = name
                .to_str()
                .and_then(|name| name.strip_prefix(NAME)?.parse().ok());
            found.extend(version.map(|version| (Version(version), entry.path())));
        }
        found.sort_unstable();
        Ok(found)
    }

    /// Returns the version of the newest checkpoint in the directory, whether or not it can be used. `None`: there is
    /// none, or the directory has been removed.
    pub(super) fn newest_version(&self) -> Result<Option<Version>, CheckpointError> {
        match self.list() {
            Ok(found) => Ok(found.last().map(|&(version, _)| version)),
            Err(CheckpointError::Read { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the newest checkpoint that is complete, undamaged, and that `accepts` does not refuse with a
    /// reason. Returns `None` if there is no checkpoint at all.
    ///
    /// # Errors
    /// If there are checkpoints, but none that can be used. If the directory cannot be read.
    pub fn newest(
        &self,
        accepts: impl Fn(&Checkpoint) -> Result<(), String>,
    ) -> Result<Option<Found>, CheckpointError> {
        let mut refused: Vec<CheckpointError> = Vec::new();
        for (_, path) in self.list()?.into_iter().rev() {
            let read = Checkpoint::read(&path).and_then(|checkpoint| match accepts(&checkpoint) {
                Ok(()) => Ok(checkpoint),
                Err(reason) => {
                    let path = path.clone();
                    Err(CheckpointError::Foreign { path, reason })
                }
            });
            match read {
                Ok(checkpoint) => {
                    for error in &refused {
                        let reason = error_chain(error);
                        tracing::warn!(%reason, "a newer checkpoint is not used");
                    }
                    return Ok(Some(Found {
                        path,
                        checkpoint,
                        refused,
                    }));
                }
                Err(error) => refused.push(error),
            }
        }
        if refused.is_empty() {
            return Ok(None);
        }
        const NUM_NAMED: usize = 3;
        let named = refused.iter().take(NUM_NAMED);
        let mut reasons: Vec<String> = named.map(|error| error_chain(error)).collect();
        if refused.len() > NUM_NAMED {
            reasons.push(format!("and {} older ones", refused.len() - NUM_NAMED));
        }
        Err(CheckpointError::NoneUsable {
            path: self.path.clone(),
            reasons: reasons.join("; "),
        })
    }

    /// Writes a checkpoint. Then removes older ones, so that the newest `keep` remain, but at least this
    /// one. Returns its path.
    ///
    /// # Errors
    /// If it cannot be written. No other checkpoint is removed then.
    pub fn save(&self, checkpoint: &Checkpoint, keep: usize) -> Result<PathBuf, CheckpointError> {
        let version = checkpoint.version();
        let path = self.path.join(format!("{NAME}{:012}", version.0));
        checkpoint.write(&path)?;
        // One of a later version can only be there if it could not be used.
        let mut older = self.list()?;
        older.retain(|(other, _)| *other < version);
        let num_removed = older.len().saturating_sub(keep.saturating_sub(1));
        for (_, old) in older.into_iter().take(num_removed) {
            if let Err(error) = remove_whole(&old) {
                tracing::warn!(path = %old.display(), %error, "an old checkpoint cannot be removed");
            }
        }
        Ok(path)
    }
}

/// Makes the directory, with those above it that do not exist. Their names are then on the disk, like what is saved in them.
fn make(path: &Path) -> io::Result<()> {
    let above = path.ancestors();
    let missing = above.take_while(|path| !path.as_os_str().is_empty() && !path.exists());
    let missing: Vec<&Path> = missing.collect();
    fs::create_dir_all(path)?;
    for parent in missing.into_iter().map(parent_of) {
        // Its owner may not let others read it.
        if let Err(error) = sync_directory(parent) {
            let parent = parent.display();
            tracing::warn!(%parent, %error, "cannot sync it; if the machine fails, a new directory in it may be lost");
        }
    }
    Ok(())
}

/// Removes a checkpoint so that, if the process dies meanwhile, no part of it looks like a checkpoint.
fn remove_whole(path: &Path) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!(".{name}{PARTIAL}"));
    fs::rename(path, &partial)?;
    remove(&partial)
}
