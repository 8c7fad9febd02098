//! Being asked to leave, and what a process says with its exit code.
//!
//! An engine sends SIGTERM and some time later SIGKILL; Ctrl-C sends SIGINT to every process of
//! the terminal's foreground group, so to the driver and to the copies that it started.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::process::ExitCode;
use std::task::Poll;

/// Exit code of a process that did what it was started for.
pub const EXIT_OK: u8 = 0;

/// Exit code for a wrong configuration: starting the process again cannot help. 64 is `EX_USAGE` of
/// `sysexits.h`. Every code but this and [`EXIT_OK`] means "start it again".
pub const EXIT_CONFIG: u8 = 64;

/// A request to end. Printed by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: from an engine, or `kill`.
    Terminate,
    /// SIGINT: Ctrl-C.
    Interrupt,
}

impl Signal {
    /// What a program ends with that was to do more when the signal came: 128 and the signal's number,
    /// as a shell shows it. A launcher takes it for "start it again".
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

/// The exit code of a program that did its work, or was to end before by a signal.
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

/// Resolves when this process is asked to leave: finish the step, hand over, leave with [`EXIT_OK`].
/// This is for a node; a driver has [`StopSignal`](super::StopSignal).
///
/// A copy that a [`ProcessGroup`](super::ProcessGroup) has started leaves Ctrl-C to its driver, which
/// the terminal sends it to as well: the driver may still need it to end in order.
///
/// Listens from this call on, not from the first poll on. From then on, and for as long as the
/// process lives, SIGTERM and SIGINT no longer end it by themselves. Several callers all hear of
/// a signal; to let a second Ctrl-C end a process at once, call this again after the first.
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
        // A copy's is taken and dropped.
        while interrupt.poll_recv(cx).is_ready() {
            if !is_copy {
                return Poll::Ready(Signal::Interrupt);
            }
        }
        Poll::Pending
    }))
}

/// Resolves when Ctrl-C is pressed.
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

/// Whether a process of ours has started this one.
fn is_copy() -> bool {
    super::env::read(super::env::PARENT_PID).is_some()
}
