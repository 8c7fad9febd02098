//! The batches of the workers in this process, from burn's data loader.
//!
//! Each worker has a share of the examples: a slice of the loader, as burn's own strategies for several devices
//! cut it. A share belongs to a process and not to a worker, because a worker that was lost begins again in the
//! middle of an epoch, and a loader cannot be asked for a batch by its number. A loader shuffles anew for each
//! epoch, and only in sequence. Each process has its own loader. So when a process first uses a share, it skips the
//! epochs and batches before the wanted one. It keeps the latest batches, in case a step is taken again.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use ps_model::burn::data::dataloader::{DataLoader, Progress};
use ps_model::burn::tensor::Device;

/// How many batches are made before they are asked for, besides the one that is being made.
const AHEAD: usize = 1;

/// Why a worker gets no batch.
#[derive(Debug, thiserror::Error)]
pub(super) enum FeedError {
    #[error(
        "the training data cannot be shared: {num_items} examples are fewer than {num_workers} workers"
    )]
    TooFew {
        num_items: usize,
        num_workers: usize,
    },
    #[error("there is no share number {rank} for {num_workers} workers")]
    NoShare { rank: usize, num_workers: usize },
    #[error(transparent)]
    Loader(#[from] LoaderError),
    #[error("the data loader panicked; its message is in the output of that worker's process")]
    Panicked,
    #[error("batch {index} of epoch {epoch} is wanted again, but the data loader is past it")]
    Past { epoch: u64, index: u64 },
    #[error("no thread for the data loader")]
    Thread(#[source] io::Error),
}

/// Why a data loader ended too early.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum LoaderError {
    #[error("the data set failed: {0}")]
    Dataset(String),
    /// burn's loader ends in this way if one of its threads panics.
    #[error(
        "the data loader ended after {num_loaded} of {num_all} examples; if it panicked, its message is in the \
         output of that worker's process"
    )]
    Ended { num_loaded: usize, num_all: usize },
}

/// The shares of all workers, in one process.
pub(super) struct Shares<I> {
    loader: Arc<dyn DataLoader<I>>,
    device: Device,
    latest: Mutex<Option<Cut<I>>>,
}

/// The shares of one training.
struct Cut<I> {
    training: u64,
    feeds: Vec<Arc<Mutex<Feed<I>>>>,
}

impl<I: Clone + Send + 'static> Shares<I> {
    pub(super) fn new(loader: Arc<dyn DataLoader<I>>, device: Device) -> Self {
        Self {
            loader,
            device,
            latest: Mutex::new(None),
        }
    }

    pub(super) fn loader(&self) -> &Arc<dyn DataLoader<I>> {
        &self.loader
    }

    /// Returns the share of the worker with this rank, which is below `num_workers`. A training that was not the
    /// latest one gets new shares, which begin with its first epoch.
    pub(super) fn of(
        &self,
        training: u64,
        rank: usize,
        num_workers: usize,
    ) -> Result<Arc<Mutex<Feed<I>>>, FeedError> {
        let mut latest = self.latest.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |cut: &Cut<I>| cut.training == training && cut.feeds.len() == num_workers;
        let cut = match latest.take().filter(is_it) {
            Some(cut) => cut,
            // All at once and in this order: each share takes random numbers from the loader, and in every process
            // it must get the same ones.
            None => Cut {
                training,
                feeds: self.cut(num_workers)?,
            },
        };
        let feed = latest.insert(cut).feeds.get(rank).cloned();
        feed.ok_or(FeedError::NoShare { rank, num_workers })
    }

    fn cut(&self, num_workers: usize) -> Result<Vec<Arc<Mutex<Feed<I>>>>, FeedError> {
        let num_items = self.loader.num_items();
        if num_items < num_workers {
            return Err(FeedError::TooFew {
                num_items,
                num_workers,
            });
        }
        let begin = |rank: usize| rank * num_items / num_workers;
        let loaders = (0..num_workers).map(|rank| match num_workers {
            // As burn's strategy for one device does, so that it is the same training.
            1 => self.loader.to_device(&self.device),
            _ => {
                let share = self.loader.slice(begin(rank), begin(rank + 1));
                share.to_device(&self.device)
            }
        });
        let feeds = loaders.map(|loader| Arc::new(Mutex::new(Feed::new(loader))));
        Ok(feeds.collect())
    }
}

