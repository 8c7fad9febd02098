//! How long a training stands still when a process with a server is killed: from the kill to the next update
//! that is applied. A model of 1.2 million weights, three servers (the first one in the driver, one on each of
//! two nodes), two workers on the nodes, `asp`, an update log, everything on this host. The driver starts the
//! killed process again, and it joins while the others go on.
//!
//! `cargo bench -p ps-bench --bench recovery`. The directory is `$PS_BENCH_DIR`, or a temporary one.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ps::prelude::*;

/// In one run, because a process is restarted at most ten times within ten minutes.
const KILLS_IN_A_RUN: usize = 20;

const NUM_RUNS: usize = 5;

/// Updates from a recovery to the next kill.
const BETWEEN: usize = 20;

const IS_DRIVER: &str = "PS_BENCH_RECOVERY";

/// When each update of the first server was made, since it was started last.
static UPDATES: Mutex<Vec<Instant>> = Mutex::new(Vec::new());

/// SGD that notes when it was used.
#[derive(Debug)]
struct Watched(Sgd);

impl UpdateRule for Watched {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], learning_rate: f64) {
        self.0.update(weights, gradient, learning_rate);
        if std::thread::current().name() == Some("main") {
            // The log is being followed. Nobody is served yet.
            return;
        }
        UPDATES.lock().expect("nobody panics").push(Instant::now());
    }
}

fn main() -> Result<()> {
    // The nodes are copies of the driver.
    if std::env::var_os(IS_DRIVER).is_some() {
        return drive();
    }
    let mut times = Vec::new();
    for run in 0..NUM_RUNS {
        let mut driver = Command::new(std::env::current_exe()?)
            .env(IS_DRIVER, run.to_string())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(driver.stdout.take().context("it is piped")?).lines();
        for line in lines {
            times.extend(line?.parse::<f64>());
        }
        driver.wait()?;
    }
    times.sort_by(f64::total_cmp);
    let (num, at) = (times.len(), |part: f64| {
        times[(times.len() as f64 * part) as usize]
    });
    println!(
        "{num} kills: {:.3} s in the middle, {:.3} s for 99 of 100, {:.3} s at most, {:.3} s at least",
        at(0.5),
        at(0.99),
        times[num - 1],
        times[0]
    );
    Ok(())
}

/// Prints the time of each recovery, in seconds.
fn drive() -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let directory = std::env::var_os("PS_BENCH_DIR").map(std::path::PathBuf::from);
    let directory = directory.unwrap_or_else(|| temporary.path().to_owned());
    let run = std::env::var(IS_DRIVER)?;
    let device = select_device(default_device_name())?;
    let trainer = Trainer::new(Net::init(1, &device), Mnist::bundled_sample().train)
        .device(&device)
        .workers(2)
        .servers(3)
        .servers_on_nodes(true)
        .consistency(Consistency::Asp)
        .update_rule(|| Watched(Sgd::new()))
        .batch_size(8)
        .iterations(u64::MAX)
        .checkpoints(CheckpointConfig {
            log: Some(LogConfig::default()),
            ..CheckpointConfig::new(directory.join(format!("recovery-{run}")))
        });
    let hosts = trainer.hosts(Hosts::new())?;
    let options = LaunchOptions::processes(3);
    let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? else {
        return Ok(());
    };
    let nodes = cluster.clone();
    std::thread::spawn(move || {
        let done = kill_and_watch(&nodes);
        if let Err(error) = &done {
            eprintln!("{error:#}");
        }
        // The training has no end. Its processes end with this one.
        std::process::exit(i32::from(done.is_err()));
    });
    trainer.run_on(&cluster)?;
    bail!("it ended by itself")
}

fn kill_and_watch(cluster: &Cluster) -> Result<()> {
    let num_updates = || UPDATES.lock().expect("nobody panics").len();
    for number in 0..KILLS_IN_A_RUN {
        let before = num_updates();
        let nodes = loop {
            let nodes = cluster.nodes();
            if nodes.len() == 2 && num_updates() >= before + BETWEEN {
                break nodes;
            }
            // Looks now and then: to be told of each update would slow the training that is measured.
            std::thread::sleep(Duration::from_millis(1));
        };
        let pid = nodes[number % 2].pid;
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a process id")?;
        let killed = Instant::now();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        println!("{:.6}", recovered(killed)?.as_secs_f64());
    }
    Ok(())
}

/// Waits until updates are made again. The longest time without an update after the kill is the pause: until
/// the loss is noticed, a few more updates may be made.
fn recovered(killed: Instant) -> Result<Duration> {
    const QUIET: Duration = Duration::from_secs(2);
    loop {
        // As above. The times come from the updates themselves, not from this loop.
        std::thread::sleep(Duration::from_millis(5));
        let updates = UPDATES.lock().expect("nobody panics").clone();
        let after: Vec<_> = updates.into_iter().filter(|&at| at > killed).collect();
        let (Some(first), Some(_)) = (after.first(), after.last()) else {
            if killed.elapsed() > Duration::from_secs(60) {
                bail!("no update for a minute");
            }
            continue;
        };
        if killed.elapsed() < QUIET {
            continue;
        }
        let times = [killed, *first].into_iter().chain(after.iter().copied());
        let times: Vec<_> = times.collect();
        let gaps = times.windows(2).map(|pair| (pair[1] - pair[0], pair[1]));
        let (_, end) = gaps.max().context("there are two")?;
        return Ok(end - killed);
    }
}
