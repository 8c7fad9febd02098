//! Processes that are killed at every point that matters: between any two actions of a worker and a server, while
//! a checkpoint or the log is written, and while a run goes on from them (PS-2, S-13, S-15, S-16).
//!
//! The program `tests/programs/count_steps.rs` says at its end how often each example was applied, and which bits
//! the weights have. `PS_KILL_MATRIX=1` runs every case in each mode; without it, each case runs in one.

use std::path::Path;
use std::sync::OnceLock;

use crate::run::Run;

/// Where the servers are, and what is saved.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Servers {
    /// Both in the driver, with an update log.
    InDriver,
    /// The first one in the driver, with an update log. The two others on nodes.
    OnNodes,
    /// All three on nodes, with checkpoints only.
    OnNodesWithoutLog,
}
use Servers::{InDriver, OnNodes, OnNodesWithoutLog};

/// The deaths of one run, for each time that it is started: `RANK POINT NTH`, separated by `;`.
struct Case {
    servers: Servers,
    deaths: &'static [&'static str],
}

const fn case(servers: Servers, deaths: &'static [&'static str]) -> Case {
    Case { servers, deaths }
}

const CASES: &[Case] = &[
    // A worker.
    case(InDriver, &["2 worker-computes 20"]),
    case(OnNodes, &["2 worker-staged 20"]),
    case(OnNodes, &["2 worker-sent 20"]),
    case(InDriver, &["2 worker-sent 20"]),
    case(OnNodes, &["2 worker-told 20"]),
    case(InDriver, &["2 worker-told 1"]),
    // All workers, at the same step.
    case(InDriver, &["* worker-sent 33"]),
    // The first server, and so the driver.
    case(InDriver, &["0 first-decided 30"]),
    case(OnNodes, &["0 first-applies 30"]),
    case(InDriver, &["0 first-applied 30"]),
    case(OnNodes, &["0 first-applied 30"]),
    case(InDriver, &["0 other-applies 30"]),
    case(InDriver, &["0 log-cut 40"]),
    case(OnNodes, &["0 log-cut 41"]),
    case(InDriver, &["0 checkpoint-written 1"]),
    case(InDriver, &["0 checkpoint-written 3"]),
    case(OnNodes, &["0 checkpoint-named 2"]),
    // Another server.
    case(OnNodes, &["2 other-applies 30"]),
    case(OnNodes, &["2 other-applied 30"]),
    // The first server, on a node. When it was started again on the other node, it dies there too.
    case(OnNodesWithoutLog, &["* first-applies 30"]),
    case(OnNodesWithoutLog, &["* first-applied 30"]),
    case(OnNodesWithoutLog, &["1 other-applied 60"]),
    // While the run goes on from a checkpoint and the log.
    case(InDriver, &["0 first-applied 30", "0 log-followed 1"]),
    case(InDriver, &["0 log-cut 50", "0 log-continues 1"]),
    case(OnNodes, &["0 first-applied 30", "0 first-restored 1"]),
    case(OnNodes, &["0 first-applied 30", "1 other-restored 1"]),
    case(OnNodes, &["2 other-applied 30;1 other-restored 1"]),
    case(OnNodes, &["2 other-applied 30;0 log-followed 1"]),
    case(
        OnNodesWithoutLog,
        &["2 other-applied 60;1 other-restored 1"],
    ),
];

const EPOCHS: u64 = 3;

#[test]
fn no_step_is_lost_or_doubled_wherever_a_process_is_killed() {
    const MODES: [&str; 3] = ["bsp", "asp", "ssp:2"];
    // Every second case (S-24).
    const OVERLAPPING: [&str; 3] = ["bsp", "asp --overlap", "ssp:2 --overlap"];
    let is_whole = std::env::var_os("PS_KILL_MATRIX").is_some();
    for (index, case) in CASES.iter().enumerate() {
        let all = if index % 2 == 0 { &MODES } else { &OVERLAPPING };
        // In `ssp`, each kind of death is enough.
        let modes = match is_whole {
            true if index % 3 == 0 => &all[..],
            true => &all[..2],
            false => &all[index % all.len()..][..1],
        };
        for mode in modes {
            check(case, mode);
        }
    }
}