/// A batch with its place.
#[derive(Clone, Debug)]
pub(super) struct Fed<I> {
    pub(super) batch: I,
    pub(super) num_examples: usize,
    /// How far the share's epoch is, with this batch.
    pub(super) progress: Progress,
}

/// The batches of one share.
pub(super) struct Feed<I> {
    loader: Arc<dyn DataLoader<I>>,
    coming: Option<Receiver<Coming<I>>>,
    /// The latest epoch that was asked for. Nobody wants batches of earlier ones.
    wanted: Arc<AtomicU64>,
    /// The latest batches, in the order of their places.
    kept: VecDeque<Loaded<I>>,
}

/// The next batch, or why there is none.
type Coming<I> = Result<Loaded<I>, LoaderError>;

struct Loaded<I> {
    /// The epoch, and the number of the batch in it, both from 0.
    place: (u64, u64),
    content: Content<I>,
}

enum Content<I> {
    Batch(Fed<I>),
    /// The epoch has no batch with this number, and none after it.
    End,
}

impl<I: Clone + Send + 'static> Feed<I> {
    fn new(loader: Arc<dyn DataLoader<I>>) -> Self {
        Self {
            loader,
            coming: None,
            wanted: Arc::default(),
            kept: VecDeque::new(),
        }
    }

    /// Returns the batch with this number of an epoch, or `None` if the epoch has fewer. Waits for it. Keeps this
    /// one and those before it, `keep` in all.
    pub(super) fn batch(
        &mut self,
        epoch: u64,
        index: u64,
        keep: usize,
    ) -> Result<Option<Fed<I>>, FeedError> {
        Ok(self.reach(epoch, index, keep)?.cloned())
    }

    /// Returns whether the epoch has a batch with this number. Otherwise like [`batch`](Self::batch).
    pub(super) fn has_batch(
        &mut self,
        epoch: u64,
        index: u64,
        keep: usize,
    ) -> Result<bool, FeedError> {
        Ok(self.reach(epoch, index, keep)?.is_some())
    }

    fn reach(&mut self, epoch: u64, index: u64, keep: usize) -> Result<Option<&Fed<I>>, FeedError> {
        let wanted = (epoch, index);
        self.wanted.fetch_max(epoch, Ordering::Relaxed);
        let found = loop {
            let is_it = |loaded: &Loaded<I>| match loaded.content {
                Content::End => loaded.place.0 == epoch && loaded.place <= wanted,
                Content::Batch(_) => loaded.place == wanted,
            };
            if let Some(found) = self.kept.iter().position(is_it) {
                break found;
            }
            if self.kept.back().is_some_and(|last| last.place >= wanted) {
                return Err(FeedError::Past { epoch, index });
            }
            let coming = match &mut self.coming {
                Some(coming) => coming,
                coming => {
                    let started = start(&self.loader, &self.wanted);
                    coming.insert(started.map_err(FeedError::Thread)?)
                }
            };
            let next = coming.recv().map_err(|_| FeedError::Panicked)?;
            self.kept.push_back(next?);
            while self.kept.len() > keep {
                self.kept.pop_front();
            }
        };
        match &self.kept[found].content {
            Content::Batch(fed) => Ok(Some(fed)),
            Content::End => Ok(None),
        }
    }
}

/// Starts a thread that makes the batches from the wanted epoch on, until nobody wants them any more.
fn start<I: Send + 'static>(
    loader: &Arc<dyn DataLoader<I>>,
    wanted: &Arc<AtomicU64>,
) -> io::Result<Receiver<Coming<I>>> {
    let (sender, coming) = sync_channel(AHEAD);
    let (loader, wanted) = (Arc::clone(loader), Arc::clone(wanted));
    let thread = thread::Builder::new().name("batches".to_owned());
    thread.spawn(move || {
        let Err(error) = make(&*loader, &wanted, &sender) else {
            return;
        };
        // Whoever asks again gets the error again.
        while sender.send(Err(error.clone())).is_ok() {}
    })?;
    Ok(coming)
}

