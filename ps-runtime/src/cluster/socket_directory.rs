//! Makes the directory of a process's Unix socket, and removes the directories of dead processes.
//!
//! A process that is killed cannot remove its directory. So each process holds a lock on its directory,
//! and the system releases the lock when the process ends. A process that starts removes the directories
//! that it can lock. A new directory may be removed before its maker has locked it. So the maker checks,
//! once it has the lock, that the directory still exists. If it does not, the maker makes another one.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Once;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, open, openat, statat, unlinkat};
use rustix::process::geteuid;
use tempfile::TempDir;

use crate::schema::Schema;

/// The permissions of a directory that only its user may enter.
const PRIVATE: u32 = 0o700;

/// The socket's name in its directory.
const SOCKET: &str = "socket";

/// The number of random characters in a directory's name.
const NUM_RANDOM: usize = 6;

/// How many entries of the temporary directory one search looks at.
const MAX_ENTRIES: usize = 20_000;

/// How many directories with such a name one search looks into.
const MAX_DIRECTORIES: usize = 1_000;

/// How often a new directory may be removed by another process before this one gives up.
const MAX_TRIES: usize = 16;

/// A directory that only this user can enter. Dropping it removes the directory and its contents.
#[derive(Debug)]
pub(crate) struct SocketDirectory {
    // Fields are dropped in this order: the lock ends last.
    directory: TempDir,
    _lock: File,
}

impl SocketDirectory {
    /// Makes a directory in the system's temporary directory. The first call in a process also removes the
    /// directories there of dead processes of this user and host.
    pub(crate) fn new() -> io::Result<Self> {
        static SWEPT: Once = Once::new();
        let parent = std::path::absolute(std::env::temp_dir())?;
        SWEPT.call_once(|| {
            // Nothing depends on the search, so an error is only logged.
            if let Err(error) = sweep(&parent) {
                tracing::debug!(%error, parent = %parent.display(), "could not look for old sockets");
            }
        });
        Self::new_in(&parent)
    }

    fn new_in(parent: &Path) -> io::Result<Self> {
        for _ in 0..MAX_TRIES {
            let directory = tempfile::Builder::new()
                .prefix(&prefix())
                .rand_bytes(NUM_RANDOM)
                // Independent of the umask: otherwise another user could connect and would be taken for
                // this one.
                .permissions(PermissionsExt::from_mode(PRIVATE))
                .tempdir_in(parent)?;
            if let Some(lock) = lock(directory.path())? {
                let _lock = lock;
                return Ok(Self { directory, _lock });
            }
        }
        Err(io::Error::other(
            "another process removes each new directory at once",
        ))
    }

    /// The path of the socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join(SOCKET)
    }
}

/// Returns the beginning of the names of this host's directories. The host is part of it, because several
/// hosts may share a temporary directory, and they do not always see each other's locks.
fn prefix() -> String {
    let mut host = Schema::new();
    host.write(&rustix::system::uname().nodename().to_string_lossy());
    format!("ps-socket-{:08x}-", host.finish() as u32)
}

/// Locks a directory that was just made. Returns `None` if another process has the lock, or if the
/// directory was removed.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let lock = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match lock.try_lock() {
        // If locks are not supported, no process can lock the directory and so remove it.
        Ok(()) | Err(TryLockError::Error(_)) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
    }
    let locked = lock.metadata()?;
    let is_it = |there: fs::Metadata| (there.dev(), there.ino()) == (locked.dev(), locked.ino());
    let is_there = fs::symlink_metadata(path).is_ok_and(is_it);
    Ok(is_there.then_some(lock))
}

/// Removes the directories of dead processes of this user. A directory with unexpected contents stays.
fn sweep(parent: &Path) -> io::Result<()> {
    let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let inside = open(parent, flags | OFlags::RDONLY, Mode::empty())?;
    let prefix = prefix();
    let entries = fs::read_dir(parent)?.take(MAX_ENTRIES);
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name()));
    let like_ours = names.filter(|name| {
        let rest = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        rest.is_some_and(|rest| rest.len() == NUM_RANDOM)
    });
    for name in like_ours.take(MAX_DIRECTORIES) {
        // In all other cases the directory stays. Usually its process still runs.
        if let Ok(true) = remove_if_dead(&inside, &name) {
            tracing::debug!(name = %name.display(), "removed the socket of a dead process");
        }
    }
    Ok(())
}

