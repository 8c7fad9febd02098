//! The device's stream of random numbers, for burn's layers that draw from it.
//!
//! The whole process has one stream. If one step at a time draws from it, each step starts the stream again
//! from its own seed, so the same seed gives the same bits. If several workers of one process draw at the
//! same time, their steps disturb each other. A warning then says so, once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, TryLockError};

use burn::tensor::Device;

use crate::rng::Rng;
use crate::step::StepSeed;

static IN_USE: Mutex<()> = Mutex::new(());
static WARNED: AtomicBool = AtomicBool::new(false);

/// Keeps the seeds of this stream apart from those of [`Step`](crate::Step).
const DEVICE_STREAM: u64 = 0x6465_7669_6365;

/// Runs `compute`, in which the `layers` draw from the device's stream.
pub(crate) fn seeded<T>(
    layers: &[String],
    device: &Device,
    seed: StepSeed,
    compute: impl FnOnce() -> T,
) -> T {
    let [first, ..] = layers else {
        return compute();
    };
    let turn = match IN_USE.try_lock() {
        Ok(turn) => Some(turn),
        // The lock guards no data, so a panic cannot have left anything half changed.
        Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    };
    if turn.is_some() {
        let StepSeed {
            seed,
            worker,
            clock,
        } = seed;
        device.seed(Rng::from_parts(&[DEVICE_STREAM, seed, worker, clock]).next_u64());
    } else if !WARNED.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            "several workers of this process draw random numbers from one stream of the device, for \
             `{first}` and maybe other layers, so the same seed does not give the same bits: use \
             `Step::dropout` in its place, or one worker in each process"
        );
    }
    compute()
}
