//! Turns a [`Sampler`]'s indexes into batches, ahead of time on a thread.
//!
//! The thread prepares at most `depth + 1` batches more than were taken: `depth` in the queue and one that
//! waits for room. Batches always arrive in the sampler's order, so prefetching never changes results. The
//! cursor is the consumer's: batches that were prepared but not taken do not count.

use std::fmt;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::thread::JoinHandle;

use burn_dataset::{Dataset, DatasetError};

use crate::{Cursor, ImageBatch, ImageDataset, Sampler, SamplerConfig, SamplerError};

const DEFAULT_DEPTH: usize = 2;

/// A batch could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// The data set could not return an example. The position has not moved: the next call tries the same
    /// batch again.
    #[error("the data set cannot give the examples of a batch")]
    Dataset(#[source] DatasetError),
    /// The collate function panicked. These `Batches` cannot be used any more.
    #[error("the function that makes batches panicked: {message}")]
    Panicked {
        /// The panic's message.
        message: String,
    },
    /// The system gave no thread. These `Batches` cannot be used any more.
    #[error("cannot start the thread that prepares batches")]
    SpawnThread(#[source] io::Error),
    /// An earlier panic or thread failure has ended these `Batches`. It was reported when it happened.
    #[error("batches ended by an earlier failure; make new ones")]
    Ended,
    /// The cursor does not fit the configuration.
    #[error("cannot move to another batch")]
    Seek(#[source] SamplerError),
}

/// An endless sequence of batches of type `T`. It is seeded, sharded, resumable and prefetched.
///
/// Dropping it stops the thread, after the batch that the thread is working on.
///
/// ```
/// use ps_data::{Batches, SamplerConfig};
///
/// // Ten examples in batches of 4, in order. The function makes a batch from its indexes.
/// let config = SamplerConfig { shuffle: false, ..SamplerConfig::new(10, 4) };
/// let squares = |indexes: &[usize]| indexes.iter().map(|i| i * i).collect::<Vec<_>>();
/// let mut batches = Batches::new(config, squares)?.prefetch(1);
/// assert_eq!(batches.next_batch()?, [0, 1, 4, 9]);
/// assert_eq!(batches.batches_per_epoch(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Batches<T> {
    config: SamplerConfig,
    batches_per_epoch: u64,
    /// The position of the next batch that the consumer gets.
    cursor: Cursor,
    depth: usize,
    pauses: bool,
    state: State<T>,
}

enum State<T> {
    /// There is no thread. The producer is at the consumer's cursor.
    Idle(Producer<T>),
    /// A thread prepares batches ahead of the consumer.
    Prefetching(Prefetcher<T>),
    /// The producer was lost.
    Ended,
}

impl<T: Send + 'static> Batches<T> {
    /// Makes each batch by calling `collate` with the indexes of its examples.
    ///
    /// `collate` runs on the prefetching thread, one call at a time and in order.
    ///
    /// # Errors
    ///
    /// If `config` is invalid; see [`Sampler::new`].
    pub fn new(
        config: SamplerConfig,
        mut collate: impl FnMut(&[usize]) -> T + Send + 'static,
    ) -> Result<Self, SamplerError> {
        Self::with_fallible(config, move |_, indices| Ok(collate(indices)))
    }

    /// Does the same, and also tells `collate` the position of each batch. So a batch may have random changes that are
    /// the same whenever the batch is made.
    ///
    /// ```
    /// use ps_data::{Batches, Cursor, SamplerConfig};
    ///
    /// let config = SamplerConfig { shuffle: false, ..SamplerConfig::new(4, 2) };
    /// let mut batches = Batches::at_cursors(config, |cursor, indexes| (cursor, indexes.to_vec()))?;
    /// assert_eq!(batches.next_batch()?.0, Cursor { epoch: 0, batch: 0 });
    /// assert_eq!(batches.next_batch()?, (Cursor { epoch: 0, batch: 1 }, vec![2, 3]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If `config` is invalid; see [`Sampler::new`].
    pub fn at_cursors(
        config: SamplerConfig,
        mut collate: impl FnMut(Cursor, &[usize]) -> T + Send + 'static,
    ) -> Result<Self, SamplerError> {
        Self::with_fallible(config, move |cursor, indices| Ok(collate(cursor, indices)))
    }

    /// Makes batches from any burn `Dataset`. `collate` joins the items of a batch.
    ///
    /// # Errors
    ///
    /// If `config` is invalid, or if its `num_examples` is not the data set's length.
    pub fn of_dataset<I>(
        dataset: impl Dataset<I> + 'static,
        config: SamplerConfig,
        mut collate: impl FnMut(Vec<I>) -> T + Send + 'static,
    ) -> Result<Self, SamplerError> {
        check_length(&config, dataset.len())?;
        Self::with_fallible(config, move |_, indices| {
            let items = dataset.get_many(indices.to_vec());
            items.map(&mut collate).map_err(BatchError::Dataset)
        })
    }

    fn with_fallible(
        config: SamplerConfig,
        collate: impl FnMut(Cursor, &[usize]) -> Result<T, BatchError> + Send + 'static,
    ) -> Result<Self, SamplerError> {
        let sampler = Sampler::new(config.clone())?;
        Ok(Self {
            config,
            batches_per_epoch: sampler.batches_per_epoch(),
            cursor: sampler.cursor(),
            depth: DEFAULT_DEPTH,
            pauses: false,
            state: State::Idle(Producer {
                sampler,
                collate: Box::new(collate),
                indices: Vec::new(),
            }),
        })
    }

    /// Sets how many finished batches may wait in the queue. Default: 2.
    ///
    /// With 0, each batch is made when it is asked for, without a thread. With more, slow and uneven collate
    /// functions delay the consumer less, but more batches take memory. Set it before the first batch. If it
    /// is set later, it takes effect at the next [`seek`](Self::seek).
    #[must_use]
    pub fn prefetch(mut self, depth: usize) -> Self {
        self.depth = depth;
        self
    }

    /// Sets that no batch of an epoch is prepared before one of them is asked for. So between two epochs the thread waits,
    /// and no batch takes memory.
    #[must_use]
    pub fn pause_between_epochs(mut self) -> Self {
        self.pauses = true;
        self
    }

    /// Waits for the next batch and returns it.
    ///
    /// # Errors
    ///
    /// If the batch could not be made. The documentation of each [`BatchError`] says whether another call
    /// can help.
    pub fn next_batch(&mut self) -> Result<T, BatchError> {
        let (batch, next) = match std::mem::replace(&mut self.state, State::Ended) {
            State::Ended => return Err(BatchError::Ended),
            State::Idle(producer) if self.depth > 0 => {
                let prefetcher = Prefetcher::start(producer, self.depth, self.pauses)?;
                self.receive(prefetcher)?
            }
            State::Idle(mut producer) => {
                let result = producer.produce();
                if !matches!(result, Err(BatchError::Panicked { .. })) {
                    self.state = State::Idle(producer);
                }
                result?
            }
            State::Prefetching(prefetcher) => {
                if self.pauses && self.cursor.batch == 0 {
                    // It fails if the thread has ended. Then there is its last result to receive.
                    let _ = prefetcher.go_on.send(());
                }
                self.receive(prefetcher)?
            }
        };
        self.cursor = next;
        Ok(batch)
    }

    /// Takes the oldest batch in the queue. After an error the thread ends, so its producer is taken back.
    fn receive(&mut self, prefetcher: Prefetcher<T>) -> Result<(T, Cursor), BatchError> {
        let result = prefetcher.receiver.recv().unwrap_or(Err(BatchError::Ended));
        self.state = match &result {
            Ok(_) => State::Prefetching(prefetcher),
            Err(_) => prefetcher.stop().map_or(State::Ended, State::Idle),
        };
        result
    }

    /// Returns the position of the next batch. Save it to resume there.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Continues at `cursor`. Batches that were prepared for another position are dropped.
    ///
    /// It waits for the batch that the thread is working on.
    ///
    /// # Errors
    ///
    /// [`BatchError::Seek`] if `cursor` is behind the end of its epoch; the position does not change then.
    /// [`BatchError::Ended`] after a panic of the collate function.
    pub fn seek(&mut self, cursor: Cursor) -> Result<(), BatchError> {
        let stopped = match std::mem::replace(&mut self.state, State::Ended) {
            State::Idle(producer) => Some(producer),
            State::Prefetching(prefetcher) => prefetcher.stop(),
            State::Ended => None,
        };
        let mut producer = stopped.ok_or(BatchError::Ended)?;
        let moved = producer.sampler.seek(cursor);
        match moved {
            Ok(()) => self.cursor = cursor,
            // Moves the sampler back from the position that prefetching had reached.
            Err(_) => producer.sampler.rewind(self.cursor),
        }
        self.state = State::Idle(producer);
        moved.map_err(BatchError::Seek)
    }

    /// Returns how many batches this shard has per epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        self.batches_per_epoch
    }

    /// Returns the configuration of the sampler.
    pub fn config(&self) -> &SamplerConfig {
        &self.config
    }
}

