//! The examples as several real processes: some are killed, stopped and started again.

mod chaos;
mod elastic;
mod kills;
#[cfg(feature = "burn-train")]
mod learner;
mod models;
mod observe;
mod resume;
mod run;
mod soak;
mod trace;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use run::{Run, example, free_port, signal, stop_all_threads};

/// One start is enough: all processes are this program on this machine.
#[test]
fn the_doctor_finds_nothing_wrong_with_processes_that_the_driver_starts() {
    let (status, output) = Run::start("sharded_ps", &["--processes", "3", "--doctor"]).finish();
    assert!(status.success(), "{output}");
    assert!(!output.contains("BAD"), "{output}");
    for said in [
        "ok   driver 0: all processes have the same: ",
        "ok   node 1: has the same as the driver: ",
        "ok   node 2: has the same as the driver: ",
    ] {
        assert!(output.contains(said), "{said}: {output}");
    }
}

/// The lines that do not depend on the number of processes or on time.
fn results(output: &str) -> Vec<&str> {
    output
        .lines()
        .filter(|line| line.contains("accuracy is"))
        .collect()
}

#[test]
fn processes_compute_what_one_process_does() {
    for name in ["sync_ps", "sharded_ps"] {
        let arguments = ["--iterations", "30"];
        let (status, alone) = Run::start(name, &arguments).finish();
        assert!(status.success(), "{alone}");
        for extra in [&["--processes", "2"][..], &["--processes", "3"]] {
            let (status, output) = Run::start(name, &[&arguments, extra].concat()).finish();
            assert!(status.success(), "{output}");
            let last = |output: &str| results(output).last().map(|line| line.to_string());
            assert_eq!(last(&output), last(&alone), "{name} {extra:?}");
        }
    }
}

#[test]
fn training_goes_on_when_a_node_is_killed_before_it_has_a_worker() {
    let mut run = Run::start("sharded_ps", &["--iterations", "300", "--processes", "3"]);
    let node = run.wait_for_node("node=node 2");
    signal("KILL", node);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("Final accuracy is"), "{output}");
}

#[test]
fn training_goes_on_when_a_worker_is_killed() {
    let mut run = Run::start("sharded_ps", &["--iterations", "3000", "--processes", "3"]);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Iter ", "accuracy is"]);
    signal("KILL", node);
    let again = run.wait_for_node("node=node 2 (incarnation 2)");
    assert_ne!(again, node);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(!output.contains(" 0 worker restarts"), "{output}");
}

/// The driver's own loops, too; the synchronous one with the same result as if nothing had happened.
#[test]
fn the_drivers_own_loops_go_on_when_a_worker_is_killed() {
    let arguments = ["--iterations", "1500"];
    for name in ["sync_ps", "async_ps"] {
        let mut run = Run::start(name, &[&arguments[..], &["--processes", "3"]].concat());
        let node = run.wait_for_node("node=node 2");
        run.wait_for(&["Iter ", "accuracy is"]);
        signal("KILL", node);
        run.wait_for(&["a worker is lost; it goes on"]);
        let (status, output) = run.finish();
        assert!(status.success(), "{name}: {output}");
        let last = |output: &str| results(output).last().map(|line| line.to_string());
        assert!(
            last(&output).is_some_and(|line| line.starts_with("Final accuracy")),
            "{output}"
        );
        if name == "sync_ps" {
            let (status, alone) = Run::start(name, &arguments).finish();
            assert!(status.success(), "{alone}");
            assert_eq!(last(&output), last(&alone));
        }
    }
}

#[test]
fn a_training_that_diverges_ends_with_a_failure() {
    // After a few iterations not enough gradients in a row were refused: then the result shows it.
    for [iterations, rate] in [["300", "1e30"], ["40", "1e6"]] {
        for name in ["sharded_ps", "sync_ps", "async_ps", "rpc_ps"] {
            let arguments = ["--iterations", iterations, "--learning-rate", rate];
            let (status, output) = Run::start(name, &arguments).finish();
            assert_eq!(status.code(), Some(1), "{name} {iterations}: {output}");
        }
    }
}

