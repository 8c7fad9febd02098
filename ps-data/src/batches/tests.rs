use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use burn_dataset::InMemDataset;
use proptest::prelude::*;

use super::*;

fn config() -> SamplerConfig {
    SamplerConfig {
        seed: 3,
        ..SamplerConfig::new(50, 8)
    }
}

/// Batches that are their own indexes.
fn indexes(depth: usize) -> Batches<Vec<usize>> {
    Batches::new(config(), <[usize]>::to_vec)
        .expect("valid")
        .prefetch(depth)
}

fn take<T: Send + 'static>(batches: &mut Batches<T>, count: usize) -> Vec<T> {
    let taken: Result<Vec<T>, _> = batches.by_ref().take(count).collect();
    taken.expect("batches")
}

#[test]
fn prefetching_changes_neither_batches_nor_their_order() {
    let mut sampler = Sampler::new(config()).expect("valid");
    let expected: Vec<_> = (0..30).map(|_| sampler.next_batch()).collect();
    for depth in [0, 1, 2, 7] {
        let mut batches = indexes(depth);
        assert_eq!(take(&mut batches, 30), expected, "depth {depth}");
        assert_eq!(batches.cursor(), sampler.cursor(), "depth {depth}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// DATA-3 through the thread: the cursor is that of the batch taken last, not prepared last.
    #[test]
    fn a_resumed_cursor_continues_identically(
        depth in 0usize..4,
        resumed_depth in 0usize..4,
        before in 0usize..20,
    ) {
        let mut original = indexes(depth);
        take(&mut original, before);
        let saved = original.cursor();
        let rest = take(&mut original, 20);

        let mut fresh = indexes(resumed_depth);
        fresh.seek(saved).expect("in range");
        original.seek(saved).expect("in range");
        prop_assert_eq!(take(&mut fresh, 20), rest.clone());
        prop_assert_eq!(take(&mut original, 20), rest);
    }
}

#[test]
fn a_refused_cursor_changes_nothing() {
    for depth in [0, 2] {
        let mut batches = indexes(depth);
        take(&mut batches, 3);
        let expected = take(&mut indexes(0), 4).pop().expect("four");
        let error = batches.seek(Cursor { epoch: 0, batch: 7 });
        assert!(matches!(error, Err(BatchError::Seek(_))), "{error:?}");
        assert_eq!(take(&mut batches, 1), [expected], "depth {depth}");
    }
}

/// The consumer takes one batch and waits until the thread has made as many as the bound allows;
/// giving it ample opportunity, no further one is ever begun.
#[test]
fn the_thread_prepares_no_more_than_depth_plus_one_batches_ahead() {
    const DEPTH: usize = 3;
    let (made, was_made) = channel();
    let collate = move |indices: &[usize]| made.send(indices.len()).expect("the test listens");
    let mut batches = Batches::new(config(), collate)
        .expect("valid")
        .prefetch(DEPTH);
    for taken in 1..20 {
        take(&mut batches, 1);
        let ahead = DEPTH + 1;
        let so_far = if taken == 1 { taken + ahead } else { 1 };
        for _ in 0..so_far {
            was_made.recv().expect("the thread fills the queue");
        }
        std::thread::yield_now();
        assert!(was_made.try_recv().is_err(), "too far ahead after {taken}");
    }
}

#[test]
fn in_a_pause_between_epochs_nothing_is_prepared() {
    let made = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&made);
    let config = config();
    for depth in [0, 1, 9] {
        made.store(0, Ordering::Relaxed);
        let counter = Arc::clone(&counter);
        let make = move |indices: &[usize]| {
            counter.fetch_add(1, Ordering::Relaxed);
            indices.to_vec()
        };
        let batches = Batches::new(config.clone(), make).expect("valid");
        let mut batches = batches.prefetch(depth).pause_between_epochs();
        let mut expected = indexes(0);
        for epoch in 1..=3 {
            assert_eq!(
                take(&mut batches, 7),
                take(&mut expected, 7),
                "depth {depth}"
            );
            assert_eq!(made.load(Ordering::Relaxed), 7 * epoch, "depth {depth}");
        }
        // In the middle of an epoch it may be left, too.
        take(&mut batches, 2);
        batches.seek(Cursor::default()).expect("in range");
        expected.seek(Cursor::default()).expect("in range");
        assert_eq!(
            take(&mut batches, 7),
            take(&mut expected, 7),
            "depth {depth}"
        );
    }
}

#[test]
fn a_panic_in_collate_is_an_error_after_the_batches_before_it() {
    for depth in [0, 1, 4] {
        let mut calls = 0;
        let collate = move |_: &[usize]| {
            calls += 1;
            assert!(calls != 4, "the fourth batch is bad");
            calls
        };
        let mut batches = Batches::new(config(), collate)
            .expect("valid")
            .prefetch(depth);
        assert_eq!(take(&mut batches, 3), [1, 2, 3]);
        let error = batches.next_batch().expect_err("panicked").to_string();
        assert!(
            error.ends_with("panicked: the fourth batch is bad"),
            "{error}"
        );
        let again = batches.next_batch();
        assert!(matches!(again, Err(BatchError::Ended)), "{again:?}");
        let seek = batches.seek(Cursor::default());
        assert!(matches!(seek, Err(BatchError::Ended)), "{seek:?}");
        assert_eq!(batches.cursor(), Cursor { epoch: 0, batch: 3 });
    }
}

#[test]
fn dropping_stops_the_thread_and_releases_what_it_held() {
    for taken in [0, 1, 9] {
        let held = Arc::new(());
        let released = Arc::downgrade(&held);
        let collate = move |_: &[usize]| Arc::clone(&held);
        let mut batches = Batches::new(config(), collate).expect("valid");
        take(&mut batches, taken);
        drop(batches);
        assert!(released.upgrade().is_none(), "after {taken} batches");
    }
}

/// A data set of words whose reading fails while `broken` is set.
struct Words {
    broken: Arc<AtomicBool>,
    reads: Arc<AtomicUsize>,
}

impl Dataset<String> for Words {
    fn get(&self, index: usize) -> Result<String, DatasetError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        match self.broken.load(Ordering::SeqCst) {
            true => Err(DatasetError::new(io::Error::other("disk on fire"))),
            false => Ok(format!("word {index}")),
        }
    }

    fn len(&self) -> usize {
        50
    }
}

