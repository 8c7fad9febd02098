//! Event files for TensorBoard.
//!
//! [`TensorBoard`] is an [`Observer`] that writes them. The flag `--tensorboard DIR` of
//! `ps::cli::ShowArgs` makes one.
//!
//! ```
//! use ps::prelude::*;
//! use ps::tensorboard::TensorBoard;
//!
//! let device = select_device(default_device_name())?;
//! # let temporary = tempfile::tempdir()?;
//! # let directory = temporary.path().join("first");
//! Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
//!     .device(&device)
//!     .iterations(5)
//!     .observe(TensorBoard::new(&directory))
//!     .run()?;
//! let files = std::fs::read_dir(&directory)?;
//! assert_eq!(files.count(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The steps of TensorBoard are updates of the weights. Each point also has the time of day.
//!
//! | tag | what it shows |
//! |---|---|
//! | `loss/batches` | the mean loss of the batches whose gradients made the update |
//! | `loss/evaluation`, `accuracy` | the results on the test data; the accuracy is from 0 to 1 |
//! | `learning_rate` | the learning rate of the next update |
//! | `gradients_per_second` | applied gradients in the seconds before |
//! | `staleness` | a histogram of the applied gradients since the one before; the bucket of n reaches from n - 0.5 to n + 0.5 |
//!
//! # What is promised
//! - A point is in the file within about three seconds, so TensorBoard shows the training while it goes on.
//! - A killed process leaves records that TensorBoard reads. A record that is cut is the last one of its file, and
//!   TensorBoard skips it.
//! - After 4,096 points of a tag, only every second update gets one, after further 4,096 every fourth, and so on. A
//!   billion updates make about 15 MB. The losses in between are part of the mean.
//! - A training that goes on from a checkpoint writes a further file into its directory. This file says from which
//!   update it goes on, so TensorBoard drops the points that the first file has after it. The same
//!   holds for servers that are recovered.
//! - A directory with the files of another run is left as it is. The new run goes to the same name with a number,
//!   such as `one-2`.
//! - If the directory cannot be written, that is logged, and the training goes on.

mod curves;
mod directory;
mod file;
mod record;

use std::path::PathBuf;

use self::curves::Curves;
use self::file::EventFile;
use crate::observe::{Event, Observer, RunStarted};

/// Writes event files for TensorBoard; see the [module](self). Nothing is made before the run starts.
#[derive(Debug)]
pub struct TensorBoard {
    /// As the user named it.
    wanted: PathBuf,
    open: Option<(EventFile, Curves)>,
}

impl TensorBoard {
    /// Makes an observer that writes to this directory.
    #[must_use]
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            wanted: directory.into(),
            open: None,
        }
    }

    fn begin(&mut self, started: &RunStarted) {
        match directory::create_file(&self.wanted, started) {
            Ok(file) => {
                let (wanted, instead) = (self.wanted.display(), file.path().parent());
                if let Some(instead) = instead.filter(|instead| *instead != self.wanted) {
                    let instead = instead.display();
                    tracing::warn!(there = %wanted, %instead, "this directory has another run already; writing to another one");
                }
                self.open = Some((file, Curves::new(started)));
            }
            Err(error) => {
                let path = self.wanted.display();
                tracing::warn!(%path, %error, "nothing is written for TensorBoard; the training goes on");
            }
        }
    }
}

impl Observer for TensorBoard {
    fn observe(&mut self, event: &Event) {
        if let Event::RunStarted(started) = event {
            self.begin(started);
        }
        let Some((file, curves)) = &mut self.open else {
            return;
        };
        curves.observe(event, file.buffer());
        let written = match event {
            Event::RunEnded(_) => file.flush(),
            _ => file.flush_now_and_then(),
        };
        if let Err(error) = written {
            let path = file.path().display();
            tracing::warn!(%path, %error, "the file for TensorBoard cannot be written; the training goes on");
        }
    }
}
