//! Reusable `f32` buffers, which hold weights and gradients.
//!
//! When a [`Buffer`] is dropped, on any thread, it goes back to the [`BufferPool`] that it came from. So
//! a training allocates nothing of the size of the model after its first steps. (The page faults of a
//! new 100 MB buffer cost more than the update itself.) A pool keeps a bounded number of idle buffers;
//! more are freed.
//!
//! Large buffers of a pool use huge pages if the system has them (Linux, `transparent_hugepage` at
//! `madvise` or `always`). A pass over 100 MB then touches 50 pages instead of 25,000.

use std::alloc::{Layout, handle_alloc_error};
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use memmap2::MmapMut;

use crate::parallel::norm_squared;

/// A request gets an idle buffer that is at most four times too large. A request for fewer numbers than
/// this may get a buffer of up to four times this many numbers.
const SMALL: usize = 4096;

/// A buffer of at least this many numbers gets pages of its own.
const LARGE: usize = (4 << 20) / size_of::<f32>();

/// Pages of this size are asked for, in bytes. Linux gives all of a buffer's memory such pages if it consists of whole
/// ones.
const HUGE_PAGE: usize = 2 << 20;

/// The system gives no memory for a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no memory for {len} numbers ({} MiB): let this process have more, or lower \
     NetConfig::max_numbers",
    len.saturating_mul(size_of::<f32>()) >> 20
)]
pub struct OutOfMemory {
    /// How many numbers the buffer should have had.
    pub len: usize,
}

/// A pool that lends buffers and takes them back. A clone is another handle to the same pool.
#[derive(Clone)]
pub struct BufferPool {
    idle: Arc<Idle>,
}

struct Idle {
    buffers: Mutex<Vec<Numbers>>,
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

    /// Takes a buffer of exactly `len` numbers whose contents are unspecified: a recycled
    /// buffer still holds what its last user left there.
    ///
    /// If there is no memory for it, the process aborts, as usual in Rust.
    #[must_use]
    pub fn take(&self, len: usize) -> Buffer {
        self.try_take(len).unwrap_or_else(|_| {
            let layout = Layout::array::<f32>(len).unwrap_or(Layout::new::<f32>());
            handle_alloc_error(layout)
        })
    }

    /// Like [`take`](Self::take), for a length that another process has announced.
    ///
    /// # Errors
    /// When there is no memory for it, even after all idle buffers were freed.
    pub fn try_take(&self, len: usize) -> Result<Buffer, OutOfMemory> {
        let numbers = match self.idle.take(len) {
            Some(recycled) => Some(recycled.resized(len)),
            None => Numbers::fresh(len).or_else(|| {
                self.idle.clear();
                Numbers::fresh(len)
            }),
        };
        Ok(Buffer {
            numbers: numbers.ok_or(OutOfMemory { len })?,
            norm_squared: None,
            home: Arc::downgrade(&self.idle),
        })
    }

