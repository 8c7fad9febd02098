//! The directory of a run: what was asked for, what happened, and pictures of it.
//!
//! [`RunDir`] is an [`Observer`](crate::observe::Observer) that writes these files, and
//! [`Trainer::run_dir`](crate::Trainer::run_dir) adds one to a training:
//!
//! | file | what it holds |
//! |---|---|
//! | `run.json` | settings, versions, command line, and when and where the run started |
//! | `events.jsonl` | the [events](crate::observe::Event), one JSON object per line |
//! | `report.json` | the final report, with the steps and times of each worker |
//! | `curves.svg`, `curves.png` | loss and accuracy over updates and over time, and a histogram of the staleness |
//! | `timeline.svg`, `timeline.png` | how each worker spent its time |
//!
//! ```
//! use ps::prelude::*;
//! use ps::runs::RunRecord;
//!
//! let device = select_device(default_device_name())?;
//! # let temporary = tempfile::tempdir()?;
//! # let directory = temporary.path().join("first");
//! let report = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .iterations(5)
//!     .run_dir(&directory)
//!     .run()?;
//! let record = RunRecord::read(&directory)?;
//! assert_eq!(record.steps().count() as u64, report.num_applied);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is promised
//! - Nothing here ends a training. If the disk is full or the directory cannot be written, that is logged,
//!   and events are left out until it can be written again.
//! - A process may be killed at any time. A last line that is cut is skipped by the reader, and removed when
//!   the run goes on.
//! - `events.jsonl` takes at most about 64 MiB. If there are more events, only every second step of each
//!   worker is kept, then every fourth, and so on; the same holds for evaluations and the states of servers. A
//!   [`StepsThinned`](crate::observe::StepsThinned) in the file says so. All steps are counted in
//!   `report.json`.
//! - A directory that has a run already is left as it is. The new run goes to the same name with a number,
//!   such as `one-2`. A training that goes on from a checkpoint continues its own file.
//!
//! [`compare`] puts several runs into one table and one picture.

mod compare;
mod events;
mod picture;
mod raster;
mod record;
mod report;
mod series;
mod writer;

pub use compare::{Comparison, compare};
pub use record::{RunError, RunRecord};
pub use report::{FinalReport, WorkerSummary};
pub use writer::RunDir;

/// The names of the files.
const RUN: &str = "run.json";
const EVENTS: &str = "events.jsonl";
const REPORT: &str = "report.json";
