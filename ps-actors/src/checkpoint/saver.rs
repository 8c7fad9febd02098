//! Saves checkpoints beside a training: when one is due, and on a thread of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use ps_runtime::actor::{ActorRef, error_chain};

use super::{Checkpoint, CheckpointDir, CheckpointError, Found};
use crate::group::ServerGroup;
use crate::ids::Version;
use crate::server::{ParameterServer, PullVersion, TakeCheckpoint};

/// Where and how often a run saves checkpoints.
///
/// ```
/// use ps_actors::checkpoint::CheckpointConfig;
///
/// let config = CheckpointConfig { every: 500, resume: true, ..CheckpointConfig::new("runs/one") };
/// assert_eq!(config.keep, 3);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointConfig {
    /// The directory. It is made if it does not exist.
    pub directory: PathBuf,
    /// A checkpoint is due when this many more updates have been applied. 0: only at the end of the run.
    /// Default: 1000. Too low: the update rule's state is copied often. Too high: a lost run repeats more.
    pub every: u64,
    /// How many checkpoints are kept; at least 1. Default: 3.
    pub keep: usize,
    /// Whether the run goes on from the newest usable checkpoint. If there is none, it starts from the
    /// beginning. Without this, a directory that already has checkpoints is an error. Default: `false`.
    pub resume: bool,
}

impl CheckpointConfig {
    /// Makes the default settings for this directory.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            every: 1000,
            keep: 3,
            resume: false,
        }
    }
}

/// Saves the checkpoints of a run beside the training.
///
/// A failure to write, for example because the disk is full, does not end the training. It is logged and
/// counted, and the next checkpoint is tried when it is due.
///
/// ```
/// use ps_actors::checkpoint::{CheckpointConfig, Checkpoints};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{GetWeights, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Layout, Weights};
///
/// # let temporary = tempfile::tempdir()?;
/// # let directory = temporary.path();
/// let config = CheckpointConfig { every: 100, resume: true, ..CheckpointConfig::new(directory) };
/// let (mut checkpoints, found) = Checkpoints::open(config, |_| Ok(()))?;
///
/// let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
/// let (rule, config) = (Sgd::new(), ServerConfig::default());
/// let server = match &found {
///     Some(found) => ParameterServer::new(&found.checkpoint, rule, config)?.spawn()?,
///     None => ParameterServer::new(&initial, rule, config)?.spawn()?,
/// };
/// for _ in 0..3 {
///     // Here the driver applies gradients. Then:
///     let version = server.ask(GetWeights).wait()?.version();
///     if checkpoints.is_due(version) {
///         checkpoints.save(&server);
///     }
/// }
/// checkpoints.save(&server);
/// let saved = checkpoints.finish();
/// assert_eq!((saved.num_saved, saved.num_failed), (1, 0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Checkpoints {
    /// `None`: nothing is saved.
    directory: Option<Arc<CheckpointDir>>,
    every: u64,
    keep: usize,
    /// Added to each checkpoint.
    facts: BTreeMap<String, String>,
    next: Version,
    writing: Option<Writing>,
    report: SaveReport,
}

type Writing = JoinHandle<Option<(Version, PathBuf)>>;

/// What a run has saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SaveReport {
    /// How many checkpoints were written.
    pub num_saved: u64,
    /// How many could not be taken or written.
    pub num_failed: u64,
    /// How many were skipped, because the one before was still being written when they were due.
    pub num_skipped: u64,
    /// The latest one.
    pub latest: Option<(Version, PathBuf)>,
}

impl SaveReport {
    /// Whether the latest checkpoint has all updates until this version.
    #[must_use]
    pub fn has(&self, version: Version) -> bool {
        let latest = self.latest.as_ref();
        latest.is_some_and(|(latest, _)| *latest >= version)
    }
}

impl Checkpoints {
    /// Opens the directory. If the run resumes, also reads the newest checkpoint that can be used and that
    /// `accepts` does not refuse with a reason.
    ///
    /// # Errors
    /// If the directory cannot be used, or is used by another process. If it has checkpoints and the run
    /// does not resume. If it resumes, and there are checkpoints but none that can be used.
    pub fn open(
        config: CheckpointConfig,
        accepts: impl Fn(&Checkpoint) -> Result<(), String>,
    ) -> Result<(Self, Option<Found>), CheckpointError> {
        let CheckpointConfig {
            directory,
            every,
            keep,
            resume,
        } = config;
        let directory = CheckpointDir::open(directory)?;
        let found = match resume {
            true => directory.newest(accepts)?,
            false => match directory.list()?.last() {
                Some(&(newest, _)) => {
                    let path = directory.path().to_owned();
                    return Err(CheckpointError::NotEmpty { path, newest });
                }
                None => None,
            },
        };
        let from = found.as_ref().map(|found| found.checkpoint.version());
        let mut checkpoints = Self {
            directory: Some(Arc::new(directory)),
            every,
            keep,
            ..Self::off()
        };
        checkpoints.next = checkpoints.due_after(from.unwrap_or_default());
        Ok((checkpoints, found))
    }

    /// Makes an object that saves nothing, for a program whose user asks for no checkpoints.
    #[must_use]
    pub fn off() -> Self {
        Self {
            directory: None,
            every: 0,
            keep: 0,
            facts: BTreeMap::new(),
            next: Version(u64::MAX),
            writing: None,
            report: SaveReport::default(),
        }
    }