/// Makes batches until nobody wants them any more, or until the loader ends too early.
fn make<I>(
    loader: &dyn DataLoader<I>,
    wanted: &AtomicU64,
    sender: &SyncSender<Coming<I>>,
) -> Result<(), LoaderError> {
    for epoch in 0.. {
        // Each iterator takes the next order of the examples, also if nobody wants its batches.
        let mut batches = loader.iter();
        let (mut index, mut num_before) = (0, 0);
        while wanted.load(Ordering::Relaxed) <= epoch {
            let batch = batches.next().transpose();
            let batch = batch.map_err(|error| LoaderError::Dataset(error.to_string()))?;
            let progress = batches.progress();
            let num_all = progress.items_processed;
            let is_last = batch.is_none();
            if is_last && num_all < progress.items_total {
                return Err(LoaderError::Ended {
                    num_loaded: num_all,
                    num_all: progress.items_total,
                });
            }
            let content = batch.map_or(Content::End, |batch| {
                Content::Batch(Fed {
                    batch,
                    num_examples: num_all.saturating_sub(num_before),
                    progress,
                })
            });
            let place = (epoch, index);
            if sender.send(Ok(Loaded { place, content })).is_err() {
                return Ok(());
            }
            if is_last {
                break;
            }
            (index, num_before) = (index + 1, num_all);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ps_model::burn::data::dataloader::DataLoaderBuilder;
    use ps_model::burn::data::dataloader::batcher::Batcher;
    use ps_model::burn::data::dataset::{Dataset, DatasetError, InMemDataset};

    use super::*;

    #[derive(Clone)]
    struct Ids;

    impl Batcher<usize, Vec<usize>> for Ids {
        fn batch(&self, ids: Vec<usize>, _: &Device) -> Vec<usize> {
            ids
        }
    }

    const TRAINING: u64 = 7;

    /// What one process has.
    fn process(num_items: usize) -> Shares<Vec<usize>> {
        let ids = InMemDataset::new((0..num_items).collect());
        let loader = DataLoaderBuilder::new(Ids).batch_size(3).shuffle(5);
        Shares::new(loader.build(ids), Device::default())
    }

    fn batch(
        shares: &Shares<Vec<usize>>,
        rank: usize,
        place: (u64, u64),
    ) -> Result<Option<Vec<usize>>, FeedError> {
        batch_of(shares, TRAINING, rank, place)
    }

    fn batch_of(
        shares: &Shares<Vec<usize>>,
        training: u64,
        rank: usize,
        (epoch, index): (u64, u64),
    ) -> Result<Option<Vec<usize>>, FeedError> {
        let feed = shares.of(training, rank, 2)?;
        let fed = feed.lock().unwrap().batch(epoch, index, 2)?;
        Ok(fed.map(|fed| {
            assert_eq!(fed.num_examples, fed.batch.len());
            fed.batch
        }))
    }

    #[test]
    fn the_shares_of_an_epoch_cover_every_example_once_in_another_order_each() {
        let shares = process(20);
        let mut orders = Vec::new();
        for epoch in 0..3 {
            let mut ids = Vec::new();
            for rank in [0, 1] {
                for index in 0.. {
                    let Some(batch) = batch(&shares, rank, (epoch, index)).unwrap() else {
                        assert_eq!(index, 4);
                        break;
                    };
                    ids.extend(batch);
                }
            }
            orders.push(ids.clone());
            ids.sort_unstable();
            assert!(ids.into_iter().eq(0..20));
        }
        assert!(orders[0] != orders[1] && orders[1] != orders[2]);
    }

    #[test]
    fn a_worker_that_begins_again_elsewhere_gets_the_same_batches() {
        let (first, second) = (process(20), process(20));
        let all: Vec<_> = (0..3)
            .flat_map(|epoch| (0..4).map(move |index| (epoch, index)))
            .map(|place| batch(&first, 1, place).unwrap().unwrap())
            .collect();
        assert_eq!(batch(&second, 1, (1, 2)).unwrap().as_ref(), Some(&all[6]));
        assert_eq!(batch(&second, 1, (1, 3)).unwrap().as_ref(), Some(&all[7]));
        assert_eq!(batch(&second, 1, (1, 4)).unwrap(), None);
        assert_eq!(batch(&second, 1, (2, 1)).unwrap().as_ref(), Some(&all[9]));
    }

    #[test]
    fn the_latest_batches_can_be_had_again_and_earlier_ones_are_an_error() {
        let shares = process(20);
        let third = batch(&shares, 0, (0, 2)).unwrap().unwrap();
        let fourth = batch(&shares, 0, (0, 3)).unwrap().unwrap();
        assert_ne!(third, fourth);
        assert_eq!(batch(&shares, 0, (0, 2)).unwrap(), Some(third));
        let past = batch(&shares, 0, (0, 1)).unwrap_err();
        assert!(
            matches!(past, FeedError::Past { epoch: 0, index: 1 }),
            "{past}"
        );
    }

    /// As on a node that outlives its driver.
    #[test]
    fn another_training_begins_with_its_first_epoch() {
        let shares = process(20);
        for training in [TRAINING, TRAINING + 1] {
            for epoch in 0..2 {
                let mut ids = Vec::new();
                for (rank, index) in (0..8).map(|number| (number / 4, number % 4)) {
                    let batch = batch_of(&shares, training, rank, (epoch, index as u64));
                    ids.extend(batch.unwrap().unwrap());
                }
                ids.sort_unstable();
                assert!(ids.into_iter().eq(0..20), "{training} {epoch}");
            }
        }
    }

    #[test]
    fn too_many_shares_are_an_error() {
        let shares = process(4);
        let error = shares.of(TRAINING, 0, 5).err().unwrap().to_string();
        assert!(
            error.contains("4 examples are fewer than 5 workers"),
            "{error}"
        );
        assert!(shares.of(TRAINING, 0, 2).is_ok());
        let error = shares.of(TRAINING, 2, 2).err().unwrap().to_string();
        assert!(error.contains("no share number 2"), "{error}");
    }

    /// Fails for one example.
    struct Broken;

    impl Dataset<usize> for Broken {
        fn get(&self, index: usize) -> Result<usize, DatasetError> {
            match index {
                13 => Err(DatasetError::new(io::Error::other("a bad sector"))),
                _ => Ok(index),
            }
        }

        fn len(&self) -> usize {
            20
        }
    }

    /// A worker asks whether there is a batch before it asks for the batch.
    #[test]
    fn the_error_of_a_data_set_arrives() {
        let loader = DataLoaderBuilder::new(Ids).batch_size(3).build(Broken);
        let shares = Shares::new(loader, Device::default());
        assert_eq!(batch(&shares, 1, (0, 0)).unwrap(), Some(vec![10, 11, 12]));
        let feed = shares.of(TRAINING, 1, 2).unwrap();
        let error = feed.lock().unwrap().has_batch(0, 1, 2).unwrap_err();
        assert!(error.to_string().contains("a bad sector"), "{error}");
        for _ in 0..3 {
            let error = batch(&shares, 1, (0, 1)).unwrap_err().to_string();
            assert!(error.contains("a bad sector"), "{error}");
        }
    }

    /// Counts its batches, and panics at one example.
    #[derive(Clone)]
    struct Counting(Arc<AtomicU64>);

    const PANICS: usize = 1_000;

    impl Batcher<usize, Vec<usize>> for Counting {
        fn batch(&self, ids: Vec<usize>, _: &Device) -> Vec<usize> {
            assert!(!ids.contains(&PANICS), "as planned");
            self.0.fetch_add(1, Ordering::Relaxed);
            ids
        }
    }

    #[test]
    fn a_panic_in_a_thread_of_the_loader_is_an_error_and_not_the_end_of_an_epoch() {
        for num_threads in [0, 1, 2] {
            let ids = InMemDataset::new((0..20).chain([PANICS]).chain(20..39).collect());
            let loader = DataLoaderBuilder::new(Counting(Arc::default()));
            let loader = loader.batch_size(5).num_workers(num_threads).build(ids);
            let shares = Shares::new(loader, Device::default());
            let feed = shares.of(TRAINING, 0, 1).unwrap();
            let next = |index| feed.lock().unwrap().batch(0, index, 2);
            let error = (0..).find_map(|index| match next(index) {
                Ok(batch) => {
                    assert!(batch.is_some(), "the epoch ended at batch {index}");
                    None
                }
                Err(error) => Some(error.to_string()),
            });
            let error = error.unwrap();
            assert!(error.contains("panicked"), "{error}");
            if num_threads > 0 {
                assert!(error.contains("of 40 examples"), "{error}");
            }
        }
    }

    #[test]
    fn a_share_that_missed_epochs_does_not_load_them() {
        let num_loaded = Arc::new(AtomicU64::new(0));
        let ids = InMemDataset::new((0..100).collect());
        let loader = DataLoaderBuilder::new(Counting(Arc::clone(&num_loaded)));
        let shares = Shares::new(loader.batch_size(5).build(ids), Device::default());
        let first = batch(&shares, 0, (0, 0)).unwrap();
        // An epoch of the share has 10 batches.
        assert_eq!(batch(&shares, 0, (6, 0)).unwrap(), first);
        let num_loaded = num_loaded.load(Ordering::Relaxed);
        assert!(num_loaded < 10, "{num_loaded} batches");
    }
}
