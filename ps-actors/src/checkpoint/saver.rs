//! Saves checkpoints beside a training: when one is due, and on a thread of its own.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use futures_util::future::{Either, select};
use ps_runtime::actor::{ActorRef, error_chain};
use tokio::sync::{Notify, oneshot};

use super::files::size_of_files;
use super::{Checkpoint, CheckpointDir, CheckpointError, Found, Start};
use crate::group::ServerGroup;
use crate::ids::Version;
use crate::rule::UpdateRule;
use crate::server::{GroupError, ParameterServer, PullVersion, TakeCheckpoint};
use crate::update_log::{self, Chain, LogConfig, LogUpdates, UpdateLog};

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
    /// Whether the servers' updates are also logged between checkpoints, so that no update is lost that a
    /// worker was told about; see [`update_log`](crate::update_log). Default: `None`, no log. A log that is
    /// there is followed in any case when a run resumes.
    pub log: Option<LogConfig>,
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
            log: None,
        }
    }
}

/// Saves the checkpoints of a run beside the training.
///
/// A failure to write, for example because the disk is full, does not end the training. It is logged and
/// counted, and the next checkpoint is tried when it is due.
///
/// ```
/// use ps_actors::checkpoint::{CheckpointConfig, Checkpoints, Start};
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{GetWeights, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Layout, Weights};
///
/// # let temporary = tempfile::tempdir()?;
/// # let directory = temporary.path();
/// let config = CheckpointConfig { every: 100, resume: true, ..CheckpointConfig::new(directory) };
/// let (mut checkpoints, found) = Checkpoints::open(config, Box::new(Sgd::new()), |_| Ok(()))?;
///
/// let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
/// let start = found.as_ref().map_or(Start::from(&initial), |found| (&found.checkpoint).into());
/// let server = ParameterServer::new(start, Sgd::new(), ServerConfig::default())?.spawn()?;
/// checkpoints.start_log(&server, start)?; // If the settings ask for a log.
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
    log_config: Option<LogConfig>,
    /// The log that the checkpoint followed from which the run goes on. `None`: no run has been prepared.
    chain: Option<Chain>,
    /// The version from which the run went on.
    began: Version,
    /// The version of the newest checkpoint that this run has found or written.
    had: Option<Version>,
    log: Option<UpdateLog>,
    listener: Listener,
    asked: Arc<Notify>,
    /// The version of the latest checkpoint that was taken.
    taken: Option<Version>,
}

/// Asks for checkpoints that are not due yet. A clone asks the same [`Checkpoints`].
#[derive(Clone, Debug)]
pub struct SaveNow {
    /// `None`: nothing is saved.
    asked: Option<Arc<Notify>>,
}

impl SaveNow {
    /// Lets [`Checkpoints::save_when_due`] save a checkpoint of the current version, even if none is due. If
    /// another checkpoint is being written, the new one is saved after it. If this is called several times
    /// before that, one checkpoint is saved. Nothing is saved if the current version has a checkpoint
    /// already. Returns `false` if nothing is ever saved.
    #[must_use]
    pub fn ask(&self) -> bool {
        let Some(asked) = &self.asked else {
            return false;
        };
        asked.notify_one();
        true
    }
}

/// Why a checkpoint is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Version,
    LogFull,
    Asked,
}

/// A checkpoint that is being written.
#[derive(Debug)]
struct Writing {
    /// Returns the version and the path, if it could be written.
    thread: JoinHandle<Option<(Version, PathBuf)>>,
    /// Becomes ready at the end.
    ended: oneshot::Receiver<Infallible>,
}

/// What became of one checkpoint; see [`Checkpoints::on_save`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SaveEvent {
    /// It is on the disk.
    Saved {
        /// The version of the weights.
        version: Version,
        /// The directory that was made for it.
        path: PathBuf,
        /// How long it took to write it.
        took: Duration,
        /// The size of its files.
        bytes: u64,
    },
    /// It was due while the one before was still being written.
    Skipped {
        /// The version of the weights.
        version: Version,
    },
    /// It could not be taken or written.
    Failed {
        /// Why it failed, with all causes.
        reason: String,
    },
}

/// Is told the result of each checkpoint.
#[derive(Clone, Default)]
struct Listener(Option<Arc<dyn Fn(SaveEvent) + Send + Sync>>);

impl Listener {
    fn tell(&self, event: impl FnOnce() -> SaveEvent) {
        if let Some(listener) = &self.0 {
            listener(event());
        }
    }

    fn tell_failure(&self, reason: &dyn std::error::Error) {
        let reason = error_chain(reason);
        tracing::warn!(%reason, "a checkpoint was not saved; the training goes on");
        self.tell(|| SaveEvent::Failed { reason });
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Listener").field(&self.0.is_some()).finish()
    }
}

