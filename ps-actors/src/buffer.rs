//! Reusable `f32` buffers: what weights and gradients are stored in.
//!
//! A [`Buffer`] goes back to the [`BufferPool`] that it came from when its last holder drops
//! it, in whichever thread that happens, so that steady state allocates nothing of the size
//! of the model (a fresh 100 MB buffer costs more in page faults than the update itself).
//! A pool keeps a bounded number of idle buffers; more are freed.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::spread::norm_squared;

/// Numbers in a buffer that is not worth being choosy about.
const SMALL: usize = 4096;

/// Hands out buffers and takes them back. Cloning gives another handle on the same pool.
#[derive(Clone)]
pub struct BufferPool {
    idle: Arc<Idle>,
}

struct Idle {
    buffers: Mutex<Vec<Vec<f32>>>,
    max: usize,
}

impl BufferPool {
    /// Makes an empty pool that keeps at most `max_idle` unused buffers.
    #[must_use]
    pub fn new(max_idle: usize) -> Self {
        let buffers = Mutex::new(Vec::with_capacity(max_idle));
        Self {
            idle: Arc::new(Idle {
                buffers,
                max: max_idle,
            }),
        }
    }

    /// Takes an empty buffer with room for `capacity` numbers, recycled if one is idle.
    #[must_use]
    pub fn take(&self, capacity: usize) -> Buffer {
        let mut data = self.idle.take(capacity).unwrap_or_default();
        data.clear();
        data.reserve_exact(capacity);
        Buffer {
            data,
            norm_squared: None,
            home: Arc::downgrade(&self.idle),
        }
    }

    /// Takes a buffer of exactly `len` numbers whose contents are unspecified: a recycled
    /// buffer still holds what its last user left there.
    #[must_use]
    pub fn take_filled(&self, len: usize) -> Buffer {
        let data = match self.idle.take(len) {
            Some(mut recycled) => {
                recycled.resize(len, 0.0);
                recycled
            }
            // Fresh zeros take no memory before they are written to.
            None => vec![0.0; len],
        };
        Buffer {
            data,
            norm_squared: None,
            home: Arc::downgrade(&self.idle),
        }
    }

    /// Returns how many buffers wait for reuse.
    #[must_use]
    pub fn num_idle(&self) -> usize {
        self.idle.lock().len()
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BufferPool")
            .field("num_idle", &self.num_idle())
            .finish()
    }
}

impl Idle {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Vec<f32>>> {
        // The list is valid after every single operation, so a poisoned lock is still good.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the smallest buffer with enough room that is not far too large. If there is none and
    /// the pool is full, an idle one goes, so that the pool follows the sizes asked for.
    fn take(&self, len: usize) -> Option<Vec<f32>> {
        let mut buffers = self.lock();
        let fits = |buffer: &&Vec<f32>| {
            buffer.capacity() >= len && buffer.capacity() / 4 <= len.max(SMALL)
        };
        let best = buffers.iter().filter(fits).map(Vec::capacity).min();
        let place = buffers
            .iter()
            .position(|buffer| Some(buffer.capacity()) == best);
        match place {
            Some(place) => Some(buffers.swap_remove(place)),
            None if buffers.len() == self.max => {
                let unused = buffers.pop();
                drop(buffers);
                drop(unused);
                None
            }
            None => None,
        }
    }
}

/// A vector of `f32` that returns to its pool when dropped.
#[derive(Default)]
pub struct Buffer {
    data: Vec<f32>,
    /// Known when whoever wrote the numbers summed their squares on the way; gone with any change.
    norm_squared: Option<f64>,
    home: Weak<Idle>,
}

impl Buffer {
    /// Appends `values`.
    pub fn extend_from_slice(&mut self, values: &[f32]) {
        self.as_mut_vec().extend_from_slice(values);
    }

    /// Gives mutable access to the vector itself, for code that appends to a `Vec`.
    pub fn as_mut_vec(&mut self) -> &mut Vec<f32> {
        self.norm_squared = None;
        &mut self.data
    }

    /// Notes the sum of the squares of the numbers as they are.
    pub(crate) fn set_norm_squared(&mut self, norm_squared: f64) {
        self.norm_squared = Some(norm_squared);
    }

    /// Returns the sum of the squares of all numbers.
    pub(crate) fn norm_squared(&self) -> f64 {
        self.norm_squared
            .unwrap_or_else(|| norm_squared(&self.data))
    }
}

/// Wraps a vector that belongs to no pool; it is freed when dropped.
impl From<Vec<f32>> for Buffer {
    fn from(data: Vec<f32>) -> Self {
        Self {
            data,
            norm_squared: None,
            home: Weak::new(),
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.as_mut_vec()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut idle = home.lock();
            if idle.len() < home.max {
                idle.push(std::mem::take(&mut self.data));
            }
        }
    }
}

/// Shows the length only: payloads do not belong in logs.
impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer")
            .field("len", &self.data.len())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_handed_out_again() {
        let pool = BufferPool::new(2);
        let mut buffer = pool.take(100);
        buffer.extend_from_slice(&[1.0; 100]);
        let address = buffer.as_ptr();
        drop(buffer);
        assert_eq!(pool.num_idle(), 1);
        let again = pool.take(100);
        assert_eq!(again.as_ptr(), address);
        assert!(again.is_empty());
    }

    #[test]
    fn a_pool_keeps_no_more_idle_buffers_than_asked() {
        let pool = BufferPool::new(2);
        let buffers: Vec<_> = (0..5).map(|_| pool.take(8)).collect();
        drop(buffers);
        assert_eq!(pool.num_idle(), 2);
    }

    #[test]
    fn a_buffer_outlives_its_pool() {
        let pool = BufferPool::new(1);
        let mut buffer = pool.take_filled(3);
        drop(pool);
        buffer.copy_from_slice(&[1.0, 2.0, 3.0]);
        assert_eq!(&buffer[..], [1.0, 2.0, 3.0]);
    }

    #[test]
    fn a_known_norm_goes_with_any_change() {
        let mut buffer = Buffer::from(vec![3.0, 4.0]);
        assert_eq!(buffer.norm_squared(), 25.0);
        buffer.set_norm_squared(26.0);
        assert_eq!(buffer.norm_squared(), 26.0, "it is not computed again");
        buffer[0] = 0.0;
        assert_eq!(buffer.norm_squared(), 16.0);
        buffer.set_norm_squared(26.0);
        buffer.extend_from_slice(&[1.0]);
        assert_eq!(buffer.norm_squared(), 17.0);
    }
}
