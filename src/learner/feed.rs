//! The batches of the workers in this process, from burn's data loader.
//!
//! Each worker has a share of the examples: a slice of the loader, as burn's own strategies for several devices
//! cut it. A share belongs to a process and not to a worker, because a worker that was lost begins again in the
//! middle of an epoch, and a loader cannot be asked for a batch by its number. A loader gives its orders one after
//! the other, and each process has its own copy of it. So a share that is used for the first time passes over the
//! epochs and batches before the wanted one, and keeps the latest batches in case they are needed again.

use std::collections::VecDeque;
use std::io;
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
    #[error(
        "the training data was shared between {before} workers, and cannot be shared again between {now}: \
         make a strategy for each training"
    )]
    OtherShares { before: usize, now: usize },
    #[error("the data set failed: {0}")]
    Dataset(String),
    #[error("the data loader panicked")]
    Panicked,
    #[error(
        "batch {index} of epoch {epoch} is wanted again, but the data loader is past it: make a strategy for \
         each training"
    )]
    Past { epoch: u64, index: u64 },
    #[error("no thread for the data loader")]
    Thread(#[source] io::Error),
}

/// The shares of all workers, in one process.
pub(super) struct Shares<I> {
    loader: Arc<dyn DataLoader<I>>,
    device: Device,
    feeds: Mutex<Vec<Arc<Mutex<Feed<I>>>>>,
}

impl<I: Clone + Send + 'static> Shares<I> {
    pub(super) fn new(loader: Arc<dyn DataLoader<I>>, device: Device) -> Self {
        Self {
            loader,
            device,
            feeds: Mutex::default(),
        }
    }

    pub(super) fn loader(&self) -> &Arc<dyn DataLoader<I>> {
        &self.loader
    }

    /// Returns the share of the worker with this rank, which is below `num_workers`.
    pub(super) fn of(
        &self,
        rank: usize,
        num_workers: usize,
    ) -> Result<Arc<Mutex<Feed<I>>>, FeedError> {
        let mut feeds = self.feeds.lock().unwrap_or_else(PoisonError::into_inner);
        if feeds.is_empty() {
            // All at once and in this order: each cut takes random numbers from the loader, and in every process
            // each share must get the same ones.
            *feeds = self.cut(num_workers)?;
        }
        match feeds.get(rank) {
            Some(feed) if feeds.len() == num_workers => Ok(Arc::clone(feed)),
            _ => Err(FeedError::OtherShares {
                before: feeds.len(),
                now: num_workers,
            }),
        }
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
    /// The latest batches, in the order of their places.
    kept: VecDeque<Loaded<I>>,
}

/// The next batch, or why the data set failed.
type Coming<I> = Result<Loaded<I>, String>;

struct Loaded<I> {
    /// The epoch since the start of the training, and the number of the batch in it, both from 0.
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
                coming => coming.insert(start(&self.loader, epoch).map_err(FeedError::Thread)?),
            };
            let next = coming.recv().map_err(|_| FeedError::Panicked)?;
            self.kept.push_back(next.map_err(FeedError::Dataset)?);
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

/// Starts a thread that makes the batches from this epoch on, until nobody wants them any more.
fn start<I: Send + 'static>(
    loader: &Arc<dyn DataLoader<I>>,
    first_epoch: u64,
) -> io::Result<Receiver<Coming<I>>> {
    let (sender, coming) = sync_channel(AHEAD);
    let loader = Arc::clone(loader);
    let thread = thread::Builder::new().name("batches".to_owned());
    thread.spawn(move || make(&*loader, first_epoch, &sender))?;
    Ok(coming)
}

fn make<I>(loader: &dyn DataLoader<I>, first_epoch: u64, sender: &SyncSender<Coming<I>>) {
    // Each iterator takes the next order of the examples.
    (0..first_epoch).for_each(|_| drop(loader.iter()));
    for epoch in first_epoch.. {
        let mut batches = loader.iter();
        let (mut index, mut num_before) = (0, 0);
        loop {
            let batch = match batches.next().transpose() {
                Ok(batch) => batch,
                Err(error) => {
                    // Nobody wants batches any more, or nobody gets more.
                    let _ = sender.send(Err(error.to_string()));
                    return;
                }
            };
            let progress = batches.progress();
            let num_all = progress.items_processed;
            let is_last = batch.is_none();
            let content = batch.map_or(Content::End, |batch| {
                Content::Batch(Fed {
                    batch,
                    num_examples: num_all.saturating_sub(num_before),
                    progress,
                })
            });
            let place = (epoch, index);
            if sender.send(Ok(Loaded { place, content })).is_err() {
                return;
            }
            if is_last {
                break;
            }
            (index, num_before) = (index + 1, num_all);
        }
    }
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

    /// What one process has.
    fn process(num_items: usize) -> Shares<Vec<usize>> {
        let ids = InMemDataset::new((0..num_items).collect());
        let loader = DataLoaderBuilder::new(Ids).batch_size(3).shuffle(5);
        Shares::new(loader.build(ids), Device::default())
    }

    fn batch(
        shares: &Shares<Vec<usize>>,
        rank: usize,
        (epoch, index): (u64, u64),
    ) -> Result<Option<Vec<usize>>, FeedError> {
        let feed = shares.of(rank, 2)?;
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

    #[test]
    fn other_shares_than_before_and_too_many_are_errors() {
        let shares = process(4);
        let error = shares.of(0, 5).err().unwrap().to_string();
        assert!(
            error.contains("4 examples are fewer than 5 workers"),
            "{error}"
        );
        assert!(shares.of(0, 2).is_ok());
        let error = shares.of(0, 3).err().unwrap().to_string();
        assert!(error.contains("between 2 workers"), "{error}");
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

    #[test]
    fn the_error_of_a_data_set_arrives() {
        let loader = DataLoaderBuilder::new(Ids).batch_size(3).build(Broken);
        let shares = Shares::new(loader, Device::default());
        assert_eq!(batch(&shares, 1, (0, 0)).unwrap(), Some(vec![10, 11, 12]));
        let error = batch(&shares, 1, (0, 1)).unwrap_err().to_string();
        assert!(error.contains("a bad sector"), "{error}");
    }
}
