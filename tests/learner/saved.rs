//! Trainings that go on from burn's checkpoints, and what is in the way of that.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::optim::AdamConfig;
use burn::train::{Interrupter, Learner, LearningResult};
use ps::learner::{SavedEpochs, SavedEpochsError};
use ps::prelude::*;

use super::alone;
use super::net::{Directory, Net, OnStep, device, learner, loader, weights_of};

/// Of two workers in an epoch, together.
const STEPS_PER_EPOCH: usize = 10;

fn new_learner() -> Learner<Net> {
    learner(AdamConfig::new().init(), 40)
}

fn open(directory: &Directory, resume: bool) -> Result<SavedEpochs, SavedEpochsError> {
    SavedEpochs::open(directory.path(), &new_learner(), resume)
}

fn refused(directory: &Directory, resume: bool) -> String {
    let refused = open(directory, resume);
    refused.expect_err("it is refused").to_string()
}

/// Trains until the end of this epoch, with examples that burn's loader shuffles anew for each. The training is
/// interrupted before this step of both workers.
fn train(
    directory: &Directory,
    num_epochs: usize,
    resume: bool,
    interrupted_at: Option<usize>,
) -> LearningResult<Net> {
    let interrupter = Interrupter::new();
    let (interrupts, num_steps) = (interrupter.clone(), AtomicUsize::new(0));
    let on_step = OnStep(Arc::new(move |_| {
        if Some(num_steps.fetch_add(1, Ordering::Relaxed)) == interrupted_at {
            interrupts.stop(None);
        }
    }));
    let (learner, loads) = (new_learner(), loader(0..40, 4, Some(9), &on_step));
    let saved = SavedEpochs::open(directory.path(), &learner, resume).unwrap();
    let strategy = alone(&learner, &loads, 2, Consistency::Bsp);
    let training = directory.training(loads, num_epochs);
    let training = training
        .with_default_checkpointers()
        .with_interrupter(interrupter)
        .with_training_strategy(strategy);
    match saved.newest() {
        Some(epoch) => training.checkpoint(epoch).launch(learner),
        None => training.launch(learner),
    }
}

/// Trains to the end. Returns the weights.
fn weights_after(directory: &Directory, num_epochs: usize, resume: bool) -> Vec<f32> {
    let result = train(directory, num_epochs, resume, None);
    assert!(result.interrupted.is_none());
    weights_of(&result)
}

/// S-13: the weights, what the optimizer remembers, the place in the schedule, and the order of the examples.
#[test]
fn a_training_goes_on_from_burns_checkpoint_with_the_same_bits() {
    let expected = weights_after(&Directory::new(), 4, false);
    let directory = Directory::new();
    // There is nothing to go on from.
    let halfway = weights_after(&directory, 2, true);
    assert_ne!(halfway, expected);
    assert_eq!(weights_after(&directory, 4, true), expected);
    // There is nothing left to do.
    assert_eq!(weights_after(&directory, 4, true), expected);
}

#[test]
fn an_epoch_that_was_interrupted_is_taken_again_from_its_beginning() {
    let expected = weights_after(&Directory::new(), 4, false);
    let directory = Directory::new();
    let in_third = 2 * STEPS_PER_EPOCH + 3;
    let result = train(&directory, 4, false, Some(in_third));
    assert!(result.interrupted.is_some());
    drop(result);
    assert_eq!(open(&directory, true).unwrap().newest(), Some(2));
    assert_eq!(weights_after(&directory, 4, true), expected);
}

/// What burn has saved of an epoch.
fn file(directory: &Directory, part: &str, epoch: usize) -> PathBuf {
    let name = format!("{part}-{epoch}.bpk");
    directory.path().join("checkpoint").join(name)
}

/// Cuts a file within what says how long it is.
fn cut(path: &Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(16).unwrap();
}

/// S-13.
#[test]
fn an_epoch_that_cannot_be_used_is_left_out() {
    let expected = weights_after(&Directory::new(), 4, false);
    for part in ["model", "optim", "scheduler"] {
        for is_missing in [false, true] {
            let directory = Directory::new();
            weights_after(&directory, 3, false);
            let broken = file(&directory, part, 3);
            match is_missing {
                true => fs::remove_file(&broken).unwrap(),
                false => cut(&broken),
            }
            assert_eq!(
                open(&directory, true).unwrap().newest(),
                Some(2),
                "{part}, missing: {is_missing}"
            );
            // No part of it can get into the next checkpoint of this epoch. What may be intact is kept.
            for part in ["model", "optim", "scheduler"] {
                let file = file(&directory, part, 3);
                assert!(!file.exists(), "{part}");
                let unusable = file.with_extension("bpk.unusable");
                assert_eq!(unusable.exists(), !is_missing, "{part}");
            }
            assert_eq!(weights_after(&directory, 4, true), expected);
        }
    }
}

/// As if burn had been killed while it saved the first epoch. A launcher that always resumes must not be stuck.
#[test]
fn a_first_epoch_that_is_incomplete_is_no_checkpoint() {
    let directory = Directory::new();
    weights_after(&directory, 1, false);
    fs::remove_file(file(&directory, "scheduler", 1)).unwrap();
    let unfinished = file(&directory, "scheduler", 1).with_extension("bpk.41-0.tmp");
    fs::write(&unfinished, "burn").unwrap();
    assert_eq!(open(&directory, true).unwrap().newest(), None);
    assert!(!unfinished.exists());
    assert!(!file(&directory, "model", 1).exists());
}

#[test]
fn what_is_in_the_way_is_an_error_that_says_so() {
    let directory = Directory::new();
    weights_after(&directory, 2, false);

    let not_empty = refused(&directory, false);
    for text in [
        "already has checkpoints, up to epoch 2",
        "`--resume`",
        "another directory",
    ] {
        assert!(not_empty.contains(text), "{text}: {not_empty}");
    }

    let one = open(&directory, true).unwrap();
    let in_use = refused(&directory, true);
    assert!(in_use.contains("another process"), "{in_use}");
    drop(one);

    // With running statistics, which the checkpoints do not have.
    let other = Learner::new(Net::normalized(&device()), AdamConfig::new().init(), 0.01);
    let other = SavedEpochs::open(directory.path(), &other, true);
    let other = other.expect_err("it is another model").to_string();
    assert!(
        other.contains("does not have the weights of this model") && other.contains("norm"),
        "{other}"
    );
    assert_eq!(open(&directory, true).unwrap().newest(), Some(2));

    for epoch in [1, 2] {
        cut(&file(&directory, "optim", epoch));
    }
    let damaged = refused(&directory, true);
    for text in [
        "no checkpoint in",
        "optim-2.bpk cannot be read",
        "optim-1.bpk",
    ] {
        assert!(damaged.contains(text), "{text}: {damaged}");
    }
    assert!(file(&directory, "model", 2).exists());
}
