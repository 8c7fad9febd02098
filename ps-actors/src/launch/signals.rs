//! Being asked to leave, and what a process says with its exit code.
//!
//! An engine sends SIGTERM and some time later SIGKILL; Ctrl-C sends SIGINT to every process of
//! the terminal's foreground group, so to the driver and to the copies that it started.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

/// Exit code of a process that did what it was started for.
pub const EXIT_OK: u8 = 0;

/// Exit code for a wrong configuration: starting the process again cannot help. 64 is `EX_USAGE` of
/// `sysexits.h`. Every code but this and [`EXIT_OK`] means "start it again".
pub const EXIT_CONFIG: u8 = 64;

/// Resolves, with the signal's name, when this process is asked to leave: finish the step, hand
/// over, leave with [`EXIT_OK`].
///
/// Listens from this call on, not from the first poll on. From then on, and for as long as the
/// process lives, SIGTERM and SIGINT no longer end it by themselves. Several callers all hear of
/// a signal; to let a second Ctrl-C end a process at once, call this again after the first.
///
/// ```
/// # actix_rt::System::new().block_on(async {
/// let terminated = ps_actors::launch::terminated()?;
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
pub fn terminated() -> io::Result<impl Future<Output = &'static str> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(poll_fn(move |cx| {
        if terminate.poll_recv(cx).is_ready() {
            Poll::Ready("SIGTERM")
        } else {
            interrupt.poll_recv(cx).map(|_| "SIGINT")
        }
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
pub fn terminated() -> io::Result<impl Future<Output = &'static str> + Send + 'static> {
    let mut ctrl_c = tokio::signal::windows::ctrl_c()?;
    Ok(poll_fn(move |cx| ctrl_c.poll_recv(cx).map(|_| "Ctrl-C")))
}
