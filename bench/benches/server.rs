//! The server's data path beside bare memory: an update of 25 million weights, and a pull of them.
//!
//! ```text
//! cargo bench -p ps-bench --bench server
//! ```

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ps::actors::ids::{GradientId, Incarnation};
use ps::actors::worker::{GetProgress, SourceError};
use ps::prelude::*;

const LEN: usize = 25_000_000;

/// Returns gradients with new clocks, as one worker computes them, all sharing the same numbers.
fn gradients(gradient: Gradient) -> impl FnMut(Version) -> GradientUpdate {
    let mut clock = 0;
    move |computed_on| {
        clock += 1;
        let (worker, incarnation) = (WorkerId(0), Incarnation(1));
        GradientUpdate {
            id: GradientId {
                worker,
                incarnation,
                clock: Clock(clock),
            },
            computed_on,
            loss: 0.0,
            num_examples: 1,
            gradient: gradient.clone(),
        }
    }
}

fn update(c: &mut Criterion) {
    let mut group = c.benchmark_group("update 25M, plain SGD");
    // Weights and gradient are read, weights are written.
    group.throughput(Throughput::Bytes(3 * 4 * LEN as u64));
    group.sample_size(20);

    let (mut weights, values) = (vec![0.5f32; LEN], vec![1e-3f32; LEN]);
    group.bench_function("a straight for loop", |b| {
        b.iter(|| {
            let rate = black_box(0.01f32);
            for (weight, value) in weights.iter_mut().zip(&values) {
                *weight -= rate * value;
            }
            black_box(&mut weights);
        });
    });

    let initial = Weights::initial(Layout::flat(LEN), weights);
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default()).unwrap();
    let server = server.spawn().unwrap();
    drop(initial);
    let mut next = gradients(Gradient::new(values));
    // The call from another thread and back is part of it; the snapshot returned is dropped
    // before the next, as a worker does that has loaded it.
    let mut version = Version(0);
    group.bench_function("ApplyGradients", |b| {
        b.iter(|| {
            let apply = ApplyGradients::mean([next(version)]);
            version = server.ask(apply).wait().unwrap().unwrap().version();
        });
    });
    // Somebody keeps the latest snapshot: the next version goes to another buffer.
    let mut held = server.ask(GetWeights).wait().unwrap();
    group.bench_function("ApplyGradients while the snapshot is held", |b| {
        b.iter(|| {
            let apply = ApplyGradients::mean([next(held.version())]);
            held = server.ask(apply).wait().unwrap().unwrap();
        });
    });
    group.finish();
}

/// An actor that has nothing to do.
fn spawn_idle() -> ActorRef<DataWorker<impl GradientSource>> {
    spawn(|| {
        let source = |_: Clock, _: &Weights| -> Result<LocalGradient, SourceError> {
            Err("it is never asked to".into())
        };
        DataWorker::new(WorkerId(0), source)
    })
}

fn pull(c: &mut Criterion) {
    let mut group = c.benchmark_group("pull 100 MB");
    let initial = Weights::initial(Layout::flat(LEN), vec![0.5; LEN]);
    let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default()).unwrap();
    let server = server.spawn().unwrap();
    // One at a time, most of it is waking two threads up: the same as for a message that carries
    // nothing. With many in flight the cost of the pull itself shows.
    group.bench_function("an empty message", |b| {
        let worker = spawn_idle();
        b.iter(|| worker.ask(GetProgress).wait().unwrap());
    });
    group.bench_function("GetWeights", |b| {
        b.iter(|| black_box(server.ask(GetWeights).wait().unwrap()));
    });
    group.bench_function("64 × GetWeights at once", |b| {
        b.iter(|| {
            let replies: Vec<_> = (0..64).map(|_| server.ask(GetWeights)).collect();
            for reply in replies {
                black_box(reply.wait().unwrap());
            }
        });
    });
    group.sample_size(10);
    group.bench_function("a copy of the numbers", |b| {
        b.iter(|| black_box(initial.to_vec()))
    });
    group.finish();
}

criterion_group!(benches, update, pull);
criterion_main!(benches);
