//! What checkpoints cost: the longest time between two updates while 100 MB are saved, and the speed of a
//! training that saves them, each beside the same without checkpoints in the same run.
//!
//! `cargo bench -p ps-bench --bench checkpoints`. The directory is `$PS_BENCH_DIR`, or a temporary one; the
//! disk under it matters.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use ps::actors::ids::{Clock, GradientId, Incarnation};
use ps::prelude::*;

/// 25 million weights and as many numbers of momentum: 200 MB per checkpoint.
const NUM_WEIGHTS: usize = 25_000_000;

const NUM_ROUNDS: usize = 5;

fn main() -> Result<()> {
    // `cargo bench` passes flags that are criterion's.
    let temporary = tempfile::tempdir()?;
    let directory = std::env::var_os("PS_BENCH_DIR").map(PathBuf::from);
    let directory = directory.unwrap_or_else(|| temporary.path().to_owned());
    pauses(&directory.join("pauses"))?;
    for (name, num_iterations, run) in [
        (
            "ConvNet",
            6000,
            train_convnet as fn(u64, Option<CheckpointConfig>) -> Result<f64>,
        ),
        ("Net", 150, train_net),
    ] {
        let mut ratios = Vec::new();
        for round in 0..NUM_ROUNDS {
            let config = CheckpointConfig {
                every: num_iterations / 4,
                ..CheckpointConfig::new(directory.join(format!("{name}-{round}")))
            };
            let without = run(num_iterations, None)?;
            let with = run(num_iterations, Some(config))?;
            ratios.push(with / without);
        }
        ratios.sort_by(f64::total_cmp);
        println!(
            "{name}: {:.3} of the gradients per second without checkpoints ({:.3} to {:.3}), at 8 checkpoints in {} updates",
            ratios[NUM_ROUNDS / 2],
            ratios[0],
            ratios[NUM_ROUNDS - 1],
            2 * num_iterations,
        );
    }
    Ok(())
}

fn pauses(directory: &std::path::Path) -> Result<()> {
    let initial = Weights::initial(Layout::flat(NUM_WEIGHTS), vec![0.0; NUM_WEIGHTS]);
    let config = ServerConfig {
        consistency: Consistency::Asp,
        ..ServerConfig::default()
    };
    let server = ParameterServer::new(&initial, Sgd::with_momentum(0.9), config)?.spawn()?;
    drop(initial);
    let mut pusher = Pusher {
        server,
        gradient: Gradient::new(vec![1e-6; NUM_WEIGHTS]),
        clock: 0,
    };
    pusher.push_for(Duration::from_secs(1), |_| ())?;
    let config = CheckpointConfig {
        every: 1,
        ..CheckpointConfig::new(directory)
    };
    let (mut checkpoints, _) =
        Checkpoints::open(config, Box::new(Sgd::with_momentum(0.9)), |_| Ok(()))?;
    for round in 0..NUM_ROUNDS {
        let without = pusher.push_for(Duration::from_secs(3), |_| ())?;
        let server = pusher.server.clone();
        let saved_before = checkpoints.finish().num_saved;
        let mut last = Instant::now();
        let with = pusher.push_for(Duration::from_secs(3), |version| {
            // A driver does not wait for the disk: if it is slow, there are fewer checkpoints.
            if last.elapsed() > Duration::from_secs(1) && checkpoints.is_due(version) {
                last = Instant::now();
                checkpoints.save(&server);
            }
        })?;
        let num_saved = checkpoints.finish().num_saved - saved_before;
        println!(
            "round {round}: without checkpoints: {}; with {num_saved} checkpoints: {}",
            describe(without),
            describe(with)
        );
    }
    Ok(())
}

struct Pusher {
    server: ActorRef<ParameterServer>,
    gradient: Gradient,
    clock: u64,
}

impl Pusher {
    /// Applies gradients one after the other. Returns the times between two updates.
    fn push_for(
        &mut self,
        time: Duration,
        mut between: impl FnMut(Version),
    ) -> Result<Vec<Duration>> {
        let (begin, mut last, mut gaps) = (Instant::now(), Instant::now(), Vec::new());
        while begin.elapsed() < time {
            let update = GradientUpdate {
                id: GradientId {
                    worker: WorkerId(0),
                    incarnation: Incarnation(1),
                    clock: Clock(self.clock),
                },
                computed_on: Version(0),
                loss: 0.0,
                num_examples: 1,
                gradient: self.gradient.clone(),
            };
            self.clock += 1;
            let weights = self.server.ask(ApplyGradients::mean([update])).flatten();
            let version = weights.wait()?.version();
            gaps.push(last.elapsed());
            last = Instant::now();
            between(version);
        }
        Ok(gaps)
    }
}

fn describe(mut gaps: Vec<Duration>) -> String {
    gaps.sort_unstable();
    let (median, longest) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    format!("{median:.1?} per update, {longest:.1?} at most")
}

fn train_convnet(iterations: u64, checkpoints: Option<CheckpointConfig>) -> Result<f64> {
    let device = select_device(default_device_name())?;
    train(ConvNet::init(1, &device), iterations, checkpoints)
}

fn train_net(iterations: u64, checkpoints: Option<CheckpointConfig>) -> Result<f64> {
    let device = select_device(default_device_name())?;
    train(Net::init(1, &device), iterations, checkpoints)
}

fn train<M: Model<Batch = ImageBatch>>(
    model: M,
    iterations: u64,
    checkpoints: Option<CheckpointConfig>,
) -> Result<f64> {
    let report = Trainer::new(model, Mnist::bundled_sample().train)
        .device(&select_device(default_device_name())?)
        .workers(2)
        .consistency(Consistency::Asp)
        .iterations(iterations)
        .checkpoints(checkpoints)
        .run()?;
    // All were written.
    let saved = report.checkpoints.as_ref();
    assert!(saved.is_none_or(|saved| saved.num_failed == 0));
    Ok(report.gradients_per_second())
}
