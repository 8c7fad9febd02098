//! Parallel loops over long vectors. One thread alone does not use the full speed of the memory.

use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;

/// The size of a part in bytes. A part fits into a core's cache.
pub(crate) const PART: usize = 1 << 20;

/// How many numbers a part has. Sums that are made part by part have the same bits on any machine.
pub const PART_LEN: usize = PART / size_of::<f32>();

/// Below this many bytes, starting a thread costs more than it saves.
const LARGE: usize = 8 << 20;

/// The most threads that work on one vector. More threads do not make the memory faster.
const MAX_THREADS: usize = 4;

/// Returns how many threads work on a vector of this many bytes.
fn num_threads(num_bytes: usize) -> usize {
    static CORES: LazyLock<usize> =
        LazyLock::new(|| thread::available_parallelism().map_or(1, usize::from));
    match num_bytes {
        LARGE.. => MAX_THREADS.min(*CORES),
        _ => 1,
    }
}

/// Calls `work` for each of the parts, in any order, on up to 4 threads. It returns when all parts are done.
///
/// `num_bytes` is the size of all parts together. It decides how many threads are used.
///
/// ```
/// use ps_runtime::parallel::{PART_LEN, for_each};
///
/// let mut numbers = vec![1.0_f32; 3_000_000];
/// let num_bytes = size_of_val(&numbers[..]);
/// for_each(num_bytes, numbers.chunks_mut(PART_LEN), |part| {
///     part.iter_mut().for_each(|number| *number *= 2.0);
/// });
/// assert!(numbers.iter().all(|&number| number == 2.0));
/// ```
///
/// # Panics
/// When `work` panics.
pub fn for_each<T: Send>(
    num_bytes: usize,
    parts: impl Iterator<Item = T> + Send,
    work: impl Fn(T) + Sync,
) {
    let parts = Mutex::new(parts);
    // Not `while let`: the lock would be held during the work.
    let next = || parts.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        loop {
            match next() {
                Some(part) => work(part),
                None => return,
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..num_threads(num_bytes) {
            let helper = thread::Builder::new().name("ps-helper".to_owned());
            // If the system gives no thread, this one does all the work.
            if helper.spawn_scoped(scope, run).is_err() {
                break;
            }
        }
        run();
    });
}

/// Returns the sum of the squares of the numbers, computed in `f64`. In `f64` the squares of finite `f32`
/// numbers cannot overflow, so the sum is finite exactly if every number is. The order of summation is
/// fixed: part by part.
pub fn norm_squared(values: &[f32]) -> f64 {
    let parts = values.chunks(PART_LEN);
    let mut sums = vec![0.0; parts.len()];
    for_each(size_of_val(values), parts.zip(&mut sums), |(part, sum)| {
        *sum = sum_of_squares(part)
    });
    sums.iter().sum()
}

/// Returns the sum of the squares of one part, computed in vector lanes.
pub(crate) fn sum_of_squares(values: &[f32]) -> f64 {
    vectorized(
        #[inline(always)]
        || {
            let square = |value: f32| f64::from(value) * f64::from(value);
            let mut lanes = [0.0; 32];
            let (chunks, rest) = values.as_chunks::<32>();
            for chunk in chunks {
                for (lane, &value) in lanes.iter_mut().zip(chunk) {
                    *lane += square(value);
                }
            }
            let rest: f64 = rest.iter().map(|&value| square(value)).sum();
            lanes.iter().sum::<f64>() + rest
        },
    )
}

/// Runs a loop with the widest vector instructions of the machine. The result has the same bits on every
/// machine. The loop must be `#[inline(always)]`.
pub fn vectorized<T>(work: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_worked_on_once() {
        for len in [0, 1, 1000, LARGE / 4 + 1] {
            let mut numbers = vec![0u32; len];
            let parts = numbers.chunks_mut(PART / 4);
            for_each(4 * len, parts, |part| {
                part.iter_mut().for_each(|number| *number += 1);
            });
            assert!(numbers.iter().all(|number| *number == 1), "{len}");
        }
    }
}