/// A trainer's own flags do not win over the driver's.
#[test]
fn a_trainer_with_other_flags_is_refused_by_name() {
    let port = free_port().to_string();
    let place = ["--world-size", "2", "--master-port", &port];
    let driver = [&place[..], &["--rank", "0", "--iterations", "3"]].concat();
    let mut driver = Run::start("rpc_ps", &driver);
    driver.wait_for(&["MNIST"]);
    let node = [&place[..], &["--rank", "1", "--iterations", "4"]].concat();
    let (status, output) = Run::start("rpc_ps", &node).finish();
    let of_driver = driver.kill();
    assert_eq!(status.code(), Some(64), "{output}\n{of_driver}");
    assert!(
        output.contains("--iterations is 4 here, but 3 in the driver"),
        "{output}"
    );
}

#[test]
fn training_goes_on_when_a_worker_stops_answering_and_comes_back() {
    let arguments = [
        "--iterations",
        "3000",
        "--processes",
        "3",
        "--process-lease",
        "1",
    ];
    let mut run = Run::start("sharded_ps", &arguments);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Iter ", "accuracy is"]);
    signal("STOP", node);
    run.wait_for(&["a worker is lost; it goes on"]);
    signal("CONT", node);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(!output.contains(" 0 worker restarts"), "{output}");
}

/// The step under way is pushed, not taken again, and the run goes on with the other node.
#[test]
fn a_node_that_is_terminated_finishes_its_step_and_its_worker_goes_on_elsewhere() {
    let size = ["--iterations", "1500", "--num-workers", "2"];
    let arguments = [&size[..], &["--processes", "3", "--consistency", "asp"]].concat();
    let mut run = Run::start("sharded_ps", &arguments);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Iter ", "accuracy is"]);
    signal("TERM", node);
    run.wait_for(&["leaving after the step under way"]);
    run.wait_for(&["a worker goes on at another node"]);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(
        output.contains("3000 updates of 3000 gradients"),
        "{output}"
    );
    assert!(output.contains(" 1 worker move"), "{output}");
    assert!(output.contains("a node has left"), "{output}");
    assert!(!output.contains("is lost"), "{output}");
}

/// A signal that comes sooner after the first one is a copy of it.
#[cfg(target_os = "linux")]
const SAME_REQUEST: Duration = Duration::from_millis(500);

/// A driver that does not answer keeps a node waiting, but not after a second signal.
#[cfg(target_os = "linux")]
#[test]
fn a_node_that_is_terminated_twice_leaves_at_once() {
    let arguments = [
        "--iterations",
        "3000",
        "--processes",
        "3",
        "--process-lease",
        "8",
    ];
    let mut run = Run::start("sharded_ps", &arguments);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Iter ", "accuracy is"]);
    stop_all_threads(run.driver.id());
    let asked = Instant::now();
    signal("TERM", node);
    run.wait_for(&["leaving after the step under way"]);
    run.signal_until("TERM", node, "leaving at once");
    assert!(asked.elapsed() >= SAME_REQUEST, "{:?}", asked.elapsed());
    signal("CONT", run.driver.id());
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(
        !output.contains("before all steps are finished"),
        "{output}"
    );
}

/// However the driver ends, nobody is left: whoever lived would keep its output open.
#[test]
fn no_process_outlives_the_driver() {
    let arguments = ["--iterations", "1000000", "--processes", "3"];
    let mut run = Run::start("sharded_ps", &arguments);
    run.wait_for(&["Iter ", "accuracy is"]);
    signal("KILL", run.driver.id());
    let (status, _) = run.finish();
    assert!(!status.success());
}

/// The exit code says that the work is not done, the output says how far it came.
fn ended_in_order(run: Run, name: &str, signal: &str) -> String {
    let code = if signal == "TERM" { 143 } else { 130 };
    let (status, output) = run.finish();
    assert_eq!(status.code(), Some(code), "{name}: {output}");
    let interrupted = format!("Interrupted by SIG{signal}");
    assert!(output.contains(&interrupted), "{name}: {output}");
    // A node that leaves, or that the driver lets go, has not crashed.
    for trouble in ["is lost", "has failed", "before all steps", "panicked"] {
        assert!(!output.contains(trouble), "{name}: {trouble}: {output}");
    }
    output
}

