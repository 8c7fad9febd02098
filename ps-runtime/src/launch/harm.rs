//! How a process kills or stops itself, as if something else had done it.
//!
//! Tests and rehearsals of faults use it, to see what the other processes then do.

use std::io;
use std::time::Duration;

/// Ends this process as `kill -9` does: nothing is flushed, nothing is dropped, nobody is told.
pub fn kill_this_process() -> ! {
    #[cfg(unix)]
    {
        use rustix::process::{Signal, getpid, kill_process};
        // It fails only if there is no such process.
        let _ = kill_process(getpid(), Signal::KILL);
    }
    // Reached if the system has no such signal. Nothing is dropped here either.
    std::process::abort()
}

/// Stops all threads of this process, as `kill -STOP` does, and lets them go on after `pause`. Returns when they
/// go on.
///
/// A child process sends the signal that lets this process go on. So it goes on even if nobody else knows that
/// it stopped.
///
/// # Errors
/// If no child process can be started, or the system has no such signal. Then nothing has stopped.
pub fn stop_this_process(pause: Duration) -> io::Result<()> {
    #[cfg(unix)]
    {
        use std::process::{Command, Stdio};

        use rustix::process::{Signal, getpid, kill_process};
        // The shell is ready to send the signal before this process stops. Its output is not inherited: a
        // process that reads the output of this one must not wait for the shell.
        let pid = getpid();
        let script = format!(
            "sleep {}; kill -CONT {}",
            pause.as_secs_f64(),
            pid.as_raw_nonzero()
        );
        let quiet = Stdio::null;
        let mut waker = Command::new("/bin/sh")
            .args(["-c", &script])
            .stdin(quiet())
            .stdout(quiet())
            .stderr(quiet())
            .spawn()?;
        kill_process(pid, Signal::STOP)?;
        // It runs again. The waker ends at the same time.
        let _ = waker.wait();
        Ok(())
    }
    #[cfg(not(unix))]
    {
        let _ = pause;
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_process_that_stops_itself_goes_on() {
        let pause = Duration::from_millis(200);
        let before = Instant::now();
        stop_this_process(pause).unwrap();
        assert!(before.elapsed() >= pause);
    }
}
