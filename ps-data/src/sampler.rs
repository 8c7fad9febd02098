//! Decides which examples form which batch, for any data set that is indexed from zero.
//!
//! Each epoch has one permutation, which depends on the seed and the epoch. It is cut into blocks of
//! `num_shards * batch_size` examples. Shard `s` takes the `s`-th part of every block. So:
//!
//! - (DATA-1) The batches of all shards in an epoch are disjoint and cover every example exactly once,
//!   unless `drop_last` leaves out a final incomplete block.
//! - (DATA-2) The `b`-th batches of all shards together are the `b`-th batch of a single shard with
//!   `num_shards` times the batch size. So workers that are in step use the same examples as one worker.
//! - (DATA-3) A sampler that was moved to a cursor continues like the sampler that the cursor came from.
//!
//! The order is part of this crate's contract and does not depend on a random number library. The
//! generator is ChaCha with 8 rounds; block counter and nonce start at zero. Its 32-byte key is the seed
//! and the epoch, each as little-endian `u64`, followed by the ASCII text `ps-data shuffle` and a zero
//! byte. Two 32-bit words, the low one first, make a number. Lemire's method
//! (<https://arxiv.org/abs/1805.10941>) reduces the number without bias. The shuffle is that of Fisher and
//! Yates, from the last position down.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// The configuration of a [`Sampler`]: which examples it returns, and in which order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerConfig {
    /// The number of examples in the whole data set, all shards together.
    pub num_examples: usize,
    /// The number of examples per batch of one shard. The last batch of an epoch may be smaller; see
    /// `drop_last`.
    pub batch_size: usize,
    /// The index of this shard, below `num_shards`. Usually it is the worker's index. Default: 0.
    pub shard: usize,
    /// The number of shards that share every epoch. Default: 1.
    pub num_shards: usize,
    /// The seed. The order depends on the seed and the epoch. All shards need the same seed. Default: 0.
    pub seed: u64,
    /// Whether the examples get a new permutation in every epoch. If not, they come in the order of their
    /// indexes. Default: `true`.
    pub shuffle: bool,
    /// Whether the incomplete end of an epoch is left out. If `true`, all shards have the same number of
    /// batches, and all batches are full. So the shards' rounds match, and every example has the same
    /// weight in a mean. With `shuffle`, each epoch leaves out other examples. If `false`, the end is
    /// divided among the shards as evenly as possible. Default: `false`.
    pub drop_last: bool,
}

impl SamplerConfig {
    /// Returns the configuration of a single shard that is shuffled with seed 0 and leaves out nothing.
    pub fn new(num_examples: usize, batch_size: usize) -> Self {
        Self {
            num_examples,
            batch_size,
            shard: 0,
            num_shards: 1,
            seed: 0,
            shuffle: true,
            drop_last: false,
        }
    }

    /// Returns the number of examples in one block, which is one batch of every shard.
    fn block(&self) -> Result<usize, SamplerError> {
        if self.num_examples == 0 {
            return Err(SamplerError::NoExamples);
        }
        if self.batch_size == 0 {
            return Err(SamplerError::ZeroBatchSize);
        }
        if self.shard >= self.num_shards {
            return Err(SamplerError::ShardOutOfRange {
                shard: self.shard,
                num_shards: self.num_shards,
            });
        }
        if self.num_shards > self.num_examples {
            return Err(SamplerError::TooManyShards {
                num_shards: self.num_shards,
                num_examples: self.num_examples,
            });
        }
        let block = self.batch_size.saturating_mul(self.num_shards);
        if self.drop_last && block > self.num_examples {
            return Err(SamplerError::NoFullBatch {
                batch_size: self.batch_size,
                num_shards: self.num_shards,
                num_examples: self.num_examples,
            });
        }
        Ok(block)
    }
}

/// A position in the endless sequence of batches: the batch that comes next.
///
/// It is valid only with the same configuration. With another configuration it stands for other batches.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Cursor {
    /// The number of completed epochs.
    pub epoch: u64,
    /// The number of completed batches of this shard in the epoch.
    pub batch: u64,
}