impl Batches<ImageBatch> {
    /// Makes normalized batches of images.
    ///
    /// # Errors
    ///
    /// If `config` is invalid, or if its `num_examples` is not the data set's length.
    pub fn of_images(images: &ImageDataset, config: SamplerConfig) -> Result<Self, SamplerError> {
        check_length(&config, images.len())?;
        let images = images.clone();
        Self::new(config, move |indices| images.batch(indices))
    }
}

impl<T: Send + 'static> Iterator for Batches<T> {
    type Item = Result<T, BatchError>;

    /// Never returns `None`. End the iteration with `take`, at an epoch of the cursor, or at an error.
    fn next(&mut self) -> Option<Self::Item> {
        Some(self.next_batch())
    }
}

impl<T> fmt::Debug for Batches<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Batches")
            .field("config", &self.config)
            .field("cursor", &self.cursor)
            .field("depth", &self.depth)
            .finish_non_exhaustive()
    }
}

fn check_length(config: &SamplerConfig, found: usize) -> Result<(), SamplerError> {
    let configured = config.num_examples;
    match configured == found {
        true => Ok(()),
        false => Err(SamplerError::WrongLength { configured, found }),
    }
}

type Collate<T> = Box<dyn FnMut(Cursor, &[usize]) -> Result<T, BatchError> + Send>;

