//! What is seen of a training over several processes: its directory, its progress on a terminal.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use ps::actors::ids::WorkerId;
use ps::observe::Event;
use ps::runs::RunRecord;

use crate::run::{Run, SOON, example, signal};

/// Checks that each clock of each worker is there once: as a step, or as one that only the servers know of.
fn check_steps(record: &RunRecord, num_workers: u32, num_steps: u64) {
    let mut clocks: BTreeMap<WorkerId, Vec<u64>> = BTreeMap::new();
    for event in record.events() {
        match event {
            Event::Step(step) => clocks.entry(step.worker).or_default().push(step.clock.0),
            Event::StepsMissed(missed) => {
                let those = missed.first.0..missed.first.0 + missed.num_steps;
                clocks.entry(missed.worker).or_default().extend(those);
            }
            _ => {}
        }
    }
    let all: Vec<u64> = (0..num_steps).collect();
    for worker in 0..num_workers {
        assert_eq!(clocks[&WorkerId(worker)], all, "worker {worker}");
    }
}

/// Checks that the events, read again, say of each worker what the final report says.
fn check_report(record: &RunRecord) {
    let (tally, end) = (record.tally(), record.report.as_ref().unwrap());
    assert_eq!(tally.workers.len(), end.workers.len());
    for told in &end.workers {
        let read = &tally.workers[&told.worker];
        assert_eq!(
            (
                read.num_applied,
                read.num_late,
                read.num_refused,
                read.num_missed
            ),
            (
                told.num_applied,
                told.num_late,
                told.num_refused,
                told.num_missed
            ),
            "{}",
            told.worker
        );
        assert_eq!(
            (read.num_examples, read.num_losses, read.staleness.max()),
            (told.num_examples, told.num_losses, told.max_staleness),
            "{}",
            told.worker
        );
        // Text does not keep the last digit of a number.
        let seconds = (read.times.total(), told.times.total());
        assert!(
            seconds.1 > 0.0 && (seconds.0 - seconds.1).abs() < 1e-9,
            "{seconds:?}"
        );
    }
}

fn check_pictures(directory: &Path, names: &[&str]) {
    for name in names {
        let svg = std::fs::read_to_string(directory.join(format!("{name}.svg"))).unwrap();
        assert!(svg.starts_with("<svg") && svg.contains("</svg>"), "{name}");
        let png = std::fs::read(directory.join(format!("{name}.png"))).unwrap();
        assert!(png.starts_with(b"\x89PNG") && png.len() > 5_000, "{name}");
    }
}

fn compare(arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(example("compare_runs"))
        .args(arguments)
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[test]
fn the_directory_of_a_run_tells_of_every_step_although_a_worker_is_killed() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path().join("one");
    let name = directory.to_str().unwrap();
    let arguments = [
        "--iterations",
        "2000",
        "--processes",
        "3",
        "--run-dir",
        name,
    ];
    let mut run = Run::start("sharded_ps", &arguments);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Iter ", "accuracy is"]);
    signal("KILL", node);
    run.wait_for_node("node=node 2 (incarnation 2)");
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    // The closing table.
    assert!(
        output.contains("data  compute  wire  waiting  apply"),
        "{output}"
    );

    let record = RunRecord::read(&directory).unwrap();
    assert_eq!(record.kept_every(), 1);
    check_steps(&record, 2, 2000);
    let has = |what: fn(&Event) -> bool| record.events().any(what);
    assert!(has(
        |event| matches!(event, Event::NodeLost(lost) if lost.node.rank == 2)
    ));
    assert!(has(
        |event| matches!(event, Event::NodeJoined(joined) if joined.node.incarnation == 2)
    ));
    assert!(has(
        |event| matches!(event, Event::ServersSeen(seen) if seen.servers.len() == 2)
    ));
    let end = record.report.as_ref().unwrap();
    assert_eq!(end.error, None);
    let report = end.report.as_ref().unwrap();
    assert_eq!(report.num_applied, 4000);
    let steps: u64 = end
        .workers
        .iter()
        .map(|worker| worker.num_applied + worker.num_missed)
        .sum();
    assert_eq!(steps, 4000);
    check_report(&record);
    check_pictures(&directory, &["curves", "timeline"]);

    let (code, table) = compare(&[name, name, "--out", temporary.path().to_str().unwrap()]);
    assert_eq!(code, Some(0), "{table}");
    assert!(table.contains("one") && table.contains("2000"), "{table}");
    check_pictures(temporary.path(), &["compare"]);

    let (code, error) = compare(&[temporary.path().to_str().unwrap()]);
    assert_eq!(code, Some(1), "{error}");
    assert!(error.contains("is not the directory of a run"), "{error}");
}

