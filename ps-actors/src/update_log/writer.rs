//! What the first server writes its decisions to.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::future::select;
use ps_runtime::actor::sleep;
use tokio::sync::Notify;

use super::chain::Chain;
use super::segment::{Segment, SegmentWriter};
use super::{LogConfig, LogStatus, LogSync};
use crate::chaos::reached;
use crate::checkpoint::sync_directory;
use crate::ids::{Clock, Version};
use crate::server::LogEntry;

/// If the log fails twice within this time, or no segment can be begun, it is tried again after this time and not at
/// once. Each try is a checkpoint, which costs the training something.
const RETRY: Duration = Duration::from_secs(60);

/// A server writes to a log that belongs to another server now.
#[derive(Debug)]
pub(crate) struct Replaced;

/// An update log that is being written. A clone is another handle to the same one.
#[derive(Clone, Debug)]
pub(crate) struct UpdateLog {
    shared: Arc<Shared>,
    /// Ends the thread that syncs, when the last handle is dropped.
    _syncing: Option<Arc<Sender<()>>>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    config: LogConfig,
    state: Mutex<State>,
    /// Whether a checkpoint should begin a new segment.
    is_full: AtomicBool,
    became_full: Notify,
}

#[derive(Debug)]
struct State {
    /// `None` before the first segment, and after a failure: updates are missing then, so nothing more is
    /// written until a checkpoint begins a new segment.
    current: Option<SegmentWriter>,
    /// Complete segments, oldest first.
    older: Vec<Segment>,
    /// A file to write over.
    spare: Option<PathBuf>,
    last_number: u64,
    /// The first entry of the first segment.
    opening: Option<LogEntry>,
    /// Files that were written to and not synced since.
    unsynced: Vec<File>,
    is_current_unsynced: bool,
    /// Whether the name of a segment was not synced since it was made.
    is_directory_unsynced: bool,
    /// Whether files are synced at all.
    is_synced: bool,
    is_replaced: bool,
    num_failures: u64,
    /// The version of the latest update in it, or at which it began.
    last_version: Version,
    last_failure: Option<Instant>,
    /// Whether updates are missing that no checkpoint has: the log failed, and no checkpoint was saved since it began
    /// anew.
    has_gap: bool,
    /// No update is missing from this version on.
    whole_from: Version,
    /// When a checkpoint should begin a new segment after a failure.
    retry_at: Option<Instant>,
}

impl UpdateLog {
    /// Continues the log after `chain`. The first segment begins when a server is told to write to it. If
    /// updates were followed, a checkpoint should be taken soon, so that they are not followed again.
    ///
    /// # Errors
    /// If what does not follow cannot be removed, or no thread can be started.
    pub(crate) fn open(
        directory: &Path,
        config: LogConfig,
        chain: Chain,
        facts: BTreeMap<String, String>,
        restarted_at: Option<Clock>,
    ) -> io::Result<Self> {
        chain.cut()?;
        reached!(LogContinues);
        let chain_is_long = chain.num_updates > 0;
        let state = State {
            current: None,
            older: chain.segments,
            spare: None,
            last_number: chain.last_number,
            opening: Some(LogEntry::Began {
                facts,
                restarted_at,
            }),
            unsynced: Vec::new(),
            is_current_unsynced: false,
            is_directory_unsynced: false,
            is_synced: config.sync != LogSync::Never,
            is_replaced: false,
            num_failures: 0,
            last_version: Version(0),
            last_failure: None,
            has_gap: false,
            whole_from: Version(0),
            retry_at: None,
        };
        let shared = Arc::new(Shared {
            directory: directory.to_owned(),
            config,
            state: Mutex::new(state),
            is_full: AtomicBool::new(false),
            became_full: Notify::new(),
        });
        if chain_is_long {
            shared.fill();
        }
        let syncing = match config.sync {
            LogSync::Every(interval) => {
                let (sender, ended) = channel();
                let shared = Arc::clone(&shared);
                let thread = std::thread::Builder::new().name("update-log".to_owned());
                thread.spawn(move || sync_every(interval, &ended, &shared))?;
                Some(Arc::new(sender))
            }
            LogSync::Never | LogSync::Always => None,
        };
        Ok(Self {
            shared,
            _syncing: syncing,
        })
    }

