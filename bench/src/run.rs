//! One run of one contender, in processes of its own.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::contenders::{Contender, Program};
use crate::measure::{Metrics, PREFIX};
use crate::processes::{MARK, Marked};

/// How often memory is looked at: often enough for what stays, seldom enough to cost nothing.
const SAMPLE_EVERY: Duration = Duration::from_millis(300);

/// A run that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(300);

/// What runs need besides their arguments.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings {
    /// The interpreter of the rivals' virtual environment.
    pub(crate) python: PathBuf,
    /// The folder with the rivals.
    pub(crate) rivals: PathBuf,
    pub(crate) data_dir: Option<PathBuf>,
}

impl Surroundings {
    fn command(&self, contender: &Contender) -> Result<Command> {
        let mut command = match contender.program {
            Program::Ours(subcommand) => {
                let mut command = Command::new(std::env::current_exe()?);
                command.arg(subcommand);
                command
            }
            Program::Rival(file) => {
                let mut command = Command::new(&self.python);
                command.arg(self.rivals.join(file));
                command
            }
        };
        command.args(&contender.arguments);
        let is_transfer = contender.arguments.iter().all(|word| word != "--model");
        if let (Some(directory), false) = (&self.data_dir, is_transfer) {
            command.arg("--data-dir").arg(directory);
        }
        Ok(command)
    }
}

/// Runs a contender once, and returns what it and we measured.
pub(crate) fn run(
    contender: &Contender,
    surroundings: &Surroundings,
    least_accuracy: f64,
) -> Result<Metrics> {
    let mark = format!("{}-{}", std::process::id(), contender.name);
    let temporary = std::env::temp_dir().join(format!("ps-bench-{}", std::process::id()));
    fs::create_dir_all(&temporary).context("no temporary folder")?;
    let errors = temporary.join("stderr");
    let marked = Marked::new(&mark);
    let mut command = surroundings.command(contender)?;
    command
        .envs(environment(&temporary)?)
        .env(MARK, &mark)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(fs::File::create(&errors)?);
    let started = Instant::now();
    let mut child = command.spawn().context("it cannot be started")?;
    let outcome = watch(&mut child, &marked, started);
    marked.kill();
    let status = child.wait()?;
    let said = fs::read_to_string(&errors).unwrap_or_default();
    let _ = fs::remove_dir_all(&temporary);
    let last_lines = || {
        let lines: Vec<_> = said.lines().collect();
        lines[lines.len().saturating_sub(12)..].join("\n")
    };
    let metrics = outcome.with_context(|| format!("{status}; it said:\n{}", last_lines()))?;
    if let Some(accuracy) = metrics.get("accuracy") {
        ensure!(
            *accuracy >= least_accuracy,
            "wrong work: after it, {accuracy:.1} % of the test images are recognized, \
             and not {least_accuracy} %"
        );
    }
    Ok(metrics)
}

/// The same for all: one thread for each worker's arithmetic.
fn environment(temporary: &Path) -> Result<Vec<(&'static str, OsString)>> {
    // Nobody else takes a port between here and its use, most likely.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let one = || OsString::from("1");
    Ok(vec![
        ("OMP_NUM_THREADS", one()),
        ("MKL_NUM_THREADS", one()),
        ("RAYON_NUM_THREADS", one()),
        ("MASTER_ADDR", "127.0.0.1".into()),
        ("MASTER_PORT", port.port().to_string().into()),
        ("GLOO_SOCKET_IFNAME", "lo".into()),
        ("TP_SOCKET_IFNAME", "lo".into()),
        ("PYTHONWARNINGS", "ignore".into()),
        ("RAY_USAGE_STATS_ENABLED", "0".into()),
        // No token file in the user's home for a cluster that lives for seconds.
        ("RAY_AUTH_MODE", "disabled".into()),
        ("PS_BENCH_TEMP", temporary.into()),
    ])
}

/// Follows a run to its result, and looks at its processes on the way.
fn watch(child: &mut Child, marked: &Marked, started: Instant) -> Result<Metrics> {
    let lines = read_lines(child.stdout.take().context("its output is piped")?);
    let mut ours = Metrics::new();
    let (mut peak, mut cpu_at_begin) = (0, 0.0);
    let mut next_sample = started + SAMPLE_EVERY;
    while started.elapsed() < PATIENCE {
        match lines.recv_timeout(next_sample.saturating_duration_since(Instant::now())) {
            Ok((at, line)) => match line.strip_prefix(PREFIX) {
                Some("first") => {
                    let startup = at.duration_since(started);
                    ours.insert("startup_s".into(), startup.as_secs_f64());
                }
                Some("begin") => cpu_at_begin = marked.cpu_seconds(),
                Some("end") => {
                    ours.insert("cpu_s".into(), marked.cpu_seconds() - cpu_at_begin);
                    peak = peak.max(marked.memory());
                }
                Some(result) => {
                    peak = peak.max(marked.memory());
                    ours.insert("peak_mb".into(), peak as f64 / 1e6);
                    return complete(result, ours);
                }
                None => {}
            },
            Err(RecvTimeoutError::Timeout) => {
                peak = peak.max(marked.memory());
                next_sample = Instant::now() + SAMPLE_EVERY;
            }
            Err(RecvTimeoutError::Disconnected) => bail!("it ended without a result"),
        }
        // A daemon can keep the pipe open after its parent has failed.
        if let Some(status) = child.try_wait()?
            && !status.success()
        {
            bail!("it failed");
        }
    }
    bail!("no result after {} s", PATIENCE.as_secs())
}

fn read_lines(stdout: ChildStdout) -> Receiver<(Instant, String)> {
    let (sender, lines) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send((Instant::now(), line)).is_err() {
                return;
            }
        }
    });
    lines
}

/// Joins what the contender says with what we saw.
fn complete(result: &str, ours: Metrics) -> Result<Metrics> {
    let json = result
        .strip_prefix("result ")
        .with_context(|| format!("it said `{result}`"))?;
    let mut metrics: Metrics = serde_json::from_str(json).context("its result is not readable")?;
    metrics.extend(ours);
    if let (Some(cpu), Some(gradients)) = (metrics.get("cpu_s"), metrics.get("gradients")) {
        let per_thousand = 1e3 * cpu / gradients;
        metrics.insert("cpu_s_per_1000".into(), per_thousand);
    }
    Ok(metrics)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_joined_with_what_was_seen() {
        let seen = Metrics::from([("cpu_s".into(), 3.0)]);
        let metrics = complete(r#"result {"gradients": 1500, "accuracy": 91.5}"#, seen).unwrap();
        assert_eq!(metrics["cpu_s_per_1000"], 2.0);
        assert_eq!(metrics["accuracy"], 91.5);
        assert!(complete("result nonsense", Metrics::new()).is_err());
        assert!(complete("hello", Metrics::new()).is_err());
    }
}
