//! A training that cannot end before its test has done something.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ps::prelude::*;

/// How many batches each worker gets without the test. It is more than are made ahead of time.
const FIRST: usize = 20;

/// Longer than any test.
const PATIENCE: Duration = Duration::from_secs(300);

/// Lets so many batches of each worker pass.
#[derive(Clone)]
pub(crate) struct Gate(Arc<(Mutex<usize>, Condvar)>);

impl Gate {
    /// Lets a few batches pass.
    pub(crate) fn new() -> Self {
        Self(Arc::new((Mutex::new(FIRST), Condvar::new())))
    }

    /// Lets all batches pass.
    pub(crate) fn open() -> Self {
        let gate = Self::new();
        gate.let_pass(usize::MAX);
        gate
    }

    /// Lets so many more batches of each worker pass.
    pub(crate) fn let_pass(&self, num_batches: usize) {
        let (allowed, changed) = &*self.0;
        let mut allowed = allowed.lock().unwrap();
        *allowed = allowed.saturating_add(num_batches);
        changed.notify_all();
    }

    /// Waits until the batch with this number may pass.
    fn pass(&self, number: usize) {
        let (allowed, changed) = &*self.0;
        let allowed = allowed.lock().unwrap();
        let waited = changed.wait_timeout_while(allowed, PATIENCE, |allowed| number >= *allowed);
        assert!(!waited.unwrap().1.timed_out(), "the test opens no gate");
    }
}

/// Examples whose batches pass a gate. Each clone has batches of its own.
pub(crate) struct Gated<E> {
    examples: E,
    gate: Gate,
    num_batches: Cell<usize>,
}

impl<E> Gated<E> {
    pub(crate) fn new(examples: E, gate: &Gate) -> Self {
        Self {
            examples,
            gate: gate.clone(),
            num_batches: Cell::new(0),
        }
    }
}

impl<E: Clone> Clone for Gated<E> {
    fn clone(&self) -> Self {
        Self::new(self.examples.clone(), &self.gate)
    }
}

impl<E: Examples> Examples for Gated<E> {
    type Batch = E::Batch;

    fn num_examples(&self) -> usize {
        self.examples.num_examples()
    }

    fn batch(&self, indices: &[usize]) -> E::Batch {
        self.gate.pass(self.num_batches.get());
        self.num_batches.set(self.num_batches.get() + 1);
        self.examples.batch(indices)
    }

    fn fingerprint(&self) -> Option<String> {
        self.examples.fingerprint()
    }
}
