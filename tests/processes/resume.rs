//! Runs whose driver is killed or interrupted, and that go on from a checkpoint.

use std::fs;
use std::path::{Path, PathBuf};

use crate::run::{Run, signal};

/// The newest checkpoint in a directory: its number of updates and its files.
fn newest(directory: &Path) -> Option<(u64, PathBuf)> {
    let entries = fs::read_dir(directory).ok()?.map_while(Result::ok);
    let version = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix("checkpoint-")?.parse().ok()
    };
    let found = entries.filter_map(|entry| Some((version(&entry.path())?, entry.path())));
    found.max()
}

/// The weights and the state of the update rule, as they are on the disk, and where each worker goes on.
fn numbers(directory: &Path) -> [Vec<u8>; 3] {
    let (_, path) = newest(directory).expect("there is a checkpoint");
    let read = |file: &str| fs::read(path.join(file)).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&read("manifest.json")).unwrap();
    let clocks = manifest["next_clocks"]
        .as_object()
        .expect("a clock for each worker");
    assert!(!clocks.is_empty());
    let clocks = serde_json::to_vec(clocks).unwrap();
    [
        read("model.safetensors"),
        read("optimizer.safetensors"),
        clocks,
    ]
}

fn words<'a>(arguments: &[&'a str], directory: &'a Path) -> Vec<&'a str> {
    saving(arguments, "20", directory)
}

fn saving<'a>(arguments: &[&'a str], every: &'a str, directory: &'a Path) -> Vec<&'a str> {
    let directory = directory.to_str().unwrap();
    let checkpoints = ["--checkpoint-dir", directory, "--checkpoint-every", every];
    [arguments, &checkpoints].concat()
}

/// S-13, for the trainer and for a driver's own loop, in one process and in three, with SGD and with Adam: the same
/// bits as of a run that nothing happened to.
#[test]
fn a_run_whose_driver_is_killed_goes_on_from_its_checkpoint_with_the_same_bits() {
    let arguments = ["--iterations", "1500"];
    let three = ["--iterations", "1500", "--processes", "3"];
    let on_nodes = [&three[..], &["--num-servers", "2", "--servers-on-nodes"]].concat();
    // Of 40 steps each, with Adam.
    let epochs = ["--epochs", "75", "--processes", "3"];
    for (name, arguments, num_updates) in [
        ("sync_ps", &arguments[..], 1500),
        ("sync_ps", &three, 1500),
        ("sharded_ps", &three, 1500),
        ("sharded_ps", &on_nodes, 1500),
        ("custom_model", &epochs, 3000),
    ] {
        let start = match name {
            "custom_model" => Run::start_plain,
            _ => Run::start,
        };
        let whole = tempfile::tempdir().unwrap();
        let (status, output) = start(name, &words(arguments, whole.path())).finish();
        assert!(status.success(), "{output}");
        let whole = numbers(whole.path());

        let killed = tempfile::tempdir().unwrap();
        let arguments = words(arguments, killed.path());
        let mut run = start(name, &arguments);
        run.wait_for(&["saved a checkpoint"]);
        signal("KILL", run.driver.id());
        let (status, _) = run.finish();
        assert!(!status.success());
        let (saved, _) = newest(killed.path()).expect("it was saved");

        // Not by mistake into another run's directory.
        let (status, output) = start(name, &arguments).finish();
        assert_eq!(status.code(), Some(1), "{output}");
        assert!(
            output.contains("already has checkpoints, up to version"),
            "{output}"
        );

        let again = [&arguments[..], &["--resume"]].concat();
        let (status, output) = start(name, &again).finish();
        assert!(status.success(), "{name}: {output}");
        let (version, _) = newest(killed.path()).unwrap();
        assert!(
            saved < num_updates && version == num_updates,
            "{name}: {saved}, {version}: {output}"
        );
        assert!(
            numbers(killed.path()) == whole,
            "{name} {arguments:?}: {output}"
        );
    }
}