#[test]
fn any_burn_data_set_can_be_batched() {
    let numbers = InMemDataset::new((0..50u32).map(|i| i * i).collect());
    let mut batches = Batches::of_dataset(numbers, config(), |items| items).expect("valid");
    let squares: Vec<u32> = take(&mut batches, 7).concat();
    let expected: Vec<usize> = take(&mut indexes(0), 7).concat();
    assert_eq!(squares.len(), 50);
    assert!(
        squares
            .iter()
            .zip(expected)
            .all(|(&s, i)| s as usize == i * i)
    );
}

#[test]
fn a_failing_data_set_is_an_error_and_the_batch_can_be_tried_again() {
    for depth in [0, 2] {
        let (broken, reads) = (Arc::new(AtomicBool::new(true)), Arc::default());
        let words = Words {
            broken: Arc::clone(&broken),
            reads: Arc::clone(&reads),
        };
        let mut batches = Batches::of_dataset(words, config(), |words| words.join(","))
            .expect("valid")
            .prefetch(depth);
        let error = batches.next_batch().expect_err("broken");
        let source = std::error::Error::source(&error).expect("a source");
        assert_eq!(source.to_string(), "disk on fire");
        assert_eq!(batches.cursor(), Cursor::default());
        assert_eq!(reads.load(Ordering::SeqCst), 1);

        broken.store(false, Ordering::SeqCst);
        let first = &take(&mut indexes(0), 1)[0];
        let expected: Vec<_> = first.iter().map(|index| format!("word {index}")).collect();
        assert_eq!(take(&mut batches, 1), [expected.join(",")]);
    }
}

#[test]
fn a_configuration_for_another_data_set_is_refused() {
    let numbers = InMemDataset::new(vec![1, 2, 3]);
    let error = Batches::of_dataset(numbers, config(), |items| items).expect_err("50 is not 3");
    let (configured, found) = (50, 3);
    assert_eq!(error, SamplerError::WrongLength { configured, found });
}