    /// Writes one entry. A failure is logged and counted, and ends the log until the next checkpoint.
    ///
    /// # Errors
    /// If another server writes the log now.
    pub(crate) fn append(&self, entry: &LogEntry, numbers: &[&[f32]]) -> Result<(), Replaced> {
        let mut state = self.shared.lock();
        if state.is_replaced {
            return Err(Replaced);
        }
        let Some(current) = &mut state.current else {
            return Ok(());
        };
        match current.append(entry, numbers) {
            Ok(()) => {
                let is_full = current.segment.num_bytes >= self.shared.config.max_bytes;
                state.is_current_unsynced = true;
                if let LogEntry::Update { update, .. } = entry {
                    state.last_version = update.version;
                }
                if is_full {
                    self.shared.fill();
                }
            }
            Err(error) => self.shared.fail(&mut state, &error),
        }
        Ok(())
    }

    /// Waits until everything is on the disk, if [`LogSync::Always`] asks for it.
    pub(crate) fn sync_if_always(&self) {
        if self.shared.config.sync == LogSync::Always {
            self.shared.sync();
        }
    }

    /// Begins the first segment, when a server begins to write at this version.
    pub(crate) fn begin(&self, version: Version) {
        let mut state = self.shared.lock();
        if state.is_replaced {
            return;
        }
        state.retire();
        let (number, spare) = (state.last_number + 1, state.spare.take());
        state.last_number = number;
        let created = SegmentWriter::create(&self.shared.directory, number, version, spare);
        let begun = created.and_then(|mut segment| {
            if let Some(opening) = &state.opening {
                segment.append(opening, &[])?;
            }
            Ok(segment)
        });
        match begun {
            Ok(segment) => {
                state.opening = None;
                state.current = Some(segment);
                state.last_version = version;
                if state.has_gap {
                    state.whole_from = version;
                }
                state.is_current_unsynced = true;
                // Without its name on the disk, the segment would not count after a power failure.
                state.is_directory_unsynced = state.is_synced;
            }
            Err(error) => {
                state.fail(&error);
                self.shared.retry_later(&mut state);
            }
        }
    }

    /// Begins a new segment, when a checkpoint of this version is taken.
    pub(crate) fn rotate(&self, version: Version) {
        // Also if it fails. Otherwise a checkpoint would be due at each update.
        self.shared.is_full.store(false, Relaxed);
        self.shared.lock().retry_at = None;
        self.begin(version);
    }

    /// Whether a checkpoint should begin a new segment: the current one is too long, or the log has failed.
    pub(crate) fn is_full(&self) -> bool {
        let mut state = self.shared.lock();
        if state.retry_at.is_some_and(|at| at <= Instant::now()) {
            state.retry_at = None;
            self.shared.is_full.store(true, Relaxed);
        }
        self.shared.is_full.load(Relaxed)
    }

    /// Waits until [`is_full`](Self::is_full) becomes true.
    pub(crate) async fn became_full(&self) {
        loop {
            let retry_at = self.shared.lock().retry_at;
            let notified = self.shared.became_full.notified();
            match retry_at {
                Some(at) => {
                    let time = at.saturating_duration_since(Instant::now());
                    select(pin!(notified), pin!(sleep(time))).await;
                }
                None => notified.await,
            }
            if self.is_full() {
                return;
            }
        }
    }

    /// A checkpoint of this version is on the disk.
    pub(crate) fn saved(&self, version: Version) {
        let mut state = self.shared.lock();
        // If a segment began at it or before, what is missing is behind it.
        let current = state.current.as_ref();
        if current.is_some_and(|current| current.segment.start <= version) {
            state.has_gap = false;
        }
    }

    /// A checkpoint could not be taken or written. If the log needs one, another is due a while later.
    pub(crate) fn not_saved(&self) {
        let mut state = self.shared.lock();
        if state.has_gap | self.shared.is_full.swap(false, Relaxed) {
            self.shared.retry_later(&mut state);
        }
    }

    /// Frees the segments that a checkpoint of this version, and every later one, does not need.
    pub(crate) fn free_before(&self, needed: Version) {
        let mut state = self.shared.lock();
        let current = state.current.as_ref().map(|current| current.segment.start);
        let starts = state.older.iter().map(|segment| segment.start);
        let next: Vec<_> = starts.skip(1).chain(current).collect();
        // All entries of a segment are older than the start of the next one.
        let num_free = next.iter().take_while(|&&next| next <= needed).count();
        let freed: Vec<_> = state.older.drain(..num_free).collect();
        for segment in freed {
            if state.spare.is_none() {
                state.spare = Some(segment.path);
            } else if let Err(error) = fs::remove_file(&segment.path) {
                let path = segment.path.display();
                tracing::warn!(%path, %error, "an old part of the update log cannot be removed");
            }
        }
    }

