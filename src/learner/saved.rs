//! Which of burn's checkpoints a training goes on from.
//!
//! burn saves an epoch as three files. A file has its name only when it is complete, so an epoch is complete when all
//! three are there. burn's reader notices a file that was cut. It does not notice changed numbers, because the files
//! have no checksums. Nor does it tell a file that was cut from one that the system did not read, for example because too
//! many files are open. So only what is incomplete is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use burn::lr_scheduler::LrSchedulerRecord;
use burn::optim::OptimizerRecord;
use burn::store::{ModuleRecord, RecordError};
use burn::train::{Learner, LearnerModel};
use ps_actors::checkpoint::{CheckpointDir, CheckpointError};

/// Where burn's default checkpointers save, in the directory of a training.
const DIRECTORY: &str = "checkpoint";

const MODEL: &str = "model";
const OPTIMIZER: &str = "optim";
const SCHEDULER: &str = "scheduler";

/// What burn's default checkpointers save of each epoch.
const PARTS: [&str; 3] = [MODEL, OPTIMIZER, SCHEDULER];

/// The end of the name of a file that burn has not finished.
const UNFINISHED: &str = ".tmp";

/// Is put at the end of the name of a file that is not used. Neither burn nor [`parse`] knows such names.
const UNUSABLE: &str = ".unusable";

/// The checkpoints that burn's default checkpointers save in the directory of a training. As long as this value lives,
/// no other process can open the same directory.
///
/// Keep at least the newest two, as burn does by itself: burn may be killed while it saves one and removes another.
///
/// ```ignore
/// let Some(cluster) = args.cluster.launch(strategy.hosts(Hosts::new())) else {
///     return Ok(ExitCode::SUCCESS);
/// };
/// let saved = SavedEpochs::open(&directory, &learner, args.resume)?;
/// let training = SupervisedTraining::new(&directory, train, valid).with_default_checkpointers();
/// let training = match saved.newest() {
///     Some(epoch) => training.checkpoint(epoch),
///     None => training,
/// };
/// ```
///
/// The [module](super) has an example that runs.
#[derive(Debug)]
pub struct SavedEpochs {
    newest: Option<usize>,
    /// Locked as long as it is there.
    _directory: CheckpointDir,
}

impl SavedEpochs {
    /// Opens the checkpoints in `directory`, which is that of burn's `SupervisedTraining`. It is made if it does not
    /// exist. If the training is to `resume`, this call finds the newest epoch that it can go on from. If there is
    /// none yet, the training starts from the beginning.
    ///
    /// Call it in the driver, after the launch of the cluster. The nodes run the same program: if they opened the
    /// directory, too, then on one disk only the first process could.
    ///
    /// An epoch is not used if one of its files is missing, cannot be read, or is of another model than the
    /// learner's. The reason is logged, and the epoch before it is used. Then the files of the epochs that are not used
    /// get out of the way: those of an incomplete epoch are removed, and the others are renamed, such as `model-3.bpk` to
    /// `model-3.bpk.unusable`. Otherwise the next checkpoint could consist of old and new files, if burn is killed
    /// while it replaces them.
    ///
    /// # Errors
    /// If the directory cannot be used, or if another process uses it. If it has checkpoints, but the training is not
    /// to `resume`. If it has checkpoints, and none can be used. If the only epoch is incomplete, it is no error: the
    /// first save was cut short.
    pub fn open<M: LearnerModel>(
        directory: impl AsRef<Path>,
        learner: &Learner<M>,
        resume: bool,
    ) -> Result<Self, SavedEpochsError> {
        let directory = CheckpointDir::open(directory.as_ref().join(DIRECTORY))?;
        let path = directory.path();
        let epochs = list(path)?;
        let newest = match epochs.last_key_value() {
            Some((&newest, _)) if !resume => {
                let path = path.to_owned();
                return Err(SavedEpochsError::NotEmpty { path, newest });
            }
            _ => newest_usable(path, &epochs, learner)?,
        };
        if resume {
            match newest {
                Some(epoch) => {
                    tracing::info!(path = %path.display(), epoch, "going on from a checkpoint");
                }
                None => tracing::info!("there is no checkpoint yet; starting from the beginning"),
            }
        }
        Ok(Self {
            newest,
            _directory: directory,
        })
    }