/// Removes one directory if its lock is free. Returns `false` if it is not the directory of a dead process.
/// Names are looked up in open directories and links are not followed, so that no one can make this
/// remove anything else.
fn remove_if_dead(parent: &OwnedFd, name: &OsStr) -> io::Result<bool> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let directory = File::from(openat(parent, name, flags, Mode::empty())?);
    let found = directory.metadata()?;
    let is_ours = found.uid() == geteuid().as_raw() && found.mode() & 0o7777 == PRIVATE;
    if !is_ours || directory.try_lock().is_err() {
        return Ok(false);
    }
    match statat(directory.as_fd(), SOCKET, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(socket) if FileType::from_raw_mode(socket.st_mode) == FileType::Socket => {
            unlinkat(directory.as_fd(), SOCKET, AtFlags::empty())?;
        }
        // The process died before it made the socket.
        Err(rustix::io::Errno::NOENT) => {}
        Ok(_) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    // Fails if the directory contains anything else.
    unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::process::{Command, Stdio};
    use std::thread;

    use super::*;

    fn names(parent: &Path) -> Vec<String> {
        let entries = fs::read_dir(parent).unwrap();
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<_> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// What a process of ours leaves that is killed.
    fn left_by_the_dead(parent: &Path, name: &str) -> PathBuf {
        let path = parent.join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(PRIVATE)).unwrap();
        drop(UnixListener::bind(path.join(SOCKET)).unwrap());
        path
    }

    ///
    #[test]
    fn a_directory_is_private_and_goes_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let directory = SocketDirectory::new_in(parent.path()).unwrap();
        let _listener = UnixListener::bind(directory.socket()).unwrap();
        let mode = fs::metadata(directory.directory.path()).unwrap().mode();
        assert_eq!(mode & 0o7777, PRIVATE);
        sweep(parent.path()).unwrap();
        assert!(directory.socket().exists(), "its owner lives");
        drop(directory);
        assert!(names(parent.path()).is_empty());
    }

    /// in a process of its own, which is killed.
    #[test]
    fn what_a_killed_process_leaves_is_removed_at_the_next_start() {
        const PARENT: &str = "PS_TEST_SOCKET_PARENT";
        const NAME: &str = "cluster::socket_directory::tests::what_a_killed_process_leaves_is_removed_at_the_next_start";
        if let Some(parent) = std::env::var_os(PARENT) {
            let directory = SocketDirectory::new_in(Path::new(&parent)).unwrap();
            let _listener = UnixListener::bind(directory.socket()).unwrap();
            eprintln!("ready");
            loop {
                thread::park();
            }
        }
        let parent = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", NAME, "--nocapture"])
            .env(PARENT, parent.path())
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let says = BufReader::new(child.stderr.take().unwrap()).lines();
        assert!(says.map_while(Result::ok).any(|line| line == "ready"));
        sweep(parent.path()).unwrap();
        assert_eq!(names(parent.path()).len(), 1, "it lives");
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(names(parent.path()).len(), 1, "a signal leaves no time");
        sweep(parent.path()).unwrap();
        assert!(names(parent.path()).is_empty());
    }

    ///
    #[test]
    fn only_what_is_as_we_leave_it_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let inside = parent.path();
        let ours = |random: &str| format!("{}{random}", prefix());
        let mut kept = Vec::new();
        let mut keep = |name: &str| {
            kept.push(name.to_owned());
            left_by_the_dead(inside, name)
        };
        let elsewhere = keep("elsewhere");
        keep("ps-abcdef");
        keep(&ours("tooLong"));
        keep("ps-socket-host-abcdef");
        let more = keep(&ours("more00"));
        fs::write(more.join("notes"), "mine").unwrap();
        let file = keep(&ours("file00")).join(SOCKET);
        fs::remove_file(&file).unwrap();
        fs::write(&file, "mine").unwrap();
        let open = keep(&ours("open00"));
        fs::set_permissions(&open, PermissionsExt::from_mode(0o755)).unwrap();
        let linked = keep(&ours("linked")).join(SOCKET);
        fs::remove_file(&linked).unwrap();
        symlink(elsewhere.join(SOCKET), &linked).unwrap();
        kept.push(ours("link00"));
        symlink(&elsewhere, inside.join(ours("link00"))).unwrap();
        kept.push(ours("flat00"));
        fs::write(inside.join(ours("flat00")), "mine").unwrap();
        left_by_the_dead(inside, &ours("dead00"));
        let dead = left_by_the_dead(inside, &ours("dead01"));
        fs::remove_file(dead.join(SOCKET)).unwrap();

        sweep(inside).unwrap();
        kept.sort();
        assert_eq!(names(inside), kept);
        assert!(elsewhere.join(SOCKET).exists(), "links are not followed");
        assert_eq!(fs::read_to_string(more.join("notes")).unwrap(), "mine");
    }

    /// locks belong to open files, so threads stand for processes.
    #[test]
    fn many_that_start_at_once_take_nothing_from_each_other() {
        const NUM_STARTING: usize = 8;
        let parent = tempfile::tempdir().unwrap();
        let inside = parent.path();
        for round in 0..20 {
            for dead in 0..10 {
                left_by_the_dead(inside, &format!("{}r{round:02}d{dead:02}", prefix()));
            }
            let living = thread::scope(|scope| {
                let start = || {
                    sweep(inside).unwrap();
                    let directory = SocketDirectory::new_in(inside).unwrap();
                    let listener = UnixListener::bind(directory.socket()).unwrap();
                    sweep(inside).unwrap();
                    (directory, listener)
                };
                let starting: Vec<_> = (0..NUM_STARTING).map(|_| scope.spawn(start)).collect();
                let started = starting.into_iter().map(|one| one.join().unwrap());
                started.collect::<Vec<_>>()
            });
            assert!(
                living
                    .iter()
                    .all(|(directory, _)| directory.socket().exists())
            );
            assert_eq!(names(inside).len(), NUM_STARTING);
            drop(living);
            assert!(names(inside).is_empty());
        }
    }

    ///
    #[test]
    fn a_crowded_temporary_directory_costs_a_bounded_time() {
        let parent = tempfile::tempdir().unwrap();
        for number in 0..MAX_DIRECTORIES + 10 {
            let name = format!("{}{number:06}", prefix());
            fs::create_dir(parent.path().join(&name)).unwrap();
            let private = PermissionsExt::from_mode(PRIVATE);
            fs::set_permissions(parent.path().join(&name), private).unwrap();
        }
        sweep(parent.path()).unwrap();
        assert_eq!(names(parent.path()).len(), 10, "the next one goes on");
        sweep(parent.path()).unwrap();
        assert!(names(parent.path()).is_empty());
    }
}