/// A [`SamplerConfig`] is invalid, or a [`Cursor`] does not fit it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SamplerError {
    /// The data set is empty.
    #[error("there are no examples to sample from")]
    NoExamples,
    /// `batch_size` is zero.
    #[error("batch_size is 0; it must be at least 1")]
    ZeroBatchSize,
    /// `shard` is not below `num_shards`.
    #[error("shard {shard} does not exist; with num_shards {num_shards} it must be below that")]
    ShardOutOfRange {
        /// The index that was asked for.
        shard: usize,
        /// The number of shards.
        num_shards: usize,
    },
    /// Some shards would have no examples.
    #[error("{num_shards} shards cannot share {num_examples} examples; use fewer shards")]
    TooManyShards {
        /// The number of shards.
        num_shards: usize,
        /// The number of examples.
        num_examples: usize,
    },
    /// `drop_last` would leave out everything.
    #[error(
        "{num_examples} examples do not give each of {num_shards} workers one full batch of \
         {batch_size}: at least {} are needed, so use a batch size of {} or less, fewer workers, or more data",
        .batch_size.saturating_mul(*num_shards), .num_examples / .num_shards
    )]
    NoFullBatch {
        /// The batch size that was asked for.
        batch_size: usize,
        /// The number of shards.
        num_shards: usize,
        /// The number of examples.
        num_examples: usize,
    },
    /// The configuration was made for a data set of another size.
    #[error("num_examples is {configured}, but the data set has {found} examples")]
    WrongLength {
        /// The number of examples in the configuration.
        configured: usize,
        /// The number of examples in the data set.
        found: usize,
    },
    /// The cursor is behind the end of its epoch, so it belongs to another configuration.
    #[error(
        "cursor points at batch {batch}, but an epoch has {batches_per_epoch}; was it saved with \
         another batch size, number of shards or data set?"
    )]
    CursorOutOfRange {
        /// The batch in the cursor.
        batch: u64,
        /// The number of batches that this shard has per epoch.
        batches_per_epoch: u64,
    },
}

/// Returns batches of example indexes, epoch after epoch, without end.
///
/// It holds one permutation, which takes 8 bytes per example of the whole data set. The permutation is made
/// when the first batch of an epoch is asked for.
///
/// ```
/// use ps_data::{Sampler, SamplerConfig};
///
/// let config = SamplerConfig { shuffle: false, num_shards: 2, ..SamplerConfig::new(8, 2) };
/// let mut first = Sampler::new(config.clone())?;
/// let mut second = Sampler::new(SamplerConfig { shard: 1, ..config })?;
/// assert_eq!((first.next_batch(), second.next_batch()), (vec![0, 1], vec![2, 3]));
/// assert_eq!((first.next_batch(), second.next_batch()), (vec![4, 5], vec![6, 7]));
/// assert_eq!(first.cursor().epoch, 1);
/// # Ok::<(), ps_data::SamplerError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    block: usize,
    batches_per_epoch: u64,
    cursor: Cursor,
    /// The permutation. It is empty without `shuffle`.
    order: Vec<usize>,
    order_epoch: Option<u64>,
}

impl Sampler {
    /// Makes a sampler that starts at the first batch of epoch 0.
    ///
    /// # Errors
    ///
    /// If the configuration is invalid: a size is zero, the shard does not exist, or a shard would get no
    /// batches.
    pub fn new(config: SamplerConfig) -> Result<Self, SamplerError> {
        let block = config.block()?;
        let mut sampler = Self {
            config,
            block,
            batches_per_epoch: 0,
            cursor: Cursor::default(),
            order: Vec::new(),
            order_epoch: None,
        };
        let has_last = !sampler.config.drop_last && !sampler.last_batch().is_empty();
        sampler.batches_per_epoch = sampler.full_batches() + u64::from(has_last);
        Ok(sampler)
    }

