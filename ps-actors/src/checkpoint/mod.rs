//! Checkpoints: everything that the servers of a run must know to go on, at one version, in files.
//!
//! [`ServerGroup::checkpoint`](crate::group::ServerGroup::checkpoint) takes a [`Checkpoint`] while workers
//! push. It has the weights, the state of the update rule, and what became of each gradient (S-13). A
//! [`CheckpointDir`] keeps the newest few of them on disk. A new group of servers starts from one where it
//! could start from initial weights, with any number of servers.
//!
//! A checkpoint does not contain the members and their pending pushes. No pending push was answered, so its
//! worker joins again and repeats the step (PS-2).
//!
//! `files` is the format. `directory` names the checkpoints of a run and removes old ones. `saver` writes
//! them beside the training.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ps_runtime::codec::Bulk;

use crate::ids::{Clock, Version, WorkerId};
use crate::rule::SavedRule;
use crate::server::{Consistency, CoordinatorState, ServerState};
use crate::weights::{BadPart, Layout, Weights};
use crate::worker::GoOnAt;

mod directory;
mod files;
mod saver;

pub use directory::{CheckpointDir, Found};
pub(crate) use files::sync_directory;
pub use saver::{CheckpointConfig, Checkpoints, SaveEvent, SaveNow, SaveReport};

/// Everything that the servers of a run must know to go on, at one version.
///
/// ```
/// use ps_actors::checkpoint::Checkpoint;
/// use ps_actors::ids::Version;
/// use ps_actors::rule::Sgd;
/// # use ps_actors::ids::{Clock, GradientId, Incarnation, WorkerId};
/// use ps_actors::server::{ApplyGradients, GetWeights, ParameterServer, ServerConfig, TakeCheckpoint};
/// # use ps_actors::weights::{Gradient, GradientUpdate};
/// use ps_actors::weights::{Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(2), vec![0.0, 0.0]);
/// let (rule, config) = (Sgd::with_momentum(0.9), ServerConfig::default());
/// let server = ParameterServer::new(&initial, rule.clone(), config)?.spawn()?;
/// # let id = GradientId { worker: WorkerId(0), incarnation: Incarnation(1), clock: Clock(0) };
/// # let gradient = Gradient::new(vec![1.0, -1.0]);
/// # let update =
/// #     GradientUpdate { id, computed_on: Version(0), loss: 0.0, num_examples: 1, gradient };
/// let weights = server.ask(ApplyGradients::mean([update])).flatten().wait()?;
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("after-1");
/// Checkpoint::of(server.ask(TakeCheckpoint).flatten().wait()?)?.write(&path)?;
///
/// // Later, in another process.
/// let checkpoint = Checkpoint::read(&path)?;
/// let server = ParameterServer::new(&checkpoint, rule, config)?.spawn()?;
/// let restored = server.ask(GetWeights).wait()?;
/// assert_eq!((restored.version(), restored.to_vec()), (Version(1), weights.to_vec()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Checkpoint {
    pub(crate) weights: Weights,
    /// The vectors cover all weights.
    pub(crate) rule: SavedRule,
    pub(crate) learning_rate: f64,
    pub(crate) coordinator: CoordinatorState,
    pub(crate) facts: BTreeMap<String, String>,
    /// Set by [`restart_workers_at`](Self::restart_workers_at), until the update log has it.
    pub(crate) restarted_at: Option<Clock>,
}

impl Checkpoint {
    /// Makes a checkpoint of the state of a server that holds all weights.
    ///
    /// # Errors
    /// If the server is one of several. Use
    /// [`ServerGroup::checkpoint`](crate::group::ServerGroup::checkpoint) for these.
    pub fn of(state: ServerState) -> Result<Self, CheckpointError> {
        Self::join(vec![state])
            .map_err(|BadPart { index: _, reason }| CheckpointError::Part { reason })
    }

    /// Makes the checkpoint of servers that have just started from the initial weights. `first` is the state
    /// of the first one.
    pub(crate) fn initial(weights: Weights, first: ServerState) -> Result<Self, CheckpointError> {
        let whole = ServerState {
            weights,
            rule: SavedRule::default(),
            ..first
        };
        Self::of(whole)
    }

