//! Which part of the crate may use which: arrows point down only.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each part, after those that it may use. Tests inside of a part may use anything.
const PARTS: [(&str, &[&str]); 12] = [
    ("deadline", &[]),
    ("sync", &[]),
    ("busy_poll", &[]),
    ("parallel", &[]),
    ("launch", &[]),
    ("buffer", &["parallel"]),
    ("schema", &[]),
    ("codec", &["buffer", "parallel", "schema"]),
    // Knows no network.
    ("actor", &["busy_poll", "deadline", "sync"]),
    // Knows no actor.
    (
        "net",
        &["buffer", "busy_poll", "codec", "deadline", "parallel"],
    ),
    (
        "remote",
        &["actor", "buffer", "codec", "deadline", "net", "schema"],
    ),
    (
        "cluster",
        &["actor", "codec", "launch", "net", "remote", "schema"],
    ),
];

/// The files of a part that are in the product.
fn files(path: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(path).expect("the sources are there") {
        let path = entry.expect("the sources are there").path();
        let name = path.file_stem().expect("it has a name");
        // Whole files of tests.
        if ["tests", "lending", "fuzz"]
            .iter()
            .any(|tests| name == *tests)
        {
            continue;
        }
        match path.is_dir() {
            true => files(&path, found),
            false => found.push(path),
        }
    }
}

/// The lines of a file without its tests. They are at its end, or in a file of their own.
fn product(text: &str) -> Vec<&str> {
    let is_test = |line: &str| {
        line.starts_with("#[cfg(") && line.contains("test") && !line.contains("feature")
    };
    let mut lines = text.lines();
    let mut product = Vec::new();
    while let Some(line) = lines.next() {
        if !is_test(line) {
            product.push(line);
            continue;
        }
        // `mod tests;`, or a `use` of one: only this item is left out.
        let item = lines.by_ref().find(|line| !line.starts_with("#["));
        if !item.is_some_and(|item| item.ends_with(';')) {
            break;
        }
    }
    product
}

#[test]
fn code_behind_a_module_of_tests_in_another_file_is_checked() {
    let text = "use crate::net;\n#[cfg(test)]\nmod tests;\nuse crate::actor;\n#[cfg(test)]\nmod more {\nuse crate::codec;\n";
    assert_eq!(used(text), ["actor", "net"].map(str::to_owned).into());
}

/// The parts that a file's product code uses.
fn used(text: &str) -> BTreeSet<String> {
    let lines = product(text).into_iter();
    let code = lines.filter(|line| !line.trim_start().starts_with("//"));
    let mut used = BTreeSet::new();
    for line in code {
        for path in line.split("crate::").skip(1) {
            let end = path.find(|c: char| !(c.is_alphanumeric() || c == '_'));
            used.insert(path[..end.unwrap_or(path.len())].to_owned());
        }
    }
    used
}

#[test]
fn no_part_uses_one_that_is_built_on_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let names: BTreeSet<&str> = PARTS.iter().map(|(part, _)| *part).collect();
    let mut above: BTreeMap<&str, usize> = BTreeMap::new();
    for (index, (part, allowed)) in PARTS.iter().enumerate() {
        above.insert(part, index);
        for below in *allowed {
            assert!(above[below] < index, "{part} is listed before {below}");
        }
        let mut found = Vec::new();
        let directory = root.join(part);
        let file = root.join(format!("{part}.rs"));
        if directory.is_dir() {
            files(&directory, &mut found);
        }
        found.extend(file.is_file().then_some(file));
        assert!(!found.is_empty(), "there is no {part}");
        for path in found {
            let text = fs::read_to_string(&path).expect("the sources are text");
            for other in used(&text) {
                let is_part = names.contains(&*other);
                let is_allowed = !is_part || other == *part || allowed.contains(&&*other);
                assert!(is_allowed, "{} uses {other}", path.display());
            }
        }
    }
}
