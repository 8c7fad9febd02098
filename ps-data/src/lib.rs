//! Training data: MNIST and FashionMNIST, and seeded, sharded, resumable batches of any data.
//!
//! ```text
//!  directory, cache, download, bundled sample
//!      │ verified
//!      ▼
//!  ImageDataset ─────────────┐
//!                            ├──▶ Batches (on a thread, ahead) ──▶ ImageBatch
//!  SamplerConfig, Cursor ──▶ Sampler: which examples form which batch
//! ```
//!
//! - `Mnist`, `FashionMnist` (feature `mnist`): loaded from a directory, the user's cache or the network, and verified.
//!   If none of them has MNIST, a bundled sample of the real images is used.
//! - [`ImageDataset`]: labelled images in memory. It is a burn `Dataset`, and makes normalized
//!   [`ImageBatch`]es.
//! - [`Sampler`]: decides which examples form which batch. The decision depends only on [`SamplerConfig`]
//!   and [`Cursor`]. It is the same on every platform and in every process.
//! - [`Batches`]: a sampler and a function from indexes to a batch, which runs ahead on a thread.
//!
//! The crate uses no tensor library, no actors and no model. Batches are flat `Vec<f32>`.
//!
//! ```
//! use ps_data::{Batches, Mnist, SamplerConfig};
//!
//! // `Mnist::load(&MnistOptions::default())?` prefers the full 60,000 images.
//! let mnist = Mnist::bundled_sample();
//!
//! // Worker 0 of 2: its batches and those of worker 1 cover every image once per epoch.
//! let config = SamplerConfig {
//!     shard: 0,
//!     num_shards: 2,
//!     seed: 7,
//!     ..SamplerConfig::new(mnist.train.len(), 128)
//! };
//! let mut batches = Batches::of_images(&mnist.train, config.clone())?;
//! let batch = batches.next_batch()?;
//! assert_eq!(batch.dims, [128, 1, 28, 28]);
//!
//! // A cursor that was saved with a checkpoint resumes with exactly the batch that would have followed.
//! let saved = batches.cursor();
//! let expected = batches.next_batch()?;
//! let mut resumed = Batches::of_images(&mnist.train, config)?;
//! resumed.seek(saved)?;
//! assert_eq!(resumed.next_batch()?, expected);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![warn(clippy::print_stdout)]

mod batches;
#[cfg(feature = "download")]
mod download;
mod error;
#[cfg(feature = "mnist")]
mod idx;
mod image;
#[cfg(feature = "mnist")]
mod load;
#[cfg(feature = "mnist")]
mod locate;
#[cfg(feature = "mnist")]
mod mnist;
mod sampler;
#[cfg(feature = "mnist")]
mod spec;

pub use batches::{BatchError, Batches};
pub use error::{DataError, IdxError};
pub use image::{ImageBatch, ImageDataset, ImageItem, Normalization, Split};
#[cfg(feature = "mnist")]
pub use mnist::{DataSource, FashionMnist, Mnist, MnistOptions};
pub use sampler::{Cursor, Sampler, SamplerConfig, SamplerError};
