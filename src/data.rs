//! Data sets that batches are made of.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use ps_actors::ids::{Clock, WorkerId};
use ps_data::{BatchError, Batches, Cursor, ImageDataset, Sampler, SamplerConfig, SamplerError};
use ps_model::burn::data::dataloader::batcher::Batcher;
use ps_model::burn::data::dataset::Dataset;
use ps_model::burn::tensor::Device;
use ps_model::{ImageBatch, Rng};
use sha2::{Digest as _, Sha256};

use crate::source::WorkerConfig;

/// A data set that can be cut into batches. Cloning it must be cheap, because every worker has a clone.
///
/// ```
/// use ps::prelude::*;
///
/// /// The pairs (x, 2·x).
/// #[derive(Clone)]
/// struct Doubles(usize);
///
/// impl Examples for Doubles {
///     type Batch = Vec<[f32; 2]>;
///
///     fn num_examples(&self) -> usize {
///         self.0
///     }
///
///     fn batch(&self, indices: &[usize]) -> Self::Batch {
///         indices.iter().map(|&x| [x as f32, 2.0 * x as f32]).collect()
///     }
///
///     fn fingerprint(&self) -> Option<String> {
///         Some(format!("doubles up to {}", self.0))
///     }
/// }
///
/// assert_eq!(Doubles(10).batch(&[3, 4]), [[3.0, 6.0], [4.0, 8.0]]);
/// ```
///
/// [`collated`] and [`batched`] make one of a burn `Dataset`.
pub trait Examples: Clone + Send + 'static {
    /// The type of a batch, which a [`Model`](ps_model::Model) computes its loss on.
    type Batch: Send + 'static;

    /// Returns the number of examples.
    fn num_examples(&self) -> usize;

    /// Makes a batch of the examples with these indexes. Each index is below
    /// [`num_examples`](Self::num_examples).
    fn batch(&self, indices: &[usize]) -> Self::Batch;

    /// Makes a batch to train on. The default is [`batch`](Self::batch), which evaluations use. Data that is changed at
    /// random for each training step (augmented) takes its random numbers from `place`. Then the same batch is made
    /// again after an interruption, in a replay, and on any process.
    ///
    /// ```
    /// use ps::data::BatchPlace;
    /// use ps::prelude::*;
    ///
    /// /// The numbers 0, 1, 2, ..., with noise while they are trained on.
    /// #[derive(Clone)]
    /// struct Noisy(usize);
    ///
    /// impl Examples for Noisy {
    ///     type Batch = Vec<f32>;
    ///
    ///     fn num_examples(&self) -> usize {
    ///         self.0
    ///     }
    ///
    ///     fn batch(&self, indices: &[usize]) -> Vec<f32> {
    ///         indices.iter().map(|&index| index as f32).collect()
    ///     }
    ///
    ///     fn training_batch(&self, indices: &[usize], place: &BatchPlace) -> Vec<f32> {
    ///         let noise = |&index| index as f32 + place.rng_of(index).uniform();
    ///         indices.iter().map(noise).collect()
    ///     }
    /// }
    ///
    /// let place = BatchPlace::default();
    /// assert_ne!(Noisy(10).training_batch(&[3, 4], &place), [3.0, 4.0]);
    /// ```
    fn training_batch(&self, indices: &[usize], place: &BatchPlace) -> Self::Batch {
        let _ = place;
        self.batch(indices)
    }

    /// Returns a text that identifies the content, such as a digest: the same text for the same content,
    /// and another text for other content. `None`, the default, if there is no such text.
    ///
    /// The processes of a training compare it. A process with other data cannot join. Without a
    /// fingerprint, only the number of examples is compared. The text must not depend on the process, as a
    /// time or an address in memory does.
    fn fingerprint(&self) -> Option<String> {
        None
    }
}

