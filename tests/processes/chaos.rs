//! Plans of faults (`--chaos`) in real processes.

use crate::run::Run;

fn words<'a>(arguments: &[&'a str], directory: &'a tempfile::TempDir) -> Vec<&'a str> {
    let directory = directory.path().to_str().unwrap();
    [arguments, &["--checkpoint-dir", directory]].concat()
}

/// The line of the report for this kind of fault: planned, happened.
pub(crate) fn happened<'a>(output: &'a str, kind: &str) -> [&'a str; 2] {
    let rest = output.lines().find_map(|line| line.strip_prefix(kind));
    let mut words = rest.unwrap_or_default().split_whitespace();
    [(); 2].map(|()| {
        words
            .next()
            .unwrap_or_else(|| panic!("no {kind}: {output}"))
    })
}

/// PS-2, S-15, S-16: nothing is lost or doubled, and in `Bsp` the bits are those of a run without faults.
#[test]
fn a_plan_is_followed_and_the_report_says_what_became_of_the_run() {
    let directory = tempfile::tempdir().unwrap();
    let plan = "kill worker 1 @ step 40; stop worker 0 for 300ms @ step 120; kill server 2 @ version 200; \
                kill worker 0 @ step 300; drop 2%; dup 2%; delay 0..1ms; seed 7";
    let arguments = ["--iterations", "400", "--processes", "3", "--chaos", plan];
    let servers = ["--num-servers", "3", "--servers-on-nodes", "--update-log"];
    let arguments = [&arguments[..], &servers, &["--chaos-control"]].concat();
    let (status, output) = Run::start("sharded_ps", &words(&arguments, &directory)).finish();
    assert!(status.success(), "{output}");
    assert_eq!(happened(&output, "kill worker"), ["2", "2"], "{output}");
    assert_eq!(happened(&output, "kill server"), ["1", "1"], "{output}");
    assert_eq!(happened(&output, "stop worker"), ["1", "1"], "{output}");
    for kind in ["drop", "dup", "delay"] {
        let [planned, num] = happened(&output, kind);
        let num: u64 = num.parse().unwrap();
        assert!(planned == "-" && num > 0, "{kind}: {output}");
    }
    for text in [
        "gradients: 800 applied, lost: 0, doubled: 0",
        "recoveries: 4, median",
        "without faults\n",
        "the weights have the bits of the run without faults",
    ] {
        assert!(output.contains(text), "{text}: {output}");
    }
}

/// A fault that ends the driver happens once, and the same command goes on.
#[test]
fn a_plan_may_kill_the_driver_if_there_are_checkpoints() {
    let plan = "kill server 0 @ version 60; kill worker 1 @ step 90; kill server 1 @ version 120";
    let arguments = ["--iterations", "200", "--processes", "3", "--chaos", plan];
    let arguments = [&arguments[..], &["--num-servers", "2", "--update-log"]].concat();
    let directory = tempfile::tempdir().unwrap();
    let arguments = words(&arguments, &directory);
    for resume in [&[][..], &["--resume"]] {
        let (status, output) =
            Run::start("sharded_ps", &[&arguments[..], resume].concat()).finish();
        assert!(!status.success(), "{output}");
        assert!(
            output.contains("a fault of the plan fault=kill server"),
            "{output}"
        );
    }
    let (status, output) =
        Run::start("sharded_ps", &[&arguments[..], &["--resume"]].concat()).finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("lost: 0, doubled: 0"), "{output}");
    // Those of the two drivers that were killed. The worker was killed while the second one lived.
    assert!(output.contains("recoveries: 2, median"), "{output}");
    assert_eq!(happened(&output, "kill server"), ["2", "2"], "{output}");
    // It happened while the second driver lived, and not again.
    assert_eq!(happened(&output, "kill worker"), ["1", "1"], "{output}");
    assert!(output.contains(" 0 worker restarts"), "{output}");
}

/// With Adam, and the servers in the driver.
#[test]
fn a_model_of_your_own_follows_a_plan() {
    let plan = "kill worker 1 @ step 30; stop worker 0 for 200ms @ step 60; kill worker 0 @ step 90; drop 1%; seed 1";
    let arguments = [
        "--epochs",
        "3",
        "--processes",
        "3",
        "--chaos",
        plan,
        "--chaos-control",
    ];
    let (status, output) = Run::start_plain("custom_model", &arguments).finish();
    assert!(status.success(), "{output}");
    // 4,000 points in batches of 50, three times.
    for text in [
        "240 applied, lost: 0, doubled: 0",
        "the weights have the bits of the run without faults",
    ] {
        assert!(output.contains(text), "{text}: {output}");
    }
    assert_eq!(happened(&output, "kill worker"), ["2", "2"], "{output}");
}

