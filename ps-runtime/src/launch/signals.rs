//! The signals that ask a process to leave, and the meaning of exit codes.
//!
//! A launcher sends SIGTERM and some time later SIGKILL. Ctrl-C sends SIGINT to every process of the
//! terminal's foreground group, so to the driver and to its child processes.

use std::fmt;
use std::future::{pending, poll_fn};
use std::io;
use std::process::ExitCode;
use std::task::Poll;
use std::time::Duration;

use tokio::time::sleep;

/// Exit code of a process that has done its work.
pub const EXIT_OK: u8 = 0;

/// Exit code for a wrong configuration: starting the process again cannot help. 64 is `EX_USAGE` of
/// `sysexits.h`. Every code other than this and [`EXIT_OK`] means "start it again".
pub const EXIT_CONFIG: u8 = 64;

/// A signal that asks a process to end. `Display` writes its name.
///
/// For an example, see [`exit_code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM, from a launcher or from `kill`.
    Terminate,
    /// SIGINT, from Ctrl-C.
    Interrupt,
}

impl Signal {
    /// The exit code of a program whose work was not done when the signal came: 128 plus the signal's
    /// number, as in a shell. For a launcher it means "start it again".
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Terminate => 128 + 15,
            Self::Interrupt => 128 + 2,
        }
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Terminate => "SIGTERM",
            Self::Interrupt => "SIGINT",
        })
    }
}

/// Returns the exit code of a program that has done its work, or was ended before that by a signal.
///
/// ```
/// use std::process::ExitCode;
/// use ps_runtime::launch::{Signal, exit_code};
///
/// assert_eq!(exit_code(None), ExitCode::SUCCESS);
/// assert_eq!(exit_code(Some(Signal::Terminate)), ExitCode::from(143));
/// ```
#[must_use]
pub fn exit_code(ended_by: Option<Signal>) -> ExitCode {
    ended_by.map_or(EXIT_OK, Signal::exit_code).into()
}

/// Returns a future that becomes ready when this process is asked to leave. The process should then finish
/// its step, hand over its work, and end with [`EXIT_OK`]. This is for nodes. A driver uses
/// [`StopSignal`](super::StopSignal).
///
/// In a child process of a [`ProcessGroup`](super::ProcessGroup), Ctrl-C does not make the future ready. The
/// terminal also sends Ctrl-C to the driver, and the driver may still need the child process.
///
/// The process listens from this call on, not from the first poll on. From then on, for as long as it runs,
/// SIGTERM and SIGINT do not end it by themselves. If there are several futures, all become ready. To let a
/// second Ctrl-C end a process at once, call this again some time after the first: some launchers send each signal
/// twice within microseconds.
///
/// ```
/// # actix_rt::System::new().block_on(async {
/// let terminated = ps_runtime::launch::terminated()?;
/// # drop(
/// async move {
///     let signal = terminated.await;
///     println!("{signal}: leaving after this step");
/// }
/// # );
/// # std::io::Result::Ok(()) }).unwrap();
/// ```
///
/// # Errors
/// When the system does not let this process handle the signals.
///
/// # Panics
/// Outside of an event loop.
#[cfg(unix)]
pub fn terminated() -> io::Result<impl Future<Output = Signal> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let is_copy = is_copy();
    Ok(poll_fn(move |cx| {
        if terminate.poll_recv(cx).is_ready() {
            return Poll::Ready(Signal::Terminate);
        }
        // In a child process, SIGINT is read and ignored.
        while interrupt.poll_recv(cx).is_ready() {
            if !is_copy {
                return Poll::Ready(Signal::Interrupt);
            }
        }
        Poll::Pending
    }))
}

/// Returns a future that becomes ready when Ctrl-C is pressed.
///
/// # Errors
/// When the system does not let this process handle it.
///
/// # Panics
/// Outside of an event loop.
#[cfg(windows)]
pub fn terminated() -> io::Result<impl Future<Output = Signal> + Send + 'static> {
    let mut ctrl_c = tokio::signal::windows::ctrl_c()?;
    Ok(poll_fn(move |cx| {
        ctrl_c.poll_recv(cx).map(|_| Signal::Interrupt)
    }))
}

/// Signals within this time after the first are copies of the same request. A launcher that signals a whole process group,
/// below a wrapper that hands the signal on, sends two within microseconds. A person who does not want to wait any
/// longer takes more time.
pub(crate) const SAME_REQUEST: Duration = Duration::from_millis(500);

/// Waits for a signal that is a new request. Call it when the first signal has come.
pub(crate) async fn terminated_again() -> Signal {
    sleep(SAME_REQUEST).await;
    match terminated() {
        Ok(again) => again.await,
        Err(_) => pending().await,
    }
}

/// Whether this is a child process of a `ProcessGroup`.
fn is_copy() -> bool {
    super::env::read(super::env::PARENT_PID).is_some()
}