    /// Joins the states of all servers of a group, in the order of their ranges.
    pub(crate) fn join(states: Vec<ServerState>) -> Result<Self, BadPart> {
        let bad = |index, reason: &str| BadPart {
            index,
            reason: reason.to_owned(),
        };
        let parts: Vec<Weights> = states.iter().map(|state| state.weights.clone()).collect();
        let weights = Weights::join(&parts)?;
        let mut states = states.into_iter();
        let first = states.next().ok_or_else(|| bad(0, "there is none"))?;
        let coordinator = first.coordinator;
        let coordinator =
            coordinator.ok_or_else(|| bad(0, "it is not the state of the first server"))?;
        if coordinator.version != weights.version() {
            return Err(bad(0, "its record of gradients is of another version"));
        }
        let mut rules = vec![first.rule];
        rules.extend(states.map(|state| state.rule));
        let lens: Vec<usize> = parts.iter().map(Weights::len).collect();
        // The rule of a server without weights has never been used. With `Cut::BetweenParameters`, that may be the
        // first server.
        let used = lens.iter().position(|&len| len > 0).unwrap_or(0);
        for (index, (rule, &len)) in rules.iter().zip(&lens).enumerate() {
            if rule.vectors.iter().any(|(_, numbers)| numbers.len() != len) {
                return Err(bad(
                    index,
                    "the state of its update rule has another length",
                ));
            }
            let names = |rule: &SavedRule| -> Vec<String> {
                rule.vectors.iter().map(|(name, _)| name.clone()).collect()
            };
            let one = &rules[used];
            if len > 0 && (names(rule), &rule.scalars) != (names(one), &one.scalars) {
                return Err(bad(
                    index,
                    "the state of its update rule is of another rule",
                ));
            }
        }
        Ok(Self {
            weights,
            rule: join_rules(rules, used),
            learning_rate: first.learning_rate,
            coordinator,
            facts: BTreeMap::new(),
            restarted_at: None,
        })
    }

    /// Returns the version of the weights: how many updates were applied.
    #[must_use]
    pub fn version(&self) -> Version {
        self.weights.version()
    }

    /// Returns the weights of the whole model.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Returns the learning rate of the servers. A restored server has the learning rate of its
    /// [`ServerConfig`](crate::server::ServerConfig), so a program that changes the rate during a run sets
    /// this one there.
    #[must_use]
    pub fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Returns the consistency mode of the servers. A restored server has the mode of its
    /// [`ServerConfig`](crate::server::ServerConfig).
    #[must_use]
    pub fn consistency(&self) -> Consistency {
        self.coordinator.consistency
    }

    /// Returns the message that lets a worker of a driver's own loop go on at its first step that is not
    /// settled. A worker that joins the servers goes on there by itself.
    #[must_use]
    pub fn go_on_at(&self, worker: WorkerId) -> GoOnAt {
        GoOnAt {
            clock: self.next_clock(worker),
            after: self.coordinator.incarnation(worker),
        }
    }

    /// Returns the clock of the first step of a worker that is not settled.
    #[must_use]
    pub fn next_clock(&self, worker: WorkerId) -> Clock {
        self.coordinator.next_clock(worker)
    }

