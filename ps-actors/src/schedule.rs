//! The schedule of a run: which gradients made which update, in which order, and on which weights each was
//! computed.
//!
//! A gradient depends only on its worker, its clock and the weights that it was computed on. So the schedule
//! of an asynchronous run, which depends on time and chance, is all that is needed to compute the same
//! weights again. The first server of a group writes it while it decides ([`Record`]). A few dozen bytes
//! per gradient are enough.
//!
//! The file is a line, and then frames (`frames.rs`). The first one says which run it is. Each other one
//! is an update. If the process or the disk fails, at most the last frame is cut. It is then skipped.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use actix::Message;
use serde::{Deserialize, Serialize};

use crate::frames::{self, Frame, FrameReader, Next, little_endian};
use crate::ids::{GradientId, Version};
use crate::server::{Reduction, Update};
use crate::weights::Weights;

const FIRST_LINE: &[u8] = b"ps schedule 1\n";

/// All frames of all schedules have the same one, because no schedule is written over another one.
const SALT: u64 = 0;

/// Lets the first server of a group write the schedule of its updates from now on. It works only for a server
/// of this process, because no other process may choose a file here.
#[derive(Debug, Message)]
#[rtype(result = "()")]
pub struct Record(pub ScheduleWriter);

/// One update of a [`Schedule`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduledUpdate {
    /// The version of the weights that the update made.
    pub version: Version,
    /// The learning rate with which the update was made.
    pub learning_rate: f64,
    /// How its gradients were combined into one.
    pub reduction: Reduction,
    /// Its gradients, in the order in which they were added.
    pub gradients: Vec<ScheduledGradient>,
    /// The weights before the update. `None` if it was decided together with the update before it, or if the file is
    /// of a version of this program that did not write it.
    pub weights: Option<WeightsChecksum>,
}

/// A checksum of the weights of the first server, which are the first ones of the model. If a replay finds another
/// one, the weights differ.
///
/// ```
/// use ps_actors::schedule::WeightsChecksum;
/// use ps_actors::weights::{Layout, Weights};
///
/// let weights = |last| Weights::initial(Layout::flat(3), vec![1.0, 2.0, last]);
/// let checksum = |last, len| WeightsChecksum::of(&weights(last), len);
/// assert_eq!(checksum(3.0, 2), checksum(4.0, 2));
/// assert_ne!(checksum(3.0, 3), checksum(4.0, 3));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightsChecksum {
    /// How many weights it is of.
    pub num_weights: usize,
    /// The CRC-32 of their little-endian bytes.
    pub crc32: u32,
}

impl WeightsChecksum {
    /// Computes the checksum of the first `num_weights` weights, or of all if there are fewer.
    #[must_use]
    pub fn of(weights: &Weights, num_weights: usize) -> Self {
        let mut crc = crc32fast::Hasher::new();
        let mut num_left = num_weights;
        for segment in weights.segments() {
            let data = segment.data();
            let data = &data[..data.len().min(num_left)];
            crc.update(&little_endian(data));
            num_left -= data.len();
        }
        Self {
            num_weights: num_weights - num_left,
            crc32: crc.finalize(),
        }
    }
}

/// An update of an older file.
#[derive(Serialize, Deserialize)]
struct UpdateAlone {
    version: Version,
    learning_rate: f64,
    reduction: Reduction,
    gradients: Vec<ScheduledGradient>,
}

/// One gradient of an update.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScheduledGradient {
    /// The id of the gradient.
    pub id: GradientId,
    /// The version of the weights that it was computed on.
    pub computed_on: Version,
    /// Its Euclidean norm. If a replay finds another one, the gradients differ.
    pub norm: f64,
    /// How many examples its batch had; 0 if that is not known.
    pub num_examples: u64,
}

impl ScheduledUpdate {
    pub(crate) fn of(
        update: &Update,
        learning_rate: f64,
        weights: Option<WeightsChecksum>,
    ) -> Self {
        let gradients = update.gradients.iter();
        Self {
            version: update.version,
            learning_rate,
            reduction: update.reduction,
            gradients: gradients
                .map(|one| ScheduledGradient {
                    id: one.id,
                    computed_on: one.computed_on,
                    norm: one.norm,
                    num_examples: one.num_examples,
                })
                .collect(),
            weights,
        }
    }

