//! PS-8: in one process no copy of weights or gradients is made on the way between actors; and
//! memory does not grow with the number of rounds.
//!
//! A binary of its own, because it counts what the whole process allocates; its tests take turns.

use std::alloc::System;
use std::sync::{Mutex, PoisonError};

use ps_actors::actor;
use ps_actors::buffer::BufferPool;
use ps_actors::group::ServerGroup;
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::rule::Sgd;
use ps_actors::server::{Consistency, PullVersion, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{DataWorker, GradientSource, LocalGradient, RunSteps, SourceError};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

static TURN: Mutex<()> = Mutex::new(());

/// A worker whose gradient is the weights themselves, in recycled buffers.
fn worker(id: u32) -> actor::ActorRef<DataWorker<impl GradientSource>> {
    actor::spawn(move || {
        let pool = BufferPool::new(4);
        let source = move |_: Clock, weights: &Weights| -> Result<_, SourceError> {
            let mut buffer = pool.take(weights.len());
            for segment in weights.segments() {
                buffer.extend_from_slice(segment.data());
            }
            let gradient = Gradient::new(buffer);
            Ok(LocalGradient {
                gradient,
                loss: 0.0,
                num_examples: 1,
            })
        };
        DataWorker::new(WorkerId(id), source)
    })
}

fn servers(num_weights: usize, num_servers: usize, consistency: Consistency) -> ServerGroup {
    let initial = Weights::initial(Layout::flat(num_weights), vec![0.5; num_weights]);
    let config = ServerConfig {
        consistency,
        ..ServerConfig::default()
    };
    ServerGroup::spawn(&initial, num_servers, config, |_| Box::new(Sgd::new())).unwrap()
}

/// Lets two workers take steps, twice: to warm up, and to be measured from the moment on at which
/// `between` is called.
fn run_twice<T>(
    servers: &ServerGroup,
    [warm_up, measured]: [u64; 2],
    between: impl FnOnce() -> T,
) -> T {
    let workers = [worker(0), worker(1)];
    let run = |num_steps| {
        let run = || RunSteps {
            servers: servers.clone(),
            num_steps,
        };
        for reply in workers.each_ref().map(|worker| worker.ask(run())) {
            reply.wait().unwrap().unwrap();
        }
    };
    run(warm_up);
    let result = between();
    run(measured);
    result
}

#[test]
fn a_steady_run_allocates_nothing_of_the_size_of_the_model() {
    const LEN: usize = 1 << 20;
    const STEPS: u64 = 50;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for consistency in [Consistency::Bsp, Consistency::Asp] {
        for num_servers in [1, 2] {
            let servers = servers(LEN, num_servers, consistency);
            let before = run_twice(&servers, [STEPS, STEPS], || {
                ALLOCATOR.stats().bytes_allocated
            });
            let allocated = ALLOCATOR.stats().bytes_allocated - before;
            // 100 gradients and 100 snapshots of 4 MiB went back and forth: 800 MiB.
            assert!(
                allocated < LEN * size_of::<f32>(),
                "{consistency}, {num_servers} servers: {allocated} bytes"
            );
            let last = actor::run(async move { servers.pull(PullVersion::Latest).await.unwrap() });
            assert!(last.version().0 >= 2 * STEPS);
        }
    }
}

#[test]
fn memory_does_not_grow_over_ten_thousand_rounds() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let live_bytes = || {
        let stats = ALLOCATOR.stats();
        stats.bytes_allocated as isize - stats.bytes_deallocated as isize
    };
    let servers = servers(500, 2, Consistency::Bsp);
    // The ledgers fill up to their bound first.
    let before = run_twice(&servers, [2_000, 10_000], live_bytes);
    let grown = live_bytes() - before;
    // A leak of one small allocation per gradient would be more.
    assert!(
        grown < 256 << 10,
        "{grown} bytes more, {} per round",
        grown / 10_000
    );
}
