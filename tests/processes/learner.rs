//! burn's own training loop as several real processes.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::chaos::happened;
use crate::results;
use crate::run::{Run, SOON, example, signal};

/// A directory with images, and with what the runs write.
struct Place(TempDir);

impl Place {
    /// Writes so many images for training and for testing, as MNIST does.
    fn new(num_train: u32, num_test: u32) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::create_dir(place.data()).unwrap();
        for (name, num) in [("train", num_train), ("t10k", num_test)] {
            let header = |numbers: &[u32]| {
                let bytes = numbers.iter().flat_map(|number| number.to_be_bytes());
                bytes.collect::<Vec<u8>>()
            };
            let mut images = header(&[2051, num, 28, 28]);
            let mut labels = header(&[2049, num]);
            for label in (0..num).map(|index| index * 7 % 10) {
                // A bright line, which is lower for each class.
                let line = 28 * (2 * label + 4)..28 * (2 * label + 6);
                images.extend((0..28 * 28).map(|pixel| {
                    let noise = (label * 31 + num + pixel * 17) % 97;
                    (noise + if line.contains(&pixel) { 150 } else { 0 }) as u8
                }));
                labels.push(label as u8);
            }
            let write = |kind: &str, bytes| {
                let file = place.data().join(format!("{name}-{kind}-ubyte"));
                fs::write(file, bytes).unwrap();
            };
            write("images-idx3", images);
            write("labels-idx1", labels);
        }
        place
    }

    fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    /// Where the run with this name writes.
    fn run(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Run {
        self.start_with_dropout("0", name, arguments)
    }

    fn start_with_dropout(&self, dropout: &str, name: &str, arguments: &[&str]) -> Run {
        let driver = Command::new(example("burn_learner"))
            .args(["--offline", "--batch-size", "2", "--dropout", dropout])
            .arg("--data-dir")
            .arg(self.data())
            .arg("--artifact-dir")
            .arg(self.run(name))
            .args(arguments)
            .env_remove("PS_MNIST_DIR")
            .env("NO_COLOR", "1")
            // The processes share the cores.
            .env("RAYON_NUM_THREADS", "1")
            .env("XDG_CACHE_HOME", self.0.path().join("cache"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        Run::follow(driver.unwrap())
    }

    /// What burn wrote about the loss on the test images, which depends on all weights.
    fn losses(&self, name: &str, num_epochs: usize) -> Vec<String> {
        self.losses_of(name, 1..=num_epochs)
    }

    fn losses_of(&self, name: &str, epochs: RangeInclusive<usize>) -> Vec<String> {
        let valid = self.run(name).join("valid");
        let files = epochs.map(|epoch| valid.join(format!("epoch-{epoch}/Loss.log")));
        files
            .map(|file| fs::read_to_string(file).unwrap())
            .collect()
    }
}

/// Waits until burn has begun to write about an epoch.
fn wait_for(directory: &Path) {
    let deadline = Instant::now() + SOON;
    while !directory.exists() {
        let missing = directory.display();
        assert!(Instant::now() < deadline, "{missing} is missing");
        // Without a pause, the looks at the disk would take a core from the run.
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn processes_train_burns_learner_as_one_does() {
    let place = Place::new(30, 10);
    let arguments = ["--num-workers", "3", "--epochs", "2"];
    let (status, alone) = place.start("one", &arguments).finish();
    assert!(status.success(), "{alone}");
    let arguments = [&arguments[..], &["--processes", "3"]].concat();
    let (status, output) = place.start("three", &arguments).finish();
    assert!(status.success(), "{output}");
    assert!(results(&alone).len() == 1, "{alone}");
    assert_eq!(results(&output), results(&alone));
    assert_eq!(place.losses("three", 2), place.losses("one", 2));
}

#[test]
fn a_worker_of_burns_learner_that_is_killed_changes_nothing() {
    let place = Place::new(42, 10);
    let arguments = ["--num-workers", "3", "--epochs", "5"];
    let (status, expected) = place.start("one", &arguments).finish();
    assert!(status.success(), "{expected}");

    let arguments = [&arguments[..], &["--processes", "3"]].concat();
    let mut run = place.start("three", &arguments);
    let node = run.wait_for_node("node=node 2");
    wait_for(&place.run("three/train/epoch-2"));
    signal("KILL", node);
    // How many epochs are over when it is back depends on the machine.
    run.wait_for(&["a node is lost"]);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert_eq!(results(&output), results(&expected));
    assert_eq!(place.losses("three", 5), place.losses("one", 5));
}

/// S-13. The examples are shuffled anew for each epoch, and dropout draws random numbers for each step. Each process has
/// one worker.
#[test]
fn a_training_of_burns_learner_whose_driver_is_killed_goes_on_with_the_same_weights() {
    const NUM_EPOCHS: usize = 8;
    let place = Place::new(24, 4);
    let arguments = ["--epochs", "8", "--processes", "3"];
    let start = |name, more: &[&str]| {
        place.start_with_dropout("0.5", name, &[&arguments[..], more].concat())
    };
    let (status, expected) = start("whole", &[]).finish();
    assert!(status.success(), "{expected}");
    assert!(results(&expected).len() == 1, "{expected}");

    // An epoch has 4 steps. So the driver waits in the fifth one until it is killed, also if this thread gets no core.
    let mut run = start("killed", &["--chaos", "stop worker 0 for 60s @ step 17"]);
    // The second epoch has been saved, and later ones perhaps.
    wait_for(&place.run("killed").join("train/epoch-4"));
    run.driver.kill().unwrap();
    let (status, output) = run.finish();
    assert!(!status.success(), "{output}");

    // Not by mistake into another run's directory.
    let (status, output) = start("killed", &[]).finish();
    assert_eq!(status.code(), Some(1), "{output}");
    assert!(
        output.contains("already has checkpoints, up to epoch"),
        "{output}"
    );

    let (status, output) = start("killed", &["--resume"]).finish();
    assert!(status.success(), "{output}");
    let saved = output.lines().find_map(|line| {
        let line = line.strip_prefix("Going on after epoch ")?;
        line.strip_suffix('.')?.parse::<usize>().ok()
    });
    let saved = saved.unwrap_or_else(|| panic!("it began again: {output}"));
    assert!((2..NUM_EPOCHS).contains(&saved), "{saved}: {output}");
    assert_eq!(results(&output), results(&expected), "{output}");
    let since = saved + 1..=NUM_EPOCHS;
    assert_eq!(
        place.losses_of("killed", since.clone()),
        place.losses_of("whole", since),
        "{output}"
    );
}

/// Over many epochs. Their steps are counted on from one to the next.
#[test]
fn burns_learner_follows_a_plan() {
    let place = Place::new(20, 4);
    // Worker 1 begins each epoch on a node, also if one of the two nodes is not back yet. Worker 2 does not.
    let plan = "kill worker 1 @ step 10; stop worker 0 for 200ms @ step 20; kill worker 1 @ step 30; drop 5%; dup 5%; \
                delay 0..1ms; seed 1";
    let arguments = ["--epochs", "20", "--processes", "3", "--chaos", plan];
    let (status, output) = place
        .start("run", &[&arguments[..], &["--chaos-control"]].concat())
        .finish();
    assert!(status.success(), "{output}");
    // Shares of 6, 7 and 7 images, so in an epoch one worker takes 3 steps and the others 4.
    for text in [
        "gradients: 220 applied, lost: 0, doubled: 0",
        "the weights have the bits of the run without faults",
    ] {
        assert!(output.contains(text), "{text}: {output}");
    }
    assert_eq!(happened(&output, "kill worker"), ["2", "2"], "{output}");
    assert_eq!(happened(&output, "stop worker"), ["1", "1"], "{output}");
    for kind in ["drop", "dup", "delay"] {
        let [planned, num] = happened(&output, kind);
        let num: u64 = num.parse().unwrap();
        assert!(planned == "-" && num > 0, "{kind}: {output}");
    }
}

#[test]
fn a_plan_that_would_end_the_driver_of_burns_learner_is_refused() {
    let place = Place::new(44, 10);
    for (plan, says) in [
        (
            "kill worker 0 @ step 3",
            "this worker is in the driver's process",
        ),
        (
            "kill server 0 @ version 3",
            "its only server is in the driver's process",
        ),
        ("damage checkpoint @ version 3", "no checksums"),
        ("kill worker 3 @ step 3", "there is no worker 3"),
    ] {
        let arguments = ["--processes", "3", "--chaos", plan];
        let (status, output) = place.start("run", &arguments).finish();
        assert_eq!(status.code(), Some(1), "{plan}: {output}");
        assert!(output.contains(says), "{plan}: {output}");
        assert!(!output.contains("joined"), "{plan}: {output}");
    }
}

///
#[test]
fn a_signal_interrupts_burns_learner_on_all_processes() {
    let place = Place::new(60, 10);
    for (how, code) in [("TERM", 143), ("INT", 130)] {
        let run = place.start(how, &["--epochs", "100000", "--processes", "3"]);
        wait_for(&place.run(how).join("train/epoch-2"));
        signal(how, run.driver.id());
        // It also waits for the other processes, which write to the same output.
        let (status, output) = run.finish();
        assert_eq!(status.code(), Some(code), "{output}");
        let interrupted = format!("Interrupted: SIG{how}.");
        assert!(output.contains(&interrupted), "{output}");
        let hint = output
            .lines()
            .find_map(|line| line.strip_prefix("To go on: "));
        assert!(
            hint.is_some_and(|hint| hint.ends_with("--resume")),
            "{output}"
        );
    }
}

///
#[test]
fn a_signal_interrupts_the_validation_of_burns_learner() {
    let place = Place::new(4, 4_000);
    let run = place.start("run", &["--epochs", "2"]);
    wait_for(&place.run("run/valid/epoch-1"));
    signal("TERM", run.driver.id());
    let (status, output) = run.finish();
    assert_eq!(status.code(), Some(143), "{output}");
    assert!(output.contains("Interrupted: SIGTERM."), "{output}");
    // burn prints how far it is.
    assert!(output.contains("items_total: 4000"), "{output}");
    assert!(!output.contains("items_processed: 4000"), "{output}");
}
