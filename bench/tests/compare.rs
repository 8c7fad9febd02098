//! Runs the whole comparison, our side only and as short as can be.
#![cfg(target_os = "linux")] // Memory is read from `/proc`.

use std::process::Command;

use ps::prelude::default_device_name;
use serde_json::Value;

#[test]
fn our_side_runs_and_writes_its_results() {
    let out = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_compare"))
        .args(["--quick", "--runs", "1", "--only", "ps", "--out"])
        .arg(out.path())
        .env("PS_OFFLINE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");

    let read = |name| std::fs::read_to_string(out.path().join(name)).unwrap();
    let json: Value = serde_json::from_str(&read("results.json")).unwrap();
    let works = json["works"].as_array().unwrap();
    assert_eq!(works.len(), 3);
    for (work, key) in works.iter().zip([
        "gradients_per_second",
        "gradients_per_second",
        "call_p50_ms",
    ]) {
        for contender in work["contenders"].as_array().unwrap() {
            let median = &contender["summaries"][key]["median"];
            assert!(median.as_f64().unwrap() > 0.0, "{contender}");
            let memory = &contender["summaries"]["peak_mb"]["median"];
            assert!(memory.as_f64().unwrap() > 1.0, "{contender}");
        }
    }
    let ours = format!("| **ps, {}: one process, bsp** |", default_device_name());
    assert!(read("results.md").contains(&ours));
    assert!(read("results.svg").contains("</svg>"));
}

#[test]
fn wrong_settings_are_refused() {
    for (arguments, said) in [
        (["--runs", "0"], "at least 1"),
        (["--seconds", "-1"], "unexpected argument"),
        (["--seconds", "nan"], "above 0"),
        (["--works", "sleep"], "invalid value"),
    ] {
        let mut compare = Command::new(env!("CARGO_BIN_EXE_compare"));
        let output = compare.args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && errors.contains(said),
            "{errors}"
        );
    }
}