    /// Returns the epoch that the training goes on after, for burn's `SupervisedTraining::checkpoint`. `None`: it
    /// starts from the beginning.
    #[must_use]
    pub fn newest(&self) -> Option<usize> {
        self.newest
    }
}

/// Why a training cannot begin in a directory, or cannot go on from the checkpoints there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SavedEpochsError {
    /// The directory cannot be made or used, or another process uses it.
    #[error(transparent)]
    Directory(#[from] CheckpointError),
    /// The directory has checkpoints already, and the training does not go on from them.
    #[error(
        "{} already has checkpoints, up to epoch {newest}: go on from them (`--resume`, `SavedEpochs::open`), or use \
         another directory",
        path.display()
    )]
    NotEmpty {
        /// The directory that has checkpoints.
        path: PathBuf,
        /// The newest epoch of which there is a file.
        newest: usize,
    },
    /// There are checkpoints, but none of them can be used.
    #[error("no checkpoint in {} can be used: {reasons}", path.display())]
    NoneUsable {
        /// The directory that has the checkpoints.
        path: PathBuf,
        /// Why each of them cannot be used.
        reasons: String,
    },
    /// The directory cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The directory that was to be read.
        path: PathBuf,
        /// Why the operating system did not read it.
        #[source]
        source: io::Error,
    },
    /// A file of an incomplete epoch cannot be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// The file that was to be removed.
        path: PathBuf,
        /// Why the operating system did not remove it.
        #[source]
        source: io::Error,
    },
    /// A file that is not used cannot be renamed.
    #[error("cannot rename {}", path.display())]
    Rename {
        /// The file that was to be renamed.
        path: PathBuf,
        /// Why the operating system did not rename it.
        #[source]
        source: io::Error,
    },
}

/// Which parts there are of each epoch.
type Epochs = BTreeMap<usize, BTreeSet<&'static str>>;

/// Lists what is saved. Removes what a killed process left unfinished.
fn list(path: &Path) -> Result<Epochs, SavedEpochsError> {
    let unreadable = |source| SavedEpochsError::Read {
        path: path.to_owned(),
        source,
    };
    let mut epochs = Epochs::new();
    for entry in fs::read_dir(path).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        // burn gives all its files names of ASCII.
        let name = name.to_string_lossy();
        if let Some((part, epoch)) = parse(&name) {
            epochs.entry(epoch).or_default().insert(part);
        } else if is_unfinished(&name) {
            remove(path.join(&*name))?;
        }
    }
    Ok(epochs)
}

fn name_of(part: &str, epoch: usize) -> String {
    format!("{part}-{epoch}.bpk")
}

/// Returns the part and the epoch that a file is named after.
fn parse(name: &str) -> Option<(&'static str, usize)> {
    let (part, rest) = name.split_once('-')?;
    let part = PARTS.into_iter().find(|known| *known == part)?;
    let epoch = rest.strip_suffix(".bpk")?.parse().ok()?;
    (name_of(part, epoch) == name).then_some((part, epoch))
}

/// Whether burn writes, or has written, to a file of this name before it gets its own: that with a process and a number.
fn is_unfinished(name: &str) -> bool {
    let name = name.strip_suffix(UNFINISHED);
    let file = name.and_then(|name| name.rsplit_once('.'));
    file.is_some_and(|(file, _)| parse(file).is_some())
}

fn remove(path: PathBuf) -> Result<(), SavedEpochsError> {
    fs::remove_file(&path).map_err(|source| SavedEpochsError::Remove { path, source })
}

/// Keeps a file under a name that is not used.
fn set_aside(path: PathBuf) -> Result<(), SavedEpochsError> {
    let mut aside = path.clone().into_os_string();
    aside.push(UNUSABLE);
    fs::rename(&path, aside).map_err(|source| SavedEpochsError::Rename { path, source })
}