    /// Returns how many idle buffers the pool keeps.
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
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Numbers>> {
        // The list is valid after every single operation, so a poisoned lock is still good.
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the smallest buffer that is large enough but not far too large. If there is none and the pool
    /// is full, an idle buffer is freed, so that the pool adapts to the sizes in use.
    fn take(&self, len: usize) -> Option<Numbers> {
        let mut buffers = self.lock();
        let fits =
            |buffer: &&Numbers| buffer.capacity() >= len && buffer.capacity() / 4 <= len.max(SMALL);
        let best = buffers.iter().filter(fits).map(Numbers::capacity).min();
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

    /// Frees all idle buffers.
    fn clear(&self) {
        let unused = std::mem::take(&mut *self.lock());
        drop(unused);
    }
}

/// The memory of a buffer.
enum Numbers {
    Heap(Vec<f32>),
    Pages { pages: MmapMut, len: usize },
}

impl Numbers {
    /// Returns zeros, or `None` if there is no memory. Large buffers take no memory before numbers are
    /// written to them.
    fn fresh(len: usize) -> Option<Self> {
        if len >= LARGE
            && let Some(num_bytes) = len.checked_mul(size_of::<f32>())
            && let Some(num_bytes) = num_bytes.checked_next_multiple_of(HUGE_PAGE)
            && let Ok(pages) = MmapMut::map_anon(num_bytes)
        {
            // Systems without huge pages refuse this and use small pages.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            return Some(Self::Pages { pages, len });
        }
        let mut numbers = Vec::new();
        numbers.try_reserve_exact(len).ok()?;
        numbers.resize(len, 0.0);
        Some(Self::Heap(numbers))
    }

    /// Returns the same memory with `len` numbers. It must be large enough.
    fn resized(self, len: usize) -> Self {
        match self {
            Self::Heap(mut numbers) => {
                numbers.resize(len, 0.0);
                Self::Heap(numbers)
            }
            Self::Pages { pages, .. } => Self::Pages { pages, len },
        }
    }

    fn capacity(&self) -> usize {
        match self {
            Self::Heap(numbers) => numbers.capacity(),
            Self::Pages { pages, .. } => pages.len() / size_of::<f32>(),
        }
    }
}

/// A run of `f32` numbers that returns to its pool when it is dropped.
pub struct Buffer {
    numbers: Numbers,
    /// Set if the code that wrote the numbers also summed their squares. Any change of the numbers clears it.
    norm_squared: Option<f64>,
    home: Weak<Idle>,
}

impl Buffer {
    /// Stores the sum of the squares of the current numbers.
    pub fn set_norm_squared(&mut self, norm_squared: f64) {
        self.norm_squared = Some(norm_squared);
    }

    /// Makes the drop of this buffer free its memory instead of returning it to the pool.
    pub(crate) fn leave_pool(&mut self) {
        self.home = Weak::new();
    }

    /// Returns the sum of the squares of all numbers.
    #[must_use]
    pub fn norm_squared(&self) -> f64 {
        self.norm_squared.unwrap_or_else(|| norm_squared(self))
    }

    /// Takes the numbers out. They are copied only if they have pages of their own.
    #[must_use]
    pub fn into_vec(mut self) -> Vec<f32> {
        match &mut self.numbers {
            Numbers::Heap(numbers) => std::mem::take(numbers),
            Numbers::Pages { .. } => self.to_vec(),
        }
    }
}

/// Wraps a vector. The buffer belongs to no pool and is freed when it is dropped.
impl From<Vec<f32>> for Buffer {
    fn from(numbers: Vec<f32>) -> Self {
        Self {
            numbers: Numbers::Heap(numbers),
            norm_squared: None,
            home: Weak::new(),
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &self.numbers {
            Numbers::Heap(numbers) => numbers,
            Numbers::Pages { pages, len } => &bytemuck::cast_slice(pages)[..*len],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        self.norm_squared = None;
        match &mut self.numbers {
            Numbers::Heap(numbers) => numbers,
            Numbers::Pages { pages, len } => &mut bytemuck::cast_slice_mut(pages)[..*len],
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(home) = self.home.upgrade() {
            let mut idle = home.lock();
            if idle.len() < home.max && self.numbers.capacity() > 0 {
                let numbers = Numbers::Heap(Vec::new());
                idle.push(std::mem::replace(&mut self.numbers, numbers));
            }
        }
    }
}

/// Shows the length only, because payloads do not belong in logs.
impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_buffer_is_handed_out_again() {
        for len in [100, LARGE] {
            let pool = BufferPool::new(2);
            let buffer = pool.take(len);
            assert!(buffer.iter().all(|number| *number == 0.0));
            let address = buffer.as_ptr();
            drop(buffer);
            assert_eq!(pool.num_idle(), 1);
            let again = pool.take(len - 10);
            assert_eq!((again.as_ptr(), again.len()), (address, len - 10));
        }
    }

    #[test]
    fn a_length_that_there_is_no_memory_for_is_an_error() {
        let pool = BufferPool::new(2);
        for len in [usize::MAX, usize::MAX / 4, 1 << 48] {
            assert_eq!(pool.try_take(len).unwrap_err(), OutOfMemory { len });
        }
        let text = OutOfMemory { len: 1 << 30 }.to_string();
        assert!(
            text.contains("4096 MiB") && text.contains("max_numbers"),
            "{text}"
        );
    }

    #[test]
    fn a_buffer_that_left_its_pool_is_freed() {
        let pool = BufferPool::new(2);
        let mut buffer = pool.take(8);
        buffer.leave_pool();
        drop(buffer);
        assert_eq!(pool.num_idle(), 0);
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
        let mut buffer = pool.take(3);
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
    }

    #[test]
    fn the_numbers_can_be_taken_out() {
        let pool = BufferPool::new(2);
        for len in [3, LARGE + 1] {
            let mut buffer = pool.take(len);
            buffer.fill(0.5);
            assert_eq!(buffer.into_vec(), vec![0.5; len]);
        }
        // The large one's memory was copied and is kept.
        assert_eq!(pool.num_idle(), 1);
    }
}