#[test]
fn a_killed_driver_leaves_events_that_can_be_read_and_goes_on_in_its_directory() {
    let temporary = tempfile::tempdir().unwrap();
    let (directory, saved) = (temporary.path().join("run"), temporary.path().join("saved"));
    let arguments = [
        "--iterations",
        "3000",
        "--checkpoint-every",
        "50",
        "--checkpoint-dir",
        saved.to_str().unwrap(),
        "--resume",
        "--run-dir",
        directory.to_str().unwrap(),
    ];
    let mut run = Run::start("sharded_ps", &arguments);
    run.wait_for(&["saved a checkpoint"]);
    run.wait_for(&["saved a checkpoint"]);
    signal("KILL", run.driver.id());
    drop(run);
    let record = RunRecord::read(&directory).unwrap();
    assert!(record.report.is_none());
    let (code, table) = compare(&[directory.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{table}");
    assert!(table.contains("(has not ended)"), "{table}");

    let mut run = Run::start("sharded_ps", &arguments);
    run.wait_for(&["Iter ", "accuracy is"]);
    signal("TERM", run.driver.id());
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    let record = RunRecord::read(&directory).unwrap();
    let starts = record.events().filter_map(|event| match event {
        Event::RunStarted(started) => Some(started.first_version.0),
        _ => None,
    });
    let starts: Vec<u64> = starts.collect();
    assert!(
        matches!(starts[..], [0, later] if later >= 50),
        "{starts:?}"
    );
    assert!(record.report.unwrap().report.unwrap().interrupted.is_some());
    assert!(!temporary.path().join("run-2").exists());
}

#[test]
fn a_directory_with_a_run_is_left_as_it_is() {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path().join("run");
    let arguments = [
        "--iterations",
        "3",
        "--run-dir",
        directory.to_str().unwrap(),
    ];
    for _ in 0..2 {
        let (status, output) = Run::start("sync_ps", &arguments).finish();
        assert!(status.success(), "{output}");
    }
    for name in ["run", "run-2"] {
        let record = RunRecord::read(temporary.path().join(name)).unwrap();
        check_steps(&record, 2, 3);
        assert!(record.report.is_some());
    }
}

#[test]
fn a_directory_that_cannot_be_written_ends_no_training() {
    let temporary = tempfile::tempdir().unwrap();
    let file = temporary.path().join("file");
    std::fs::write(&file, "not a directory").unwrap();
    let inside = file.join("run");
    let arguments = ["--iterations", "3", "--run-dir", inside.to_str().unwrap()];
    let (status, output) = Run::start("sync_ps", &arguments).finish();
    assert!(status.success(), "{output}");
    assert!(
        output.contains("nothing is written about this run"),
        "{output}"
    );
    assert!(output.contains("Final accuracy is"), "{output}");
}

/// On a pseudo-terminal, which `script` makes.
#[test]
fn the_bar_of_a_terminal_garbles_no_line() {
    let temporary = tempfile::tempdir().unwrap();
    let typescript = temporary.path().join("typescript");
    let program = example("sharded_ps");
    let command = format!(
        "{} --offline --batch-size 16 --iterations 400 --checkpoint-every 100 --checkpoint-dir {}",
        program.display(),
        temporary.path().join("saved").display()
    );
    let started = Command::new("script")
        .args(["-qefc", &command])
        .arg(&typescript)
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = started else {
        println!("skipped: there is no `script` (Debian: bsdutils)");
        return;
    };
    let deadline = std::time::Instant::now() + SOON;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(std::time::Instant::now() < deadline, "it does not end");
        // Without a pause this would take a core from the run.
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let text = std::fs::read_to_string(&typescript).unwrap();
    assert!(status.success(), "{text}");
    assert!(text.contains(" left, loss "), "no bar: {text}");
    // What a terminal shows of each line: the text after the last time that it was erased.
    let shown = text.lines().map(|line| {
        let line = line.trim_end_matches('\r');
        let after = line.rsplit("\x1b[2K").next().unwrap_or_default();
        let after = after.rsplit('\r').next().unwrap_or_default();
        // Log lines erase the rest of the line in another way.
        after.trim_start_matches("\x1b[K").to_owned()
    });
    let shown: Vec<String> = shown.collect();
    let lines = |word: &'static str| shown.iter().filter(move |line| line.contains(word));
    for line in lines("accuracy is") {
        let is_whole = line.starts_with("Iter ") || line.starts_with("Final accuracy is");
        assert!(is_whole && !line.contains("gradients/s"), "{line:?}");
    }
    // Evaluations and checkpoints are made beside the training, as many as there is time for.
    assert!(lines("accuracy is").count() > 1, "{shown:#?}");
    for line in lines("saved a checkpoint") {
        assert!(
            line.starts_with("driver 0: ") && !line.contains("gradients/s,"),
            "{line:?}"
        );
    }
    assert!(lines("saved a checkpoint").count() >= 1, "{shown:#?}");
    // Nothing of the bar stays.
    assert!(lines(" left, ").count() == 0, "{shown:#?}");
}

#[test]
fn quiet_is_quiet() {
    let (status, output) = Run::start("sync_ps", &["--iterations", "3", "--quiet"]).finish();
    assert!(status.success(), "{output}");
    assert!(!output.contains("gradients/s"), "{output}");
}
