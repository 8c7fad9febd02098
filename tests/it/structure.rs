//! PS-6: each actor that other processes can call is in a fuzz target.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each actor type with messages for other processes, and the file with its fuzz target. The target itself
/// fails if it never sends one of the messages.
const TARGETS: [(&str, &str); 9] = [
    ("DataWorker", "ps-actors/src/server/fuzz.rs"),
    ("DriverAgent", "ps-runtime/src/cluster/tests/fuzz.rs"),
    ("KeptResults", "ps-runtime/src/cluster/tests/fuzz.rs"),
    ("Monitor", "src/chaos/fuzz.rs"),
    ("NodeAgent", "ps-runtime/src/cluster/tests/fuzz.rs"),
    ("Owned", "ps-runtime/src/cluster/tests/fuzz.rs"),
    ("ParameterServer", "ps-actors/src/server/fuzz.rs"),
    ("PartServer", "tests/it/served/fuzz.rs"),
    ("Probe", "src/cli/doctor/probe.rs"),
];

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let is_test = path.file_stem().is_some_and(|name| name == "tests");
        match path.is_dir() {
            _ if is_test => {}
            true => sources(&path, found),
            false => found.push(path),
        }
    }
}

/// The types that implement `Remote` in a file, by their names. Examples in comments do not count.
fn remote_types(text: &str) -> impl Iterator<Item = String> {
    let impls = text.lines().filter(|line| line.starts_with("impl"));
    impls.filter_map(|line| {
        let (_, name) = line.split_once(" Remote for ")?;
        let end = name.find(|c: char| !c.is_alphanumeric())?;
        Some(name[..end].to_owned())
    })
}

#[test]
fn each_actor_that_other_processes_can_call_is_in_a_fuzz_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for directory in ["src", "ps-runtime/src", "ps-actors/src"] {
        sources(&root.join(directory), &mut files);
    }
    let texts = files.iter().map(|path| fs::read_to_string(path).unwrap());
    let found: BTreeSet<String> = texts.flat_map(|text| remote_types(&text).collect::<Vec<_>>()).collect();
    let targets = BTreeMap::from(TARGETS);
    let listed: BTreeSet<String> = targets.keys().map(ToString::to_string).collect();
    assert_eq!(found, listed, "`impl Remote` and the list of fuzz targets differ");
    for (actor, file) in targets {
        let text = fs::read_to_string(root.join(file)).unwrap();
        let sends = [format!("sent::<{actor},"), format!("sent::<{actor}<")];
        let is_sent = sends.iter().any(|send| text.contains(send.as_str()));
        assert!(is_sent && text.contains(".run"), "{file} sends nothing to {actor}");
    }
}
