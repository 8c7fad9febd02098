//! The update log of a run is replaced by an input. A checkpoint follows it as far as it makes sense, and what comes of it
//! can be used.

use std::cell::RefCell;
use std::fs;

use ps_actors::checkpoint::{CheckpointConfig, Checkpoints, Start};
use ps_actors::rule::{Sgd, UpdateRule};
use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
use ps_actors::update_log::{LogConfig, LogSync};
use tempfile::TempDir;

use crate::checkpoint::{initial, update};
use crate::repair::repair;

const SEGMENT: &str = "updates-000001.log";

/// The salt of a segment's entries is its number.
const SALT: u64 = 1;

fn rule() -> Box<dyn UpdateRule> {
    Box::new(Sgd::with_momentum(0.9))
}

fn config(directory: &TempDir) -> CheckpointConfig {
    CheckpointConfig {
        every: 0,
        log: Some(LogConfig {
            sync: LogSync::Never,
            ..LogConfig::default()
        }),
        resume: true,
        ..CheckpointConfig::new(directory.path())
    }
}

/// Puts the bytes behind the first one in the place of the log, and lets a checkpoint follow it. If the first byte is odd,
/// the checksums are made right first.
///
/// # Panics
/// When such a file could do harm, or when the files cannot be written.
pub fn run(input: &[u8]) {
    thread_local! {
        static SAVED: RefCell<Option<TempDir>> = const { RefCell::new(None) };
    }
    let Some((how, bytes)) = input.split_first() else {
        return;
    };
    let bytes = match how % 2 {
        0 => bytes.to_vec(),
        _ => repair(bytes.to_vec(), SALT),
    };
    SAVED.with_borrow_mut(|saved| {
        let directory = saved.get_or_insert_with(|| logged(0));
        fs::write(directory.path().join(SEGMENT), bytes).expect("there is room for files");
        let opened = Checkpoints::open(config(directory), rule(), |_| Ok(()));
        let Ok((_, Some(found))) = opened else {
            return;
        };
        if let Ok(server) = ParameterServer::new(
            &found.checkpoint,
            Sgd::with_momentum(0.9),
            ServerConfig::default(),
        ) {
            let server = server.spawn().expect("there is a thread");
            // The record of gradients may refuse it.
            let update = ApplyGradients::mean([update(1 << 20)]);
            let _refused = server.ask(update).wait().expect("the server answers");
        }
    });
}

/// The directory of a run with a checkpoint of version 0 and a log of so many updates.
fn logged(num_updates: u64) -> TempDir {
    let directory = tempfile::tempdir().expect("there is room for files");
    let initial = initial();
    let opened = Checkpoints::open(config(&directory), rule(), |_| Ok(()));
    let (mut checkpoints, _) = opened.expect("the directory is empty");
    let server = ParameterServer::new(&initial, Sgd::with_momentum(0.9), ServerConfig::default());
    let server = server.expect("the settings work").spawn();
    let server = server.expect("there is a thread");
    let begun = checkpoints.start_log(&server, Start::from(&initial));
    begun.expect("the log can be written");
    for clock in 0..num_updates {
        let applied = server.ask(ApplyGradients::mean([update(clock)])).wait();
        applied.expect("it answers").expect("it is a gradient");
    }
    drop(checkpoints);
    directory
}

/// Returns logs that are whole, as inputs.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let log = |num_updates| {
        let directory = logged(num_updates);
        fs::read(directory.path().join(SEGMENT)).expect("it was written")
    };
    let logs = [log(0), log(1), log(5)];
    let of = |how: u8| logs.iter().map(move |log| [&[how], &log[..]].concat());
    of(0).chain(of(1)).collect()
}

/// A log that is whole is followed to its end, with its own checksums and with those that are made here.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_followed() {
        let directory = logged(5);
        let path = directory.path().join(SEGMENT);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(repair(bytes.clone(), SALT), bytes);
        let (_, found) = Checkpoints::open(config(&directory), rule(), |_| Ok(())).unwrap();
        assert_eq!(found.unwrap().checkpoint.version().0, 5);
    }
}
