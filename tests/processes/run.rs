//! A driver as a real process, with the processes that it starts.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Bounds every wait.
pub(crate) const SOON: Duration = Duration::from_secs(120);

/// A driver with the processes that it has started.
pub(crate) struct Run {
    pub(crate) driver: Child,
    /// What all processes print and log; ends when nobody is left who could.
    lines: Receiver<String>,
    seen: Vec<String>,
}

pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test
        .parent()
        .and_then(|deps| deps.parent())
        .unwrap()
        .join("examples")
        .join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --examples` with the same profile",
        path.display()
    );
    path
}

/// Returns a port that stays free until somebody listens there.
///
/// It is below those that systems usually give to a connection or to port 0. One of those could be given to another
/// process between this call and the use of the port. The next one is free, too: under torchrun it is the driver's.
pub(crate) fn free_port() -> u16 {
    static TAKEN: AtomicU16 = AtomicU16::new(0);
    let begin = 20_000 + (std::process::id() % 10_000) as u16;
    loop {
        let taken = TAKEN.fetch_add(2, Ordering::Relaxed);
        assert!(taken < 2000, "no port is free");
        let port = begin + taken;
        let is_free = |port| TcpListener::bind(("127.0.0.1", port)).is_ok();
        if is_free(port) && is_free(port + 1) {
            return port;
        }
    }
}

impl Run {
    pub(crate) fn start(name: &str, arguments: &[&str]) -> Self {
        let small = ["--offline", "--batch-size", "16"];
        Self::start_plain(name, &[&small, arguments].concat())
    }

    /// Starts a program with these flags alone.
    pub(crate) fn start_plain(name: &str, arguments: &[&str]) -> Self {
        let driver = Command::new(example(name))
            .args(arguments)
            .env_remove("PS_MNIST_DIR")
            .env("NO_COLOR", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self::follow(driver)
    }

    pub(crate) fn follow(mut driver: Child) -> Self {
        let (sender, lines) = channel();
        follow(driver.stderr.take().unwrap(), sender.clone());
        follow(driver.stdout.take().unwrap(), sender);
        Self {
            driver,
            lines,
            seen: Vec::new(),
        }
    }

    /// Waits until a process prints or logs a line that contains all these texts.
    pub(crate) fn wait_for(&mut self, texts: &[&str]) -> String {
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if texts.iter().all(|text| line.contains(text)) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("nobody said {texts:?}, but:\n{}", self.seen.join("\n"))
                }
            }
        }
    }

    /// Sends a signal again and again, until a process says this text.
    pub(crate) fn signal_until(&mut self, name: &str, pid: u32, text: &str) {
        let deadline = Instant::now() + SOON;
        loop {
            signal(name, pid);
            match self.lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return;
                    }
                }
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(_) => panic!("nobody said {text:?}, but:\n{}", self.seen.join("\n")),
            }
        }
    }

    /// Waits until a node has joined, and returns its process.
    pub(crate) fn wait_for_node(&mut self, node: &str) -> u32 {
        let line = self.wait_for(&["a node has joined", node]);
        let pid = line.split("pid=").nth(1).unwrap();
        pid.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Waits for the end of the driver, and of everything that could write to its output.
    pub(crate) fn finish(mut self) -> (ExitStatus, String) {
        let began = Instant::now();
        loop {
            // Each line has its deadline; a slow machine may need many of them. All have one, too.
            match self.lines.recv_timeout(SOON) {
                Ok(line) if began.elapsed() < 5 * SOON => self.seen.push(line),
                Ok(line) => panic!("no end, but {line:?} after:\n{}", self.seen.join("\n")),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("somebody lives on; so far:\n{}", self.seen.join("\n"))
                }
            }
        }
        (self.driver.wait().unwrap(), self.seen.join("\n"))
    }

    /// Kills the driver, and returns what was printed and logged.
    pub(crate) fn kill(mut self) -> String {
        let _ = self.driver.kill();
        self.finish().1
    }
}

/// Passes a process's lines on.
fn follow(stream: impl Read + Send + 'static, lines: Sender<String>) {
    thread::spawn(move || {
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if lines.send(line).is_err() {
                return;
            }
        }
    });
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}

pub(crate) fn signal(name: &str, pid: u32) {
    let sent = Command::new("kill")
        .args([&format!("-{name}"), &pid.to_string()])
        .status();
    assert!(sent.unwrap().success(), "{name} to {pid}");
}

/// Stops a process, and waits until none of its threads runs any more.
#[cfg(target_os = "linux")]
pub(crate) fn stop_all_threads(pid: u32) {
    signal("STOP", pid);
    let deadline = Instant::now() + SOON;
    let is_stopped = || {
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        threads.map_while(Result::ok).all(|thread| {
            let status = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // After the name, which is in brackets.
            status
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.starts_with(" T"))
        })
    };
    while !is_stopped() {
        assert!(Instant::now() < deadline, "{pid} does not stop");
        thread::yield_now();
    }
}