/// S-13: 2n updates in one run, and n updates, a kill, and n more, with each kind of update rule: the same weights and
/// the same vectors of the rule. Killed at update 3, too, where Adam's correction of its bias is still far from 1.
#[test]
fn a_run_that_is_killed_after_n_updates_and_goes_on_has_the_same_bits_with_every_optimizer() {
    for optimizer in ["sgd", "momentum", "adam"] {
        let arguments = [
            "--epochs",
            "1",
            "--processes",
            "3",
            "--optimizer",
            optimizer,
        ];
        let whole = tempfile::tempdir().unwrap();
        let (status, output) =
            Run::start_plain("count_steps", &saving(&arguments, "30", whole.path())).finish();
        assert!(status.success(), "{output}");
        for n in [30, 3] {
            let killed = tempfile::tempdir().unwrap();
            let every = n.to_string();
            let arguments = saving(&arguments, &every, killed.path());
            let dies = [&arguments[..], &["--die", "0 checkpoint-named 1"]].concat();
            let (status, output) = Run::start_plain("count_steps", &dies).finish();
            assert!(
                !status.success() && output.contains("dies at checkpoint-named"),
                "{output}"
            );
            let (saved, _) = newest(killed.path()).expect("it was named");
            // One is taken as soon as so many updates were made; others may be made first.
            assert!((n..=60).contains(&saved), "{saved}: {output}");

            let again = [&arguments[..], &["--resume"]].concat();
            let (status, output) = Run::start_plain("count_steps", &again).finish();
            assert!(status.success(), "{optimizer}, {n}: {output}");
            assert_eq!(newest(killed.path()).unwrap().0, 60, "{output}");
            assert!(
                output.contains("120 gradients"),
                "{optimizer}, {n}: {output}"
            );
            assert!(
                numbers(killed.path()) == numbers(whole.path()),
                "{optimizer}, {n}: {output}"
            );
        }
    }
}

/// The command that it prints goes on. (A launcher may take the run for done until then: nothing is lost.)
#[test]
fn an_interrupted_driver_saves_a_checkpoint_and_says_how_to_go_on() {
    let endless = ["--iterations", "1000000", "--checkpoint-every", "0"];
    let three = [&endless[..], &["--processes", "3"]].concat();
    for (name, arguments, how) in [
        ("sync_ps", &endless[..], "TERM"),
        ("async_ps", &three, "INT"),
        ("sharded_ps", &three, "TERM"),
        ("rpc_ps", &endless, "TERM"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().to_str().unwrap();
        let arguments = [arguments, &["--checkpoint-dir", dir]].concat();
        let mut run = Run::start(name, &arguments);
        match name {
            "rpc_ps" => run.wait_for(&["training batch 5 "]),
            _ => run.wait_for(&["Iter ", "accuracy is"]),
        };
        signal(how, run.driver.id());
        let (status, output) = run.finish();
        assert_eq!(status.code(), Some(0), "{name}: {output}");
        assert!(
            output.contains(&format!("Interrupted by SIG{how}")),
            "{output}"
        );
        let hint = output
            .lines()
            .find_map(|line| line.strip_prefix("To go on: "));
        let hint = hint.unwrap_or_else(|| panic!("{name}: no hint: {output}"));
        assert!(hint.ends_with("--resume") && hint.contains(dir), "{hint}");
        let (saved, _) = newest(directory.path()).expect("it was saved");

        // As the hint says, but not without end.
        let words = hint.split(' ').skip(1);
        let words: Vec<&str> = words
            .map(|word| if word == "1000000" { "1" } else { word })
            .collect();
        let (status, output) = Run::start(name, &words[3..]).finish();
        assert!(status.success(), "{name}: {output}");
        let (version, _) = newest(directory.path()).unwrap();
        assert!(
            version >= saved && saved > 0,
            "{name}: {saved}, then {version}: {output}"
        );
    }
}

/// The examples are dealt out by seed and batch size.
#[test]
fn trainers_of_a_model_on_the_server_do_not_go_on_with_other_batches() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--offline", "--batch-size", "16", "--iterations", "4"];
    let arguments = words(&arguments, directory.path());
    let (status, output) = Run::start_plain("rpc_ps", &arguments).finish();
    assert!(status.success(), "{output}");
    for (flag, value, says) in [
        ("--seed", "1", "the seed is `0` there, and `1` here"),
        (
            "--batch-size",
            "8",
            "the batch size is `16` there, and `8` here",
        ),
    ] {
        let mut again = [&arguments[..], &["--resume"]].concat();
        match again.iter().position(|word| *word == flag) {
            Some(at) => again[at + 1] = value,
            None => again.extend([flag, value]),
        }
        let (status, output) = Run::start_plain("rpc_ps", &again).finish();
        assert!(
            !status.success() && output.contains(says),
            "{says}: {output}"
        );
    }
}