/// The place of a batch in a training: what its random changes may depend on.
///
/// For an example, see [`Examples::training_batch`] and [`Collated::augmented_by`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchPlace {
    /// The seed of the training.
    pub seed: u64,
    /// How often the data was gone through before.
    pub epoch: u64,
    /// The worker that computes on the batch.
    pub worker: WorkerId,
    /// The worker's step, from the start of the training on. The first one is 0.
    pub step: u64,
    /// The part of the step's batch, if it is computed in [several](crate::Trainer::micro_batches). The first one is 0.
    pub part: usize,
}

/// They make the streams of batches, of examples and of other users of the seed differ.
const OF_BATCHES: u64 = 0x6261_7463_6865_7321;
const OF_EXAMPLES: u64 = 0x6578_616d_706c_6573;

impl BatchPlace {
    /// Returns random numbers for the example with this index. They depend on the seed, the epoch and the index, and
    /// not on the number of workers and the size of batches. So N workers compute what one worker computes on the
    /// joined batch (PS-3).
    #[must_use]
    pub fn rng_of(&self, index: usize) -> Rng {
        Rng::from_parts(&[self.seed, OF_EXAMPLES, self.epoch, index as u64])
    }

    /// Returns random numbers for a change of the whole batch. They depend on everything here but the epoch, which
    /// follows from the step.
    #[must_use]
    pub fn rng(&self) -> Rng {
        let (worker, part) = (self.worker.0.into(), self.part as u64);
        Rng::from_parts(&[self.seed, OF_BATCHES, worker, self.step, part])
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

    /// The digest of the whole content.
    fn fingerprint(&self) -> Option<String> {
        Some(hex(&self.digest()))
    }
}

/// Returns the first 16 hexadecimal digits of a digest. They are enough to tell data sets apart that differ
/// by mistake.
pub(crate) fn hex(digest: &[u8]) -> String {
    digest[..8]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Changes an item at random.
type Augment<I> = Arc<dyn Fn(I, &BatchPlace, &mut Rng) -> I + Send + Sync>;

/// A burn [`Dataset`] with a function that makes a batch of items. See [`collated`].
pub struct Collated<I, D, F> {
    dataset: Arc<D>,
    collate: F,
    augment: Option<Augment<I>>,
    fingerprint: Option<String>,
    items: PhantomData<fn() -> I>,
}

/// How many items of a data set [`Collated::compared_by`] compares.
const NUM_COMPARED: usize = 1_000;

/// Makes [`Examples`] of a burn data set and a function that makes a batch of items.
///
/// If a batch contains tensors, make them on a device with autodiff, such as that of
/// [`select_device`](ps_model::select_device). See [`batched`].
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
        augment: None,
        fingerprint: None,
        items: PhantomData,
    }
}

impl<I, D, F> Collated<I, D, F> {
    /// Changes each item before it becomes a part of a batch that is trained on. `augment` takes its random numbers
    /// from the [`Rng`] of the item ([`BatchPlace::rng_of`]): so an item is changed in another way in each epoch, and
    /// in the same way whenever this batch is made again, by any number of workers. Evaluations see the items as they
    /// are.
    ///
    /// ```
    /// use ps::data::{BatchPlace, Examples, collated};
    /// use ps::model::burn::data::dataset::InMemDataset;
    ///
    /// let numbers = InMemDataset::new(vec![1.0f32, 2.0, 3.0]);
    /// let data = collated(numbers, |items: Vec<f32>| items)
    ///     .augmented_by(|item, _place, rng| item + rng.uniform());
    /// let first = BatchPlace::default();
    /// let batch = data.training_batch(&[2, 0], &first);
    /// assert!((3.0..4.0).contains(&batch[0]) && (1.0..2.0).contains(&batch[1]));
    /// assert_eq!(data.training_batch(&[0], &first), batch[1..]);
    /// let second = BatchPlace { epoch: 1, ..first };
    /// assert_ne!(data.training_batch(&[0], &second), batch[1..]);
    /// assert_eq!(data.batch(&[2, 0]), [3.0, 1.0]);
    /// ```
    #[must_use]
    pub fn augmented_by(
        mut self,
        augment: impl Fn(I, &BatchPlace, &mut Rng) -> I + Send + Sync + 'static,
    ) -> Self {
        self.augment = Some(Arc::new(augment));
        self
    }
}