/// Makes one batch after the other.
struct Producer<T> {
    sampler: Sampler,
    collate: Collate<T>,
    indices: Vec<usize>,
}

impl<T> Producer<T> {
    /// Makes one batch and returns it with the position behind it. If that fails, the position does not
    /// change.
    fn produce(&mut self) -> Result<(T, Cursor), BatchError> {
        let start = self.sampler.cursor();
        self.sampler.next_into(&mut self.indices);
        // After a panic the producer is dropped, because its state may be inconsistent.
        let collated = catch_unwind(AssertUnwindSafe(|| (self.collate)(start, &self.indices)));
        match collated {
            Ok(Ok(batch)) => Ok((batch, self.sampler.cursor())),
            Ok(Err(error)) => {
                self.sampler.rewind(start);
                Err(error)
            }
            Err(panic) => Err(BatchError::Panicked {
                message: panic_message(&*panic),
            }),
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

/// The thread and the queue of its batches.
struct Prefetcher<T> {
    receiver: Receiver<Result<(T, Cursor), BatchError>>,
    /// Ends a pause between two epochs. The thread stays meanwhile: with a new one for each epoch, the allocator would
    /// take memory for each.
    go_on: Sender<()>,
    thread: Stopper<T>,
}

/// Joins its thread when it is dropped. Fields are dropped in order, so both channels are already closed then, and
/// the thread cannot be waiting for one of them.
struct Stopper<T>(Option<JoinHandle<Option<Producer<T>>>>);

impl<T: Send + 'static> Prefetcher<T> {
    fn start(mut producer: Producer<T>, depth: usize, pauses: bool) -> Result<Self, BatchError> {
        let (sender, receiver) = sync_channel(depth);
        let (go_on, pause) = channel();
        let run = move || {
            loop {
                let result = producer.produce();
                let failed = result.is_err();
                let panicked = matches!(result, Err(BatchError::Panicked { .. }));
                // This fails if the consumer was dropped or takes the producer back.
                let refused = sender.send(result).is_err();
                if panicked {
                    return None;
                }
                if failed || refused {
                    return Some(producer);
                }
                let is_pause = pauses && producer.sampler.cursor().batch == 0;
                if is_pause && pause.recv().is_err() {
                    return Some(producer);
                }
            }
        };
        let thread = std::thread::Builder::new()
            .name("ps-data batches".to_owned())
            .spawn(run)
            .map_err(BatchError::SpawnThread)?;
        Ok(Self {
            receiver,
            go_on,
            thread: Stopper(Some(thread)),
        })
    }
}

impl<T> Prefetcher<T> {
    /// Ends the thread and returns its producer. Returns `None` if the producer was lost in a panic.
    fn stop(self) -> Option<Producer<T>> {
        let Self {
            receiver,
            go_on,
            mut thread,
        } = self;
        drop((receiver, go_on));
        thread.0.take()?.join().ok().flatten()
    }
}

impl<T> Drop for Stopper<T> {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // A panic outside the collate function cannot be reported here.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
