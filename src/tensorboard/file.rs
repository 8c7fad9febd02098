//! An event file, to which whole records are added.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a record waits at most until it is written, if further events come.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// How long nothing is tried after the disk was full.
const PAUSE: Duration = Duration::from_secs(10);

/// How many bytes may wait. When more do, they are dropped.
const MAX_WAITING: usize = 1 << 20;

/// An event file, open for appending.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
    /// How many bytes of whole records are in the file.
    len: u64,
    /// Whole records that are not yet written.
    buffer: Vec<u8>,
    next_flush: Instant,
}

impl EventFile {
    /// Creates a file, which must not be there.
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .open(&path)?;
        Ok(Self {
            path,
            file,
            len: 0,
            buffer: Vec::new(),
            // The first records show at once that the file can be written.
            next_flush: Instant::now(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the place for further records.
    pub(super) fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.buffer
    }

    /// Writes the records that wait, if the last time was some time ago.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    pub(super) fn flush_now_and_then(&mut self) -> io::Result<()> {
        match self.buffer.is_empty() || Instant::now() < self.next_flush {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Writes the records that wait.
    ///
    /// # Errors
    /// If the file cannot be written. No part of a record is left in it then: TensorBoard would read nothing behind
    /// it. The records wait for the next time, unless they are too many.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        self.next_flush = Instant::now() + FLUSH_EVERY;
        match self.file.write_all(&self.buffer) {
            Ok(()) => {
                self.len += self.buffer.len() as u64;
                self.buffer.clear();
                Ok(())
            }
            Err(error) => {
                self.next_flush = Instant::now() + PAUSE;
                if self.buffer.len() > MAX_WAITING {
                    self.buffer.clear();
                }
                self.file.set_len(self.len)?;
                Err(error)
            }
        }
    }
}

/// What waits is written, also where a training ends without an end.
impl Drop for EventFile {
    fn drop(&mut self) {
        if !self.buffer.is_empty() {
            // It was said before if this does not work.
            let _ = self.flush();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_there_is_left_as_it_is() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("events");
        std::fs::write(&path, "mine").unwrap();
        let error = EventFile::create(path.clone()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(path).unwrap(), b"mine");
    }

    #[test]
    fn a_failed_write_leaves_no_part_of_a_record_and_is_repeated() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("events");
        let mut file = EventFile::create(path.clone()).unwrap();
        file.buffer().extend(b"one");
        file.flush_now_and_then().unwrap();
        // Part of a record got to the disk before the write failed.
        let writable = std::mem::replace(&mut file.file, File::open(&path).unwrap());
        let mut other = OpenOptions::new().append(true).open(&path).unwrap();
        other.write_all(b"tw").unwrap();
        file.buffer().extend(b"two");
        file.flush().unwrap_err();
        // A file that cannot be written cannot be cut either.
        assert_eq!(std::fs::read(&path).unwrap(), b"onetw");
        file.file = writable;
        file.file.set_len(file.len).unwrap();
        // Not yet: it has just failed.
        file.flush_now_and_then().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        drop(file);
        assert_eq!(std::fs::read(&path).unwrap(), b"onetwo");
    }
}