/// As Slurm, mpirun and others do: SIGTERM goes to all processes at once, also to those with the servers.
#[test]
fn a_run_of_which_all_processes_are_asked_to_end_saves_a_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = words(
        &[
            "--iterations",
            "1000000",
            "--processes",
            "3",
            "--num-servers",
            "2",
            "--servers-on-nodes",
        ],
        directory.path(),
    );
    let mut run = Run::start("sharded_ps", &arguments);
    let nodes = [(); 2].map(|()| run.wait_for_node("node=node"));
    run.wait_for(&["Iter ", "accuracy is"]);
    for process in [nodes[0], nodes[1], run.driver.id()] {
        signal("TERM", process);
    }
    let (status, output) = run.finish();
    assert_eq!(status.code(), Some(0), "{output}");
    // One that was saved on the way would be there, too.
    assert!(output.contains("To go on: "), "{output}");
}

/// The servers are lost with their node. The run goes on from what they had at the last checkpoint, with the
/// bits of a run that nothing happened to.
#[test]
fn a_run_that_loses_its_servers_goes_on_from_its_checkpoint() {
    let arguments = [
        "--processes",
        "3",
        "--num-servers",
        "2",
        "--servers-on-nodes",
    ];
    let arguments = [&["--iterations", "2000"], &arguments[..]].concat();
    let whole = tempfile::tempdir().unwrap();
    let (status, output) = Run::start("sharded_ps", &words(&arguments, whole.path())).finish();
    assert!(status.success(), "{output}");

    let directory = tempfile::tempdir().unwrap();
    let mut run = Run::start("sharded_ps", &words(&arguments, directory.path()));
    // They join in any order. Each has a server, also after the other one was lost.
    let nodes = [(); 2].map(|()| run.wait_for_node("node=node"));
    for node in nodes {
        run.wait_for(&["saved a checkpoint"]);
        signal("KILL", node);
        run.wait_for(&["the servers are lost; going on from the last checkpoint"]);
    }
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("The servers were lost 2 times"), "{output}");
    assert!(
        numbers(directory.path()) == numbers(whole.path()),
        "{output}"
    );
}

/// S-15: without any checkpoint but the one that begins the log. What the driver had printed is not lost.
#[test]
fn a_driver_that_is_killed_loses_no_update_with_a_log() {
    let three = ["--processes", "3"];
    for (name, more) in [
        ("async_ps", &[][..]),
        ("async_ps", &three),
        ("sync_ps", &three),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().to_str().unwrap();
        let log = [
            "--update-log",
            "--checkpoint-dir",
            dir,
            "--checkpoint-every",
            "0",
        ];
        let arguments = [&["--iterations", "600"], more, &log].concat();
        let mut run = Run::start(name, &arguments);
        let line = run.wait_for(&["Iter 50:"]);
        signal("KILL", run.driver.id());
        let (status, output) = run.finish();
        assert!(!status.success(), "{output}");
        let printed = output.lines().chain([&line[..]]).filter_map(|line| {
            let number = line.strip_prefix("Iter ")?.split(':').next()?;
            number.parse::<u64>().ok()
        });
        let printed = printed.max().unwrap();

        let (status, output) = Run::start(name, &[&arguments[..], &["--resume"]].concat()).finish();
        assert!(status.success(), "{name}: {output}");
        let known = output.lines().find_map(|line| {
            let number = line.strip_prefix("Going on after ")?.split(' ').next()?;
            number.parse::<u64>().ok()
        });
        assert!(
            known > Some(printed),
            "{name}: {known:?}, {printed}: {output}"
        );
        let (version, _) = newest(directory.path()).unwrap();
        let num_updates = if name == "async_ps" { 1200 } else { 600 };
        assert_eq!(version, num_updates, "{name}: {output}");
    }
}

