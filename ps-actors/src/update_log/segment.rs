//! One file of an update log: a line, a header, and entries.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::frames::{self, FrameReader, Next};
use crate::ids::Version;
use crate::server::LogEntry;

const FIRST_LINE: &[u8] = b"ps updates 2\n";
const NAME: (&str, &str) = ("updates-", ".log");

/// The salt of the header. The entries have the number of their segment as salt.
const HEADER_SALT: u64 = 0;

#[derive(Serialize, Deserialize)]
struct Header {
    number: u64,
    start: Version,
}

/// Where a segment is in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Later segments have greater numbers, from 1.
    pub(super) number: u64,
    /// The version of the weights when it began.
    pub(super) start: Version,
    pub(super) path: PathBuf,
    /// How many bytes it has until the end of its last entry.
    pub(super) num_bytes: u64,
}

/// Returns the files in the directory that have the name of a segment, in the order of their numbers.
pub(super) fn list(directory: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| {
            let number = name.strip_prefix(NAME.0)?.strip_suffix(NAME.1)?;
            number.parse().ok()
        });
        found.extend(number.map(|number: u64| (number, entry.path())));
    }
    found.sort_unstable();
    Ok(found)
}

/// A segment that is being written.
#[derive(Debug)]
pub(super) struct SegmentWriter {
    pub(super) segment: Segment,
    pub(super) file: File,
}

impl SegmentWriter {
    /// Begins the segment of this number. Writes over the file `spare`, if there is one.
    pub(super) fn create(
        directory: &Path,
        number: u64,
        start: Version,
        spare: Option<PathBuf>,
    ) -> io::Result<Self> {
        let path = directory.join(format!("{}{number:06}{}", NAME.0, NAME.1));
        if let Some(spare) = spare {
            fs::rename(spare, &path)?;
        }
        let mut options = OpenOptions::new();
        // It is not truncated: to write over what the system has in memory is fast.
        let mut file = options
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        file.write_all(FIRST_LINE)?;
        let header = Header { number, start };
        let len = frames::write(&mut file, HEADER_SALT, &header, &[])?;
        let segment = Segment {
            number,
            start,
            path,
            num_bytes: FIRST_LINE.len() as u64 + len,
        };
        Ok(Self { segment, file })
    }

    pub(super) fn append(&mut self, entry: &LogEntry, numbers: &[&[f32]]) -> io::Result<()> {
        let salt = self.segment.number;
        #[cfg(feature = "chaos")]
        if crate::chaos::points::cuts_log() {
            return self.append_in_halves(entry, numbers);
        }
        self.segment.num_bytes += frames::write(&mut self.file, salt, entry, numbers)?;
        Ok(())
    }

    /// Writes an entry with a point in its middle.
    #[cfg(feature = "chaos")]
    fn append_in_halves(&mut self, entry: &LogEntry, numbers: &[&[f32]]) -> io::Result<()> {
        let mut bytes = Vec::new();
        self.segment.num_bytes += frames::write(&mut bytes, self.segment.number, entry, numbers)?;
        let (half, rest) = bytes.split_at(bytes.len() / 2);
        self.file.write_all(half)?;
        crate::chaos::reached!(LogCut);
        self.file.write_all(rest)
    }
}

/// A segment that is being read.
#[derive(Debug)]
pub(super) struct SegmentReader {
    pub(super) segment: Segment,
    frames: FrameReader,
}

impl SegmentReader {
    /// Returns `None` if the file is not the segment of this number.
    pub(super) fn open(number: u64, path: &Path) -> io::Result<Option<Self>> {
        let file = File::open(path)?;
        let num_bytes = file.metadata()?.len();
        let mut file = BufReader::new(file);
        let mut line = Vec::new();
        let first = file.by_ref().take(FIRST_LINE.len() as u64);
        { first }.read_to_end(&mut line)?;
        if line != FIRST_LINE {
            return Ok(None);
        }
        let mut frames = FrameReader::new(file, HEADER_SALT, FIRST_LINE.len() as u64)?;
        let header = match frames.next()? {
            Next::Frame(frame) => frame.value::<Header>().ok(),
            Next::End | Next::Cut => None,
        };
        let Some(header) = header.filter(|header| header.number == number) else {
            return Ok(None);
        };
        frames.set_salt(number);
        let segment = Segment {
            number,
            start: header.start,
            path: path.to_owned(),
            // Until somebody has read where the entries end.
            num_bytes,
        };
        Ok(Some(Self { segment, frames }))
    }

    /// Returns the next entry, with its numbers. `None` at the end, and where the rest is cut, damaged, or
    /// left from an older segment.
    pub(super) fn next(&mut self) -> io::Result<Option<(LogEntry, Vec<f32>)>> {
        match self.frames.next()? {
            Next::Frame(frame) => match frame.value() {
                Ok(entry) => Ok(Some((entry, frame.numbers))),
                Err(reason) => {
                    let path = self.segment.path.display();
                    tracing::warn!(%path, %reason, "an entry of the update log makes no sense");
                    Ok(None)
                }
            },
            Next::End | Next::Cut => Ok(None),
        }
    }

    /// Returns where the entries end that were read until now, in bytes.
    pub(super) fn position(&self) -> u64 {
        self.frames.position()
    }
}
