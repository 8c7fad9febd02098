//! Where batches come from: anything that can make a batch of given examples.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use ps_actors::ids::Clock;
use ps_data::{BatchError, Batches, Cursor, ImageDataset, SamplerConfig, SamplerError};
use ps_model::ImageBatch;
use ps_model::burn::data::dataloader::batcher::Batcher;
use ps_model::burn::data::dataset::Dataset;
use ps_model::burn::tensor::Device;
use sha2::{Digest as _, Sha256};

use crate::source::WorkerConfig;

/// A data set that can be cut into batches. Cloning it must be cheap: every worker has one.
pub trait Examples: Clone + Send + 'static {
    /// What a [`Model`](ps_model::Model) computes its loss on.
    type Batch: Send + 'static;

    /// Counts the examples.
    fn num_examples(&self) -> usize;

    /// Makes a batch of the examples with these indexes, each below
    /// [`num_examples`](Self::num_examples).
    fn batch(&self, indices: &[usize]) -> Self::Batch;

    /// Returns a text that is the same for the same content and another one for other content, such as a
    /// digest; `None` if there is none, which is the default.
    ///
    /// The processes of a training compare it, and one with other data is not let in. Without it only
    /// the number of examples is compared. It must not depend on the process, such as a time or an
    /// address in memory does.
    fn fingerprint(&self) -> Option<String> {
        None
    }
}

impl Examples for ImageDataset {
    type Batch = ImageBatch;

    fn num_examples(&self) -> usize {
        self.len()
    }

    fn batch(&self, indices: &[usize]) -> ImageBatch {
        let ps_data::ImageBatch {
            images,
            labels,
            dims,
        } = Self::batch(self, indices);
        let labels = labels.into_iter().map(i64::from).collect();
        ImageBatch::new(images, labels, dims, self.num_classes())
            .expect("the data set checked its images and labels when it was made")
    }

    /// Of the whole content.
    fn fingerprint(&self) -> Option<String> {
        Some(hex(&self.digest()))
    }
}

/// The first 16 hexadecimal digits of a digest, which is enough to tell mistakes apart.
pub(crate) fn hex(digest: &[u8]) -> String {
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Any burn [`Dataset`] with a function that joins items to a batch. See [`collated`].
pub struct Collated<I, D, F> {
    dataset: Arc<D>,
    collate: F,
    fingerprint: Option<String>,
    items: PhantomData<fn() -> I>,
}

/// How many items of a data set [`Collated::compared_by`] looks at.
const NUM_COMPARED: usize = 1_000;

/// Makes [`Examples`] of a burn data set and a function that joins its items to a batch.
///
/// If a batch holds tensors, make them on a device with autodiff, as that of
/// [`select_device`](ps_model::select_device): see [`batched`].
///
/// ```
/// use ps::data::{Examples, collated};
/// use ps::model::burn::data::dataset::InMemDataset;
///
/// let numbers = InMemDataset::new(vec![1.5f32, 2.5, 3.5]);
/// let data = collated(numbers, |items: Vec<f32>| items);
/// assert_eq!(data.num_examples(), 3);
/// assert_eq!(data.batch(&[2, 0]), [3.5, 1.5]);
/// ```
pub fn collated<I, B, D, F>(dataset: D, collate: F) -> Collated<I, D, F>
where
    D: Dataset<I> + 'static,
    F: Fn(Vec<I>) -> B + Clone + Send + 'static,
{
    Collated {
        dataset: Arc::new(dataset),
        collate,
        fingerprint: None,
        items: PhantomData,
    }
}

impl<I, D: Dataset<I>, F> Collated<I, D, F> {
    /// Lets the processes of a training compare their data: by the bytes that `bytes` makes of an item,
    /// for at most 1,000 items, spread evenly over the data set. They are read here.
    ///
    /// ```
    /// use ps::data::{Examples, collated};
    /// use ps::model::burn::data::dataset::InMemDataset;
    ///
    /// let data = |last| {
    ///     let numbers = InMemDataset::new(vec![1.5f32, 2.5, last]);
    ///     collated(numbers, |items: Vec<f32>| items).compared_by(|item| item.to_le_bytes())
    /// };
    /// assert_eq!(data(3.5).fingerprint(), data(3.5).fingerprint());
    /// assert_ne!(data(3.5).fingerprint(), data(4.5).fingerprint());
    /// ```
    ///
    /// # Panics
    /// When the data set cannot give an item.
    #[must_use]
    pub fn compared_by<T: AsRef<[u8]>>(mut self, bytes: impl Fn(&I) -> T) -> Self {
        let len = self.dataset.len();
        let mut hash = Sha256::new();
        for sample in 0..len.min(NUM_COMPARED) {
            let index = sample as u128 * len as u128 / len.min(NUM_COMPARED) as u128;
            let item = self.dataset.get(index as usize);
            let item = item.unwrap_or_else(|error| panic!("the data set failed: {error}"));
            let bytes = bytes(&item);
            hash.update((bytes.as_ref().len() as u64).to_le_bytes());
            hash.update(bytes);
        }
        self.fingerprint = Some(hex(&hash.finalize()));
        self
    }
}

/// Makes [`Examples`] of a burn data set and a burn [`Batcher`], which makes its tensors on `device`.
///
/// Autodiff is on for the tensors, so that burn's layers know an input of training from one of an
/// inference. The device must be the one to train on, with gradient checkpointing if it is on there.
///
/// ```
/// use ps::data::{Examples, batched};
/// use ps::model::burn::data::dataloader::batcher::Batcher;
/// use ps::model::burn::data::dataset::InMemDataset;
/// use ps::model::burn::tensor::{Device, Tensor};
/// use ps::prelude::*;
///
/// #[derive(Clone)]
/// struct Rows;
///
/// impl Batcher<[f32; 2], Tensor<2>> for Rows {
///     fn batch(&self, items: Vec<[f32; 2]>, device: &Device) -> Tensor<2> {
///         let rows = items.into_iter().map(|row| Tensor::<1>::from_floats(row, device).unsqueeze());
///         Tensor::cat(rows.collect(), 0)
///     }
/// }
///
/// let device = select_device(default_device_name())?;
/// let data = batched(InMemDataset::new(vec![[1.5, 2.5], [3.5, 4.5]]), Rows, &device);
/// assert_eq!(data.batch(&[1, 0]).dims(), [2, 2]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn batched<I, B, D, T>(
    dataset: D,
    batcher: T,
    device: &Device,
) -> Collated<I, D, impl Fn(Vec<I>) -> B + Clone + Send + use<I, B, D, T>>
where
    D: Dataset<I> + 'static,
    T: Batcher<I, B> + Clone + 'static,
{
    let device = device.clone().autodiff();
    collated(dataset, move |items| batcher.batch(items, &device))
}

