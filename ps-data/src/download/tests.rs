//! Downloads from servers on 127.0.0.1, in place of the mirrors.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier, Mutex};

use indicatif::{ProgressDrawTarget, TermLike};
use sha2::{Digest, Sha256};

use super::server::{Answer, TestServer};
use super::*;
use crate::load::{Environment, load};
use crate::spec::{Checksum, MNIST_SAMPLE, Pair, Sample};
use crate::{DataSource, Normalization};

/// A data set of 3 training and 2 test images.
const NAMES: [&str; 4] = ["a-images", "a-labels", "b-images", "b-labels"];

fn content(name: &str) -> Vec<u8> {
    let count = if name.starts_with('a') { 3u32 } else { 2 };
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_be_bytes()).collect();
    let (header, body): (Vec<u8>, _) = match name.ends_with("images") {
        true => (
            words(&[0x0803, count, 28, 28]),
            vec![count as u8; count as usize * 784],
        ),
        false => (words(&[0x0801, count]), vec![7; count as usize]),
    };
    [header, body].concat()
}

/// Checksums of the uncompressed content, as MNIST has, or of the file sent, as FashionMNIST has.
fn spec(by_content: bool, sample: Option<&'static Sample>) -> Spec {
    let file = |name: &'static str| {
        let digest: [u8; 32] = Sha256::digest(content(name)).into();
        DataFile {
            name,
            checksum: match by_content {
                true => Checksum::Content(digest),
                // The server sends the files uncompressed: the loader goes by content, not name.
                false => Checksum::Gzip(digest),
            },
        }
    };
    let pair = |images, labels| Pair {
        images: file(images),
        labels: file(labels),
    };
    Spec {
        name: "Tiny",
        folder: "tiny",
        torchvision: "Tiny",
        variable: "TINY_DIR",
        mirrors: &["http://127.0.0.1:9/unused"],
        normalization: Normalization::UNIT,
        train: pair(NAMES[0], NAMES[1]),
        test: pair(NAMES[2], NAMES[3]),
        sample,
    }
}

/// Answers with the right file, whatever the folder.
fn good(path: &str) -> Answer {
    let name = path
        .rsplit('/')
        .next()
        .and_then(|file| file.strip_suffix(".gz"));
    match name.filter(|name| NAMES.contains(name)) {
        Some(name) => Answer::body(content(name)),
        None => Answer::status(404),
    }
}

fn options(cache: &Path, mirrors: &[&TestServer]) -> MnistOptions {
    MnistOptions {
        cache_directory: Some(cache.to_owned()),
        mirrors: mirrors.iter().map(|server| server.url()).collect(),
        ..Default::default()
    }
}

fn cache() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("not yet/there");
    (directory, path)
}

/// Names in the cache that are neither the data nor the lock.
fn leftovers(cache: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(cache).expect("the cache");
    let names = entries.map(|entry| entry.expect("entry").file_name().into_string());
    names
        .map(|name| name.expect("UTF-8"))
        .filter(|name| name != ".lock" && !NAMES.iter().any(|n| *name == format!("{n}.gz")))
        .collect()
}

#[test]
fn missing_files_are_downloaded_once_and_cached() {
    for by_content in [true, false] {
        let (_guard, cache) = cache();
        let (spec, server) = (spec(by_content, None), TestServer::start(good));
        let options = options(&cache, &[&server]);
        let environment = Environment::default();
        let (train, test, source) = load(&spec, &options, &environment).expect("downloads");
        assert_eq!((train.len(), test.len()), (3, 2));
        assert_eq!((train.image(2)[783], test.label(1)), (3, 7));
        assert_eq!(source, DataSource::Downloaded(cache.clone()));
        assert_eq!(server.requests().len(), 4);

        let (_, _, source) = load(&spec, &options, &environment).expect("cached");
        assert_eq!(source, DataSource::Cache(cache.clone()));
        assert_eq!(server.requests().len(), 4);
        assert!(leftovers(&cache).is_empty());
    }
}