impl<I, D: Dataset<I>, F> Collated<I, D, F> {
    /// Lets the processes of a training compare their data. `bytes` makes the bytes of an item that are
    /// compared. At most 1,000 items are compared, spread evenly over the data set. They are read in this
    /// call.
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
    /// If the data set cannot return an item.
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
/// Autodiff is on for the tensors, so that burn's layers can tell the input of a training from that of an
/// inference. The device must be the one to train on. If gradient checkpointing is on there, it must be on
/// for `device` too.
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
    /// If the data set cannot return an example. A worker reports this as the error of its source.
    fn batch(&self, indices: &[usize]) -> B {
        (self.collate)(self.items(indices))
    }

    /// # Panics
    /// As [`batch`](Self::batch).
    fn training_batch(&self, indices: &[usize], place: &BatchPlace) -> B {
        let mut items = self.items(indices);
        if let Some(augment) = &self.augment {
            let each = items.into_iter().zip(indices);
            let each = each.map(|(item, &index)| augment(item, place, &mut place.rng_of(index)));
            items = each.collect();
        }
        (self.collate)(items)
    }

    fn fingerprint(&self) -> Option<String> {
        self.fingerprint.clone()
    }
}

impl<I, D: Dataset<I>, F> Collated<I, D, F> {
    fn items(&self, indices: &[usize]) -> Vec<I> {
        let items = self.dataset.get_many(indices.to_vec());
        items.unwrap_or_else(|error| panic!("the data set failed: {error}"))
    }
}

impl<I, D, F: Clone> Clone for Collated<I, D, F> {
    fn clone(&self) -> Self {
        let (dataset, collate) = (Arc::clone(&self.dataset), self.collate.clone());
        Self {
            dataset,
            collate,
            augment: self.augment.clone(),
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
/// The batch of a step depends only on the seed, the worker and the clock. The next batches are prepared in
/// advance, on another thread.
///
/// ```
/// use ps::model::burn::data::dataset::InMemDataset;
/// use ps::prelude::*;
///
/// let data = collated(InMemDataset::new((0..10u32).collect()), |items: Vec<u32>| items);
/// let share = |rank| {
///     let config =
///         WorkerConfig { worker: WorkerId(rank), num_workers: 2, batch_size: 2, seed: 0 };
///     WorkerBatches::new(&data, config)
/// };
/// let mut first = share(0)?;
/// assert_eq!(first.steps_per_epoch(), 3); // 8 of 10 examples fill 2 batches of each worker.
/// let batch = first.batch(Clock(1))?;
/// assert_eq!(batch.len(), 2);
/// assert_eq!(share(0)?.batch(Clock(1))?, batch);
/// assert_ne!(share(1)?.batch(Clock(1))?, batch);
/// assert_eq!(first.batch(Clock(2))?.len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct WorkerBatches<B> {
    batches: Batches<B>,
}

impl<B: Send + 'static> WorkerBatches<B> {
    /// Makes the worker's share of `data`. The order changes from epoch to epoch.
    ///
    /// All batches are full but those of the last step of an epoch: the workers share what is left. A mean of gradients
    /// weights each by the number of its examples, so within that update each example counts the same. The update
    /// moves the weights as far as any other, and in `Asp`, `Ssp` and sums a smaller batch counts as a full one.
    /// Examples that are not enough for one of each worker are left out.
    ///
    /// # Errors
    /// If there are not enough examples for one batch of each worker.
    pub fn new<E>(data: &E, config: WorkerConfig) -> Result<Self, SamplerError>
    where
        E: Examples<Batch = B>,
    {
        let data = data.clone();
        Self::made_by(data.num_examples(), config, move |place, indices| {
            data.training_batch(indices, &place)
        })
    }

    /// Makes the batches of a worker's share by `make`, from their places and the indexes of their examples.
    fn made_by(
        num_examples: usize,
        config: WorkerConfig,
        mut make: impl FnMut(BatchPlace, &[usize]) -> B + Send + 'static,
    ) -> Result<Self, SamplerError> {
        let sampler = SamplerConfig {
            shard: config.worker.0 as usize,
            num_shards: config.num_workers,
            seed: config.seed,
            // All workers have the same number of batches.
            drop_last: leaves_out_end(num_examples, config.num_workers, config.batch_size),
            ..SamplerConfig::new(num_examples, config.batch_size)
        };
        let per_epoch = Sampler::new(sampler.clone())?.batches_per_epoch();
        let make_at = move |Cursor { epoch, batch }, indices: &[usize]| {
            let place = BatchPlace {
                seed: config.seed,
                epoch,
                worker: config.worker,
                step: epoch.wrapping_mul(per_epoch).wrapping_add(batch),
                part: 0,
            };
            make(place, indices)
        };
        Ok(Self {
            batches: Batches::at_cursors(sampler, make_at)?,
        })
    }

    /// Returns how many steps the worker takes per epoch.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.batches.batches_per_epoch()
    }

