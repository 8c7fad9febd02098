//! The locks and wakers of a call, in one place. `tests/schedules` compiles the files of a call with replacements
//! for them, which switch threads at every operation.

pub(crate) use std::sync::{Mutex, MutexGuard};

pub(crate) use futures_util::task::AtomicWaker;
pub(crate) use tokio::sync::Semaphore;
