//! A synchronous round of two workers on `ConvNet`, beside the same two gradient computations on
//! two bare threads with a barrier.
//!
//! ```text
//! cargo bench -p ps-bench --bench round
//! ```

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use ps::actors::worker::GradientSource;
use ps::model::burn::tensor::Device;
use ps::prelude::*;
use ps::source::ModelSource;

const BATCH: usize = 128;

fn config(rank: u32) -> WorkerConfig {
    WorkerConfig {
        worker: WorkerId(rank),
        num_workers: 2,
        batch_size: BATCH,
        seed: 1,
    }
}

fn device() -> Device {
    let name = std::env::var("PS_BENCH_DEVICE").unwrap_or(default_device_name().to_owned());
    select_device(&name).unwrap()
}

/// Two threads compute gradients on the same weights, with a barrier after each round.
fn bare_threads(
    weights: &Weights,
    sources: &mut [ModelSource<ConvNet>; 2],
    rounds: std::ops::Range<u64>,
) -> Duration {
    let barrier = Barrier::new(2);
    let started = Instant::now();
    thread::scope(|scope| {
        for source in sources {
            let (barrier, rounds) = (&barrier, rounds.clone());
            scope.spawn(move || {
                for clock in rounds.map(Clock) {
                    source.gradient(clock, weights).unwrap();
                    barrier.wait();
                }
            });
        }
    });
    started.elapsed()
}

fn rounds(c: &mut Criterion) {
    let device = device();
    let model = ConvNet::init(1, &device);
    let data = Mnist::bundled_sample().train;
    let initial = initial_weights(&model, &device).unwrap();
    let mut group = c.benchmark_group("synchronous round, ConvNet, 2 workers");
    group
        .sample_size(30)
        .measurement_time(Duration::from_secs(15));

    // Batches are prefetched on a thread of their own in all three, as in training.
    let mut sources =
        [0, 1].map(|rank| ModelSource::new(&model, &device, &data, config(rank)).unwrap());
    let mut next = 0;
    group.bench_function("two bare threads and a barrier", |b| {
        b.iter_custom(|num_rounds| {
            // Batches follow one another over all samples, as they do in training.
            let rounds = next..next + num_rounds;
            next = rounds.end;
            bare_threads(&initial, &mut sources, rounds)
        });
    });
    drop(sources);

    let workers = || [0, 1].map(|rank| spawn_worker(&model, &device, &data, config(rank)).unwrap());
    let server = || {
        let config = ServerConfig {
            learning_rate: 1e-6,
            ..ServerConfig::default()
        };
        ParameterServer::new(&initial, Sgd::new(), config)
            .unwrap()
            .spawn()
            .unwrap()
    };

    {
        let (server, workers) = (ServerGroup::single(server()), workers());
        group.bench_function("RunSteps, bsp", |b| {
            b.iter_custom(|num_steps| {
                let started = Instant::now();
                let run = || RunSteps {
                    servers: server.clone(),
                    num_steps,
                };
                for reply in workers.each_ref().map(|worker| worker.ask(run())) {
                    reply.wait().unwrap().unwrap();
                }
                started.elapsed()
            });
        });
    }

    let (server, workers) = (server(), workers());
    let mut weights = server.ask(GetWeights).wait().unwrap();
    group.bench_function("driver's loop", |b| {
        b.iter(|| {
            let replies = workers
                .each_ref()
                .map(|worker| worker.ask(ComputeGradients(weights.clone())));
            let gradients = replies.map(|reply| reply.wait().unwrap().unwrap());
            weights = server
                .ask(ApplyGradients::mean(gradients))
                .wait()
                .unwrap()
                .unwrap();
        });
    });
    group.finish();
}

criterion_group!(benches, rounds);
criterion_main!(benches);