    fn read(frame: &Frame) -> Result<Self, String> {
        frame.value().or_else(|reason| {
            let UpdateAlone {
                version,
                learning_rate,
                reduction,
                gradients,
            } = frame.value().map_err(|_: String| reason)?;
            Ok(Self {
                version,
                learning_rate,
                reduction,
                gradients,
                weights: None,
            })
        })
    }
}

/// Why a schedule could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScheduleError {
    /// The file cannot be written or read.
    #[error("cannot use {} as a schedule", path.display())]
    Io {
        /// The file that was to be written or read.
        path: PathBuf,
        /// Why the operating system did not do it.
        #[source]
        source: io::Error,
    },
    /// The file is not a schedule.
    #[error("{} is not a schedule of a run: {reason}", path.display())]
    NoSchedule {
        /// The file that was read as a schedule.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file has the schedule of another run.
    #[error("{} has the schedule of another run: {difference}", path.display())]
    OtherRun {
        /// The file with that schedule.
        path: PathBuf,
        /// What differs, with its value here and there.
        difference: String,
    },
}

/// Writes the schedule of a run to a file.
///
/// ```
/// use std::collections::BTreeMap;
///
/// use ps_actors::rule::Sgd;
/// use ps_actors::schedule::{Record, Schedule, ScheduleWriter};
/// # use ps_actors::ids::{Clock, GradientId, Incarnation, WorkerId};
/// use ps_actors::ids::Version;
/// use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
/// use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("run.schedule");
/// let facts = BTreeMap::from([("seed".to_owned(), "7".to_owned())]);
///
/// let initial = Weights::initial(Layout::flat(2), vec![0.0; 2]);
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
/// server.ask(Record(ScheduleWriter::create(&path, &facts)?)).wait()?;
/// # let id = GradientId { worker: WorkerId(0), incarnation: Incarnation(1), clock: Clock(0) };
/// # let gradient = Gradient::new(vec![3.0, 4.0]);
/// # let update =
/// #     GradientUpdate { id, computed_on: Version(0), loss: 0.0, num_examples: 1, gradient };
/// server.ask(ApplyGradients::mean([update])).flatten().wait()?;
///
/// let schedule = Schedule::read(&path)?;
/// assert_eq!(schedule.facts, facts);
/// let [update] = &schedule.updates[..] else { panic!("one update") };
/// assert_eq!((update.version, update.gradients[0].norm), (Version(1), 5.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ScheduleWriter {
    path: PathBuf,
    /// `None` after a failure: updates are missing then, so nothing more is written.
    file: Option<File>,
}

impl ScheduleWriter {
    /// Creates the file. `facts` are statements about the run, such as its seed, which a replay compares.
    ///
    /// # Errors
    /// If the file exists already, or cannot be written.
    pub fn create(path: &Path, facts: &BTreeMap<String, String>) -> Result<Self, ScheduleError> {
        let failed = |source| ScheduleError::Io {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new().write(true).create_new(true).open(path);
        let mut file = file.map_err(failed)?;
        file.write_all(FIRST_LINE).map_err(failed)?;
        frames::write(&mut file, SALT, facts, &[]).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file: Some(file),
        })
    }

    /// Continues the schedule of the same run after update `from`, when the run goes on from a checkpoint of
    /// this version. What was written of later updates is removed.
    ///
    /// # Errors
    /// If the file is not the schedule of this run, or lacks updates before this version.
    pub fn resume(
        path: &Path,
        facts: &BTreeMap<String, String>,
        from: Version,
    ) -> Result<Self, ScheduleError> {
        let failed = |source| ScheduleError::Io {
            path: path.to_owned(),
            source,
        };
        let schedule = Schedule::read(path)?;
        schedule.check(facts)?;
        let kept = schedule
            .updates
            .iter()
            .take_while(|update| update.version <= from);
        let num_kept = kept.count();
        let last = num_kept
            .checked_sub(1)
            .map(|last| schedule.updates[last].version);
        if last.unwrap_or_default() != from {
            let reason = format!("it has no update that made {from}");
            let path = path.to_owned();
            return Err(ScheduleError::NoSchedule { path, reason });
        }
        let mut file = OpenOptions::new().write(true).open(path).map_err(failed)?;
        let end = schedule.ends[num_kept];
        file.set_len(end).map_err(failed)?;
        file.seek(SeekFrom::Start(end)).map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            file: Some(file),
        })
    }

    pub(crate) fn write(&mut self, update: &ScheduledUpdate) {
        let Some(file) = &mut self.file else {
            return;
        };
        if let Err(error) = frames::write(file, SALT, update, &[]) {
            let (path, version) = (self.path.display(), update.version);
            tracing::warn!(%path, %error, %version, "the schedule ends here; the training goes on");
            self.file = None;
        }
    }
}