#[test]
fn the_drivers_own_loops_follow_a_plan() {
    for name in ["sync_ps", "async_ps"] {
        let plan = "kill worker 1 @ step 30; stop worker 0 for 200ms @ step 60; seed 1";
        let arguments = ["--iterations", "150", "--processes", "3", "--chaos", plan];
        let (status, output) = Run::start(name, &arguments).finish();
        assert!(status.success(), "{name}: {output}");
        assert!(
            output.contains("300 applied, lost: 0, doubled: 0"),
            "{name}: {output}"
        );
        assert_eq!(
            happened(&output, "kill worker"),
            ["1", "1"],
            "{name}: {output}"
        );
    }
}

/// M-4, with running statistics and groups of parameters. The bits are not compared with burn's own dropout.
#[test]
fn larger_models_follow_a_plan() {
    for (name, more) in [("resnet", "--offline"), ("char_transformer", "--dropout=0")] {
        let plan = "kill worker 1 @ step 2; stop worker 0 for 200ms @ step 4; seed 1";
        let small = [
            "--iterations",
            "12",
            "--batch-size",
            "8",
            "--processes",
            "3",
        ];
        let arguments = [&small[..], &[more, "--chaos", plan, "--chaos-control"]].concat();
        let (status, output) = Run::start_plain(name, &arguments).finish();
        assert!(status.success(), "{name}: {output}");
        for text in [
            "24 applied, lost: 0, doubled: 0",
            "the weights have the bits of the run without faults",
        ] {
            assert!(output.contains(text), "{name}: {text}: {output}");
        }
        assert_eq!(happened(&output, "kill worker"), ["1", "1"], "{output}");
    }
}

/// PT-2, S-15: also if the process of the server and the model is killed.
#[test]
fn a_model_that_lives_with_the_server_follows_a_plan() {
    let directory = tempfile::tempdir().unwrap();
    let plan = "kill worker 1 @ step 5; stop worker 0 for 200ms @ step 8; kill server 0 @ version 30; seed 1";
    let arguments = ["--iterations", "20", "--processes", "3", "--chaos", plan];
    let arguments = [&arguments[..], &["--update-log"]].concat();
    let arguments = words(&arguments, &directory);
    let (status, output) = Run::start("rpc_ps", &arguments).finish();
    assert!(!status.success(), "{output}");
    let killed = "a fault of the plan fault=kill server";
    assert!(output.contains(killed), "{output}");
    let (status, output) = Run::start("rpc_ps", &[&arguments[..], &["--resume"]].concat()).finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("lost: 0, doubled: 0"), "{output}");
    assert!(output.contains("40 updates by 2 trainers."), "{output}");
    for kind in ["kill worker", "stop worker", "kill server"] {
        assert_eq!(happened(&output, kind), ["1", "1"], "{kind}: {output}");
    }
}

#[test]
fn a_plan_that_cannot_be_followed_is_refused_at_the_start() {
    let three = ["--processes", "3"];
    for (name, more, plan, code, says) in [
        (
            "sharded_ps",
            &three[..],
            "drop 5%; kill worker 2",
            2,
            "clause 2, `kill worker 2`",
        ),
        (
            "sharded_ps",
            &three,
            "kill worker 2 @ step 3",
            1,
            "there is no worker 2",
        ),
        (
            "sharded_ps",
            &three,
            "kill server 1 @ version 3",
            1,
            "add --checkpoint-dir",
        ),
        (
            "sharded_ps",
            &three,
            "lose power @ version 3",
            1,
            "the simulator can",
        ),
        (
            "sharded_ps",
            &[],
            "delay 1..2ms",
            1,
            "no process calls a server",
        ),
        ("sync_ps", &three, "drop 1%", 1, "no process calls a server"),
        (
            "async_ps",
            &[],
            "kill worker 0 @ step 3",
            1,
            "add --checkpoint-dir",
        ),
    ] {
        let arguments = ["--iterations", "1000000", "--chaos", plan];
        let (status, output) = Run::start(name, &[more, &arguments].concat()).finish();
        assert_eq!(status.code(), Some(code), "{plan}: {output}");
        assert!(output.contains(says), "{plan}: {output}");
        assert!(
            !output.contains("panicked") && !output.contains("joined"),
            "{output}"
        );
    }
}

#[test]
fn a_fault_that_did_not_happen_is_a_failure() {
    let arguments = ["--iterations", "20", "--processes", "3"];
    let arguments = [&arguments[..], &["--chaos", "kill worker 1 @ step 30"]].concat();
    let (status, output) = Run::start("sharded_ps", &arguments).finish();
    assert_eq!(status.code(), Some(1), "{output}");
    assert_eq!(happened(&output, "kill worker"), ["1", "0"], "{output}");
}
