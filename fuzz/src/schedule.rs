//! A schedule, as `--record` writes it, is replaced by an input. It is read or refused.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;

use ps_actors::ids::Version;
use ps_actors::rule::Sgd;
use ps_actors::schedule::{Record, Schedule, ScheduleWriter};
use ps_actors::server::{ApplyGradients, ParameterServer, ServerConfig};
use tempfile::TempDir;

use crate::checkpoint::{initial, update};
use crate::repair::repair;

/// All frames of a schedule have this one.
const SALT: u64 = 0;

fn facts() -> BTreeMap<String, String> {
    BTreeMap::from([("seed".to_owned(), "7".to_owned())])
}

/// Reads the bytes behind the first one as a schedule, and continues it. If the first byte is odd, the checksums are made
/// right first.
///
/// # Panics
/// When such a file could do harm, or when the file cannot be written.
pub fn run(input: &[u8]) {
    thread_local! {
        static DIRECTORY: RefCell<Option<TempDir>> = const { RefCell::new(None) };
    }
    let Some((how, bytes)) = input.split_first() else {
        return;
    };
    let bytes = match how % 2 {
        0 => bytes.to_vec(),
        _ => repair(bytes.to_vec(), SALT),
    };
    DIRECTORY.with_borrow_mut(|directory| {
        let make = || tempfile::tempdir().expect("there is room for files");
        let path = directory.get_or_insert_with(make).path().join("schedule");
        fs::write(&path, bytes).expect("there is room for files");
        let Ok(schedule) = Schedule::read(&path) else {
            return;
        };
        let middle = schedule.updates.get(schedule.updates.len() / 2);
        let from = middle.map_or(Version(0), |update| update.version);
        if ScheduleWriter::resume(&path, &facts(), from).is_ok() {
            let kept = Schedule::read(&path).expect("it was read before");
            assert_eq!(
                kept.updates.last().map_or(Version(0), |last| last.version),
                from
            );
        }
    });
}

/// Returns schedules that are whole, as inputs.
///
/// # Panics
/// When they cannot be written.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let recorded = |num_updates| {
        let directory = tempfile::tempdir().expect("there is room for files");
        let path = directory.path().join("schedule");
        let server = ParameterServer::new(&initial(), Sgd::new(), ServerConfig::default());
        let server = server.expect("the settings work").spawn();
        let server = server.expect("there is a thread");
        let writer = ScheduleWriter::create(&path, &facts()).expect("it is new");
        server.ask(Record(writer)).wait().expect("it answers");
        for clock in 0..num_updates {
            let applied = server.ask(ApplyGradients::mean([update(clock)])).wait();
            applied.expect("it answers").expect("it is a gradient");
        }
        fs::read(&path).expect("it was written")
    };
    let schedules = [recorded(0), recorded(5)];
    let of = |how: u8| schedules.iter().map(move |one| [&[how], &one[..]].concat());
    of(0).chain(of(1)).collect()
}