/// Returns the newest epoch that can be used, and removes or sets aside the newer ones. `None` if nothing is saved.
fn newest_usable<M: LearnerModel>(
    path: &Path,
    epochs: &Epochs,
    learner: &Learner<M>,
) -> Result<Option<usize>, SavedEpochsError> {
    let mut refused = Vec::new();
    let mut found = None;
    for (&epoch, parts) in epochs.iter().rev() {
        match check(path, epoch, parts, learner) {
            Ok(()) => {
                found = Some(epoch);
                break;
            }
            Err(refusal) => refused.push((epoch, parts, refusal)),
        }
    }
    let is_first_save = matches!(refused[..], [(_, _, Refusal::Incomplete(_))]);
    if found.is_none() && !refused.is_empty() && !is_first_save {
        const NUM_NAMED: usize = 3;
        let named = refused.iter().take(NUM_NAMED);
        let mut reasons: Vec<String> = named
            .map(|(_, _, refusal)| refusal.reason().to_owned())
            .collect();
        if refused.len() > NUM_NAMED {
            reasons.push(format!("and {} older ones", refused.len() - NUM_NAMED));
        }
        return Err(SavedEpochsError::NoneUsable {
            path: path.to_owned(),
            reasons: reasons.join("; "),
        });
    }
    for (epoch, parts, refusal) in refused {
        let reason = refusal.reason();
        tracing::warn!(epoch, %reason, "a checkpoint is not used");
        for part in parts {
            let file = path.join(name_of(part, epoch));
            match refusal {
                Refusal::Incomplete(_) => remove(file)?,
                Refusal::Unusable(_) => set_aside(file)?,
            }
        }
    }
    Ok(found)
}

/// Why an epoch is not used.
enum Refusal {
    /// A file is missing.
    Incomplete(String),
    /// A file cannot be read, or is of another model.
    Unusable(String),
}

impl Refusal {
    fn reason(&self) -> &str {
        match self {
            Self::Incomplete(reason) | Self::Unusable(reason) => reason,
        }
    }
}

fn check<M: LearnerModel>(
    path: &Path,
    epoch: usize,
    parts: &BTreeSet<&'static str>,
    learner: &Learner<M>,
) -> Result<(), Refusal> {
    if let Some(missing) = PARTS.into_iter().find(|part| !parts.contains(part)) {
        let missing = name_of(missing, epoch);
        let reason = format!("epoch {epoch} is incomplete: {missing} is missing");
        return Err(Refusal::Incomplete(reason));
    }
    let file = |part| path.join(name_of(part, epoch));
    let unusable = |part, what: &str, error: RecordError| {
        Refusal::Unusable(format!("{} {what}: {error}", file(part).display()))
    };
    let unreadable = |part| move |error| unusable(part, "cannot be read", error);
    OptimizerRecord::load(file(OPTIMIZER)).map_err(unreadable(OPTIMIZER))?;
    LrSchedulerRecord::load(file(SCHEDULER)).map_err(unreadable(SCHEDULER))?;
    let record = ModuleRecord::load(file(MODEL)).map_err(unreadable(MODEL))?;
    // The last of all: clones of a module share their running statistics, so this changes those of the learner.
    // burn will load the same ones.
    let loaded = learner.model().try_load_record(record);
    let what = "does not have the weights of this model";
    loaded.map_err(|error| unusable(MODEL, what, error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_burns_own_files_count() {
        for (name, expected) in [
            ("model-7.bpk", Some(("model", 7))),
            ("optim-12.bpk", Some(("optim", 12))),
            ("scheduler-1.bpk", Some(("scheduler", 1))),
            ("model-07.bpk", None),
            ("model-+7.bpk", None),
            ("model-7.bpk.41-0.tmp", None),
            ("model-7.bpk.unusable", None),
            ("model-best.bpk", None),
            ("models-7.bpk", None),
            ("model-7.mpk", None),
            (".lock", None),
        ] {
            assert_eq!(parse(name), expected, "{name}");
        }
        for (name, expected) in [
            ("model-7.bpk.41-0.tmp", true),
            ("model-7.bpk", false),
            ("model-7.bpk.unusable", false),
            ("notes-7.bpk.41-0.tmp", false),
            ("model.tmp", false),
        ] {
            assert_eq!(is_unfinished(name), expected, "{name}");
        }
    }
}
