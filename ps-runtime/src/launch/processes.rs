//! Child processes: copies of this program on this machine, which end when their driver ends.
//!
//! However the driver ends, no child process is left:
//!
//! - [`ProcessGroup::shutdown`] asks them to end, and kills those that do not.
//! - Dropping the group, for example in a panic, does the same with a shorter grace.
//! - If the driver is killed or crashes, the kernel kills the child processes (only on Linux, and only
//!   those that called [`die_with_parent`]).
//!
//! Processes that child processes start are not ended.
//!
//! One thread, which lives as long as the group, starts all child processes, because for the kernel that
//! thread is the parent; see `supervisor`.

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

/// How long a group that is dropped waits before it kills its child processes.
const DROP_GRACE: Duration = Duration::from_secs(1);

/// The settings of a [`ProcessGroup`], which the child processes are told.
#[derive(Clone)]
pub struct ProcessConfig {
    /// How many processes to run, including this one. At least 1.
    pub world_size: u32,
    /// The address at which this process, rank 0, already listens.
    pub rendezvous: Rendezvous,
    /// The secret with which child processes connect. They get it in an environment variable: unlike the
    /// command line, only this user can read that. `None` leaves [`env::TOKEN`](names::TOKEN) as it is.
    pub token: Option<String>,
    /// The id of the run. `None` leaves [`env::RUN_ID`](names::RUN_ID) as it is.
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

/// How a child process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exited {
    /// The child process's rank, from 1.
    pub rank: u32,
    /// How often the rank had been started again before.
    pub attempt: u64,
    /// The exit code or the signal. It is `None` if it is not known: other code in this process waited for
    /// the child process, or the system did not end the child process after it was killed.
    pub status: Option<ExitStatus>,
}

impl Exited {
    /// Whether starting the rank again can help. It cannot after [`EXIT_OK`] and [`EXIT_CONFIG`].
    pub fn can_retry(&self) -> bool {
        let code = self.status.and_then(|status| status.code());
        code != Some(EXIT_OK.into()) && code != Some(EXIT_CONFIG.into())
    }
}

/// The child processes that this process has started: ranks 1 to `world_size - 1`.
///
/// Dropping it ends them: it asks them to end, waits up to 1 s, kills those that still run, and blocks until
/// all have ended. [`shutdown`](Self::shutdown) can give them more time.
///
/// ```standalone_crate
/// use std::net::TcpListener;
///
/// use ps_runtime::launch::{self, ProcessConfig, ProcessGroup, env};
///
/// fn main() -> Result<(), Box<dyn std::error::Error>> {
///     launch::die_with_parent()?;
///     if let Some(rank) = env::read(env::RANK) {
///         println!("rank {rank} would join the driver now");
///         return Ok(());
///     }
///     let listener = TcpListener::bind("127.0.0.1:0")?;
///     let mut group = ProcessGroup::start(ProcessConfig {
///         world_size: 3,
///         rendezvous: listener.local_addr()?.to_string().parse()?,
///         token: None,
///         run_id: None,
///     })?;
///     let mut ranks = Vec::new();
///     ps_runtime::actor::run(async {
///         while let Some(exited) = group.exited().await {
///             assert!(exited.status.is_some_and(|status| status.success()));
///             ranks.push(exited.rank);
///         }
///     });
///     ranks.sort();
///     assert_eq!(ranks, [1, 2]);
///     Ok(())
/// }
/// ```
pub struct ProcessGroup {
    requests: UnboundedSender<Request>,
    /// Bounded by the number of starts, because each is reported once.
    exits: UnboundedReceiver<Exited>,
    num_unreported: usize,
    thread: Option<JoinHandle<()>>,
}

impl ProcessGroup {
    /// Starts copies of this program with the same arguments, working directory and output, and without
    /// input. Variables of [`env`](mod@super::env) tell each copy its rank. The variables of other launchers
    /// are removed.
    ///
    /// It returns when all copies are started; they may not have reached `main` yet. It blocks for some
    /// milliseconds.
    ///
    /// # Errors
    /// When the world size is 0, or when the system gives no thread or does not start a process. The
    /// processes that were already started are then killed.
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

