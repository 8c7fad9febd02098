//! Memory does not grow with the number of rounds, burn's part included.
//!
//! A binary of its own, because it counts what the whole process holds. `PS_SOAK_ROUNDS` sets how
//! many rounds are run; by default few.

use std::alloc::System;

use ps::prelude::*;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Bytes on the heap now.
fn live_bytes() -> isize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated as isize - stats.bytes_deallocated as isize
}

#[test]
fn memory_does_not_grow_over_many_rounds() {
    let num_rounds = std::env::var("PS_SOAK_ROUNDS").map_or(Ok(300), |text| text.parse());
    let num_rounds: u64 = num_rounds.expect("PS_SOAK_ROUNDS is a number of rounds");
    let device = select_device(default_device_name()).unwrap();
    let model = ConvNet::init(1, &device);
    let initial = initial_weights(&model, &device).unwrap();
    let make_rule = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::with_momentum(0.9)) };
    let servers = ServerGroup::spawn(&initial, 2, ServerConfig::default(), make_rule).unwrap();
    let data = Mnist::bundled_sample().train;
    let workers = [0, 1].map(|rank| {
        let worker = WorkerId(rank);
        let config = WorkerConfig {
            worker,
            num_workers: 2,
            batch_size: 8,
            seed: 1,
        };
        spawn_worker(&model, &device, &data, config).unwrap()
    });
    let rounds = |num_steps| {
        let run = || RunSteps {
            servers: servers.clone(),
            num_steps,
        };
        let replies = [workers[0].ask(run()), workers[1].ask(run())];
        for reply in replies {
            reply.wait().unwrap().unwrap();
        }
    };
    // The ledgers fill up to their bound of some thousand outcomes, and caches with them.
    rounds(1_100);
    let before = live_bytes();
    rounds(num_rounds);
    let grown = live_bytes() - before;
    // A leak of one gradient per round would be 4 × 1,960 bytes × rounds.
    assert!(
        grown < 1 << 20,
        "{grown} bytes more after {num_rounds} rounds"
    );
}