    /// Returns what there is of it.
    pub(crate) fn status(&self) -> LogStatus {
        let state = self.shared.lock();
        let current = state.current.as_ref().map(|current| &current.segment);
        let segments = || state.older.iter().chain(current);
        LogStatus {
            since: segments()
                .next()
                .map(|first| first.start.max(state.whole_from)),
            bytes: segments().map(|segment| segment.num_bytes).sum(),
            num_segments: segments().count(),
            is_written: current.is_some(),
            num_failures: state.num_failures,
        }
    }

    /// Returns how often it could not be written.
    pub(crate) fn num_failures(&self) -> u64 {
        self.shared.lock().num_failures
    }

    /// Returns the version until which all updates are in checkpoints or in the log. `None` if some are missing, because
    /// it has failed.
    pub(crate) fn whole_until(&self) -> Option<Version> {
        let state = self.shared.lock();
        (!state.has_gap).then_some(state.last_version)
    }

    /// Whether another checkpoint is due a while later.
    #[cfg(test)]
    pub(super) fn is_retried(&self) -> bool {
        self.shared.lock().retry_at.is_some()
    }

    /// Brings everything to the disk.
    #[cfg(test)]
    pub(super) fn sync(&self) {
        self.shared.sync();
    }

    /// Lets the current segment be written to another file.
    #[cfg(test)]
    pub(super) fn write_to(&self, file: File) {
        let mut state = self.shared.lock();
        state.current.as_mut().expect("it has begun").file = file;
    }

    /// Ends the log: its server may write nothing more, and gets an error if it tries. What was not synced yet
    /// is synced later, because somebody may wait to read it, which needs no disk.
    pub(crate) fn close(&self) {
        let mut state = self.shared.lock();
        state.is_replaced = true;
        state.retire();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the log until a checkpoint begins it anew, and says that one should be taken.
    fn fail(&self, state: &mut State, error: &io::Error) {
        let before = state.last_failure;
        state.fail(error);
        match before.is_some_and(|before| before.elapsed() < RETRY) {
            true => self.retry_later(state),
            false => self.fill(),
        }
    }

    fn retry_later(&self, state: &mut State) {
        state.retry_at = Some(Instant::now() + RETRY);
        // Who waits for a checkpoint to be due must learn when that is.
        self.became_full.notify_one();
    }

    /// Says that a checkpoint should be taken.
    fn fill(&self) {
        if !self.is_full.swap(true, Relaxed) {
            self.became_full.notify_one();
        }
    }

    /// Brings what was written to the disk. The server can write meanwhile.
    fn sync(&self) {
        let (files, is_directory_unsynced) = {
            let mut state = self.lock();
            let mut files = std::mem::take(&mut state.unsynced);
            if std::mem::take(&mut state.is_current_unsynced)
                && let Some(current) = &state.current
            {
                match current.file.try_clone() {
                    Ok(file) => files.push(file),
                    Err(error) => return self.fail(&mut state, &error),
                }
            }
            (files, std::mem::take(&mut state.is_directory_unsynced))
        };
        let mut synced = files.iter().map(File::sync_data);
        let synced = synced.try_for_each(|synced| synced);
        let synced = synced.and_then(|()| match is_directory_unsynced {
            true => sync_directory(&self.directory),
            false => Ok(()),
        });
        if let Err(error) = synced {
            self.fail(&mut self.lock(), &error);
        }
    }
}

impl State {
    /// Ends the current segment.
    fn retire(&mut self) {
        if let Some(current) = self.current.take() {
            self.older.push(current.segment);
            if std::mem::take(&mut self.is_current_unsynced) && self.is_synced {
                self.unsynced.push(current.file);
            }
        }
    }

    fn fail(&mut self, error: &io::Error) {
        tracing::warn!(
            %error,
            "the update log cannot be written; the training goes on without it until the next checkpoint"
        );
        self.num_failures += 1;
        self.last_failure = Some(Instant::now());
        self.has_gap = true;
        self.retire();
    }
}

fn sync_every(interval: Duration, ended: &Receiver<()>, shared: &Shared) {
    while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
        shared.sync();
    }
    shared.sync();
}
