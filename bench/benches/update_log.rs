//! What an update log costs: the speed of a training that writes one, beside the same training with
//! checkpoints alone, in turn. And how long a run takes to follow the log when it goes on, as a part of the
//! time in which the updates were made.
//!
//! `cargo bench -p ps-bench --bench update_log`. The directory is `$PS_BENCH_DIR`, or a temporary one; the
//! disk under it matters.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ps::actors::checkpoint::CheckpointDir;
use ps::prelude::*;

const NUM_ROUNDS: usize = 7;

const SYNCS: [LogSync; 3] = [
    LogSync::Never,
    LogSync::Every(Duration::from_secs(1)),
    LogSync::Always,
];

fn main() -> Result<()> {
    // `cargo bench` passes flags that are criterion's.
    let temporary = tempfile::tempdir()?;
    let directory = std::env::var_os("PS_BENCH_DIR").map(PathBuf::from);
    let directory = directory.unwrap_or_else(|| temporary.path().to_owned());
    let device = select_device(default_device_name())?;
    compare("ConvNet", &ConvNet::init(1, &device), 3000, &directory)?;
    compare("Net", &Net::init(1, &device), 100, &directory)?;
    follow(&directory)
}

/// Prints the speed with each kind of log, as a part of the speed without one.
fn compare<M: Model<Batch = ImageBatch>>(
    name: &str,
    model: &M,
    num_iterations: u64,
    directory: &Path,
) -> Result<()> {
    let mut ratios = SYNCS.map(|_| Vec::new());
    for round in 0..NUM_ROUNDS {
        let run = |log: Option<LogSync>| {
            let case = log.map_or("none".to_owned(), |sync| sync.to_string());
            let directory = directory.join(format!("{name}-{round}-{case}"));
            let speed = train(model, num_iterations, config(&directory, log))?;
            std::fs::remove_dir_all(directory)?;
            Ok::<_, anyhow::Error>(speed)
        };
        let without = run(None)?;
        for (sync, ratios) in SYNCS.into_iter().zip(&mut ratios) {
            ratios.push(run(Some(sync))? / without);
        }
    }
    for (sync, mut ratios) in SYNCS.into_iter().zip(ratios) {
        ratios.sort_by(f64::total_cmp);
        println!(
            "{name}, synced {}: {:.3} of the gradients per second without a log ({:.3} to {:.3})",
            match sync {
                LogSync::Every(interval) => format!("every {interval:?}"),
                LogSync::Never | LogSync::Always => sync.to_string(),
            },
            ratios[NUM_ROUNDS / 2],
            ratios[0],
            ratios[NUM_ROUNDS - 1],
        );
    }
    Ok(())
}

fn config(directory: &Path, log: Option<LogSync>) -> CheckpointConfig {
    CheckpointConfig {
        every: 1000,
        log: log.map(|sync| LogConfig {
            sync,
            ..LogConfig::default()
        }),
        ..CheckpointConfig::new(directory)
    }
}

fn train<M: Model<Batch = ImageBatch>>(
    model: &M,
    num_iterations: u64,
    checkpoints: CheckpointConfig,
) -> Result<f64> {
    let report = Trainer::new(model.clone(), Mnist::bundled_sample().train)
        .device(&select_device(default_device_name())?)
        .workers(2)
        .consistency(Consistency::Asp)
        .iterations(num_iterations)
        .checkpoints(checkpoints)
        .run()?;
    let saved = report.checkpoints.as_ref().context("they were saved")?;
    assert_eq!((saved.num_failed, saved.num_log_failures), (0, 0));
    Ok(report.gradients_per_second())
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