/// Each kind of bad mirror in front of a good one; then bad ones alone.
#[test]
fn a_bad_mirror_is_passed_over_and_named_when_none_is_good() {
    type Handler = fn(&str) -> Answer;
    let bad: [(Handler, &str); 7] = [
        (|_| Answer::status(404), "404"),
        (|_| Answer::status(500), "500"),
        (
            |_| Answer::body(b"<html>please log in</html>".to_vec()),
            "damaged file: expected magic",
        ),
        (
            |path| Answer::body(good(path).body[..9].to_vec()),
            "damaged file",
        ),
        (
            |path| Answer {
                length: Some(100_000),
                ..good(path)
            },
            "",
        ),
        (
            |path| {
                let mut answer = good(path);
                *answer.body.last_mut().expect("a body") ^= 1;
                answer
            },
            "SHA-256",
        ),
        (
            |_| Answer {
                hang_up: true,
                ..Answer::status(200)
            },
            "",
        ),
    ];
    for (index, (handler, complaint)) in bad.into_iter().enumerate() {
        let (_guard, cache) = cache();
        let (bad, good) = (TestServer::start(handler), TestServer::start(good));
        let alone = options(&cache, &[&bad]);
        let error = fetch(&spec(true, None), &cache, &alone).expect_err("no good mirror");
        let error = error.to_string();
        let expected = format!("cannot download a-labels.gz: {}/a-labels.gz: ", bad.url());
        assert!(error.starts_with(&expected), "{index}: {error}");
        assert!(
            error[expected.len()..].contains(complaint),
            "{index}: {error}"
        );
        assert!(!cache.join("a-labels.gz").exists(), "{index}");

        let both = options(&cache, &[&bad, &good]);
        assert_eq!(
            fetch(&spec(true, None), &cache, &both).expect("one is good"),
            4
        );
        // The good mirror moves to the front, so the bad one is asked only once more.
        assert_eq!(
            (bad.requests().len(), good.requests().len()),
            (2, 4),
            "{index}"
        );
        assert!(leftovers(&cache).is_empty(), "{index}");
    }
}

#[test]
fn only_missing_and_damaged_files_are_fetched() {
    let (_guard, cache) = cache();
    let (spec, server) = (spec(true, None), TestServer::start(good));
    let options = options(&cache, &[&server]);
    fetch(&spec, &cache, &options).expect("downloads");
    std::fs::remove_file(cache.join("a-images.gz")).expect("removable");
    std::fs::write(cache.join("b-labels.gz"), b"torn").expect("writable");
    let loaded = load(&spec, &options, &Environment::default()).expect("repairs the cache");
    assert_eq!(loaded.2, DataSource::Downloaded(cache.clone()));
    assert_eq!(server.requests()[4..], ["/b-labels.gz", "/a-images.gz"]);
}

#[test]
fn leftovers_of_killed_processes_are_removed_and_do_no_harm() {
    let (_guard, cache) = cache();
    std::fs::create_dir_all(&cache).expect("writable");
    std::fs::write(cache.join(".download-Xy12ab.part"), b"half").expect("writable");
    std::fs::write(cache.join(".lock"), b"").expect("writable");
    std::fs::write(cache.join("notes.txt"), b"the user's").expect("writable");
    let server = TestServer::start(good);
    let fetched = fetch(&spec(true, None), &cache, &options(&cache, &[&server]));
    assert_eq!(fetched.expect("downloads"), 4);
    assert_eq!(leftovers(&cache), ["notes.txt"]);
}

