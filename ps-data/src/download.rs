//! Downloads the files of a data set into a cache directory that processes share.
//!
//! One process holds the cache's lock and downloads. The others wait for it and then find the files in the
//! cache. A file gets its final name only after its checksum has been verified. So readers, which take no
//! lock, see a whole file or none. Every wait ends at the caller's deadline.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use ureq::Agent;

use crate::MnistOptions;
use crate::error::{DataError, chain};
use crate::idx::Kind;
use crate::load::{cached_path, read_file};
use crate::spec::{DataFile, Spec};

/// Size in bytes of the largest body that is accepted. The largest published file, FashionMNIST's training
/// images, has 26 MB.
const MAX_BODY_BYTES: u64 = 100_000_000;

/// If a mirror sends nothing for this long, the next one is tried.
const STALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Longer timeouts are cut to this, because every platform can represent the time an hour from now.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(3600);

/// Pause between two attempts at the lock. The standard library cannot wait for a lock with a time limit.
const LOCK_POLL: Duration = Duration::from_millis(50);

const PART_PREFIX: &str = ".download-";
const PART_SUFFIX: &str = ".part";

/// Downloads the files that are missing from `cache` or damaged there. Returns how many files it downloaded.
pub(crate) fn fetch(spec: &Spec, cache: &Path, options: &MnistOptions) -> Result<usize, DataError> {
    let started = Instant::now();
    std::fs::create_dir_all(cache).map_err(cache_error("create the cache directory", cache))?;
    let _lock = lock(cache, started, options.download_timeout)?;
    let mut mirrors = Mirrors::new(spec, options, started);
    let mut fetched = 0;
    for (file, kind) in spec.files() {
        let path = cached_path(cache, file);
        if path.exists() && read_file(&path, kind, Some(file.checksum)).is_ok() {
            continue;
        }
        mirrors.fetch(file, kind, cache)?;
        fetched += 1;
    }
    Ok(fetched)
}