    /// Returns the clock of the first step that is not settled, for each worker that took part.
    pub(crate) fn next_clocks(&self) -> impl Iterator<Item = (WorkerId, Clock)> + '_ {
        self.coordinator.next_clocks()
    }

    /// Lets all workers, known ones and new ones, go on at the same clock. Needed if the run goes on with
    /// another number of workers, because the data is then dealt out differently: a clock stands for
    /// another batch.
    #[must_use]
    pub fn restart_workers_at(mut self, clock: Clock) -> Self {
        self.coordinator.restart_at(clock);
        self.restarted_at = Some(clock);
        self
    }

    /// Checks that the weights are of a model with this layout.
    ///
    /// # Errors
    /// If they are not. The error names the first difference.
    pub fn check_layout(&self, layout: &Layout) -> Result<(), String> {
        let (buffers, wanted_buffers) = (self.weights.layout().num_buffers(), layout.num_buffers());
        let (saved, wanted) = (self.weights.layout().parameters(), layout.parameters());
        for (saved, wanted) in saved.iter().zip(wanted) {
            if saved != wanted {
                let (name, shape) = (&saved.name, &saved.shape);
                let (wanted_name, wanted_shape) = (&wanted.name, &wanted.shape);
                return Err(format!(
                    "it has `{name}` {shape:?} where the model has `{wanted_name}` {wanted_shape:?}"
                ));
            }
        }
        match (saved.len(), wanted.len()) {
            (a, b) if a != b => Err(format!("it has {a} parameters, and the model has {b}")),
            _ if buffers != wanted_buffers => Err(format!(
                "{buffers} of its parameters are buffers, and {wanted_buffers} of the model's"
            )),
            _ => Ok(()),
        }
    }

    /// Returns the statements about the run that [`with_fact`](Self::with_fact) added, by name.
    #[must_use]
    pub fn facts(&self) -> &BTreeMap<String, String> {
        &self.facts
    }

    /// Adds a statement about the run, such as the name of its optimizer, so that a program can compare it
    /// before it goes on.
    #[must_use]
    pub fn with_fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.insert(name.into(), value.into());
        self
    }

    /// Writes the checkpoint to a new directory `path`. The directory is either complete or does not exist,
    /// whatever happens meanwhile: the files are written to a temporary directory beside it, which is renamed when
    /// all of them are on the disk. A usable checkpoint of the same version that is already there is left
    /// as it is.
    ///
    /// # Errors
    /// If a file cannot be written. Nothing is left of it then, if possible.
    pub fn write(&self, path: &Path) -> Result<(), CheckpointError> {
        files::write(self, path)
    }

    /// Reads a checkpoint.
    ///
    /// # Errors
    /// If a file is missing, damaged, or of a later format. Then nothing of the checkpoint is used.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        files::read(path)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Checkpoint")
            .field("version", &self.version())
            .field("facts", &self.facts)
            .finish_non_exhaustive()
    }
}

/// `used` is the index of a rule that was used, if one was.
fn join_rules(mut rules: Vec<SavedRule>, used: usize) -> SavedRule {
    if rules.len() == 1 {
        return rules.remove(0);
    }
    let mut joined = SavedRule {
        vectors: Vec::new(),
        scalars: rules[used].scalars.clone(),
    };
    let names: Vec<String> = rules[used]
        .vectors
        .iter()
        .map(|(name, _)| name.clone())
        .collect();
    for name in names {
        let mut numbers = Vec::new();
        for rule in &mut rules {
            if let Some(index) = rule.vectors.iter().position(|(other, _)| *other == name) {
                // Each part is freed as soon as it is copied.
                numbers.extend_from_slice(&rule.vectors.remove(index).1);
            }
        }
        joined.vectors.push((name, Bulk::from(numbers)));
    }
    joined
}

/// What servers start from: initial weights, or a checkpoint.
///
/// Functions that start servers take `impl Into<Start>`, so a program passes `&weights` or `&checkpoint`.
///
/// ```
/// use ps_actors::checkpoint::{Checkpoint, Start};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ParameterServer, ServerConfig, TakeCheckpoint};
/// use ps_actors::weights::{Layout, Weights};
///
/// fn server<'a>(start: impl Into<Start<'a>>) -> Result<ParameterServer, Box<dyn std::error::Error>> {
///     Ok(ParameterServer::new(start, Sgd::with_momentum(0.9), ServerConfig::default())?)
/// }
///
/// let initial = Weights::initial(Layout::flat(2), vec![1.0, 2.0]);
/// let first = server(&initial)?.spawn()?;
/// let checkpoint = Checkpoint::of(first.ask(TakeCheckpoint).wait()??)?;
/// let second = server(&checkpoint)?.spawn()?; // With the momentum of the first.
/// # drop(second);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// The initial weights of a model, with a fresh update rule.
    Initial(&'a Weights),
    /// The state of an earlier run. The settings are not part of it.
    Restored(&'a Checkpoint),
}

impl<'a> From<&'a Weights> for Start<'a> {
    fn from(weights: &'a Weights) -> Self {
        Self::Initial(weights)
    }
}

impl<'a> From<&'a Checkpoint> for Start<'a> {
    fn from(checkpoint: &'a Checkpoint) -> Self {
        Self::Restored(checkpoint)
    }
}