/// The schedule of a run, or of its beginning.
#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    /// The file that it was read from.
    pub path: PathBuf,
    /// Statements about the run.
    pub facts: BTreeMap<String, String>,
    /// The updates, in order.
    pub updates: Vec<ScheduledUpdate>,
    /// Whether the file ends in the middle of an update.
    pub is_cut: bool,
    /// Where the first update begins, and where each update ends, in bytes.
    ends: Vec<u64>,
}

impl Schedule {
    /// Reads a schedule. If the end of the file is cut or damaged, it is skipped.
    ///
    /// # Errors
    /// If the file cannot be read, or is not a schedule.
    pub fn read(path: &Path) -> Result<Self, ScheduleError> {
        let failed = |source| ScheduleError::Io {
            path: path.to_owned(),
            source,
        };
        let none = |reason: &str| ScheduleError::NoSchedule {
            path: path.to_owned(),
            reason: reason.to_owned(),
        };
        let mut file = BufReader::new(File::open(path).map_err(failed)?);
        let mut line = Vec::new();
        let first = file.by_ref().take(FIRST_LINE.len() as u64);
        { first }.read_to_end(&mut line).map_err(failed)?;
        if line != FIRST_LINE {
            return Err(none("its first line is another one, or of a later format"));
        }
        let mut file = FrameReader::new(file, SALT, FIRST_LINE.len() as u64).map_err(failed)?;
        let facts = match file.next().map_err(failed)? {
            Next::Frame(frame) => frame.value().map_err(|reason| none(&reason))?,
            Next::End | Next::Cut => return Err(none("it does not say which run it is of")),
        };
        let (mut updates, mut ends) = (Vec::<ScheduledUpdate>::new(), vec![file.position()]);
        let is_cut = loop {
            let frame = match file.next().map_err(failed)? {
                Next::Frame(frame) => frame,
                Next::End => break false,
                Next::Cut => break true,
            };
            let update = ScheduledUpdate::read(&frame).map_err(|reason| none(&reason))?;
            let before = updates.last().map(|before| before.version);
            if before.is_some_and(|before| update.version != before.next()) {
                return Err(none(&format!("{} comes after {before:?}", update.version)));
            }
            updates.push(update);
            ends.push(file.position());
        };
        Ok(Self {
            path: path.to_owned(),
            facts,
            updates,
            is_cut,
            ends,
        })
    }