impl<I, B, D, F> Examples for Collated<I, D, F>
where
    I: 'static,
    B: Send + 'static,
    D: Dataset<I> + 'static,
    F: Fn(Vec<I>) -> B + Clone + Send + 'static,
{
    type Batch = B;

    fn num_examples(&self) -> usize {
        self.dataset.len()
    }

    /// # Panics
    /// When the data set cannot give an example; a worker reports that as its source's error.
    fn batch(&self, indices: &[usize]) -> B {
        let items = self.dataset.get_many(indices.to_vec());
        (self.collate)(items.unwrap_or_else(|error| panic!("the data set failed: {error}")))
    }

    fn fingerprint(&self) -> Option<String> {
        self.fingerprint.clone()
    }
}

impl<I, D, F: Clone> Clone for Collated<I, D, F> {
    fn clone(&self) -> Self {
        let (dataset, collate) = (Arc::clone(&self.dataset), self.collate.clone());
        Self {
            dataset,
            collate,
            fingerprint: self.fingerprint.clone(),
            items: PhantomData,
        }
    }
}

impl<I, D, F> fmt::Debug for Collated<I, D, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collated").finish_non_exhaustive()
    }
}

/// A worker's share of a data set, cut into the batches of its steps.
///
/// Which batch belongs to a step depends on seed, worker and clock only. Those that come next are
/// prepared ahead, on a thread.
pub struct WorkerBatches<B> {
    batches: Batches<B>,
}

impl<B: Send + 'static> WorkerBatches<B> {
    /// Deals out the worker's share of `data`. All batches are full; what does not fill one of every
    /// worker is left out, and the order changes from epoch to epoch.
    ///
    /// # Errors
    /// When there are not enough examples for a batch of each worker.
    pub fn new<E>(data: &E, config: WorkerConfig) -> Result<Self, SamplerError>
    where
        E: Examples<Batch = B>,
    {
        let data = data.clone();
        let sampler = SamplerConfig {
            shard: config.worker.0 as usize,
            num_shards: config.num_workers,
            seed: config.seed,
            // All batches full, and as many for each worker: a mean of means is then the mean.
            drop_last: true,
            ..SamplerConfig::new(data.num_examples(), config.batch_size)
        };
        Ok(Self {
            batches: Batches::new(sampler, move |indices| data.batch(indices))?,
        })
    }

    /// Returns how many steps the worker takes per epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.batches.batches_per_epoch()
    }

    /// Makes the batch of a step.
    ///
    /// # Errors
    /// When the data set fails.
    pub fn batch(&mut self, clock: Clock) -> Result<B, BatchError> {
        let per_epoch = self.batches.batches_per_epoch();
        let cursor = Cursor {
            epoch: clock.0 / per_epoch,
            batch: clock.0 % per_epoch,
        };
        if self.batches.cursor() != cursor {
            self.batches.seek(cursor)?;
        }
        self.batches.next_batch()
    }
}

impl<B> fmt::Debug for WorkerBatches<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerBatches").finish_non_exhaustive()
    }
}
