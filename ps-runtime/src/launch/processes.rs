//! Copies of this program on this machine, which end when their driver ends.
//!
//! However the driver ends, no copy is left: [`ProcessGroup::shutdown`] asks and then kills;
//! dropping the group, so also a panic, does the same with less patience; and for a driver that
//! cannot do anything any more, killed or crashed, the kernel kills the copies (Linux only, and
//! only those that called [`die_with_parent`]). Processes that copies start are theirs to end.
//!
//! All copies are started by one thread that lives as long as the group, because the kernel's
//! "parent" is that thread: see `supervisor`.

use std::env;
use std::fmt;
use std::io;
use std::process::{self, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::env as names;
use super::error::ProcessError;
use super::launchers::variables;
use super::rendezvous::Rendezvous;
use super::signals::{EXIT_CONFIG, EXIT_OK};
use super::supervisor::{self, Request};

/// How long a group that is dropped waits before it kills.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// What copies are told.
#[derive(Clone)]
pub struct ProcessConfig {
    /// How many processes there shall be, this one among them; at least 1.
    pub world_size: u32,
    /// Where this process, rank 0, listens already.
    pub rendezvous: Rendezvous,
    /// The secret that copies show when they connect. It travels in the environment, which, other
    /// than the command line, only this user can read. `None` leaves [`env::TOKEN`](names::TOKEN) as it is.
    pub token: Option<String>,
    /// Which run they take part in. `None` leaves [`env::RUN_ID`](names::RUN_ID) as it is.
    pub run_id: Option<String>,
}

impl fmt::Debug for ProcessConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessConfig")
            .field("world_size", &self.world_size)
            .field("rendezvous", &self.rendezvous)
            .field("token", &self.token.as_ref().map(|_| "(secret)"))
            .finish()
    }
}

/// How one copy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// The copy's rank, from 1.
    pub rank: u32,
    /// How often the rank had been started again before.
    pub attempt: u64,
    /// Exit code, or signal. `None` when it is not known: somebody else in this process waited for
    /// the copy, or the system did not end it after it was killed.
    pub status: Option<ExitStatus>,
}

impl Exited {
    /// Whether starting the rank again can help: not after [`EXIT_OK`] and [`EXIT_CONFIG`].
    pub fn can_retry(&self) -> bool {
        let code = self.status.and_then(|status| status.code());
        code != Some(EXIT_OK.into()) && code != Some(EXIT_CONFIG.into())
    }
}

/// The copies of this program that this process started: ranks 1 to `world_size - 1`.
///
/// Dropping it ends them: it asks, waits up to a second, kills, and blocks until all are gone. Use
/// [`shutdown`](Self::shutdown) for a patient end.
pub struct ProcessGroup {
    requests: UnboundedSender<Request>,
    /// Bounded by the number of starts: each is reported once.
    exits: UnboundedReceiver<Exited>,
    num_unreported: usize,
    thread: Option<JoinHandle<()>>,
}

impl ProcessGroup {
    /// Starts copies of this program with the same arguments, working directory and output, no
    /// input, and variables of [`env`](mod@super::env) that tell each its rank. Other launchers'
    /// variables are taken away.
    ///
    /// Returns when all are started, which says nothing about how far they have come. It blocks for
    /// some milliseconds.
    ///
    /// # Errors
    /// When the world size is 0, or the system refuses a thread or a process; then those that had
    /// been started are killed.
    pub fn start(config: ProcessConfig) -> Result<Self, ProcessError> {
        let Some(num_copies) = config.world_size.checked_sub(1) else {
            return Err(ProcessError::NoProcesses);
        };
        let program = env::current_exe().map_err(ProcessError::CurrentExe)?;
        let command = move |rank: u32, attempt: u64| {
            let mut command = Command::new(&program);
            command.args(env::args_os().skip(1));
            command.stdin(Stdio::null());
            set_variables(&mut command, &config, rank, attempt);
            command
        };
        let (requests, requested) = unbounded_channel();
        let (exited, exits) = unbounded_channel();
        let (started, start) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("ps-processes".to_owned())
            .spawn(move || supervisor::run(command, num_copies, requested, exited, started))
            .map_err(ProcessError::Thread)?;
        start.recv().map_err(|_| ProcessError::WatcherLost)??;
        Ok(Self {
            requests,
            exits,
            num_unreported: num_copies as usize,
            thread: Some(thread),
        })
    }

