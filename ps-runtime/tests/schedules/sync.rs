//! Locks and wakers that let another thread run before every operation.
//!
//! The semaphore and the waker are those of the product. Each operation of theirs is one step of a schedule.

use std::task::Waker;
use std::time::Duration;

pub(crate) use shuttle::sync::{Mutex, MutexGuard};
use tokio::sync::{AcquireError, SemaphorePermit, TryAcquireError};

/// Lets another thread run. (`yield_now` would also wake this thread, and so hide that nobody else does.)
fn step() {
    shuttle::thread::sleep(Duration::ZERO);
}

pub(crate) struct Semaphore(tokio::sync::Semaphore);

impl Semaphore {
    pub(crate) fn new(permits: usize) -> Self {
        Self(tokio::sync::Semaphore::new(permits))
    }

    pub(crate) fn available_permits(&self) -> usize {
        self.0.available_permits()
    }

    pub(crate) fn try_acquire(&self) -> Result<SemaphorePermit<'_>, TryAcquireError> {
        step();
        self.0.try_acquire()
    }

    pub(crate) async fn acquire(&self) -> Result<SemaphorePermit<'_>, AcquireError> {
        step();
        // Outside tokio's cooperative budget, which belongs to the one real thread.
        tokio::task::unconstrained(self.0.acquire()).await
    }

    pub(crate) fn add_permits(&self, permits: usize) {
        step();
        self.0.add_permits(permits);
    }

    pub(crate) fn close(&self) {
        step();
        self.0.close();
    }
}

#[derive(Default)]
pub(crate) struct AtomicWaker(futures_util::task::AtomicWaker);

impl AtomicWaker {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn register(&self, waker: &Waker) {
        step();
        self.0.register(waker);
    }

    pub(crate) fn wake(&self) {
        step();
        self.0.wake();
    }
}