    /// Checks that the schedule is of a run with these facts.
    ///
    /// # Errors
    /// If it is not. The error names the first difference.
    pub fn check(&self, facts: &BTreeMap<String, String>) -> Result<(), ScheduleError> {
        let differ = |name: &String| {
            let (there, here) = (self.facts.get(name), facts.get(name));
            let show =
                |value: Option<&String>| value.map_or("unknown".to_owned(), |v| format!("`{v}`"));
            (there != here)
                .then(|| format!("{name} is {} there, and {} here", show(there), show(here)))
        };
        let mut names = facts.keys().chain(self.facts.keys());
        match names.find_map(differ) {
            None => Ok(()),
            Some(difference) => Err(ScheduleError::OtherRun {
                path: self.path.clone(),
                difference,
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Clock, Incarnation, WorkerId};

    fn update(version: u64) -> ScheduledUpdate {
        let gradient = |worker| ScheduledGradient {
            id: GradientId {
                worker: WorkerId(worker),
                incarnation: Incarnation(1),
                clock: Clock(version),
            },
            computed_on: Version(version - 1),
            norm: 0.1 * version as f64,
            num_examples: 32,
        };
        ScheduledUpdate {
            version: Version(version),
            learning_rate: 0.1,
            reduction: Reduction::Sum,
            gradients: (0..2).map(gradient).collect(),
            weights: Some(WeightsChecksum {
                num_weights: 7,
                crc32: version as u32,
            }),
        }
    }

    fn facts(seed: u64) -> BTreeMap<String, String> {
        BTreeMap::from([("the seed".to_owned(), seed.to_string())])
    }

    fn written(path: &Path, num: u64) {
        let mut writer = ScheduleWriter::create(path, &facts(1)).unwrap();
        (1..=num).for_each(|version| writer.write(&update(version)));
    }

    #[test]
    fn a_cut_or_damaged_end_is_skipped_wherever_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("whole");
        written(&path, 5);
        let whole = Schedule::read(&path).unwrap();
        assert_eq!((whole.updates.len(), whole.is_cut), (5, false));
        assert_eq!(whole.updates[4], update(5));
        let bytes = std::fs::read(&path).unwrap();
        let first = whole.ends[0] as usize;
        let path = directory.path().join("cut");
        for len in 0..bytes.len() {
            std::fs::write(&path, &bytes[..len]).unwrap();
            let read = Schedule::read(&path);
            if len < first {
                assert!(read.is_err(), "{len}");
                continue;
            }
            let read = read.unwrap();
            let num_whole = whole.ends.iter().filter(|&&end| end <= len as u64).count() - 1;
            assert_eq!(read.updates, whole.updates[..num_whole], "{len}");
            assert_eq!(read.is_cut, !whole.ends.contains(&(len as u64)), "{len}");
        }
        for at in first..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&path, damaged).unwrap();
            let read = Schedule::read(&path).unwrap();
            let num_whole = whole.ends.iter().filter(|&&end| end <= at as u64).count() - 1;
            assert_eq!(read.updates, whole.updates[..num_whole], "byte {at}");
            assert!(read.is_cut);
        }
    }

    /// Older programs wrote nothing about the weights.
    #[test]
    fn an_older_file_is_read_and_continued() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let mut writer = ScheduleWriter::create(&path, &facts(1)).unwrap();
        let ScheduledUpdate {
            version,
            learning_rate,
            reduction,
            gradients,
            ..
        } = update(1);
        let alone = UpdateAlone {
            version,
            learning_rate,
            reduction,
            gradients,
        };
        let file = writer.file.as_mut().unwrap();
        frames::write(file, SALT, &alone, &[]).unwrap();
        let mut writer = ScheduleWriter::resume(&path, &facts(1), Version(1)).unwrap();
        writer.write(&update(2));
        let old = ScheduledUpdate {
            weights: None,
            ..update(1)
        };
        assert_eq!(Schedule::read(&path).unwrap().updates, [old, update(2)]);
    }

    #[test]
    fn a_run_that_goes_on_from_a_checkpoint_continues_its_schedule_and_no_other() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        written(&path, 5);
        let refused = ScheduleWriter::create(&path, &facts(1)).unwrap_err();
        assert!(matches!(refused, ScheduleError::Io { .. }), "{refused}");
        let refused = ScheduleWriter::resume(&path, &facts(2), Version(3)).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("the seed is `1` there, and `2` here"),
            "{refused}"
        );
        let refused = ScheduleWriter::resume(&path, &facts(1), Version(9)).unwrap_err();
        assert!(
            refused
                .to_string()
                .contains("no update that made version 9"),
            "{refused}"
        );

        // The checkpoint is of version 3, so 4 and 5 are made again.
        let mut writer = ScheduleWriter::resume(&path, &facts(1), Version(3)).unwrap();
        let again = ScheduledUpdate {
            learning_rate: 0.5,
            ..update(4)
        };
        writer.write(&again);
        let read = Schedule::read(&path).unwrap();
        assert_eq!(read.updates, [update(1), update(2), update(3), again]);

        let mut writer = ScheduleWriter::resume(&path, &facts(1), Version(0)).unwrap();
        writer.write(&update(1));
        assert_eq!(Schedule::read(&path).unwrap().updates, [update(1)]);
    }
}
