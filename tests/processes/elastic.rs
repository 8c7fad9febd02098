//! Nodes that join late, and workers that go on elsewhere.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::run::{Run, example, free_port, signal};

fn exported(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// Runs `sharded_ps` undisturbed. Returns its model.
fn undisturbed(arguments: &[&str], directory: &Path) -> Vec<u8> {
    let model = directory.join("undisturbed.safetensors");
    let export = ["--export", model.to_str().unwrap()];
    let (status, output) = Run::start("sharded_ps", &[arguments, &export].concat()).finish();
    assert!(status.success(), "{output}");
    exported(&model)
}

/// S-16: in `Bsp`, the bits are those of a run that nothing happened to.
#[test]
fn a_worker_that_is_killed_changes_no_bit() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = ["--iterations", "1500", "--num-workers", "3"];
    let whole = undisturbed(&arguments, directory.path());

    let model = directory.path().join("model.safetensors");
    let more = ["--processes", "3", "--export", model.to_str().unwrap()];
    let mut run = Run::start("sharded_ps", &[&arguments[..], &more].concat());
    for incarnation in ["node=node 2", "node=node 2 (incarnation 2)"] {
        let node = run.wait_for_node(incarnation);
        run.wait_for(&["Iter ", "accuracy is"]);
        signal("KILL", node);
        // It may have no worker yet.
        run.wait_for(&["a node is lost: its process has ended"]);
    }
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(
        output.contains("1500 updates of 4500 gradients"),
        "{output}"
    );
    assert!(exported(&model) == whole, "{output}");
}

/// S-16
#[test]
fn a_node_that_starts_late_gets_workers() {
    let port = free_port().to_string();
    let place = |rank: &'static str, world_size: &'static str| {
        let words = ["--rank", rank, "--world-size", world_size];
        let master = ["--master-addr", "127.0.0.1", "--master-port", &port];
        [&words[..], &master]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let training = ["--iterations", "3000", "--num-workers", "4"];
    let node = |place: Vec<String>| {
        let mut node = Command::new(example("sharded_ps"));
        node.args(["--offline", "--batch-size", "16"])
            .args(training)
            .args(place);
        node.stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let driver = place("0", "2");
    let words: Vec<&str> = driver.iter().map(String::as_str).collect();
    let mut run = Run::start("sharded_ps", &[&training[..], &words].concat());
    let mut first = node(place("1", "2"));
    run.wait_for(&["Iter ", "accuracy is"]);
    // It is more than the driver was told to wait for.
    let mut late = node(place("2", "3"));
    run.wait_for(&["a worker moves to a node that has fewer"]);
    run.wait_for(&["a worker goes on at another node"]);
    let (status, output) = run.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("of 12000 gradients"), "{output}");
    assert!(output.contains(" 2 worker moves"), "{output}");
    assert!(output.contains(" 0 worker restarts"), "{output}");
    assert!(first.wait().unwrap().success() && late.wait().unwrap().success());
}
