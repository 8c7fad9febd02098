//! A training as a trace for Perfetto.

use std::path::Path;

use ps::prelude::*;
use ps::trace::Trace;
use serde_json::Value;

fn trained(file: &Path) -> String {
    let device = select_device(default_device_name()).unwrap();
    Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
        .device(&device)
        .workers(2)
        .servers(2)
        .batch_size(8)
        .consistency(Consistency::Asp)
        .iterations(5)
        .observe(Trace::new(file))
        .run()
        .unwrap();
    std::fs::read_to_string(file).unwrap()
}

#[test]
fn each_step_is_there_with_its_parts_and_the_update_that_it_made() {
    let directory = tempfile::tempdir().unwrap();
    let text = trained(&directory.path().join("run.json"));
    let entries: Vec<Value> = serde_json::from_str(&text).unwrap();
    let slices = |name: &str| {
        let is_it = |entry: &&Value| {
            entry["ph"] == "X" && entry["name"].as_str().unwrap_or("").starts_with(name)
        };
        entries.iter().filter(is_it).collect::<Vec<_>>()
    };
    for part in ["step ", "batch", "compute", "send", "receive"] {
        assert_eq!(slices(part).len(), 10, "{part}");
    }
    // At both servers.
    for part in ["gradient ", "version "] {
        assert_eq!(slices(part).len(), 2 * 10, "{part}");
    }
    let (mut parts, mut whole) = (0.0, 0.0);
    for part in ["batch", "compute", "send", "the servers hold it", "receive"] {
        parts += slices(part)
            .iter()
            .map(|one| one["dur"].as_f64().unwrap())
            .sum::<f64>();
    }
    whole += slices("step ")
        .iter()
        .map(|one| one["dur"].as_f64().unwrap())
        .sum::<f64>();
    // Each of 50 numbers is rounded to a thousandth of a microsecond.
    assert!((parts - whole).abs() < 0.1, "{parts} {whole}");
    for phase in ["s", "t", "f"] {
        let arrows = entries.iter().filter(|entry| entry["ph"] == phase).count();
        assert_eq!(arrows, 2 * 10, "{phase}");
    }
}

/// A process that dies leaves a file without an end.
#[test]
fn a_file_without_an_end_has_whole_lines_until_the_last_one() {
    let directory = tempfile::tempdir().unwrap();
    let text = trained(&directory.path().join("run.json"));
    let cut = &text[..text.len() / 2];
    let lines: Vec<&str> = cut.lines().collect();
    assert_eq!(lines[0], "[");
    for line in &lines[1..lines.len() - 1] {
        let entry: Value = serde_json::from_str(line.trim_end_matches(',')).unwrap();
        assert!(entry["ph"].is_string(), "{line}");
    }
}

/// Only the trace is missing then.
#[test]
fn a_training_goes_on_without_a_trace_that_cannot_be_written() {
    let device = select_device(default_device_name()).unwrap();
    let report = Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
        .device(&device)
        .iterations(2)
        .observe(Trace::new(Path::new("/dev/null/run.json")))
        .run()
        .unwrap();
    assert_eq!(report.num_applied, 2);
}