    /// Waits for the next child process to end. Each end is returned once, in the order in which the ends
    /// were noticed.
    ///
    /// Returns `None` when no child process runs and all ends have been returned. If the future is dropped,
    /// no end is lost.
    pub async fn exited(&mut self) -> Option<Exited> {
        if self.num_unreported == 0 {
            return None;
        }
        let exited = self.exits.recv().await?;
        self.num_unreported -= 1;
        Some(exited)
    }

    /// Returns how the last child process of a rank ended, or `None` while it runs.
    ///
    /// # Errors
    /// When the group has no such rank.
    pub fn try_wait(&self, rank: u32) -> Result<Option<Exited>, ProcessError> {
        self.ask(|done| Request::Look { rank, done })
    }

    /// Starts a rank again after it has ended, and returns the attempt of the new child process.
    ///
    /// # Errors
    /// When the rank still runs, when the group has no such rank, or when the system does not start the
    /// process. (The file of the program may have been replaced or removed.)
    pub fn restart(&mut self, rank: u32) -> Result<u64, ProcessError> {
        let attempt = self.ask(|done| Request::Restart { rank, done })?;
        self.num_unreported += 1;
        Ok(attempt)
    }

    /// Kills the child process of a rank with SIGKILL, if it runs.
    ///
    /// It returns before the process has ended. [`exited`](Self::exited) reports the end.
    ///
    /// # Errors
    /// When the group has no such rank, or when the system does not send the signal.
    pub fn kill(&self, rank: u32) -> Result<(), ProcessError> {
        self.ask(|done| Request::Kill { rank, done })
    }

    /// Ends all child processes: it sends SIGTERM, and SIGKILL to those that still run after `grace`.
    ///
    /// When no child process is left, it returns the ends that [`exited`](Self::exited) had not returned. If
    /// the future is dropped earlier, the group is dropped, and then the grace is at most 1 s more.
    pub async fn shutdown(mut self, grace: Duration) -> Vec<Exited> {
        self.stop(grace);
        let mut ends = Vec::new();
        while let Some(exited) = self.exits.recv().await {
            ends.push(exited);
        }
        ends
    }

    fn stop(&self, grace: Duration) {
        // This fails only if the thread has ended, and then no child process is left.
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

/// Sets the variables that tell a child process its place, and removes those of an outer launcher.
fn set_variables(command: &mut Command, config: &ProcessConfig, rank: u32, attempt: u64) {
    for variable in variables() {
        command.env_remove(variable);
    }
    command
        .env(names::RANK, rank.to_string())
        .env(names::WORLD_SIZE, config.world_size.to_string())
        .env(names::LOCAL_RANK, rank.to_string())
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

/// Makes a child process of a [`ProcessGroup`] end when its driver ends, and ignore Ctrl-C. (A terminal
/// sends Ctrl-C to the driver, too, and the driver decides.) In all other processes it does nothing.
///
/// Call it first in `main`, on the main thread, because the kernel's promise to kill this process ends with
/// the thread that asked for it. If the driver has already ended, this process exits with code 1 at once.
/// Only Linux and Android make this promise. On other systems, a child process whose driver was killed runs
/// until it notices that the driver does not answer.
///
/// # Errors
/// When `PS_PARENT_PID` is not a process id, or when the kernel refuses.
pub fn die_with_parent() -> io::Result<()> {
    let Some(value) = names::read(names::PARENT_PID) else {
        return Ok(());
    };
    let Ok(parent) = value.trim().parse::<u32>() else {
        let message = format!("{}={value:?} is no process id", names::PARENT_PID);
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    };
    // SIGKILL and not SIGTERM: without a driver there is no process to hand over to, and no process that
    // would send SIGKILL later.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // The parent may have died before the line above. Then this process has another parent now.
    #[cfg(unix)]
    if std::os::unix::process::parent_id() != parent {
        // The reader of stderr may have ended, too, so errors are ignored.
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

/// Installs a handler for SIGINT. With any handler, the signal does not end the process.
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