    /// Waits for the next copy to end; each end is returned once, in the order seen.
    ///
    /// `None` when none runs and all ends have been returned. Nothing is lost when the future is
    /// dropped.
    pub async fn exited(&mut self) -> Option<Exited> {
        if self.num_unreported == 0 {
            return None;
        }
        let exited = self.exits.recv().await?;
        self.num_unreported -= 1;
        Some(exited)
    }

    /// Returns how a rank's last copy ended, or `None` while it runs.
    ///
    /// # Errors
    /// When the group has no such rank.
    pub fn try_wait(&self, rank: u32) -> Result<Option<Exited>, ProcessError> {
        self.ask(|done| Request::Look { rank, done })
    }

    /// Starts a rank again after it has ended, and returns the new copy's attempt.
    ///
    /// # Errors
    /// When it still runs, when the group has no such rank, or when the system refuses: the
    /// program's file may have been replaced or removed since.
    pub fn restart(&mut self, rank: u32) -> Result<u64, ProcessError> {
        let attempt = self.ask(|done| Request::Restart { rank, done })?;
        self.num_unreported += 1;
        Ok(attempt)
    }

    /// Kills a rank's copy at once, if it runs: SIGKILL, which it cannot refuse.
    ///
    /// Returns before it has ended; [`exited`](Self::exited) tells.
    ///
    /// # Errors
    /// When the group has no such rank, or the system refuses.
    pub fn kill(&self, rank: u32) -> Result<(), ProcessError> {
        self.ask(|done| Request::Kill { rank, done })
    }

    /// Ends all copies: SIGTERM, and SIGKILL to those that still run after `grace`.
    ///
    /// Returns the ends that [`exited`](Self::exited) had not returned, when no copy is left. When
    /// the future is dropped before, the group is dropped, and its grace is at most a second more.
    pub async fn shutdown(mut self, grace: Duration) -> Vec<Exited> {
        self.stop(grace);
        let mut ends = Vec::new();
        while let Some(exited) = self.exits.recv().await {
            ends.push(exited);
        }
        ends
    }

    fn stop(&self, grace: Duration) {
        // Refused only when the thread has ended, and then no copy is left.
        let _ = self.requests.send(Request::Stop { grace });
    }

    fn ask<T>(
        &self,
        request: impl FnOnce(mpsc::Sender<Result<T, ProcessError>>) -> Request,
    ) -> Result<T, ProcessError> {
        let (done, answer) = mpsc::channel();
        let sent = self.requests.send(request(done));
        sent.map_err(|_| ProcessError::WatcherLost)?;
        answer.recv().map_err(|_| ProcessError::WatcherLost)?
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.stop(DROP_GRACE);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches processes has panicked");
        }
    }
}

impl fmt::Debug for ProcessGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProcessGroup")
            .field("num_unreported", &self.num_unreported)
            .finish_non_exhaustive()
    }
}

/// Tells a copy its place, and takes away what an outer launcher told this process.
fn set_variables(command: &mut Command, config: &ProcessConfig, rank: u32, attempt: u64) {
    for variable in variables() {
        command.env_remove(variable);
    }
    command
        .env(names::RANK, rank.to_string())
        .env(names::WORLD_SIZE, config.world_size.to_string())
        .env(names::ATTEMPT, attempt.to_string())
        .env(names::RENDEZVOUS, config.rendezvous.to_string())
        .env(names::PARENT_PID, process::id().to_string());
    if let Some(token) = &config.token {
        command.env(names::TOKEN, token);
    }
    if let Some(run_id) = &config.run_id {
        command.env(names::RUN_ID, run_id);
    }
}