impl<'a> Start<'a> {
    /// Returns the weights of the whole model.
    #[must_use]
    pub fn weights(self) -> &'a Weights {
        match self {
            Self::Initial(weights) => weights,
            Self::Restored(checkpoint) => &checkpoint.weights,
        }
    }

    /// Returns what the server of this range needs besides the weights. The first one needs the record of
    /// the gradients.
    pub(crate) fn rest(self, range: Range<usize>, is_first: bool) -> Rest {
        match self {
            Self::Initial(_) => Rest::default(),
            Self::Restored(checkpoint) => {
                let vectors = checkpoint.rule.vectors.iter();
                let part =
                    |(name, numbers): &(String, Bulk)| (name.clone(), numbers.slice(range.clone()));
                Rest {
                    rule: SavedRule {
                        vectors: vectors.map(part).collect(),
                        scalars: checkpoint.rule.scalars.clone(),
                    },
                    coordinator: is_first.then(|| checkpoint.coordinator.clone()),
                }
            }
        }
    }
}

/// What a restored server has besides its weights. Empty for a new one.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(crate) struct Rest {
    pub(crate) rule: SavedRule,
    #[serde(with = "crate::server::beside_header")]
    pub(crate) coordinator: Option<CoordinatorState>,
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The state is that of one server of several.
    #[error("this state is no checkpoint of a whole model: {reason}")]
    Part {
        /// What is wrong with it.
        reason: String,
    },
    /// The directory for checkpoints cannot be made or used.
    #[error("cannot use {} for checkpoints", path.display())]
    Directory {
        /// The directory that was given for the checkpoints of a run.
        path: PathBuf,
        /// Why the operating system does not let it be used.
        #[source]
        source: std::io::Error,
    },
    /// Another process writes its checkpoints there.
    #[error("another process writes its checkpoints to {}: use a directory for each run", path.display())]
    InUse {
        /// The directory that the other process has locked.
        path: PathBuf,
    },
    /// The directory has checkpoints already, and the run does not go on from them.
    #[error(
        "{} already has checkpoints, up to {newest}: go on from them (`--resume`, \
         `CheckpointConfig::resume`), or use another directory",
        path.display()
    )]
    NotEmpty {
        /// The directory that has checkpoints.
        path: PathBuf,
        /// The version of the newest one.
        newest: Version,
    },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file or directory that was to be written.
        path: PathBuf,
        /// Why the operating system did not write it.
        #[source]
        source: std::io::Error,
    },
    /// The update log cannot be written.
    #[error("cannot write the update log in {}", path.display())]
    Log {
        /// The directory with the segments of the log.
        path: PathBuf,
        /// Why the operating system did not write the log.
        #[source]
        source: std::io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory that was to be read.
        path: PathBuf,
        /// Why the operating system did not read it.
        #[source]
        source: std::io::Error,
    },
    /// The checkpoints of a run have gone while it ran.
    #[error(
        "{} had a checkpoint of {had}, and was emptied or replaced meanwhile: restore it, or begin in another \
         directory",
        path.display()
    )]
    Gone {
        /// The directory that had the checkpoint.
        path: PathBuf,
        /// The version of the checkpoint.
        had: Version,
    },
    /// A part of the update log has gone while its run ran.
    #[error(
        "the update log in {} had all updates until {had}, and only those until {found} can be read now: \
         restore the directory, and resume the run; if it resumes without them, they are lost",
        path.display()
    )]
    LogLost {
        /// The directory with the segments of the log.
        path: PathBuf,
        /// The version until which all updates were logged.
        had: Version,
        /// The version until which they can be read.
        found: Version,
    },
    /// A file is not what the checkpoint's list of files says, or makes no sense.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file or directory that is damaged.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The checkpoint is of another run: another model, optimizer or data.
    #[error("{} is of another run: {reason}", path.display())]
    Foreign {
        /// The directory of the checkpoint.
        path: PathBuf,
        /// What differs, with its value here and there.
        reason: String,
    },
    /// A file of weights has those of another model.
    #[error("{} does not have the weights of this model: {reason}", path.display())]
    OtherModel {
        /// The file.
        path: PathBuf,
        /// The first difference.
        reason: String,
    },
    /// There are checkpoints, but none of them can be used.
    #[error("no checkpoint in {} can be used: {reasons}", path.display())]
    NoneUsable {
        /// The directory that has the checkpoints.
        path: PathBuf,
        /// Why each of them cannot be used.
        reasons: String,
    },
}
