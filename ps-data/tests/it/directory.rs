//! Directories named by the user: used or refused, never skipped.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use ps_data::{DataError, DataSource, FashionMnist, Mnist, MnistOptions};

const TRAIN_IMAGES: &str = "train-images-idx3-ubyte";
const NAMES: [&str; 4] = [
    TRAIN_IMAGES,
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
];

/// A copy of the sample's files that a test may damage.
fn copy_of_sample() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("temporary directory");
    for name in NAMES {
        let name = format!("{name}.gz");
        fs::copy(sample().join(&name), directory.path().join(&name)).expect("writable");
    }
    directory
}

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("sample")
}

fn load(directory: &Path) -> Result<Mnist, DataError> {
    Mnist::load(&MnistOptions {
        directory: Some(directory.to_owned()),
        ..Default::default()
    })
}

/// Message and sources in one line.
fn message(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", message(source)),
        None => error.to_string(),
    }
}

/// Expects an error that names `path` and contains `complaint`.
fn check(directory: &Path, path: &Path, complaint: &str) {
    let error = load(directory).expect_err(complaint);
    let message = message(&error);
    assert!(message.contains(path.to_str().expect("UTF-8")), "{message}");
    assert!(message.contains(complaint), "{message}");
}

#[test]
fn uncompressed_files_are_read_too() {
    let directory = copy_of_sample();
    for name in NAMES {
        let compressed = directory.path().join(format!("{name}.gz"));
        let mut content = Vec::new();
        let file = fs::File::open(&compressed).expect("copied");
        GzDecoder::new(file)
            .read_to_end(&mut content)
            .expect("valid");
        fs::write(directory.path().join(name), content).expect("writable");
        fs::remove_file(compressed).expect("removable");
    }
    let mnist = load(directory.path()).expect("valid");
    assert_eq!((mnist.train.len(), mnist.test.len()), (4000, 1000));
    assert_eq!(
        mnist.source,
        DataSource::Directory(directory.path().to_owned())
    );
}

#[test]
fn fashion_mnist_is_read_by_the_same_loader_with_its_own_normalization() {
    let directory = copy_of_sample();
    let options = MnistOptions {
        directory: Some(directory.path().to_owned()),
        ..Default::default()
    };
    let fashion = FashionMnist::load(&options).expect("the same format");
    assert_eq!(fashion.train.normalization().mean, 0.2860);
    assert_eq!(
        fashion.source,
        DataSource::Directory(directory.path().to_owned())
    );
}

#[test]
fn a_directory_that_cannot_be_read_is_an_error_with_its_path() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = directory.path().join("file");
    fs::write(&file, "not a directory").expect("writable");
    for path in [directory.path().join("none"), file] {
        check(&path, &path, "cannot read the data directory");
    }
}

#[test]
fn a_missing_file_is_an_error_with_its_name() {
    for name in NAMES {
        let directory = copy_of_sample();
        let directory = directory.path();
        fs::remove_file(directory.join(format!("{name}.gz"))).expect("removable");
        let complaint = format!("has neither {name} nor {name}.gz");
        check(directory, directory, &complaint);
    }
}

#[test]
fn damaged_files_are_errors_with_their_path() {
    let images = format!("{TRAIN_IMAGES}.gz");
    let whole = fs::read(sample().join(&images)).expect("committed");
    let damaged: [(&[u8], &str); 4] = [
        (&whole[..whole.len() / 2], "gzip stream"),
        (b"", "header of 16 bytes, found 0"),
        (b"<html>404 - not found</html>", "expected magic number"),
        (
            &[0, 0, 8, 3, 255, 255, 255, 255, 0, 0, 0, 28, 0, 0, 0, 28],
            "limit of 1000000",
        ),
    ];
    for (content, complaint) in damaged {
        let directory = copy_of_sample();
        fs::write(directory.path().join(&images), content).expect("writable");
        check(directory.path(), &directory.path().join(&images), complaint);
    }
}

#[test]
fn images_and_labels_of_different_number_are_an_error() {
    let directory = copy_of_sample();
    let path = |name: &str| directory.path().join(format!("{name}.gz"));
    fs::copy(
        path("t10k-labels-idx1-ubyte"),
        path("train-labels-idx1-ubyte"),
    )
    .expect("writable");
    let error = load(directory.path()).expect_err("4000 is not 1000");
    let message = error.to_string();
    assert!(message.contains("holds 4000 images"), "{message}");
    assert!(message.contains("holds 1000 labels"), "{message}");
}

#[test]
fn a_directory_in_place_of_a_file_is_an_error() {
    let directory = copy_of_sample();
    let images = format!("{TRAIN_IMAGES}.gz");
    fs::remove_file(directory.path().join(&images)).expect("removable");
    fs::create_dir(directory.path().join(&images)).expect("writable");
    check(
        directory.path(),
        &directory.path().join(&images),
        "not a regular file",
    );
}