    /// Whether nothing is saved.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.directory.is_none()
    }

    /// Returns the newest checkpoint that can be used, when the servers of a run were lost. The next one is
    /// due at the first multiple of [`every`](CheckpointConfig::every) after it. If one is being written,
    /// waits for it first.
    ///
    /// # Errors
    /// If there are checkpoints, but none that can be used and that `accepts` does not refuse.
    pub fn newest(
        &mut self,
        accepts: impl Fn(&Checkpoint) -> Result<(), String>,
    ) -> Result<Option<Found>, CheckpointError> {
        self.wait();
        let found = match &self.directory {
            Some(directory) => directory.newest(accepts)?,
            None => None,
        };
        let version = found.as_ref().map(|found| found.checkpoint.version());
        self.next = self.due_after(version.unwrap_or_default());
        Ok(found)
    }

    /// Adds a statement about the run to each checkpoint; see [`Checkpoint::with_fact`].
    #[must_use]
    pub fn with_fact(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.facts.insert(name.into(), value.into());
        self
    }

    /// Returns the version at which the next checkpoint is due.
    #[must_use]
    pub fn next_due(&self) -> Version {
        self.next
    }

    /// Whether a checkpoint is due at this version, and none is being written.
    pub fn is_due(&mut self, version: Version) -> bool {
        if version < self.next {
            return false;
        }
        if self
            .writing
            .as_ref()
            .is_some_and(|writing| !writing.is_finished())
        {
            self.next = self.due_after(version);
            self.report.num_skipped += 1;
            tracing::warn!(%version, "a checkpoint is skipped: the one before is still being written");
            return false;
        }
        true
    }

    /// Writes a checkpoint on another thread. If one is being written, waits for it first.
    pub fn write(&mut self, checkpoint: Checkpoint) {
        let Some(directory) = self.directory.clone() else {
            return;
        };
        self.wait();
        self.next = self.due_after(checkpoint.version());
        let facts = self.facts.clone().into_iter();
        let checkpoint = facts.fold(checkpoint, |checkpoint, (name, value)| {
            checkpoint.with_fact(name, value)
        });
        let keep = self.keep;
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        let writing = thread.spawn(move || {
            let version = checkpoint.version();
            match directory.save(&checkpoint, keep) {
                Ok(path) => {
                    tracing::info!(%version, path = %path.display(), "saved a checkpoint");
                    Some((version, path))
                }
                Err(error) => {
                    log_failure(&error);
                    None
                }
            }
        });
        match writing {
            Ok(writing) => self.writing = Some(writing),
            Err(error) => self.failed(&error),
        }
    }

    /// Takes a checkpoint of a server that holds all weights, and [writes](Self::write) it. Waits for the
    /// server, but not for the disk. A failure is logged and counted.
    pub fn save(&mut self, server: &ActorRef<ParameterServer>) {
        if self.is_off() {
            return;
        }
        let state = server.ask(TakeCheckpoint).flatten().wait();
        let failed: Box<dyn std::error::Error> = match state.map(Checkpoint::of) {
            Ok(Ok(checkpoint)) => return self.write(checkpoint),
            Ok(Err(error)) => error.into(),
            Err(error) => error.into(),
        };
        self.failed(&*failed);
    }

    /// Takes a checkpoint of a group of servers, and [writes](Self::write) it. Waits for the servers, but not
    /// for the disk. A failure is logged and counted.
    pub async fn save_group(&mut self, servers: &ServerGroup) {
        if self.is_off() {
            return;
        }
        match servers.checkpoint().await {
            Ok(checkpoint) => self.write(checkpoint),
            Err(error) => self.failed(&error),
        }
    }

    /// [Saves](Self::save_group) a checkpoint each time that one is due, as long as it is polled. So run it
    /// beside the training, and drop it at the end.
    pub async fn save_when_due(&mut self, servers: &ServerGroup) -> Infallible {
        if self.is_off() || self.every == 0 {
            return std::future::pending().await;
        }
        loop {
            let due = self.next_due();
            let version = match servers.pull(PullVersion::AtLeast(due)).await {
                Ok(weights) => weights.version(),
                // Those who train find out too.
                Err(_) => return std::future::pending().await,
            };
            if self.is_due(version) {
                self.next = self.due_after(version);
                self.save_group(servers).await;
            }
        }
    }

    /// Waits until the checkpoint that is being written is on the disk. Returns what was saved until now.
    pub fn finish(&mut self) -> SaveReport {
        self.wait();
        self.report.clone()
    }

    fn wait(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        match writing.join() {
            Ok(Some(saved)) => {
                self.report.num_saved += 1;
                self.report.latest = Some(saved);
            }
            // The thread has logged why.
            Ok(None) => self.report.num_failed += 1,
            Err(_) => self.failed(&io::Error::other("the thread that writes it panicked")),
        }
    }

    fn failed(&mut self, reason: &dyn std::error::Error) {
        self.report.num_failed += 1;
        log_failure(reason);
    }

    /// Returns the first version after `version` at which a checkpoint is due.
    fn due_after(&self, version: Version) -> Version {
        match version.0.checked_div(self.every) {
            Some(num_before) => Version(num_before.saturating_add(1).saturating_mul(self.every)),
            None => Version(u64::MAX),
        }
    }
}

fn log_failure(reason: &dyn std::error::Error) {
    let reason = error_chain(reason);
    tracing::warn!(%reason, "a checkpoint was not saved; the training goes on");
}
