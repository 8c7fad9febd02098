//! Reads the directory of a run.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use super::{EVENTS, FinalReport, REPORT};
use crate::observe::{Evaluated, Event, RunStarted, SettledStep, Tally};

/// An error of the library that reads JSON.
type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why the directory of a run cannot be read or compared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The directory has no file of events.
    #[error(
        "{} is not the directory of a run: it has no {EVENTS}. Name a directory that was given to `--run-dir`",
        .path.display()
    )]
    NotARun {
        /// The directory that was named.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// The file that was to be read.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// A line of the file of events is no event.
    #[error("line {line} of {} is not an event: the file is damaged, or of another program", .path.display())]
    BadLine {
        /// The file of events.
        path: PathBuf,
        /// The number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        #[source]
        source: Cause,
    },
    /// The file of events does not begin with the start of a run.
    #[error("{} does not begin with the start of a run, so it is of no use", .path.display())]
    NoStart {
        /// The file of events.
        path: PathBuf,
    },
    /// The report is no report.
    #[error("{} is not a report of a run", .path.display())]
    BadReport {
        /// The file with the report.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: Cause,
    },
    /// A picture or table cannot be written.
    #[error("cannot write {}", .path.display())]
    Write {
        /// The file that was to be written.
        path: PathBuf,
        /// Why it cannot be written.
        #[source]
        source: io::Error,
    },
    /// A picture cannot be drawn.
    #[error("cannot draw a picture: {reason}")]
    Draw {
        /// Why it cannot be drawn.
        reason: String,
    },
    /// No run was named.
    #[error("there is nothing to compare: name the directories of one or more runs")]
    NoRuns,
}

/// What the directory of a run says.
#[derive(Clone, Debug)]
pub struct RunRecord {
    /// The directory that was read.
    pub path: PathBuf,
    /// The settings and the start. If the run went on later, those of its first process.
    pub started: RunStarted,
    /// The final report. `None` if the run has not ended, or was killed.
    pub report: Option<FinalReport>,
    /// The events, with times since the first start. The time in which no process ran is left out.
    events: Vec<Event>,
    /// Of the steps of each worker, every so many are there.
    kept_every: u64,
}

impl RunRecord {
    /// Reads a directory. A last line that is cut is skipped: the process was killed when it wrote it.
    ///
    /// # Errors
    /// If it is not the directory of a run, or a file is damaged.
    pub fn read(path: impl Into<PathBuf>) -> Result<Self, RunError> {
        let path = path.into();
        let (file, name) = open(&path)?;
        let (events, kept_every) = read_events(BufReader::new(file), &name)?;
        let started = events.iter().find_map(|event| match event {
            Event::RunStarted(started) => Some((**started).clone()),
            _ => None,
        });
        let Some(started) = started else {
            return Err(RunError::NoStart { path: name });
        };
        Ok(Self {
            report: read_report(&path.join(REPORT))?,
            path,
            started,
            events,
            kept_every,
        })
    }

    /// Returns the name of the directory.
    #[must_use]
    pub fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or(self.path.as_os_str());
        name.to_string_lossy().into_owned()
    }

    /// Returns all events that are in the file, in their order. Their times go on if the run went on later.
    pub fn events(&self) -> impl Iterator<Item = &Event> + Clone {
        self.events.iter()
    }

    /// Returns the steps that are in the file.
    pub fn steps(&self) -> impl Iterator<Item = &SettledStep> + Clone {
        self.events.iter().filter_map(|event| match event {
            Event::Step(step) => Some(step),
            _ => None,
        })
    }

    /// Returns the evaluations that are in the file.
    pub fn evaluations(&self) -> impl Iterator<Item = &Evaluated> + Clone {
        self.events.iter().filter_map(|event| match event {
            Event::Evaluated(evaluated) => Some(evaluated),
            _ => None,
        })
    }

    /// Returns n if only every n-th step of each worker is in the file; 1 if all are.
    #[must_use]
    pub fn kept_every(&self) -> u64 {
        self.kept_every
    }

    /// Returns how long the run took, in seconds, without the time in which no process ran.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.events.iter().map(Event::time).fold(0.0, f64::max)
    }

    /// Counts the events that are in the file.
    #[must_use]
    pub fn tally(&self) -> Tally {
        let mut tally = Tally::default();
        self.events.iter().for_each(|event| tally.count(event));
        tally
    }
}

fn open(path: &Path) -> Result<(File, PathBuf), RunError> {
    let name = path.join(EVENTS);
    match File::open(&name) {
        Ok(file) => Ok((file, name)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(RunError::NotARun {
            path: path.to_owned(),
        }),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(RunError::NotARun {
            path: path.to_owned(),
        }),
        Err(source) => Err(RunError::Read { path: name, source }),
    }
}

fn read_events(mut reader: impl io::BufRead, path: &Path) -> Result<(Vec<Event>, u64), RunError> {
    let (mut events, mut kept_every, mut text) = (Vec::<Event>::new(), 1, Vec::new());
    let (mut offset, mut latest) = (0.0, 0.0_f64);
    for line in 1.. {
        text.clear();
        let read = reader.read_until(b'\n', &mut text);
        read.map_err(|source| RunError::Read {
            path: path.to_owned(),
            source,
        })?;
        if text.last() != Some(&b'\n') {
            // The end, or a line that is cut.
            break;
        }
        let event = serde_json::from_slice(&text).map_err(|source| RunError::BadLine {
            path: path.to_owned(),
            line,
            source: source.into(),
        })?;
        match &event {
            // Another process goes on.
            Event::RunStarted(_) => offset = latest,
            Event::StepsThinned(thinned) => kept_every = thinned.kept_every.max(1),
            _ => {}
        }
        let event = event.later(offset);
        latest = latest.max(event.time());
        events.push(event);
    }
    Ok((events, kept_every))
}

fn read_report(path: &Path) -> Result<Option<FinalReport>, RunError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(RunError::Read {
                path: path.to_owned(),
                source,
            });
        }
    };
    let report = serde_json::from_slice(&text).map_err(|source| RunError::BadReport {
        path: path.to_owned(),
        source: source.into(),
    })?;
    Ok(Some(report))
}