    /// Makes the batch of step `clock`.
    ///
    /// # Errors
    /// If the data set fails.
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

/// Whether the examples at the end of an epoch that fill no batch of every worker are left out, because they are not
/// enough for one of each. Data without a single full batch of every worker is a mistake.
pub(crate) fn leaves_out_end(num_examples: usize, num_workers: usize, batch_size: usize) -> bool {
    let block = num_workers.saturating_mul(batch_size).max(1);
    num_examples < block || num_examples % block < num_workers.max(1)
}

/// A part of a batch, with the number of its examples.
pub(crate) type MicroBatch<B> = (usize, B);

impl<B: Send + 'static> WorkerBatches<Vec<MicroBatch<B>>> {
    /// Makes the same batches, each in `num_parts` parts of the same size, or of nearly the same.
    pub(crate) fn in_parts<E>(
        data: &E,
        config: WorkerConfig,
        num_parts: usize,
    ) -> Result<Self, SamplerError>
    where
        E: Examples<Batch = B>,
    {
        let data = data.clone();
        Self::made_by(data.num_examples(), config, move |place, indices| {
            let parts = parts(indices, num_parts).into_iter().enumerate();
            let micro_batch = |(part, indices): (usize, &[usize])| {
                let place = BatchPlace { part, ..place };
                (indices.len(), data.training_batch(indices, &place))
            };
            parts.map(micro_batch).collect()
        })
    }
}

/// Cuts a slice into this many parts, of which none is empty. The first ones may be longer by one.
fn parts<T>(mut whole: &[T], num_parts: usize) -> Vec<&[T]> {
    let num_parts = num_parts.clamp(1, whole.len().max(1));
    let lengths = (0..num_parts).map(|part| (whole.len() + num_parts - 1 - part) / num_parts);
    let lengths: Vec<usize> = lengths.collect();
    let cut = lengths.into_iter().map(|len| {
        let (part, rest) = whole.split_at(len);
        whole = rest;
        part
    });
    cut.collect()
}

impl<B> fmt::Debug for WorkerBatches<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkerBatches").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::parts;

    #[test]
    fn parts_have_all_items_and_nearly_the_same_size() {
        for len in 1..12_usize {
            let whole: Vec<usize> = (0..len).collect();
            for num_parts in 1..14 {
                let parts = parts(&whole, num_parts);
                assert_eq!(parts.len(), num_parts.min(len));
                assert_eq!(parts.concat(), whole);
                let sizes = || parts.iter().map(|part| part.len());
                let spread = sizes().max().unwrap() - sizes().min().unwrap();
                assert!(
                    spread <= 1 && sizes().all(|size| size > 0),
                    "{len}, {num_parts}"
                );
            }
        }
    }
}
