//! What a reader of the sources relies on: each actor that other processes can call is in a fuzz target (PS-6), and
//! each numbered claim is quoted by a test.

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

/// All Rust files below some directories of this workspace.
fn sources(directories: &[&str]) -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut directories: Vec<PathBuf> = directories.iter().map(|name| root.join(name)).collect();
    let mut found = Vec::new();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => directories.push(path),
                false if path.extension().is_some_and(|end| end == "rs") => found.push(path),
                false => {}
            }
        }
    }
    found
}

/// Whether a file is nothing but tests.
fn is_test(path: &Path) -> bool {
    let names = path.iter().map(|name| name.to_string_lossy());
    names
        .rev()
        .take(4)
        .any(|name| ["tests", "tests.rs", "fuzz.rs", "lending.rs"].contains(&&*name))
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
    let files = sources(&["src", "ps-runtime/src", "ps-actors/src"]);
    let product = files.iter().filter(|path| !is_test(path));
    let texts = product.map(|path| fs::read_to_string(path).unwrap());
    let found: BTreeSet<String> = texts
        .flat_map(|text| remote_types(&text).collect::<Vec<_>>())
        .collect();
    let targets = BTreeMap::from(TARGETS);
    let listed: BTreeSet<String> = targets.keys().map(ToString::to_string).collect();
    assert_eq!(
        found, listed,
        "`impl Remote` and the list of fuzz targets differ"
    );
    for (actor, file) in targets {
        let text = fs::read_to_string(root.join(file)).unwrap();
        let sends = [format!("sent::<{actor},"), format!("sent::<{actor}<")];
        let is_sent = sends.iter().any(|send| text.contains(send.as_str()));
        assert!(
            is_sent && text.contains(".run"),
            "{file} sends nothing to {actor}"
        );
    }
}

/// The module of tests in a file, up to the file's end. Empty if there is none, or if it is a file of its own.
fn tests_in(text: &str) -> &str {
    let mut pieces = text.split_inclusive("#[cfg(test)]\n");
    let mut end = pieces.next().map_or(0, str::len);
    for behind in pieces {
        let item = behind.lines().find(|line| !line.starts_with("#["));
        // Anything else is product code that only tests need, and more product code may follow.
        if item.is_some_and(|item| item.contains("mod ") && item.ends_with('{')) {
            return &text[end..];
        }
        end += behind.len();
    }
    ""
}

#[test]
fn comments_of_product_code_are_no_tests() {
    let product = "#[cfg(test)]\nmod tests;\n/// PS-1\nfn product() {}\n    #[cfg(test)]\n    fn shown() {}\n";
    assert_eq!(tests_in(product), "");
    let tests = "#[expect(unused)]\npub(crate) mod tests {\n    /// PS-2\n}\n";
    let text = format!("{product}#[cfg(test)]\n{tests}");
    assert_eq!(tests_in(&text), tests);
}

#[test]
fn each_claim_is_quoted_by_a_test() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = ["runtime", "parameter-server"].map(|page| {
        let path = root.join(format!("docs/semantics/{page}.md"));
        fs::read_to_string(path).unwrap()
    });
    let claims = pages.iter().flat_map(|page| page.lines());
    let claims = claims.filter_map(|line| line.strip_prefix("### ")?.split(' ').next());
    let claims: BTreeSet<&str> = claims.filter(|claim| claim.contains('-')).collect();
    assert!(claims.len() > 60, "only {claims:?}");
    let mut quoted = BTreeSet::new();
    for path in sources(&["src", "tests", "ps-runtime", "ps-actors", "ps-model"]) {
        // It quotes numbers to test itself.
        if path.ends_with(file!()) {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        let tests = match is_test(&path) {
            true => &text,
            false => tests_in(&text),
        };
        let words = tests.split(|c: char| !c.is_alphanumeric() && c != '-');
        quoted.extend(
            words
                .filter(|word| claims.contains(word))
                .map(str::to_owned),
        );
    }
    let claims: BTreeSet<String> = claims.into_iter().map(str::to_owned).collect();
    let missing: Vec<&String> = claims.difference(&quoted).collect();
    assert!(missing.is_empty(), "no test quotes {missing:?}");
}
