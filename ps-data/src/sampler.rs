//! Decides which examples form which batch, for any data set that is indexed from zero.
//!
//! One permutation per epoch, drawn from (seed, epoch), is cut into blocks of
//! `num_shards * batch_size` examples; shard `s` takes the `s`-th part of every block. So:
//!
//! - (DATA-1) the shards' batches of an epoch are disjoint and cover every example exactly once,
//!   unless `drop_last` leaves out a final incomplete block;
//! - (DATA-2) the shards' `b`-th batches together are the `b`-th batch of a single shard with
//!   `num_shards` times the batch size: workers in step with each other see what one worker would;
//! - (DATA-3) a sampler sought to a cursor continues as the one that the cursor came from.
//!
//! The order is part of the crate's contract, not of a random number library's. The generator is
//! ChaCha with 8 rounds, block counter and nonce starting at zero; its 32-byte key is the seed and
//! the epoch, each as little-endian `u64`, and the ASCII text `ps-data shuffle` ended by a zero.
//! Two 32-bit words, low one first, make a number; Lemire's method
//! (<https://arxiv.org/abs/1805.10941>) reduces it without bias; Fisher and Yates' shuffle, from
//! the last position down, does the rest.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

/// Which examples a [`Sampler`] deals out, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SamplerConfig {
    /// Size of the whole data set, all shards together.
    pub num_examples: usize,
    /// Examples per batch of one shard. The last batch of an epoch may be smaller; see
    /// `drop_last`.
    pub batch_size: usize,
    /// Index of this shard, below `num_shards`; usually the worker's index. Default: 0.
    pub shard: usize,
    /// Number of shards that share every epoch. Default: 1.
    pub num_shards: usize,
    /// Together with the epoch decides the order. All shards need the same one. Default: 0.
    pub seed: u64,
    /// Whether to permute the examples anew in every epoch; otherwise they come by index. Default:
    /// `true`.
    pub shuffle: bool,
    /// Whether to leave out the incomplete end of an epoch. If so, all shards have the same number
    /// of batches, all of them full, so synchronous rounds line up and their mean weighs every
    /// example alike; other examples are left out in every epoch. If not, the end is spread over
    /// the shards as evenly as possible. Default: `false`.
    pub drop_last: bool,
}

impl SamplerConfig {
    /// One shard, shuffled with seed 0, nothing left out.
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

    /// Examples in one block: a batch of every shard.
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
/// Valid only with the configuration it was taken under; another one gives other batches.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct Cursor {
    /// Epochs completed.
    pub epoch: u64,
    /// Batches of this shard completed in the epoch.
    pub batch: u64,
}

/// A [`SamplerConfig`] that cannot be met, or a [`Cursor`] that does not fit.
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
        /// Shard asked for.
        shard: usize,
        /// Shards there are.
        num_shards: usize,
    },
    /// Some shards would have no examples.
    #[error("{num_shards} shards cannot share {num_examples} examples; use fewer shards")]
    TooManyShards {
        /// Shards there are.
        num_shards: usize,
        /// Examples there are.
        num_examples: usize,
    },
    /// `drop_last` would leave out everything.
    #[error(
        "{num_examples} examples do not give each of {num_shards} workers one full batch of \
         {batch_size}: at least {} are needed, so use a batch size of {} or less, fewer workers, or more data",
        .batch_size.saturating_mul(*num_shards), .num_examples / .num_shards
    )]
    NoFullBatch {
        /// Batch size asked for.
        batch_size: usize,
        /// Shards there are.
        num_shards: usize,
        /// Examples there are.
        num_examples: usize,
    },
    /// The configuration was made for a data set of another size.
    #[error("num_examples is {configured}, but the data set has {found} examples")]
    WrongLength {
        /// Size in the configuration.
        configured: usize,
        /// Size of the data set.
        found: usize,
    },
    /// The cursor points behind the end of its epoch, so it was taken under another configuration.
    #[error(
        "cursor points at batch {batch}, but an epoch has {batches_per_epoch}; was it saved with \
         another batch size, number of shards or data set?"
    )]
    CursorOutOfRange {
        /// Batch in the cursor.
        batch: u64,
        /// Batches that this shard has per epoch.
        batches_per_epoch: u64,
    },
}

/// Deals out batches of example indexes, epoch after epoch, without end.
///
/// Holds one permutation, eight bytes per example of the whole data set, made when the first batch
/// of an epoch is asked for.
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplerConfig,
    block: usize,
    batches_per_epoch: u64,
    cursor: Cursor,
    /// The permutation and its epoch; empty without `shuffle`.
    order: Vec<usize>,
    order_epoch: Option<u64>,
}

impl Sampler {
    /// Starts at the first batch of epoch 0.
    ///
    /// # Errors
    ///
    /// If the configuration would give no batches, or none to some shard.
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

    /// Batches of this shard per epoch. Without `drop_last` shards may differ by one.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches_per_epoch
    }

    /// Position of the batch that comes next.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Continues at `cursor`, forwards or backwards.
    ///
    /// # Errors
    ///
    /// If `cursor` points behind the end of its epoch; the sampler stays where it was.
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

    /// Returns to a position that this sampler has had.
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

    /// Replaces `indices` by those of the next batch.
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
            // A cursor read from a file may hold any epoch; the last one is followed by the first.
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

    /// Positions of this shard's part of the incomplete last block; it may be empty.
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

/// Draws a uniform number below `bound`, which is not zero.
fn below(bound: u64, rng: &mut ChaCha8Rng) -> u64 {
    loop {
        let (low, high) = (u64::from(rng.next_u32()), u64::from(rng.next_u32()));
        let product = u128::from(high << 32 | low) * u128::from(bound);
        let fraction = product as u64;
        // 2^64 mod bound values of the fraction are one too many; the modulo is rarely needed.
        if fraction >= bound || fraction >= bound.wrapping_neg() % bound {
            return (product >> 64) as u64;
        }
    }
}

#[cfg(test)]
mod tests;
