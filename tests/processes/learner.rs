//! burn's own training loop as several real processes.

use std::path::Path;
use std::time::Instant;

use crate::results;
use crate::run::{Run, SOON, signal};

fn start(directory: &Path, arguments: &[&str]) -> Run {
    let directory = directory.to_str().unwrap();
    let own = ["--artifact-dir", directory, "--dropout", "0"];
    Run::start("burn_learner", &[&own, arguments].concat())
}

/// Waits until burn has begun to write about this epoch.
fn wait_for_epoch(directory: &Path, epoch: usize) {
    let deadline = Instant::now() + SOON;
    let file = directory.join(format!("train/epoch-{epoch}"));
    while !file.exists() {
        assert!(Instant::now() < deadline, "{} is missing", file.display());
        // Between two looks at the disk.
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn processes_train_burns_learner_as_one_does() {
    let arguments = ["--num-workers", "3", "--epochs", "2"];
    let [one, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (status, alone) = start(one.path(), &arguments).finish();
    assert!(status.success(), "{alone}");
    let arguments = [&arguments[..], &["--processes", "3"]].concat();
    let (status, output) = start(other.path(), &arguments).finish();
    assert!(status.success(), "{output}");
    assert!(results(&alone).len() == 1, "{alone}");
    assert_eq!(results(&output), results(&alone));
}

#[test]
fn a_worker_of_burns_learner_that_is_killed_changes_nothing() {
    let arguments = ["--epochs", "6", "--processes", "3"];
    let [one, other] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (status, expected) = start(one.path(), &arguments).finish();
    assert!(status.success(), "{expected}");

    let mut run = start(other.path(), &arguments);
    let node = run.wait_for_node("node=node 2");
    wait_for_epoch(other.path(), 2);
    signal("KILL", node);
    run.wait_for_node("node=node 2 (incarnation 2)");
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert_eq!(results(&output), results(&expected));
}

#[test]
fn a_signal_interrupts_burns_learner_on_all_processes() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--epochs", "1000", "--processes", "3"];
    let run = start(directory.path(), &arguments);
    wait_for_epoch(directory.path(), 2);
    signal("TERM", run.driver.id());
    // It also waits for the other processes, which write to the same output.
    let (status, output) = run.finish();
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(output.contains("Interrupted: SIGTERM."), "{output}");
}