/// alone and with others, the driver's own loops and the trainer, servers here and on nodes.
#[test]
fn an_interrupted_driver_ends_in_order() {
    let endless = ["--iterations", "1000000"];
    let three = ["--iterations", "1000000", "--processes", "3"];
    let on_nodes = [&three[..], &["--num-servers", "2", "--servers-on-nodes"]].concat();
    for (name, arguments, how) in [
        ("sync_ps", &endless[..], "INT"),
        ("sync_ps", &three, "TERM"),
        ("async_ps", &three, "INT"),
        ("sharded_ps", &endless, "TERM"),
        ("sharded_ps", &three, "INT"),
        ("sharded_ps", &on_nodes, "TERM"),
    ] {
        let mut run = Run::start(name, arguments);
        run.wait_for(&["Iter ", "accuracy is"]);
        signal(how, run.driver.id());
        let output = ended_in_order(run, name, how);
        assert!(output.contains("Final accuracy is"), "{name}: {output}");
    }
    let mut run = Run::start("rpc_ps", &three);
    run.wait_for(&["training batch 5 "]);
    signal("TERM", run.driver.id());
    let output = ended_in_order(run, "rpc_ps", "TERM");
    assert!(output.contains("updates by 2 trainers."), "{output}");
}

/// As at a terminal, which sends Ctrl-C to all: the servers on nodes are still asked for the weights.
#[test]
fn an_interrupt_of_all_processes_is_the_drivers_matter() {
    let arguments = ["--iterations", "1000000", "--processes", "3"];
    let arguments = [
        &arguments[..],
        &["--num-servers", "2", "--servers-on-nodes"],
    ]
    .concat();
    let mut run = Run::start("sharded_ps", &arguments);
    // They join in any order.
    let nodes = [(); 2].map(|()| run.wait_for_node("node=node"));
    run.wait_for(&["Iter ", "accuracy is"]);
    for process in [nodes[0], run.driver.id(), nodes[1]] {
        signal("INT", process);
    }
    let output = ended_in_order(run, "sharded_ps", "INT");
    assert!(output.contains("Final accuracy is"), "{output}");
}

/// One of two workers is in the middle of a step, and stays there.
#[cfg(target_os = "linux")]
fn start_with_a_worker_that_hangs() -> Run {
    let arguments = ["--iterations", "1000000", "--consistency", "asp"];
    let arguments = [
        &arguments[..],
        &["--processes", "3", "--process-lease", "60"],
    ]
    .concat();
    let mut run = Run::start("sharded_ps", &arguments);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Iter ", "accuracy is"]);
    stop_all_threads(node);
    run
}

/// a worker that does not come to the end of its step costs the driver some seconds, not the result.
#[cfg(target_os = "linux")]
#[test]
fn a_step_that_takes_too_long_is_given_up_when_the_driver_is_interrupted() {
    let mut run = start_with_a_worker_that_hangs();
    signal("TERM", run.driver.id());
    run.wait_for(&["ending before all steps are finished"]);
    let (status, output) = run.finish();
    assert_eq!(status.code(), Some(143), "{output}");
    assert!(output.contains("Final accuracy is"), "{output}");
}

/// a second signal is for those who do not want to wait.
#[cfg(target_os = "linux")]
#[test]
fn a_driver_that_is_interrupted_twice_ends_at_once() {
    let mut run = start_with_a_worker_that_hangs();
    let asked = Instant::now();
    signal("INT", run.driver.id());
    run.wait_for(&["ending in order; a second signal"]);
    let driver = run.driver.id();
    run.signal_until("TERM", driver, "ending at once");
    assert!(asked.elapsed() >= SAME_REQUEST, "{:?}", asked.elapsed());
    let (status, output) = run.finish();
    assert_eq!(status.code(), Some(130), "{output}");
    assert!(!output.contains("Final accuracy is"), "{output}");
}

