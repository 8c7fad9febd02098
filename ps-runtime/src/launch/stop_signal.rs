//! Lets a driver that is asked to end finish its work within a time limit.

use std::io;
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use super::signals::{Signal, terminated, terminated_again};

/// How long a process may take to end in order. Launchers wait for 30 s between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(30);

/// Tells a program that it was asked to end, by SIGTERM or Ctrl-C.
///
/// While a `StopSignal` exists, the first signal does not end the process. The program should check
/// [`received`](Self::received), finish the work that it has begun, and end with
/// [`exit_code`](super::exit_code). A second signal ends the process at once, unless it comes within 500 ms:
/// some launchers send each signal twice. If the process still runs 30 s after the first signal, it is ended,
/// too. When no `StopSignal` exists any more, a signal ends the process at once with [`Signal::exit_code`].
///
/// It changes the signal handlers of this process permanently. A program with signal handlers of its own
/// should not use it.
///
/// ```
/// use ps_runtime::launch::{StopSignal, exit_code};
///
/// let stop = StopSignal::heed()?;
/// for _step in 0..3 {
///     if let Some(signal) = stop.received() {
///         println!("ended by {signal}");
///         break;
///     }
/// }
/// let _to_return_from_main = exit_code(stop.received());
/// # std::io::Result::Ok(())
/// ```
#[derive(Debug)]
#[must_use = "a signal ends the process at once where nobody heeds it"]
pub struct StopSignal {
    heard: watch::Receiver<Option<Signal>>,
}

/// How many `StopSignal`s exist.
static NUM_HEEDING: AtomicUsize = AtomicUsize::new(0);

impl StopSignal {
    /// Starts to heed the signals. A signal that another `StopSignal` has received before counts, too.
    ///
    /// # Errors
    /// When the system gives no thread, or does not let this process handle the signals.
    pub fn heed() -> io::Result<Self> {
        let heard = heard().map_err(|error| {
            let text = format!(
                "the system does not let this process handle signals: {error}; if the limit on open files \
                 (ulimit -n) or threads (ulimit -u) is low, raise it"
            );
            io::Error::new(error.kind(), text)
        });
        let heard = heard?.subscribe();
        NUM_HEEDING.fetch_add(1, Ordering::SeqCst);
        Ok(Self { heard })
    }

    /// Returns the first signal that was received, if there was one.
    #[must_use]
    pub fn received(&self) -> Option<Signal> {
        *self.heard.borrow()
    }

    /// Waits for a signal.
    pub async fn wait(&self) -> Signal {
        let mut heard = self.heard.clone();
        // The sender lives as long as the process.
        match heard.wait_for(Option::is_some).await {
            Ok(signal) => signal.expect("it was waited for"),
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for StopSignal {
    fn drop(&mut self) {
        NUM_HEEDING.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Returns the channel of the first signal. The first call starts the thread that listens.
fn heard() -> io::Result<&'static watch::Sender<Option<Signal>>> {
    static HEARD: OnceLock<watch::Sender<Option<Signal>>> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());

    let _turn = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(heard) = HEARD.get() {
        return Ok(heard);
    }
    let (started, start) = mpsc::channel();
    let heard = watch::Sender::new(None);
    let sender = heard.clone();
    thread::Builder::new()
        .name("ps-signals".to_owned())
        .spawn(move || {
            let event_loop = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match event_loop {
                Ok(event_loop) => event_loop.block_on(listen(&sender, &started)),
                // This cannot fail: the receiver waits for it.
                Err(error) => drop(started.send(Err(error))),
            }
        })?;
    start.recv().map_err(io::Error::other)??;
    Ok(HEARD.get_or_init(|| heard))
}

async fn listen(heard: &watch::Sender<Option<Signal>>, started: &mpsc::Sender<io::Result<()>>) {
    let first = match terminated() {
        Ok(first) => first,
        // This cannot fail, here and below: the receiver waits for it.
        Err(error) => return drop(started.send(Err(error))),
    };
    let _ = started.send(Ok(()));
    let signal = first.await;
    if NUM_HEEDING.load(Ordering::SeqCst) == 0 {
        process::exit(signal.exit_code().into());
    }
    tracing::warn!(%signal, "ending in order; a second signal ends this process at once");
    heard.send_replace(Some(signal));
    match timeout(GRACE, terminated_again()).await {
        Ok(signal) => tracing::warn!(%signal, "ending at once"),
        Err(_) => tracing::warn!("not over after {GRACE:?}: ending at once"),
    }
    process::exit(signal.exit_code().into());
}
