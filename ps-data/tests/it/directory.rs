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
        "it is a directory",
    );
}

/// Moves the sample's files to where and how other programs keep them.
fn check_place(place: impl Fn(&str) -> PathBuf) {
    let directory = copy_of_sample();
    for name in NAMES {
        let from = directory.path().join(format!("{name}.gz"));
        let to = directory.path().join(place(name));
        let unpacked = fs::read(&from).expect("copied");
        fs::remove_file(from).expect("removable");
        fs::create_dir_all(to.parent().expect("in the directory")).expect("writable");
        fs::write(&to, unpacked).expect("writable");
    }
    let mnist = load(directory.path()).expect("found");
    assert_eq!((mnist.train.len(), mnist.test.len()), (4000, 1000));
}

#[test]
fn files_are_found_as_other_programs_keep_them() {
    let dotted = |name: &str| name.replace("-idx", ".idx");
    check_place(|name| dotted(name).into());
    check_place(|name| format!("{}.gz", dotted(name)).into());
    check_place(|name| format!("MNIST/raw/{name}").into());
    check_place(|name| format!("raw/{name}.gz").into());
    check_place(|name| format!("{name}/{name}").into());
    check_place(|name| format!("{0}/{0}", dotted(name)).into());
}

#[test]
fn each_data_set_has_its_own_folder_of_torchvisions() {
    let root = tempfile::tempdir().expect("temporary directory");
    let raw = root.path().join("FashionMNIST/raw");
    fs::create_dir_all(&raw).expect("writable");
    for name in NAMES.map(|name| format!("{name}.gz")) {
        fs::copy(sample().join(&name), raw.join(&name)).expect("writable");
    }
    let options = MnistOptions {
        directory: Some(root.path().to_owned()),
        ..Default::default()
    };
    FashionMnist::load(&options).expect("found");
    check(root.path(), root.path(), "it holds FashionMNIST");
}

#[test]
fn nothing_is_put_together_from_two_folders() {
    let directory = copy_of_sample();
    let raw = directory.path().join("MNIST/raw");
    fs::create_dir_all(&raw).expect("writable");
    let images = format!("{TRAIN_IMAGES}.gz");
    fs::rename(directory.path().join(&images), raw.join(&images)).expect("writable");
    let complaint = format!("has neither {TRAIN_IMAGES}");
    check(directory.path(), directory.path(), &complaint);
}

#[test]
fn an_error_lists_what_lies_there() {
    let directory = tempfile::tempdir().expect("temporary directory");
    check(directory.path(), directory.path(), "it holds nothing");
    for index in 10..22 {
        fs::write(directory.path().join(format!("{index}.png")), "").expect("writable");
    }
    check(directory.path(), directory.path(), "18.png, 19.png, 2 more");
}

/// Three images and their labels, as MNIST has them.
fn small_file(name: &str) -> Vec<u8> {
    if name.contains("images") {
        let header = [0x0803, 3, 28, 28].map(u32::to_be_bytes).concat();
        [header, vec![7; 3 * 784]].concat()
    } else {
        let header = [0x0801, 3].map(u32::to_be_bytes).concat();
        [header, vec![0, 9, 5]].concat()
    }
}

#[test]
fn damaged_directories_load_or_name_the_file() {
    for seed in 0..300_u64 {
        // Splitmix64: the same damage on every machine.
        let mut state = seed;
        let mut below = |limit: usize| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % limit as u64) as usize
        };
        let directory = tempfile::tempdir().expect("temporary directory");
        let damaged = directory.path().join(NAMES[below(4)]);
        for name in NAMES {
            fs::write(directory.path().join(name), small_file(name)).expect("writable");
        }
        let mut content = fs::read(&damaged).expect("written");
        match below(4) {
            0 => content.truncate(below(content.len())),
            1 => content.extend((0..=below(9)).map(|byte| byte as u8)),
            _ => {
                for _ in 0..=below(3) {
                    let index = below(content.len().min(20));
                    content[index] = below(256) as u8;
                }
            }
        }
        fs::write(&damaged, content).expect("writable");
        match load(directory.path()) {
            Ok(mnist) => assert_eq!((mnist.train.len(), mnist.test.len()), (3, 3), "seed {seed}"),
            Err(error) => {
                let told = message(&error);
                let path = damaged.to_str().expect("UTF-8");
                assert!(told.contains(path), "seed {seed}: {told}");
            }
        }
    }
}
