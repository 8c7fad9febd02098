//! What an update log costs: the speed of a training that writes one, beside the same training with
//! checkpoints alone, in turn. And how long a run takes to follow the log when it goes on, as a part of the
//! time in which the updates were made.
//!
//! A log writes over its own files from the fourth segment on. The speed is that of the beginning, when it
//! writes new files, and that of the rest of the run.
//!
//! `cargo bench -p ps-bench --bench update_log -- [ConvNet | Net | follow]`. The directory is `$PS_BENCH_DIR`,
//! or a temporary one; the disk under it matters.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ps::actors::checkpoint::CheckpointDir;
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
    let segment = (LogConfig::default().max_bytes / num_bytes).min(EVERY);
    let num_updates = (NUM_FRESH * segment).max(least);
    for round in 0..NUM_ROUNDS {
        let run = |log: Option<LogSync>| {
            let case = log.map_or("none".to_owned(), |sync| sync.to_string());
            let directory = directory.join(format!("{name}-{round}-{case}"));
            let speeds = train(model, num_updates, config(&directory, log))?;
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

fn config(directory: &Path, log: Option<LogSync>) -> CheckpointConfig {
    CheckpointConfig {
        every: EVERY,
        log: log.map(|sync| LogConfig {
            sync,
            ..LogConfig::default()
        }),
        ..CheckpointConfig::new(directory)
    }
}

/// Trains for twice this number of updates. Returns how many were made per second in each half.
fn train<M: Model<Batch = ImageBatch>>(
    model: &M,
    num_updates: u64,
    checkpoints: CheckpointConfig,
) -> Result<[f64; 2]> {
    let mnist = Mnist::bundled_sample();
    let report = Trainer::new(model.clone(), mnist.train)
        .device(&select_device(default_device_name())?)
        .workers(2)
        .consistency(Consistency::Asp)
        // Two workers, and two halves.
        .iterations(num_updates)
        .test_data(mnist.test)
        .evaluate_every(num_updates)
        .checkpoints(checkpoints)
        .run()?;
    let saved = report.checkpoints.as_ref().context("they were saved")?;
    assert_eq!((saved.num_failed, saved.num_log_failures), (0, 0));
    let point = |at: usize| {
        let point = report.curve.get(at).context("evaluated in the middle")?;
        Ok::<_, anyhow::Error>((point.version.0 as f64, point.elapsed.as_secs_f64()))
    };
    let (middle, last) = (point(0)?, point(report.curve.len() - 1)?);
    Ok([
        middle.0 / middle.1,
        (last.0 - middle.0) / (last.1 - middle.1),
    ])
}

/// Prints how long it takes to follow the log of 100 updates of `Net`.
fn follow(directory: &Path) -> Result<()> {
    let device = select_device(default_device_name())?;
    let model = Net::init(1, &device);
    let directory = directory.join("follow");
    let began = Instant::now();
    let log = Some(LogSync::Never);
    train(&model, 50, config(&directory, log))?;
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
        ..config(&directory, None)
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
