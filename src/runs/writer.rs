//! Writes the directory of a run while it goes on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::events::{EventsFile, MAX_BYTES};
use super::picture;
use super::record::RunRecord;
use super::report::FinalReport;
use super::{EVENTS, REPORT, RUN};
use crate::observe::{Event, Observer, RunEnded, RunStarted, Settings, Tally, Versions};

/// How many names with a number are tried if a directory has a run already.
const MAX_NAMES: u32 = 10_000;

/// Writes the directory of a run; see the [module](super). Nothing is made before the run starts.
///
/// ```
/// use ps::observe::Observer;
/// use ps::runs::RunDir;
///
/// let observers: Vec<Box<dyn Observer>> = vec![Box::new(RunDir::new("runs/first"))];
/// # drop(observers);
/// ```
#[derive(Debug)]
pub struct RunDir {
    /// As the user named it.
    wanted: PathBuf,
    open: Option<Open>,
    tally: Tally,
    max_bytes: u64,
}

/// A directory that takes this run.
#[derive(Debug)]
struct Open {
    path: PathBuf,
    events: EventsFile,
}

/// What `run.json` says.
#[derive(Debug, Serialize, Deserialize)]
struct Run {
    settings: Settings,
    versions: Versions,
    /// When the run started, in seconds since 1970.
    unix_time: f64,
    /// The words of the command line.
    command: Vec<String>,
}

impl RunDir {
    /// Makes an observer that writes to this directory.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            wanted: directory.into(),
            open: None,
            tally: Tally::default(),
            max_bytes: MAX_BYTES,
        }
    }

    fn begin(&mut self, started: &RunStarted) {
        match Open::find(&self.wanted, started, self.max_bytes) {
            Ok(open) => {
                if open.path != self.wanted {
                    let (there, instead) = (self.wanted.display(), open.path.display());
                    tracing::warn!(%there, %instead, "this directory has a run already; writing to another one");
                }
                self.open = Some(open);
            }
            Err(error) => {
                let path = self.wanted.display();
                tracing::warn!(%path, %error, "nothing is written about this run; the training goes on");
            }
        }
    }

    fn end(&mut self, end: &RunEnded) {
        let Some(Open { path, mut events }) = self.open.take() else {
            return;
        };
        if let Err(error) = events.flush() {
            warn(&path, &error);
        }
        let report = FinalReport::new(end, &self.tally, events.every(), events.num_lost());
        if let Err(error) = write_json(&path.join(REPORT), &report) {
            warn(&path, &error);
        }
        // They are made of the files, so those who draw them later get the same.
        let pictures = RunRecord::read(&path).and_then(|record| picture::draw_run(&record, &path));
        match pictures {
            Ok(()) => tracing::info!(path = %path.display(), "the run is described there"),
            Err(error) => warn(&path, &error),
        }
    }
}

impl Observer for RunDir {
    fn observe(&mut self, event: &Event) {
        self.tally.count(event);
        // The result is what matters later.
        if matches!(event, Event::Evaluating(_)) {
            return;
        }
        if let Event::RunStarted(started) = event {
            self.begin(started);
        }
        if let Some(open) = &mut self.open
            && let Err(error) = open.events.add(event)
        {
            warn(&open.path, &error);
        }
        if let Event::RunEnded(end) = event {
            self.end(end);
        }
    }
}

impl Open {
    /// Opens a directory without a run, or the one of the run that goes on.
    fn find(wanted: &Path, started: &RunStarted, max_bytes: u64) -> io::Result<Self> {
        let (path, is_new) = place(wanted, started)?;
        fs::create_dir_all(&path)?;
        if is_new {
            let run = Run {
                settings: started.settings.clone(),
                versions: started.versions.clone(),
                unix_time: started.unix_time,
                command: std::env::args_os()
                    .map(|word| word.to_string_lossy().into_owned())
                    .collect(),
            };
            write_json(&path.join(RUN), &run)?;
        }
        let events = EventsFile::open(&path.join(EVENTS), max_bytes)?;
        // It is of an earlier end.
        let _ = fs::remove_file(path.join(REPORT));
        Ok(Self { path, events })
    }
}

/// Finds a directory without a run, or the last one with the run that goes on. Returns whether it is without one.
fn place(wanted: &Path, started: &RunStarted) -> io::Result<(PathBuf, bool)> {
    let mut own = None;
    for number in 1..MAX_NAMES {
        let path = match number {
            1 => wanted.to_owned(),
            _ => numbered(wanted, number),
        };
        if !path.join(EVENTS).try_exists()? {
            return Ok(own.map_or((path, true), |own| (own, false)));
        }
        if goes_on(&path, started) {
            own = Some(path);
        }
    }
    Err(io::Error::other("too many runs have this name"))
}

/// Whether the run in this directory is the one that now goes on from a checkpoint.
fn goes_on(path: &Path, started: &RunStarted) -> bool {
    if started.first_version.0 == 0 {
        return false;
    }
    let run = fs::read(path.join(RUN)).ok();
    let run = run.and_then(|text| serde_json::from_slice::<Run>(&text).ok());
    let now = &started.settings;
    run.is_some_and(|Run { settings, .. }| {
        let same = |settings: &Settings| {
            (
                settings.model.clone(),
                settings.num_weights,
                settings.num_examples,
                settings.batch_size,
                settings.seed,
                settings.optimizer.clone(),
            )
        };
        same(&settings) == same(now)
    })
}

/// Returns the name with a number behind it.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}-{number}"))
}

/// Writes a file as a whole or not at all.
fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    let temporary = path.with_extension("json.tmp");
    fs::write(&temporary, text)?;
    fs::rename(temporary, path)
}

fn warn(path: &Path, error: &dyn std::error::Error) {
    let error = ps_actors::actor::error_chain(error);
    let path = path.display();
    tracing::warn!(%path, %error, "the directory of the run cannot be written; the training goes on");
}

#[cfg(test)]
mod tests {
    use ps_actors::ids::Version;

    use super::*;

    fn run(seed: u64, first_version: u64) -> RunStarted {
        RunStarted {
            time: 0.0,
            unix_time: 1.7e9,
            settings: Settings {
                seed,
                ..Settings::default()
            },
            versions: Versions::here(),
            first_version: Version(first_version),
        }
    }

    #[test]
    fn a_run_that_goes_on_takes_the_last_directory_of_its_own() {
        let temporary = tempfile::tempdir().unwrap();
        let wanted = temporary.path().join("deep").join("one");
        let place = |seed, version| {
            let mut open = Open::find(&wanted, &run(seed, version), MAX_BYTES).unwrap();
            let started = Event::RunStarted(Box::new(run(seed, version)));
            open.events.add(&started).unwrap();
            let name = open.path.file_name().unwrap();
            name.to_string_lossy().into_owned()
        };
        assert_eq!(place(1, 0), "one");
        // The report of a run that has ended.
        fs::write(wanted.join(REPORT), "{}").unwrap();
        // The same settings, but it does not go on.
        assert_eq!(place(1, 0), "one-2");
        assert_eq!(place(2, 0), "one-3");
        assert_eq!(place(1, 10), "one-2");
        assert_eq!(place(2, 10), "one-3");
        assert!(
            wanted.join(REPORT).exists(),
            "the first run is left as it is"
        );
        // Its directory is gone.
        assert_eq!(place(3, 10), "one-4");
    }
}