/// Makes this process end with the [`ProcessGroup`] that started it, and leave Ctrl-C, which a terminal
/// sends to both, to that one; does nothing in any other.
///
/// Call it first thing in `main`, on the main thread: the kernel's promise to kill this process
/// ends with the thread that asked for it. If the parent is gone already, this process exits with
/// code 1 at once. Only Linux and Android make such a promise; elsewhere a copy whose driver was
/// killed lives until it notices that nobody answers.
///
/// # Errors
/// When `PS_PARENT_PID` holds no process id, or the kernel refuses.
pub fn die_with_parent() -> io::Result<()> {
    let Some(value) = names::read(names::PARENT_PID) else {
        return Ok(());
    };
    let Ok(parent) = value.trim().parse::<u32>() else {
        let message = format!("{}={value:?} is no process id", names::PARENT_PID);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    };
    // SIGKILL, because without a driver there is nobody to hand over to, and nobody who would
    // follow a polite signal by a firm one.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // It may have died before the line above; then the kernel has given this process to another.
    #[cfg(unix)]
    if std::os::unix::process::parent_id() != parent {
        // Whoever read it may be gone, too.
        let message = format!("process {parent}, which started this one, is gone: leaving\n");
        let _ = io::Write::write_all(&mut io::stderr(), message.as_bytes());
        process::exit(1);
    }
    #[cfg(unix)]
    ignore_interrupts()?;
    #[cfg(not(unix))]
    let _ = parent;
    Ok(())
}

/// With a handler, even one that nobody listens to any more, the signal does nothing by itself.
#[cfg(unix)]
fn ignore_interrupts() -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let event_loop = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let _inside = event_loop.enter();
    drop(signal(SignalKind::interrupt())?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn config() -> ProcessConfig {
        ProcessConfig {
            world_size: 3,
            rendezvous: "127.0.0.1:4000".parse().unwrap(),
            token: Some("hush".to_owned()),
            run_id: Some("first".to_owned()),
        }
    }

    #[test]
    fn a_copy_is_told_its_place_and_nothing_of_an_outer_launcher() {
        let mut command = Command::new("program");
        set_variables(&mut command, &config(), 2, 5);
        let set: HashMap<_, _> = command
            .get_envs()
            .map(|(name, value)| (name.to_str().unwrap(), value.map(|v| v.to_str().unwrap())))
            .collect();
        assert_eq!(set["RANK"], None);
        assert_eq!(set["SLURM_PROCID"], None);
        assert_eq!(set["JOB_COMPLETION_INDEX"], None);
        assert_eq!(set["MASTER_ADDR"], None);
        assert_eq!(set["PS_TOKEN"], Some("hush"));
        assert_eq!(set["PS_RUN_ID"], Some("first"));
        let get = |name: &str| set.get(name).copied().flatten().map(str::to_owned);
        let place = super::super::from_env(get).unwrap().unwrap();
        assert_eq!((place.rank, place.world_size, place.attempt), (2, 3, 5));
        assert_eq!(place.rendezvous, Some(config().rendezvous));
        assert_eq!(command.get_args().count(), 0);
    }

    #[test]
    fn the_token_is_not_printed() {
        assert!(!format!("{:?}", config()).contains("hush"));
    }

    #[test]
    fn a_group_needs_a_driver() {
        let config = ProcessConfig {
            world_size: 0,
            ..config()
        };
        assert!(matches!(
            ProcessGroup::start(config),
            Err(ProcessError::NoProcesses)
        ));
    }

    #[cfg(unix)]
    #[test]
    fn only_success_and_a_wrong_configuration_are_final() {
        use std::os::unix::process::ExitStatusExt;

        let can_retry = |raw: Option<i32>| {
            let status = raw.map(ExitStatus::from_raw);
            Exited {
                rank: 1,
                attempt: 0,
                status,
            }
            .can_retry()
        };
        // As wait(2) gives them: the code is in the second byte, a signal in the first.
        assert!(!can_retry(Some(0)));
        assert!(!can_retry(Some(64 << 8)));
        assert!(can_retry(Some(1 << 8)));
        assert!(can_retry(Some(101 << 8)));
        assert!(can_retry(Some(9)));
        assert!(can_retry(None));
    }
}