fn check(case: &Case, mode: &str) {
    let Case { servers, deaths } = case;
    let name = format!("{servers:?} {deaths:?} {mode}");
    let directory = tempfile::tempdir().unwrap();
    let arguments = arguments(*servers, mode, directory.path());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut log = String::new();
    for (start, deaths) in deaths.iter().enumerate() {
        let mut arguments = arguments.clone();
        if start > 0 {
            arguments.push("--resume");
        }
        for death in deaths.split(';') {
            arguments.extend(["--die", death]);
        }
        let (status, output) = Run::start_plain("count_steps", &arguments).finish();
        log += &output;
        for death in deaths.split(';') {
            let point = death.split(' ').nth(1).unwrap();
            assert!(
                output.contains(&format!("dies at {point}")),
                "{name}: {log}"
            );
        }
        let has_driver = |death: &str| death.starts_with("0 ");
        if !deaths.split(';').any(has_driver) {
            // It has come to its end by itself.
            assert!(status.success(), "{name}: {log}");
            return check_end(&name, mode, &output, &log);
        }
        assert!(!status.success(), "{name}: {log}");
    }
    let again = [&arguments[..], &["--resume"]].concat();
    let (status, output) = Run::start_plain("count_steps", &again).finish();
    log += &output;
    assert!(status.success(), "{name}: {log}");
    check_end(&name, mode, &output, &log);
}

fn arguments(servers: Servers, mode: &str, directory: &Path) -> Vec<String> {
    let (where_they_are, saved) = match servers {
        InDriver => (&["--num-servers", "2"][..], &["--update-log"][..]),
        OnNodes => (
            &["--num-servers", "3", "--servers-on-nodes"][..],
            &["--update-log"][..],
        ),
        OnNodesWithoutLog => (&["--num-servers", "3", "--servers-on-nodes"][..], &[][..]),
    };
    let fixed = ["--processes", "3", "--consistency"].into_iter();
    let fixed: Vec<_> = fixed.chain(mode.split(' ')).collect();
    let epochs = EPOCHS.to_string();
    let saving = ["--checkpoint-dir", directory.to_str().unwrap()];
    let every = ["--checkpoint-every", "25", "--epochs", &epochs];
    let all = [&fixed[..], where_they_are, &saving, &every, saved].concat();
    all.into_iter().map(str::to_owned).collect()
}

/// Every step was applied once. In `bsp`, the run has the bits of one that nothing happened to.
fn check_end(name: &str, mode: &str, output: &str, log: &str) {
    let exactly = format!("Each example was applied {EPOCHS} to {EPOCHS} times.");
    assert!(output.contains(&exactly), "{name}: {log}");
    if mode == "bsp" {
        assert_eq!(bits(output), undisturbed(), "{name}: {log}");
    }
}

/// S-13: a training that was asked to end in order, and goes on, has the bits too. Its last round has a gradient of
/// each worker.
#[test]
fn a_run_that_is_interrupted_again_and_again_ends_with_the_right_bits() {
    // More than are made until the last signal.
    let epochs = 16 * EPOCHS;
    let epochs = epochs.to_string();
    let training = ["--num-workers", "6", "--epochs", &epochs];
    let (status, output) = Run::start_plain("count_steps", &training).finish();
    assert!(status.success(), "{output}");
    let undisturbed = bits(&output).to_owned();
    for processes in ["1", "3"] {
        let directory = tempfile::tempdir().unwrap();
        let saving = ["--checkpoint-dir", directory.path().to_str().unwrap()];
        let saving = [&saving[..], &["--checkpoint-every", "20", "--resume"]].concat();
        let processes = match processes {
            "1" => &[][..],
            _ => &["--processes", "3"],
        };
        let arguments = [&training[..], &saving, processes].concat();
        let (mut log, mut num_interrupted) = (String::new(), 0);
        for _ in 0..4 {
            let mut run = Run::start_plain("count_steps", &arguments);
            run.wait_for(&["saved a checkpoint"]);
            crate::run::signal("TERM", run.driver.id());
            let (status, output) = run.finish();
            assert_eq!(status.code(), Some(0), "{output}");
            num_interrupted += u32::from(output.contains("Interrupted by"));
            log += &output;
        }
        assert!(num_interrupted > 0, "{log}");
        let (status, output) = Run::start_plain("count_steps", &arguments).finish();
        log += &output;
        assert!(status.success(), "{log}");
        assert_eq!(bits(&output), undisturbed, "{log}");
    }
}

fn bits(output: &str) -> &str {
    let line = output.lines().find(|line| line.contains("have the bits"));
    line.unwrap_or_else(|| panic!("no bits: {output}"))
}

fn undisturbed() -> &'static str {
    static BITS: OnceLock<String> = OnceLock::new();
    BITS.get_or_init(|| {
        let epochs = EPOCHS.to_string();
        let (status, output) = Run::start_plain("count_steps", &["--epochs", &epochs]).finish();
        assert!(status.success(), "{output}");
        bits(&output).to_owned()
    })
}