#[test]
fn of_many_threads_at_once_one_downloads() {
    let (_guard, cache) = cache();
    let (spec, server) = (spec(true, None), TestServer::start(good));
    let options = options(&cache, &[&server]);
    let start = Barrier::new(6);
    let sources: Vec<DataSource> = std::thread::scope(|scope| {
        let run = || {
            start.wait();
            load(&spec, &options, &Environment::default())
                .expect("loads")
                .2
        };
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(run)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    let downloaded = DataSource::Downloaded(cache);
    assert_eq!(
        sources.iter().filter(|&s| *s == downloaded).count(),
        1,
        "{sources:?}"
    );
    assert_eq!(server.requests().len(), 4);
}

/// Starts this test program four times, each running `child_process` below.
#[test]
fn of_many_processes_at_once_one_downloads() {
    let (_guard, cache) = cache();
    let server = TestServer::start(good);
    let program = std::env::current_exe().expect("a path");
    let children: Vec<_> = (0..4)
        .map(|_| {
            Command::new(&program)
                .args(["--exact", "download::tests::child_process"])
                .args(["--ignored", "--nocapture"])
                .env("PS_DATA_TEST_CACHE", &cache)
                .env("PS_DATA_TEST_MIRROR", server.url())
                .stdout(Stdio::piped())
                .spawn()
                .expect("starts")
        })
        .collect();
    let mut downloads = 0;
    for child in children {
        let output = child.wait_with_output().expect("ends");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("fetched "),
            "{text}"
        );
        downloads += usize::from(text.contains("fetched 4"));
    }
    assert_eq!((downloads, server.requests().len()), (1, 4));
}

#[test]
#[ignore = "runs as a child of of_many_processes_at_once_one_downloads"]
#[allow(clippy::print_stdout, reason = "the parent reads it")]
fn child_process() {
    let Some(cache) = std::env::var_os("PS_DATA_TEST_CACHE").map(PathBuf::from) else {
        return;
    };
    let options = MnistOptions {
        mirrors: vec![std::env::var("PS_DATA_TEST_MIRROR").expect("set with the cache")],
        ..Default::default()
    };
    let fetched = fetch(&spec(true, None), &cache, &options).expect("downloads or waits");
    println!("fetched {fetched}");
}

#[test]
fn a_lock_held_for_too_long_is_an_error() {
    let (_guard, cache) = cache();
    std::fs::create_dir_all(&cache).expect("writable");
    let _held = lock(&cache, Instant::now(), Duration::ZERO).expect("free");
    let server = TestServer::start(good);
    let options = MnistOptions {
        download_timeout: Duration::from_millis(120),
        ..options(&cache, &[&server])
    };
    let error = fetch(&spec(true, None), &cache, &options).expect_err("locked");
    assert!(matches!(error, DataError::Locked { .. }), "{error}");
    assert!(server.requests().is_empty());
}

#[test]
fn endless_timeouts_are_accepted() {
    let (_guard, cache) = cache();
    let server = TestServer::start(good);
    let options = MnistOptions {
        connect_timeout: Duration::MAX,
        download_timeout: Duration::MAX,
        ..options(&cache, &[&server])
    };
    assert_eq!(
        fetch(&spec(true, None), &cache, &options).expect("downloads"),
        4
    );
}

#[test]
fn a_silent_mirror_is_given_up_at_the_deadline() {
    let (_guard, cache) = cache();
    let silent = TestServer::start(|_| Answer {
        silent: true,
        ..Answer::status(200)
    });
    let options = MnistOptions {
        download_timeout: Duration::from_millis(150),
        ..options(&cache, &[&silent])
    };
    let error = fetch(&spec(true, None), &cache, &options).expect_err("silent");
    assert!(error.to_string().contains("timeout"), "{error}");
}

#[test]
fn offline_never_asks_a_mirror() {
    let (_guard, cache) = cache();
    let server = TestServer::start(good);
    let given = options(&cache, &[&server]);
    let by_option = MnistOptions {
        offline: true,
        ..given.clone()
    };
    let by_environment = Environment {
        offline: true,
        ..Environment::default()
    };
    for (options, environment) in [(by_option, Environment::default()), (given, by_environment)] {
        let error = load(&spec(true, None), &options, &environment).expect_err("no data");
        let message = chain(&error);
        assert!(message.starts_with("Tiny is not available and downloading is switched off"));
        assert!(
            message.contains("set TINY_DIR") && message.contains("a-labels"),
            "{message}"
        );
    }
    assert!(server.requests().is_empty());
    assert!(!cache.exists());
}

/// Port 9 of loopback, where nobody listens, stands for a machine without network.
#[test]
fn a_failed_download_falls_back_to_the_sample_and_says_why() {
    let (_guard, cache) = cache();
    let options = MnistOptions {
        cache_directory: Some(cache.clone()),
        ..Default::default()
    };
    let spec = spec(true, Some(&MNIST_SAMPLE));
    let (train, _, source) = load(&spec, &options, &Environment::default()).expect("the sample");
    assert_eq!(train.len(), 4000);
    let line = source.to_string();
    let expected = "bundled sample of the real data (cannot download a-labels.gz: http://127.0.0.1";
    assert!(line.starts_with(expected), "{line}");
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    let server = TestServer::start(good);
    let options = options(file.path(), &[&server]);
    let error = fetch(&spec(true, None), file.path(), &options).expect_err("a file, no directory");
    assert!(
        error
            .to_string()
            .contains(file.path().to_str().expect("UTF-8")),
        "{error}"
    );
}

/// A terminal of 80 columns: all that was written to it, with a line break instead of each move of the cursor.
#[derive(Clone, Debug, Default)]
struct Terminal(Arc<Mutex<String>>);

impl Terminal {
    fn write(&self, text: &str) -> io::Result<()> {
        self.0.lock().expect("no panic").push_str(text);
        Ok(())
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        80
    }

    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        self.write("\n")
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        self.write("\n")
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        self.write("\n")
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        self.write("\n")
    }

    fn write_line(&self, line: &str) -> io::Result<()> {
        self.write(line)?;
        self.write("\n")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.write(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write("\n")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

/// A log line erases the line of the bar, but no second one.
#[test]
fn the_bar_is_one_line() {
    let terminal = Terminal::default();
    let target = ProgressDrawTarget::term_like(Box::new(terminal.clone()));
    let bar = with_template(ProgressBar::with_draw_target(Some(26_421_880), target));
    let bar = bar.with_message("train-images-idx3-ubyte");
    for _ in 0..20 {
        bar.inc(1_234_567);
        bar.tick();
    }
    let written = terminal.0.lock().expect("no panic").clone();
    let lines: Vec<&str> = written.lines().filter(|line| !line.is_empty()).collect();
    assert!(lines.len() > 1, "{written:?}");
    for line in lines {
        assert!(line.starts_with('[') && line.len() <= 80, "{line:?}");
        assert!(line.contains("train-images"), "{line:?}");
    }
}
