//! Long runs under faults: what the processes that live through them hold does not grow.
//!
//! `PS_SOAK_ROUNDS` sets how many rounds are measured, after the warm-up.

#![cfg(target_os = "linux")]

use std::fs;
use std::time::Instant;

use crate::run::{Run, SOON};

/// Rounds until everything that is made once has been made: buffers, layouts, connections, ledgers of workers, the
/// files of the log and the checkpoints, and what the first restarts need.
const WARM_UP: u64 = 400;

fn num_rounds() -> u64 {
    let text = std::env::var("PS_SOAK_ROUNDS");
    let rounds = text.map_or(Ok(300), |text| text.parse());
    rounds.expect("PS_SOAK_ROUNDS is a number of rounds")
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
struct Held {
    resident_kib: u64,
    num_threads: u64,
    num_files: u64,
}

impl Held {
    fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let number = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let word = line.and_then(|line| line.split_whitespace().next());
            word.and_then(|word| word.parse().ok()).unwrap()
        };
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        Self {
            resident_kib: number("VmRSS:"),
            num_threads: number("Threads:"),
            num_files: files.count() as u64,
        }
    }

    /// Returns what is left to complain about, compared with what was held before.
    fn grown(self, before: Self, num_rounds: u64) -> Option<String> {
        // The driver keeps the losses, the evaluations and what was in each update: measured, 0.4 MiB in 300 rounds
        // and 1.6 MiB in 2,000; nodes grow by a tenth of it. The allowance is three times as much, because pages of
        // the allocator come in steps. A gradient has 8 KiB and each round has two, so a leak of one in every second
        // round is found, also in a short run.
        let allowed_kib = (1 << 10) + 3 * num_rounds;
        let memory = self.resident_kib.saturating_sub(before.resident_kib);
        // A checkpoint that is being written has a thread and a file. A connection that was cut is closed by its
        // other end a little later, and each of the workers, of the driver and of the servers has one to each server.
        let is_good = memory <= allowed_kib
            && self.num_threads <= before.num_threads + 1
            && self.num_files <= before.num_files + 9;
        (!is_good).then(|| format!("{before:?}, then {self:?}"))
    }
}

/// Waits until the servers have made this update.
fn wait_for_round(run: &mut Run, round: u64) {
    let began = Instant::now();
    loop {
        let line = run.wait_for(&["Iter ", "accuracy is"]);
        let number = line
            .strip_prefix("Iter ")
            .and_then(|rest| rest.split(':').next());
        if number.and_then(|number| number.parse().ok()) >= Some(round) {
            return;
        }
        // Each line has its deadline; all of them together have one that grows with the work.
        assert!(began.elapsed() < SOON * 60, "round {round} does not come");
    }
}

fn check(plan: &str, num_processes: &str, more: &[&str], survivors: impl Fn(&mut Run) -> Vec<u32>) {
    let num_rounds = num_rounds();
    // The last ones are for what comes and goes.
    let iterations = (WARM_UP + num_rounds + 600).to_string();
    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().to_str().unwrap();
    let arguments = [
        "--processes",
        num_processes,
        "--iterations",
        &iterations,
        "--chaos",
        plan,
    ];
    let saving = [
        "--checkpoint-dir",
        dir,
        "--checkpoint-every",
        "50",
        "--update-log",
    ];
    let mut run = Run::start("sharded_ps", &[&arguments[..], &saving, more].concat());
    let survivors = survivors(&mut run);
    wait_for_round(&mut run, WARM_UP);
    let before: Vec<_> = survivors.iter().map(|&pid| Held::of(pid)).collect();
    wait_for_round(&mut run, WARM_UP + num_rounds);
    // What comes and goes may just be there.
    let deadline = Instant::now() + SOON / 12;
    let mut grown: Vec<String>;
    loop {
        let after = survivors.iter().zip(&before);
        grown = after
            .filter_map(|(&pid, before)| Held::of(pid).grown(*before, num_rounds))
            .collect();
        if grown.is_empty() || Instant::now() > deadline {
            break;
        }
        // If the run ends before it is good, this is all that shows.
        println!("not yet: {grown:?}");
        run.wait_for(&["Iter ", "accuracy is"]);
    }
    for (&pid, before) in survivors.iter().zip(&before) {
        println!("{before:?}, after {num_rounds} rounds {:?}", Held::of(pid));
    }
    assert!(grown.is_empty(), "{grown:?}");
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("lost: 0, doubled: 0"), "{output}");
}

/// Connections are cut, calls are doubled, processes stop for a while. All live.
#[test]
fn processes_hold_no_more_after_many_disturbances() {
    let stops = (0..(WARM_UP + num_rounds()) / 100).map(|i| {
        let (worker, step) = (i % 2, 100 * i + 50);
        format!("stop worker {worker} for 200ms @ step {step}; ")
    });
    let plan = stops.collect::<String>() + "drop 1%; dup 1%; seed 1";
    let more = ["--num-servers", "3", "--servers-on-nodes"];
    check(&plan, "3", &more, |run| {
        let nodes = [(); 2].map(|()| run.wait_for_node("node=node"));
        vec![run.driver.id(), nodes[0], nodes[1]]
    });
}

/// Nodes with workers and servers are killed. The driver lives.
#[test]
fn a_driver_holds_no_more_after_many_kills() {
    // A process is started again at most ten times within ten minutes.
    let each = ((WARM_UP + num_rounds()) / 8).max(100);
    let kills = (0..(WARM_UP + num_rounds()) / each).map(|i| match i % 2 {
        0 => format!("kill worker 1 @ step {}; ", each * i + 50),
        _ => format!("kill server 2 @ version {}; ", each * i + 50),
    });
    let plan = kills.collect::<String>() + "seed 1";
    let more = ["--num-servers", "3", "--servers-on-nodes"];
    // If all nodes were down at once, the driver would have to take their actors, and would hold them from then on. A
    // process that is killed again and again comes back after a pause, so there are more nodes than can be down.
    check(&plan, "5", &more, |run| vec![run.driver.id()]);
}
