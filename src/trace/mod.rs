//! A training as a trace, for Perfetto (<https://ui.perfetto.dev>) and Chrome (`chrome://tracing`).
//!
//! [`Trace`] is an observer. It writes a file in Chrome's trace format (an array of JSON objects), in which one gradient
//! can be followed from its batch to the update at every server. A worker waits for the batch, computes, sends; the first server
//! holds the push, and makes the update; the worker receives the next weights. Each other server has its part of the
//! gradient from its arrival until it has made its part of the update. Each server is drawn in the process where it is. Arrows
//! connect the worker with each server. They and the slices of the gradient at the servers have its name,
//! `gradient WORKER.INCARNATION.CLOCK`. The numbers of the worker's step name it, too.
//!
//! ```
//! use ps::prelude::*;
//! use ps::trace::Trace;
//!
//! # let directory = tempfile::tempdir()?;
//! let file = directory.path().join("run.json");
//! let device = select_device(default_device_name())?;
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .workers(2)
//!     .iterations(3)
//!     .observe(Trace::new(&file))
//!     .run()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What the times mean
//! A worker measures the parts of its step by its own clock, and the driver knows when the step ended, as exactly as it
//! knows the times of the run's events (see [`observe`](crate::observe)). The times for sending and for receiving are
//! not measured separately, so each is drawn with half of their sum. The times of the servers follow from that. So the
//! lengths of the parts of a worker's step are exact. The positions of different workers relative to each other are
//! exact to within half of a transfer.
//!
//! The other servers measure by their own clocks, too: how long they have had a part when they begin the update, and how long
//! that takes. No clock is compared with another one. The driver asks them four times per second, and places what they
//! tell when the answer arrives. So their slices are as long as they were, but up to the time of an answer too late: on a busy
//! machine, some milliseconds. A part that seems to come before its gradient was sent is drawn later. A slice that seems
//! to begin before the one before it has ended is drawn shorter; the numbers of the gradient's slice say how long it
//! waited, and how long the update took. An update is drawn once, for the first of its gradients. If another one seems to
//! have come after it, no arrow leads from that one to the update.
//!
//! A driver's own loop tells of its calls ([`LoopCall`](crate::observe::LoopCall);
//! [`LastingWorker`](crate::prelude::LastingWorker) does it by itself). They are drawn from the question to the moment when the loop took
//! the answer: the gradients of each worker, and the updates. If two of them overlap, the later one is
//! drawn from the end of the earlier one. What happens inside a call is not known. A loop that tells of no calls, and the
//! workers of `http_server`, have no steps in the trace.
//!
//! # Bounds
//! The file is created when the training begins, and written as it goes on. If the process dies, what is there can be
//! opened: the format needs no end. After [`MAX_STEPS`] steps the trace ends, which the log says. With several servers it
//! ends earlier: a part at another server counts as a third of a step. A call or a step of a driver's own loop counts as
//! much. After the end of the trace, the servers still keep records, and the driver still fetches them. If the file cannot
//! be written, the log says so once, and the training goes on.
//!
//! | file | what it holds |
//! |---|---|
//! | `entries` | makes entries of events; pure |
//! | `mod` | writes them |

mod entries;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use entries::Entries;

use crate::observe::{Event, Observer};

/// After this many steps the trace ends. Perfetto opens files of this size: about 200 MB.
pub const MAX_STEPS: u64 = 100_000;

/// How long entries stay in memory at most, while others arrive.
const FLUSH_AFTER: Duration = Duration::from_secs(1);

/// Writes a training as a trace. For an example, see the [module](self).
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    /// `None` before the training begins, after its end, and after an error.
    file: Option<BufWriter<File>>,
    entries: Entries,
    flushed: Instant,
}

impl Trace {
    /// Makes an observer that writes this file. One of that name is written over when the training begins.
    /// Its directory is made.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            entries: Entries::default(),
            flushed: Instant::now(),
        }
    }

    fn write(&mut self, event: &Event) -> io::Result<()> {
        if let Event::RunStarted(_) = event {
            if let Some(directory) = self.path.parent() {
                fs::create_dir_all(directory)?;
            }
            let mut file = BufWriter::new(File::create(&self.path)?);
            file.write_all(b"[\n")?;
            self.file = Some(file);
            self.entries = Entries::default();
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        for entry in self.entries.of(event) {
            serde_json::to_writer(&mut *file, &entry)?;
            file.write_all(b",\n")?;
        }
        let is_over = self.entries.are_as_many_as(MAX_STEPS);
        if is_over {
            let path = self.path.display();
            tracing::info!(%path, "the trace ends here: it is as large as one of {MAX_STEPS} steps");
        }
        if is_over || matches!(event, Event::RunEnded(_)) {
            // The array's last element has no comma behind it.
            serde_json::to_writer(&mut *file, &entries::driver())?;
            file.write_all(b"\n]\n")?;
            file.flush()?;
            self.file = None;
        } else if self.flushed.elapsed() >= FLUSH_AFTER {
            file.flush()?;
            self.flushed = Instant::now();
        }
        Ok(())
    }
}

impl Observer for Trace {
    fn follows_gradients(&self) -> bool {
        true
    }

    fn observe(&mut self, event: &Event) {
        if let Err(error) = self.write(event) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "the trace cannot be written; the training goes on without it");
            self.file = None;
        }
    }
}