/// What a run has saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SaveReport {
    /// How many checkpoints were written.
    pub num_saved: u64,
    /// How many could not be taken or written.
    pub num_failed: u64,
    /// How many were skipped, because the one before was still being written when they were due.
    pub num_skipped: u64,
    /// The version and the directory of the latest checkpoint that was written.
    pub latest: Option<(Version, PathBuf)>,
    /// How often the update log could not be written. Each time, it was missing until the next checkpoint.
    pub num_log_failures: u64,
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
    /// `accepts` does not refuse with a reason. If there is an update log, the checkpoint follows it. For
    /// this it needs a new `rule` of the kind that the servers have.
    ///
    /// # Errors
    /// If the directory cannot be used, or is used by another process. If it has checkpoints and the run
    /// does not resume. If it resumes, and there are checkpoints but none that can be used.
    pub fn open(
        config: CheckpointConfig,
        rule: Box<dyn UpdateRule>,
        accepts: impl Fn(&Checkpoint) -> Result<(), String>,
    ) -> Result<(Self, Option<Found>), CheckpointError> {
        let CheckpointConfig {
            directory,
            every,
            keep,
            resume,
            log,
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
        let mut checkpoints = Self {
            directory: Some(Arc::new(directory)),
            every,
            keep,
            log_config: log,
            ..Self::off()
        };
        let found = checkpoints.prepare(found, rule)?;
        Ok((checkpoints, found))
    }

    /// Lets the checkpoint follow the log, and prepares the run that goes on from there.
    fn prepare(
        &mut self,
        found: Option<Found>,
        rule: Box<dyn UpdateRule>,
    ) -> Result<Option<Found>, CheckpointError> {
        let Some(directory) = &self.directory else {
            return Ok(None);
        };
        self.had = found.as_ref().map(|found| found.checkpoint.version());
        let (found, chain) = match found {
            Some(found) => {
                let followed = update_log::follow(directory.path(), found.checkpoint, rule)?;
                let (checkpoint, chain) = followed;
                (
                    Some(Found {
                        checkpoint,
                        ..found
                    }),
                    chain,
                )
            }
            None => (None, Chain::of_nothing(directory.path())?),
        };
        self.chain = Some(chain);
        let version = found.as_ref().map(|found| found.checkpoint.version());
        self.began = version.unwrap_or_default();
        self.next = self.due_after(self.began);
        Ok(found)
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
            log_config: None,
            chain: None,
            began: Version(0),
            had: None,
            log: None,
            listener: Listener::default(),
            asked: Arc::default(),
            taken: None,
        }
    }

    /// Calls `listener` each time that a checkpoint is written, skipped or failed. It may be called on
    /// another thread.
    ///
    /// ```
    /// use std::sync::mpsc;
    ///
    /// use ps_actors::checkpoint::{CheckpointConfig, Checkpoints, SaveEvent};
    /// use ps_actors::ids::Version;
    /// use ps_actors::rule::Sgd;
    /// use ps_actors::server::{ParameterServer, ServerConfig};
    /// use ps_actors::weights::{Layout, Weights};
    ///
    /// # let temporary = tempfile::tempdir()?;
    /// # let directory = temporary.path();
    /// let config = CheckpointConfig::new(directory);
    /// let (checkpoints, _) = Checkpoints::open(config, Box::new(Sgd::new()), |_| Ok(()))?;
    /// let (sender, saved) = mpsc::channel();
    /// let mut checkpoints = checkpoints.on_save(move |event| _ = sender.send(event));
    ///
    /// let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
    /// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
    /// checkpoints.save(&server);
    /// checkpoints.finish();
    /// assert!(matches!(saved.recv()?, SaveEvent::Saved { version: Version(0), .. }));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn on_save(mut self, listener: impl Fn(SaveEvent) + Send + Sync + 'static) -> Self {
        self.listener = Listener(Some(Arc::new(listener)));
        self
    }

    /// Returns a handle that asks for a checkpoint now.
    ///
    /// ```
    /// use ps_actors::checkpoint::Checkpoints;
    ///
    /// assert!(!Checkpoints::off().save_now().ask(), "nothing is saved");
    /// ```
    #[must_use]
    pub fn save_now(&self) -> SaveNow {
        let asked = (!self.is_off()).then(|| Arc::clone(&self.asked));
        SaveNow { asked }
    }

    /// Whether nothing is saved.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.directory.is_none()
    }

    /// Returns the newest checkpoint that can be used, when the servers of a run were lost. The next one is
    /// due at the first multiple of [`every`](CheckpointConfig::every) after it. If one is being written,
    /// waits for it first. If there is an update log, the checkpoint follows it, and the lost servers can
    /// write no more to it.
    ///
    /// # Errors
    /// If there are checkpoints, but none that can be used and that `accepts` does not refuse. If the newest one that
    /// this run has saved or found is not there any more, or the update log has lost updates, so that servers would
    /// come back with old weights.
    pub fn newest(
        &mut self,
        rule: Box<dyn UpdateRule>,
        accepts: impl Fn(&Checkpoint) -> Result<(), String>,
    ) -> Result<Option<Found>, CheckpointError> {
        self.wait();
        let logged = self.close_log();
        let Some(directory) = self.directory.clone() else {
            return Ok(None);
        };
        let path = || directory.path().to_owned();
        if let Some(had) = self.had
            && directory.newest_version()? < Some(had)
        {
            return Err(CheckpointError::Gone { path: path(), had });
        }
        let found = directory.newest(accepts)?;
        let found = self.prepare(found, rule)?;
        match logged {
            Some(had) if self.began < had => Err(CheckpointError::LogLost {
                path: path(),
                had,
                found: self.began,
            }),
            _ => Ok(found),
        }
    }

    /// Begins the update log, if the settings ask for one. Call it when the servers have started from
    /// `start` and before any worker joins. `first` is the server, or the first one of a group, and must be
    /// in this process. If there is no checkpoint yet, the servers' state is saved first, because a log
    /// continues a checkpoint.
    ///
    /// # Errors
    /// If the first checkpoint or the log cannot be written, an older log cannot be changed, or the server is not in this process.
    pub fn start_log(
        &mut self,
        first: &ActorRef<ParameterServer>,
        start: Start<'_>,
    ) -> Result<(), CheckpointError> {
        let (Some(directory), Some(chain)) = (self.directory.clone(), self.chain.take()) else {
            return Ok(());
        };
        let failed = |source| CheckpointError::Log {
            path: directory.path().to_owned(),
            source,
        };
        let Some(config) = self.log_config else {
            // What comes now is not logged. No later run may take an older continuation for it.
            return chain.cut().map_err(failed);
        };
        if let Start::Initial(weights) = start {
            let state = first.ask(TakeCheckpoint).flatten().wait();
            let state = state.map_err(|error| failed(io::Error::other(error)))?;
            let checkpoint = self.with_facts(Checkpoint::initial(weights.clone(), state)?);
            directory.save(&checkpoint, self.keep)?;
            self.had = Some(checkpoint.version());
        }
        let restarted_at = match start {
            Start::Initial(_) => None,
            Start::Restored(checkpoint) => checkpoint.restarted_at,
        };
        let facts = self.facts.clone();
        let log = UpdateLog::open(directory.path(), config, chain, facts, restarted_at);
        let log = log.map_err(failed)?;
        let told = first.ask(LogUpdates(log.clone())).flatten().wait();
        told.map_err(|error| failed(io::Error::other(error)))?;
        self.log = Some(log);
        Ok(())
    }

    /// Returns the version until which the log had all updates.
    fn close_log(&mut self) -> Option<Version> {
        let log = self.log.take()?;
        log.close();
        self.report.num_log_failures += log.num_failures();
        log.whole_until()
    }

    fn with_facts(&self, checkpoint: Checkpoint) -> Checkpoint {
        let facts = self.facts.clone().into_iter();
        facts.fold(checkpoint, |checkpoint, (name, value)| {
            checkpoint.with_fact(name, value)
        })
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
        let is_log_full = self.log.as_ref().is_some_and(UpdateLog::is_full);
        if version < self.next && !is_log_full {
            return false;
        }
        if self
            .writing
            .as_ref()
            .is_some_and(|writing| !writing.thread.is_finished())
        {
            // If it is due for the log only, it is still due when the other one is written.
            if version >= self.next {
                self.next = self.due_after(version);
                self.report.num_skipped += 1;
                tracing::warn!(%version, "a checkpoint is skipped: the one before is still being written");
                self.listener.tell(|| SaveEvent::Skipped { version });
            }
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
        self.taken = Some(checkpoint.version());
        let checkpoint = self.with_facts(checkpoint);
        let (keep, log, began) = (self.keep, self.log.clone(), self.began);
        let listener = self.listener.clone();
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        let (ends, ended) = oneshot::channel::<Infallible>();
        let writing = thread.spawn(move || {
            let version = checkpoint.version();
            let started = Instant::now();
            let saved = match directory.save(&checkpoint, keep) {
                Ok(path) => {
                    tracing::info!(%version, path = %path.display(), "saved a checkpoint");
                    listener.tell(|| SaveEvent::Saved {
                        version,
                        path: path.clone(),
                        took: started.elapsed(),
                        bytes: size_of_files(&path),
                    });
                    if let Some(log) = &log {
                        log.saved(version);
                    }
                    free_log(&directory, log.as_ref(), version, began);
                    Some((version, path))
                }
                Err(error) => {
                    if let Some(log) = &log {
                        log.not_saved();
                    }
                    listener.tell_failure(&error);
                    None
                }
            };
            drop(ends);
            saved
        });
        match writing {
            Ok(thread) => self.writing = Some(Writing { thread, ended }),
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

    /// As [`save_group`](Self::save_group), but takes none if the latest one that was taken is of the current
    /// version. If one is being written, waits for it first, because it may fail.
    pub async fn save_unless_taken(&mut self, servers: &ServerGroup) {
        if self.is_off() {
            return;
        }
        self.wait();
        match servers.status().await {
            Ok(status) if self.taken == Some(status[0].version) => {}
            Ok(_) => self.save_group(servers).await,
            Err(error) => self.failed(&error),
        }
    }

    /// [Saves](Self::save_group) a checkpoint each time that one is due or [asked for](Self::save_now), as long as it is polled. So run it
    /// beside the training, and drop it at the end.
    pub async fn save_when_due(&mut self, servers: &ServerGroup) -> Infallible {
        if self.is_off() {
            return std::future::pending().await;
        }
        loop {
            let due = match self.wait_until_due(servers).await {
                Ok(due) => due,
                // Those who train find out too.
                Err(_) => return std::future::pending().await,
            };
            let writing = self.writing.as_mut().map(|writing| &mut writing.ended);
            if let (Due::LogFull | Due::Asked, Some(ended)) = (due, writing) {
                // It frees a part of the log, and whoever asks wants this one not to be skipped.
                _ = ended.await;
                self.wait();
            }
            let version = match servers.status().await {
                Ok(status) => status[0].version,
                Err(_) => return std::future::pending().await,
            };
            let is_due = match due {
                Due::Asked => self.taken != Some(version),
                Due::Version | Due::LogFull => self.is_due(version),
            };
            if is_due {
                self.next = self.due_after(version);
                self.save_group(servers).await;
            }
        }
    }

    /// Waits until a checkpoint is due, and returns why it is.
    async fn wait_until_due(&self, servers: &ServerGroup) -> Result<Due, GroupError> {
        let version = pin!(servers.pull(PullVersion::AtLeast(self.next_due())));
        let full = pin!(async {
            match &self.log {
                Some(log) => log.became_full().await,
                None => std::future::pending().await,
            }
        });
        let asked = pin!(self.asked.notified());
        match select(select(version, full), asked).await {
            Either::Left((Either::Left((weights, _)), _)) => weights.map(|_| Due::Version),
            Either::Left((Either::Right(((), _)), _)) => Ok(Due::LogFull),
            Either::Right(((), _)) => Ok(Due::Asked),
        }
    }

    /// Waits until the checkpoint that is being written is on the disk. Returns what was saved until now.
    pub fn finish(&mut self) -> SaveReport {
        self.wait();
        let mut report = self.report.clone();
        report.num_log_failures += self.log.as_ref().map_or(0, UpdateLog::num_failures);
        report
    }

    fn wait(&mut self) {
        let Some(writing) = self.writing.take() else {
            return;
        };
        match writing.thread.join() {
            Ok(Some(saved)) => {
                self.report.num_saved += 1;
                self.had = Some(saved.0);
                self.report.latest = Some(saved);
            }
            // The thread has logged why.
            Ok(None) => {
                self.report.num_failed += 1;
                self.taken = None;
            }
            Err(_) => self.failed(&io::Error::other("the thread that writes it panicked")),
        }
    }

    fn failed(&mut self, reason: &dyn std::error::Error) {
        self.report.num_failed += 1;
        self.taken = None;
        if let Some(log) = &self.log {
            log.not_saved();
        }
        self.listener.tell_failure(reason);
    }

    /// Returns the first version after `version` at which a checkpoint is due.
    fn due_after(&self, version: Version) -> Version {
        match version.0.checked_div(self.every) {
            Some(num_before) => Version(num_before.saturating_add(1).saturating_mul(self.every)),
            None => Version(u64::MAX),
        }
    }
}

/// Frees the parts of the update log that are not needed after this checkpoint was saved. The checkpoint
/// before it keeps its part, because it is used if this one is damaged.
fn free_log(directory: &CheckpointDir, log: Option<&UpdateLog>, saved: Version, began: Version) {
    let Ok(mut kept) = directory.list() else {
        return;
    };
    kept.retain(|(version, _)| *version <= saved);
    let Some(&(needed, _)) = kept.iter().rev().take(2).next_back() else {
        return;
    };
    match log {
        Some(log) => log.free_before(needed),
        // An earlier process wrote it.
        None if needed >= began => update_log::remove_all(directory.path()),
        None => {}
    }
}