/// A server for workers in other languages says how far it came, too.
#[test]
fn an_interrupted_http_server_ends_in_order() {
    let server = Command::new(example("http_server"))
        .args(["--listen", "127.0.0.1:0"])
        .env_remove("PS_MNIST_DIR")
        .env("PS_OFFLINE", "1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut run = Run::follow(server.unwrap());
    run.wait_for(&["Update 0", "accuracy is"]);
    signal("TERM", run.driver.id());
    ended_in_order(run, "http_server", "TERM");
}

/// The guide's program as three processes, by one command and by hand.
#[test]
fn trainers_of_a_model_on_the_server_print_what_the_guides_do() {
    let directory = tempfile::tempdir().unwrap();
    let exported = directory.path().join("net.safetensors");
    let exported = exported.to_str().unwrap();
    let alone = ["--iterations", "6", "--export", exported];
    let alone = Run::start("rpc_ps", &alone).finish();
    assert!(Path::new(exported).is_file(), "{}", alone.1);
    let together = ["--iterations", "6", "--processes", "3"];
    let together = Run::start("rpc_ps", &together).finish();
    for ((status, output), ranks) in [(alone, 1..=1), (together, 1..=2)] {
        assert!(status.success(), "{output}");
        let num_trainers = ranks.clone().count();
        for rank in ranks {
            for batch in [0, 5] {
                let line = format!("Rank {rank} training batch {batch} loss ");
                assert!(output.contains(&line), "{line}: {output}");
            }
            assert!(
                output.contains(&format!("Rank {rank} accuracy ")),
                "{output}"
            );
        }
        let complete = output.matches("Training complete!").count();
        assert_eq!(complete, num_trainers, "{output}");
        let updates = format!("{} updates by {num_trainers} trainers.", 6 * num_trainers);
        assert!(output.contains(&updates), "{output}");
    }
}

#[test]
fn a_trainer_that_is_killed_goes_on_and_no_update_is_lost_or_doubled() {
    let arguments = ["--iterations", "60", "--processes", "3"];
    let mut run = Run::start("rpc_ps", &arguments);
    let node = run.wait_for_node("node=node 2");
    run.wait_for(&["Rank 2 training batch 5 "]);
    signal("KILL", node);
    run.wait_for(&["a trainer is lost; it goes on"]);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("120 updates by 2 trainers."), "{output}");
}

/// The real ones, as far as they are installed; `launchers.rs` knows more.
#[test]
fn launchers_start_the_driver_and_its_nodes() {
    // One port for all: they run one after the other.
    let port = free_port().to_string();
    let open_mpi = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "3",
    ];
    let mpich = ["mpiexec.hydra", "-n", "3"];
    let torch = ["torchrun", "--nproc-per-node", "3", "--master-port", &port];
    let torch = [&torch[..], &["--no-python"]].concat();
    for launcher in [&open_mpi[..], &mpich, &torch] {
        let child = Command::new(launcher[0])
            .args(&launcher[1..])
            .arg(example("sharded_ps"))
            .args(["--offline", "--batch-size", "16", "--iterations", "5"])
            .env_remove("PS_MNIST_DIR")
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", &port)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let run = match child {
            Ok(child) => Run::follow(child),
            Err(error) => {
                println!("skipped: {}: {error}", launcher[0]);
                continue;
            }
        };
        let (status, output) = run.finish();
        assert!(status.success(), "{}: {output}", launcher[0]);
        for node in ["node 1", "node 2"] {
            let mut lines = output.lines();
            let has_joined = |line: &str| line.contains("a node has joined") && line.contains(node);
            assert!(lines.any(has_joined), "{}: {output}", launcher[0]);
        }
        assert!(output.contains("5 updates of 10 gradients"), "{output}");
    }
}

#[test]
fn a_wrong_launch_ends_with_the_code_for_do_not_retry() {
    for (arguments, text) in [
        (&["--rank", "1"][..], "--world-size"),
        (&["--rank", "3", "--world-size", "2"], "rank"),
        (
            &["--processes", "3", "--rank", "0", "--world-size", "3"],
            "--processes",
        ),
        (
            &[
                "--rank",
                "0",
                "--world-size",
                "2",
                "--master-addr",
                "0.0.0.0",
            ],
            "needs a token",
        ),
        (
            &["--processes", "2", "--process-lease", "0"],
            "--process-lease",
        ),
    ] {
        let (status, output) = Run::start("sync_ps", arguments).finish();
        assert_eq!(status.code(), Some(64), "{arguments:?}: {output}");
        assert!(output.contains(text), "{arguments:?}: {output}");
    }
}

/// A full disk, or a reader that has gone, is no reason to lose a training.
#[cfg(target_os = "linux")]
#[test]
fn output_that_cannot_be_written_ends_no_training() {
    let full = || {
        let device = std::fs::OpenOptions::new().write(true).open("/dev/full");
        Stdio::from(device.unwrap())
    };
    let closed = || {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        Stdio::from(writer)
    };
    for (out, err) in [(full(), full()), (closed(), closed())] {
        let status = Command::new(example("sync_ps"))
            .args(["--offline", "--batch-size", "16"])
            .args(["--iterations", "20", "--processes", "3"])
            .env_remove("PS_MNIST_DIR")
            .stdout(out)
            .stderr(err)
            .status();
        let status = status.unwrap();
        assert!(status.success(), "{status}");
    }
}
