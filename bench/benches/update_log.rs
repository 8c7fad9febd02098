//! What an update log costs: the speed of a training that writes one, beside the same training with
//! checkpoints alone, in turn. And how long a run takes to follow the log when it goes on, as a part of the
//! time in which the updates were made.
//!
//! A log writes over its own files from the fourth segment on. The speed is that of the beginning, when it
//! writes new files, and that of the rest of the run.
//!
//! `cargo bench -p ps-bench --bench update_log -- [ConvNet | Net | follow]`. The directory is `$PS_BENCH_DIR`,
//! or a temporary one; the disk under it matters. `$PS_BENCH_LOG_MIB` is the size of a segment in MiB, in place of the
//! default: a checkpoint is taken when a segment is full.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ps::actors::checkpoint::CheckpointDir;
use ps::observe::Event;
use ps::prelude::*;

const NUM_ROUNDS: usize = 5;

/// How many updates there are from one checkpoint to the next, at most.
const EVERY: u64 = 1000;

/// How many segments a log writes before it writes over old ones.
const NUM_FRESH: u64 = 3;

const SYNCS: [LogSync; 3] = [
    LogSync::Never,
    LogSync::Every(Duration::from_secs(1)),
    LogSync::Always,
];

fn main() -> Result<()> {
    // `cargo bench` passes flags that are criterion's.
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|one| one == part);
    let temporary = tempfile::tempdir()?;
    let directory = std::env::var_os("PS_BENCH_DIR").map(PathBuf::from);
    let directory = directory.unwrap_or_else(|| temporary.path().to_owned());
    let device = select_device(default_device_name())?;
    if wants("ConvNet") {
        compare("ConvNet", &ConvNet::init(1, &device), 9000, &directory)?;
    }
    if wants("Net") {
        compare("Net", &Net::init(1, &device), 150, &directory)?;
    }
    if wants("follow") {
        follow(&directory)?;
    }
    Ok(())
}

/// Prints the speed with each kind of log, as a part of the speed without one. Each half of a run has at least
/// `least` updates.
fn compare<M: Model<Batch = ImageBatch>>(
    name: &str,
    model: &M,
    least: u64,
    directory: &Path,
) -> Result<()> {
    let mut ratios = SYNCS.map(|_| [Vec::new(), Vec::new()]);
    // Each update writes one gradient.
    let device = select_device(default_device_name())?;
    let num_bytes = 4 * initial_weights(model, &device)?.len() as u64;
    let segment = (max_bytes()? / num_bytes).clamp(1, EVERY);
    let num_updates = (NUM_FRESH * segment).max(least);
    for round in 0..NUM_ROUNDS {
        let run = |log: Option<LogSync>| {
            let case = log.map_or("none".to_owned(), |sync| sync.to_string());
            let directory = directory.join(format!("{name}-{round}-{case}"));
            let speeds = train(model, num_updates, config(&directory, log)?)?;
            std::fs::remove_dir_all(directory)?;
            Ok::<_, anyhow::Error>(speeds)
        };
        let without = run(None)?;
        for (sync, ratios) in SYNCS.into_iter().zip(&mut ratios) {
            let with = run(Some(sync))?;
            for (part, ratios) in ratios.iter_mut().enumerate() {
                ratios.push(with[part] / without[part]);
            }
        }
    }
    for (sync, ratios) in SYNCS.into_iter().zip(ratios) {
        for (part, mut ratios) in ["new files", "later"].into_iter().zip(ratios) {
            ratios.sort_by(f64::total_cmp);
            println!(
                "{name}, synced {}, {part}: {:.3} of the gradients per second without a log ({:.3} to {:.3})",
                match sync {
                    LogSync::Every(interval) => format!("every {interval:?}"),
                    LogSync::Never | LogSync::Always => sync.to_string(),
                },
                ratios[NUM_ROUNDS / 2],
                ratios[0],
                ratios[NUM_ROUNDS - 1],
            );
        }
    }
    Ok(())
}

/// The size of a segment of the log, in bytes.
fn max_bytes() -> Result<u64> {
    match std::env::var("PS_BENCH_LOG_MIB") {
        Ok(mib) => Ok(mib.parse::<u64>().context("PS_BENCH_LOG_MIB")? << 20),
        Err(_) => Ok(LogConfig::default().max_bytes),
    }
}

fn config(directory: &Path, log: Option<LogSync>) -> Result<CheckpointConfig> {
    let max_bytes = max_bytes()?;
    Ok(CheckpointConfig {
        every: EVERY,
        log: log.map(|sync| LogConfig { sync, max_bytes }),
        ..CheckpointConfig::new(directory)
    })
}

/// Trains for twice this number of updates. Returns how many were made per second in each half.
fn train<M: Model<Batch = ImageBatch>>(
    model: &M,
    num_updates: u64,
    checkpoints: CheckpointConfig,
) -> Result<[f64; 2]> {
    let (sender, seen) = mpsc::channel();
    let report = Trainer::new(model.clone(), Mnist::bundled_sample().train)
        .device(&select_device(default_device_name())?)
        .workers(2)
        .consistency(Consistency::Asp)
        // Two workers, and two halves.
        .iterations(num_updates)
        .checkpoints(checkpoints)
        .observe(move |event: &Event| {
            if let Event::Step(step) = event {
                let _ = sender.send(step.time);
            }
        })
        .run()?;
    let saved = report.checkpoints.as_ref().context("they were saved")?;
    assert_eq!((saved.num_failed, saved.num_log_failures), (0, 0));
    let mut times: Vec<f64> = seen.iter().collect();
    times.sort_by(f64::total_cmp);
    let half = times.len() / 2;
    let (middle, last) = (times[half], times[times.len() - 1]);
    let speed = |num: usize, seconds: f64| num as f64 / seconds;
    Ok([
        speed(half, middle - times[0]),
        speed(times.len() - half, last - middle),
    ])
}

/// Prints how long it takes to follow the log of 100 updates of `Net`.
fn follow(directory: &Path) -> Result<()> {
    let device = select_device(default_device_name())?;
    let model = Net::init(1, &device);
    let directory = directory.join("follow");
    let began = Instant::now();
    let log = Some(LogSync::Never);
    train(&model, 50, config(&directory, log)?)?;
    let trained = began.elapsed();
    // The run's last checkpoint would leave nothing to follow.
    let (_, last) = CheckpointDir::open(&directory)?
        .list()?
        .pop()
        .context("it was saved")?;
    std::fs::remove_dir_all(last)?;
    let began = Instant::now();
    let resume = CheckpointConfig {
        resume: true,
        ..config(&directory, None)?
    };
    let (_, found) = Checkpoints::open(resume, Box::new(Sgd::new()), |_| Ok(()))?;
    let version = found.context("there is one")?.checkpoint.version();
    assert_eq!(version, Version(100));
    println!(
        "100 updates of Net are followed in {:.3} of the time in which they were made",
        began.elapsed().as_secs_f64() / trained.as_secs_f64()
    );
    Ok(())
}