    /// Returns the configuration.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }

    /// Returns the number of batches of this shard per epoch. Without `drop_last` it may differ by one between
    /// shards.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches_per_epoch
    }

    /// Returns the position of the next batch.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Continues at `cursor`, forwards or backwards.
    ///
    /// # Errors
    ///
    /// If `cursor` is behind the end of its epoch. The position does not change then.
    pub fn seek(&mut self, cursor: Cursor) -> Result<(), SamplerError> {
        if cursor.batch >= self.batches_per_epoch {
            return Err(SamplerError::CursorOutOfRange {
                batch: cursor.batch,
                batches_per_epoch: self.batches_per_epoch,
            });
        }
        self.cursor = cursor;
        Ok(())
    }

    /// Moves back to an earlier position of this sampler.
    pub(crate) fn rewind(&mut self, cursor: Cursor) {
        debug_assert!(cursor.batch < self.batches_per_epoch);
        self.cursor = cursor;
    }

    /// Returns the indexes of the next batch.
    pub fn next_batch(&mut self) -> Vec<usize> {
        let mut indices = Vec::new();
        self.next_into(&mut indices);
        indices
    }

    /// Replaces the contents of `indices` by the indexes of the next batch.
    pub fn next_into(&mut self, indices: &mut Vec<usize>) {
        let Cursor { epoch, batch } = self.cursor;
        let range = if batch < self.full_batches() {
            // Below `num_examples`, so it fits in a usize.
            let start = batch as usize * self.block + self.config.shard * self.config.batch_size;
            start..start + self.config.batch_size
        } else {
            self.last_batch()
        };
        indices.clear();
        if self.config.shuffle {
            self.shuffle(epoch);
            indices.extend_from_slice(&self.order[range]);
        } else {
            indices.extend(range);
        }
        let last = batch + 1 == self.batches_per_epoch;
        self.cursor = match last {
            // A cursor that was read from a file may have any epoch, so the number wraps around.
            true => Cursor {
                epoch: epoch.wrapping_add(1),
                batch: 0,
            },
            false => Cursor {
                epoch,
                batch: batch + 1,
            },
        };
    }

    fn full_batches(&self) -> u64 {
        (self.config.num_examples / self.block) as u64
    }

    /// Returns the positions of this shard's part of the incomplete last block. The part may be empty.
    fn last_batch(&self) -> std::ops::Range<usize> {
        let rest = self.config.num_examples % self.block;
        let (share, extra) = (rest / self.config.num_shards, rest % self.config.num_shards);
        // The first `extra` shards take one more.
        let shard = self.config.shard;
        let start = self.config.num_examples - rest + shard * share + shard.min(extra);
        start..start + share + usize::from(shard < extra)
    }

    /// Makes `order` the permutation of `epoch`.
    fn shuffle(&mut self, epoch: u64) {
        if self.order_epoch == Some(epoch) {
            return;
        }
        let mut key = *b"........________ps-data shuffle\0";
        key[..8].copy_from_slice(&self.config.seed.to_le_bytes());
        key[8..16].copy_from_slice(&epoch.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        self.order.clear();
        self.order.extend(0..self.config.num_examples);
        for last in (1..self.order.len()).rev() {
            let chosen = below(last as u64 + 1, &mut rng);
            self.order.swap(last, chosen as usize);
        }
        self.order_epoch = Some(epoch);
    }
}

/// Returns a uniform random number below `bound`, which is not zero.
fn below(bound: u64, rng: &mut ChaCha8Rng) -> u64 {
    loop {
        let (low, high) = (u64::from(rng.next_u32()), u64::from(rng.next_u32()));
        let product = u128::from(high << 32 | low) * u128::from(bound);
        let fraction = product as u64;
        // The lowest `2^64 mod bound` values of the fraction are rejected to avoid a bias. The second
        // condition, with the slow modulo, is rarely evaluated.
        if fraction >= bound || fraction >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests;
