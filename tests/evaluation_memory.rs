//! A process that only evaluates, or serves, or looks at weights, holds no more memory after a while (M-5).
//!
//! A binary of its own, because it counts what the whole process holds, and because burn clears its
//! books of graphs in all of the process whenever anybody goes backward.

use std::alloc::System;

use ps::model::{Array, LocalModel};
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
fn memory_does_not_grow_where_nothing_is_trained() {
    const ROUNDS: isize = 100;
    let device = select_device(default_device_name()).unwrap();
    let model = ConvNet::init(1, &device);
    let mut evaluator = Evaluator::new(&model, &device, &Mnist::bundled_sample().test).unwrap();
    let initial = initial_weights(&model, &device).unwrap();
    // As a part server does for those who only ask for outputs, whenever there are new weights.
    let mut served = LocalModel::new(model.clone(), &device).unwrap();
    let weights = initial.to_vec();
    let input = Array {
        shape: vec![1, 1, 28, 28],
        values: vec![0.5; 28 * 28],
    };
    let mut rounds = |num_rounds| {
        for _ in 0..num_rounds {
            evaluator.evaluate(&initial).unwrap();
            drop(model_with_weights(&model, &device, &initial).unwrap());
            drop(initial_weights(&model, &device).unwrap());
            served.load(&weights).unwrap();
            served.infer(input.clone()).unwrap();
        }
    };
    rounds(5);
    let before = live_bytes();
    rounds(ROUNDS);
    let grown = live_bytes() - before;
    // A leaf in burn's books takes some 1.3 kB: less than one in each round, of 16 that could be made.
    assert!(grown < ROUNDS * 600, "{grown} bytes more");
}
