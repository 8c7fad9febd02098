//! Finds the directory of a run, and a name for its file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::file::EventFile;
use crate::observe::RunStarted;

/// How many names with a number are tried.
const MAX_NAMES: u32 = 10_000;

/// What TensorBoard knows event files by.
const MARK: &str = "tfevents";

/// Creates the file of a run that starts or goes on.
pub(super) fn create_file(wanted: &Path, started: &RunStarted) -> io::Result<EventFile> {
    let run = identity(started);
    let directory = find(wanted, &run, started.first_version.0 > 0)?;
    fs::create_dir_all(&directory)?;
    let seconds = started.unix_time as u64;
    let pid = std::process::id();
    for number in 0..MAX_NAMES {
        // TensorBoard reads the files of a directory in the order of their names. Ten digits last until 2286.
        let name = format!("events.out.{MARK}.{seconds:010}.{number:04}.{pid}.{run}");
        match EventFile::create(directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            created => return created,
        }
    }
    Err(io::Error::other(
        "too many runs have started in this second",
    ))
}

/// Finds a directory without event files; for a run that goes on, the last one with files of its own.
fn find(wanted: &Path, run: &str, goes_on: bool) -> io::Result<PathBuf> {
    let mut own = None;
    for number in 1..MAX_NAMES {
        let path = match number {
            1 => wanted.to_owned(),
            _ => numbered(wanted, number),
        };
        let names = event_files(&path)?;
        if names.is_empty() {
            return Ok(own.filter(|_| goes_on).unwrap_or(path));
        }
        if names.iter().any(|name| name.ends_with(run)) {
            own = Some(path);
        }
    }
    Err(io::Error::other("too many runs have this name"))
}

fn event_files(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.contains(MARK) {
            names.push(name);
        }
    }
    Ok(names)
}

/// What stays the same when a run goes on from a checkpoint, as a short text.
fn identity(started: &RunStarted) -> String {
    let settings = &started.settings;
    let words = format!(
        "{:?}",
        (
            &settings.model,
            settings.num_weights,
            settings.num_examples,
            settings.batch_size,
            settings.seed,
            &settings.optimizer,
        )
    );
    format!("ps-{:08x}", crc32c::crc32c(words.as_bytes()))
}

/// Returns the name with a number behind it.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}-{number}"))
}

#[cfg(test)]
mod tests {
    use ps_actors::ids::Version;

    use super::*;
    use crate::observe::{Settings, Versions};

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
    fn a_run_has_a_directory_of_its_own_and_goes_on_there() {
        let temporary = tempfile::tempdir().unwrap();
        let wanted = temporary.path().join("deep").join("one");
        let place = |seed, version| {
            let file = create_file(&wanted, &run(seed, version)).unwrap();
            let directory = file.path().parent().unwrap();
            directory
                .file_name()
                .unwrap()
                .to_string_lossy()
                .into_owned()
        };
        assert_eq!(place(1, 0), "one");
        assert_eq!(place(2, 0), "one-2");
        // The same settings, but it does not go on.
        assert_eq!(place(2, 0), "one-3");
        assert_eq!(place(1, 10), "one");
        assert_eq!(place(2, 10), "one-3");
        // Its files are gone.
        assert_eq!(place(3, 10), "one-4");
        let mut names = event_files(&wanted).unwrap();
        names.sort();
        assert_eq!(names.len(), 2);
        assert!(
            names[0].contains(".1700000000.0000.") && names[1].contains(".1700000000.0001."),
            "{names:?}"
        );
    }

    #[test]
    fn a_directory_that_cannot_be_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        create_file(&file.path().join("one"), &run(1, 0)).unwrap_err();
    }
}
