//! What the environment variables do, seen from a process of its own.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use ps_data::{FashionMnist, Mnist, MnistOptions};

/// Runs `child_process` below with nothing but the given variables and a home of its own.
fn child(home: &Path, variables: &[(&str, &Path)]) -> Output {
    Command::new(std::env::current_exe().expect("a path"))
        .args([
            "--exact",
            "environment::child_process",
            "--ignored",
            "--nocapture",
        ])
        .env_remove("PS_MNIST_DIR")
        .env_remove("PS_FASHION_MNIST_DIR")
        .env_remove("PS_OFFLINE")
        .env("PS_DATA_TEST_CHILD", "1")
        .env("HOME", home)
        .env("XDG_CACHE_HOME", home.join("cache"))
        .envs(variables.iter().copied())
        .stderr(Stdio::piped())
        .output()
        .expect("starts")
}

/// Expects the child's report to contain each of `expected`.
fn check(variables: &[(&str, &Path)], expected: &[&str]) {
    let home = tempfile::tempdir().expect("temporary directory");
    let output = child(home.path(), variables);
    let report = String::from_utf8_lossy(&output.stdout);
    for expected in expected {
        assert!(report.contains(expected), "{expected} is not in {report}");
    }
    assert!(output.status.success(), "{report}");
    // Nothing was fetched, so nothing was made in the user's cache.
    assert!(!home.path().join("cache/ps").exists());
}

#[test]
fn offline_mnist_is_the_sample_and_offline_fashion_mnist_an_error() {
    check(
        &[("PS_OFFLINE", Path::new("1"))],
        &[
            "MNIST: 4000 from bundled sample of the real data (offline: ",
            "FashionMNIST: FashionMNIST is not available and downloading is switched off; \
             put its four IDX files into a directory and set PS_FASHION_MNIST_DIR to it",
        ],
    );
}

#[test]
fn each_data_set_has_its_own_directory_variable() {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample");
    let from = format!("4000 from directory {}", sample.display());
    check(
        &[("PS_OFFLINE", Path::new("1")), ("PS_MNIST_DIR", &sample)],
        &[
            &format!("MNIST: {from}"),
            "FashionMNIST: FashionMNIST is not available",
        ],
    );
    check(
        &[
            ("PS_OFFLINE", Path::new("1")),
            ("PS_FASHION_MNIST_DIR", &sample),
        ],
        &[
            "MNIST: 4000 from bundled sample",
            &format!("FashionMNIST: {from}"),
        ],
    );
}

#[test]
fn a_directory_variable_that_points_nowhere_is_an_error_not_the_sample() {
    let nowhere = Path::new("/does/not/exist");
    check(
        &[("PS_MNIST_DIR", nowhere), ("PS_OFFLINE", Path::new("1"))],
        &["MNIST: cannot read the data directory /does/not/exist"],
    );
}

#[test]
fn an_empty_directory_variable_counts_as_unset() {
    check(
        &[
            ("PS_MNIST_DIR", Path::new("")),
            ("PS_OFFLINE", Path::new("1")),
        ],
        &["MNIST: 4000 from bundled sample"],
    );
}

#[test]
#[ignore = "runs as a child of the tests above"]
fn child_process() {
    if std::env::var_os("PS_DATA_TEST_CHILD").is_none() {
        return;
    }
    let options = MnistOptions::default();
    match Mnist::load(&options) {
        Ok(mnist) => println!("MNIST: {} from {}", mnist.train.len(), mnist.source),
        Err(error) => println!("MNIST: {error}"),
    }
    match FashionMnist::load(&options) {
        Ok(fashion) => println!(
            "FashionMNIST: {} from {}",
            fashion.train.len(),
            fashion.source
        ),
        Err(error) => println!("FashionMNIST: {error}"),
    }
}
