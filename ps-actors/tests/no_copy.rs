//! PS-8: in one process no copy of weights or gradients is made on the way between actors.
//!
//! A binary of its own, because it counts what the whole process allocates.

use std::alloc::System;

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

const LEN: usize = 1 << 20;

fn worker(id: u32) -> actor::ActorRef<DataWorker<impl GradientSource>> {
    actor::spawn(move || {
        let pool = BufferPool::new(4);
        let source = move |_: Clock, weights: &Weights| -> Result<_, SourceError> {
            let mut buffer = pool.take(LEN);
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

/// The bytes that `num_steps` of two workers allocate, all threads together.
fn bytes_allocated(servers: &ServerGroup, num_steps: u64) -> usize {
    let workers = [worker(0), worker(1)];
    let run = || {
        let replies: Vec<_> = workers
            .iter()
            .map(|worker| {
                worker.ask(RunSteps {
                    servers: servers.clone(),
                    num_steps,
                })
            })
            .collect();
        replies.into_iter().for_each(|reply| {
            reply.wait().unwrap().unwrap();
        });
    };
    run();
    let before = ALLOCATOR.stats().bytes_allocated;
    run();
    ALLOCATOR.stats().bytes_allocated - before
}

#[test]
fn a_steady_run_allocates_nothing_of_the_size_of_the_model() {
    const STEPS: u64 = 50;
    for consistency in [Consistency::Bsp, Consistency::Asp] {
        for num_servers in [1, 2] {
            let initial = Weights::initial(Layout::flat(LEN), vec![0.5; LEN]);
            let config = ServerConfig {
                consistency,
                ..ServerConfig::default()
            };
            let group = ServerGroup::spawn(&initial, num_servers, config, |_| Box::new(Sgd::new()));
            let servers = group.unwrap();
            let allocated = bytes_allocated(&servers, STEPS);
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