/// S-15: the node of another server is killed. No update is made twice, although none is in a checkpoint.
#[test]
fn a_server_that_is_killed_loses_no_update_with_a_log() {
    for mode in ["bsp", "asp"] {
        let size = ["--iterations", "1500", "--consistency", mode];
        let servers = [
            "--num-servers",
            "3",
            "--servers-on-nodes",
            "--processes",
            "3",
        ];
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().to_str().unwrap();
        let log = [
            "--update-log",
            "--checkpoint-dir",
            dir,
            "--checkpoint-every",
            "0",
        ];
        let arguments = [&size[..], &servers, &log].concat();
        let mut run = Run::start("sharded_ps", &arguments);
        let node = run.wait_for_node("node=node 2");
        run.wait_for(&["Iter ", "accuracy is"]);
        signal("KILL", node);
        let line = run.wait_for(&["followed the update log", "from=version 0"]);
        run.wait_for(&["the servers are lost; going on from the last checkpoint"]);
        let (status, output) = run.finish();
        assert!(status.success(), "{line} {output}");
        assert!(output.contains("The servers were lost 1 time"), "{output}");
        let gradients = if mode == "bsp" {
            "1500 updates of 3000 gradients"
        } else {
            "3000 updates of 3000 gradients"
        };
        assert!(output.contains(gradients), "{output}");
        if mode == "bsp" {
            let whole = tempfile::tempdir().unwrap();
            let arguments = words(&size, whole.path());
            let (status, output) = Run::start("sharded_ps", &arguments).finish();
            assert!(status.success(), "{output}");
            assert!(numbers(directory.path()) == numbers(whole.path()));
        }
    }
}

/// S-13, S-15: killed at random moments, most often while a checkpoint or the log is being written, and started
/// again by the same command. `PS_KILL_SEED` chooses the moments, `PS_KILLS` how many.
#[test]
fn a_driver_that_is_killed_again_and_again_ends_with_the_right_bits() {
    let number = |name: &str, or: u64| match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name} is no number: {text}")),
        Err(_) => or,
    };
    let (mut dice, num_kills) = (number("PS_KILL_SEED", 1), number("PS_KILLS", 6));
    println!("PS_KILL_SEED={dice}");
    // More than are made until the last kill: at most half of them before it is said, and then there is time for it.
    let each = 1200;
    let num_steps = each * (num_kills + 1);
    let iterations = num_steps.to_string();
    let training = ["--iterations", &iterations, "--num-servers", "2"];
    let whole = tempfile::tempdir().unwrap();
    let (status, output) = Run::start("sharded_ps", &words(&training, whole.path())).finish();
    assert!(status.success(), "{output}");

    let directory = tempfile::tempdir().unwrap();
    let dir = directory.path().to_str().unwrap();
    let saving = [
        "--checkpoint-dir",
        dir,
        "--checkpoint-every",
        "7",
        "--keep-checkpoints",
        "1",
    ];
    let arguments = [&training[..], &saving, &["--update-log", "--resume"]].concat();
    let mut reached = 0;
    for _ in 0..num_kills {
        let mut run = Run::start("sharded_ps", &arguments);
        // The generator of Knuth's MMIX.
        dice = dice
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        for _ in 0..=(dice >> 33) % 6 {
            let line = run.wait_for(&["saved a checkpoint"]);
            let version = line.split("version=").nth(1).unwrap();
            let version = version.trim_start_matches("version ");
            let version = version.split_whitespace().next().unwrap();
            if version.parse::<u64>().unwrap() >= reached + each / 2 {
                break;
            }
        }
        signal("KILL", run.driver.id());
        let (_, output) = run.finish();
        let (version, _) = newest(directory.path()).expect("there is one");
        assert!(version >= reached, "{reached}, then {version}: {output}");
        reached = version;
    }
    let (status, output) = Run::start("sharded_ps", &arguments).finish();
    assert!(status.success(), "{output}");
    assert!(
        output.contains(&format!(
            "{num_steps} updates of {} gradients",
            2 * num_steps
        )),
        "{output}"
    );
    assert!(
        numbers(directory.path()) == numbers(whole.path()),
        "{output}"
    );
}