fn cache_error<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> DataError + 'a {
    move |source| DataError::Cache {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Takes the cache's lock. The operating system releases it when the file is closed or the process ends.
fn lock(cache: &Path, started: Instant, timeout: Duration) -> Result<File, DataError> {
    let path = cache.join(".lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(cache_error("open the lock file", &path))?;
    let mut announced = false;
    loop {
        match file.try_lock() {
            Ok(()) => {
                remove_leftovers(cache);
                return Ok(file);
            }
            Err(TryLockError::WouldBlock) => {
                let waited = started.elapsed();
                if waited >= timeout {
                    return Err(DataError::Locked { path, waited });
                }
                if !announced {
                    tracing::info!("waiting for another process that fills {}", cache.display());
                    announced = true;
                }
                std::thread::sleep(LOCK_POLL.min(timeout - waited));
            }
            // Some network file systems cannot lock. Then two processes may download the same file. The last
            // one to rename it replaces the other's file by one with the same content.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                return Ok(file);
            }
            Err(TryLockError::Error(source)) => {
                return Err(cache_error("lock", &path)(source));
            }
        }
    }
}

/// Removes the files that killed processes have left. The lock is held, so no running process owns such a
/// file.
fn remove_leftovers(cache: &Path) {
    let entries = std::fs::read_dir(cache).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(PART_PREFIX) && name.ends_with(PART_SUFFIX) {
            // A file that cannot be removed does no harm.
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// Why one mirror did not deliver one file.
enum Failure {
    /// The mirror has failed. Another mirror may succeed.
    Mirror(String),
    /// This machine has failed. No mirror can help.
    Local(DataError),
}

/// The mirrors that have the files.
struct Mirrors {
    agent: Agent,
    /// Base URLs without a final slash. A mirror that has delivered a file moves to the front.
    bases: Vec<String>,
    started: Instant,
    timeout: Duration,
    shows_progress: bool,
}

impl Mirrors {
    fn new(spec: &Spec, options: &MnistOptions, started: Instant) -> Self {
        let bases: Vec<&str> = match options.mirrors.as_slice() {
            [] => spec.mirrors.to_vec(),
            given => given.iter().map(String::as_str).collect(),
        };
        let connect_timeout = options.connect_timeout.min(LONGEST_TIMEOUT);
        let agent = Agent::config_builder()
            .timeout_resolve(Some(connect_timeout))
            .timeout_connect(Some(connect_timeout))
            .timeout_recv_response(Some(STALL_TIMEOUT))
            .timeout_per_read(Some(STALL_TIMEOUT))
            .build()
            .new_agent();
        Self {
            agent,
            bases: bases
                .iter()
                .map(|base| base.trim_end_matches('/').to_owned())
                .collect(),
            started,
            timeout: options.download_timeout,
            shows_progress: options.shows_progress && io::stderr().is_terminal(),
        }
    }

    /// Puts a verified copy of `file` into `cache`.
    fn fetch(&mut self, file: &DataFile, kind: Kind, cache: &Path) -> Result<(), DataError> {
        let mut attempts = Vec::new();
        for index in 0..self.bases.len() {
            let url = format!("{}/{}.gz", self.bases[index], file.name);
            match self.try_fetch(&url, file, kind, cache) {
                Ok(()) => {
                    self.bases.swap(0, index);
                    return Ok(());
                }
                Err(Failure::Mirror(reason)) => {
                    tracing::debug!("{url}: {reason}");
                    attempts.push(format!("{url}: {reason}"));
                }
                Err(Failure::Local(error)) => return Err(error),
            }
        }
        Err(DataError::Download {
            file: format!("{}.gz", file.name),
            attempts,
        })
    }

    fn try_fetch(
        &self,
        url: &str,
        file: &DataFile,
        kind: Kind,
        cache: &Path,
    ) -> Result<(), Failure> {
        let remaining = self.timeout.saturating_sub(self.started.elapsed());
        if remaining.is_zero() {
            let timeout = self.timeout;
            return Err(Failure::Mirror(format!("no time left of {timeout:?}")));
        }
        let response = self
            .agent
            .get(url)
            .config()
            .timeout_global(Some(remaining.min(LONGEST_TIMEOUT)))
            .build()
            .call()
            .map_err(|error| Failure::Mirror(chain(&error)))?;
        let body = response.into_body();
        let bar = self.progress_bar(file.name, body.content_length());
        // In the same directory as the final file, because only then is renaming atomic.
        let mut part = new_part(cache)
            .map_err(|source| Failure::Local(cache_error("write into", cache)(source)))?;
        let copied = copy(body.into_reader(), part.as_file_mut(), cache, &bar);
        bar.finish_and_clear();
        copied?;
        read_file(part.path(), kind, Some(file.checksum)).map_err(refusal)?;
        let path = cached_path(cache, file);
        // No fsync: a file that a power cut has damaged fails its checksum and is downloaded again.
        part.persist(&path)
            .map_err(|error| Failure::Local(cache_error("create", &path)(error.error)))?;
        Ok(())
    }

    /// Returns a progress bar. If none is to be shown, the log gets one line.
    fn progress_bar(&self, name: &str, length: Option<u64>) -> ProgressBar {
        if !self.shows_progress {
            tracing::info!("downloading {name}.gz");
            return ProgressBar::hidden();
        }
        let bar = length.map_or_else(ProgressBar::new_spinner, ProgressBar::new);
        with_template(bar).with_message(name.to_owned())
    }
}

/// Makes the bar one line on a terminal of 60 columns or more: log lines, also of other processes, can then
/// overwrite it.
fn with_template(bar: ProgressBar) -> ProgressBar {
    let template = "[{bar:16}] {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}";
    let style = ProgressStyle::with_template(template).expect("the template is well formed");
    bar.with_style(style.progress_chars("=> "))
}

fn new_part(cache: &Path) -> io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PART_PREFIX).suffix(PART_SUFFIX);
    // By default only its owner can read a temporary file, but users may share a cache. The umask applies.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(cache)
}

fn copy(body: impl Read, part: &mut File, cache: &Path, bar: &ProgressBar) -> Result<(), Failure> {
    let mut body = body.take(MAX_BODY_BYTES + 1);
    let mut buffer = vec![0; 64 * 1024];
    let mut total = 0;
    loop {
        let read = match body.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Failure::Mirror(chain(&error))),
        };
        total += read as u64;
        if total > MAX_BODY_BYTES {
            let reason = format!("sent more than {MAX_BODY_BYTES} bytes");
            return Err(Failure::Mirror(reason));
        }
        part.write_all(&buffer[..read])
            .map_err(|source| Failure::Local(cache_error("write into", cache)(source)))?;
        bar.inc(read as u64);
    }
}

/// Turns the error of a delivered file into one without the name of the temporary file.
fn refusal(error: DataError) -> Failure {
    match error {
        DataError::Corrupt { source, .. } => {
            Failure::Mirror(format!("sent a damaged file: {}", chain(&source)))
        }
        DataError::Checksum {
            expected, found, ..
        } => Failure::Mirror(format!(
            "sent a file with SHA-256 {found}, expected {expected}"
        )),
        local => Failure::Local(local),
    }
}

#[cfg(test)]
mod server;
#[cfg(test)]
mod tests;
