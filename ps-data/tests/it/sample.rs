//! The bundled sample is what `sample/README.md` says.

use std::path::Path;

use ps_data::{DataSource, Mnist, MnistOptions, Split};
use sha2::{Digest, Sha256};

fn histogram(labels: &[u8]) -> [usize; 10] {
    let mut counts = [0; 10];
    labels
        .iter()
        .for_each(|&label| counts[usize::from(label)] += 1);
    counts
}

#[test]
fn the_sample_holds_equally_many_images_of_each_digit() {
    let mnist = Mnist::bundled_sample();
    assert_eq!(histogram(mnist.train.labels()), [400; 10]);
    assert_eq!(histogram(mnist.split(Split::Test).labels()), [100; 10]);
    for data in [&mnist.train, &mnist.test] {
        assert_eq!((data.dims(), data.num_classes()), ([1, 28, 28], 10));
    }
    assert!(matches!(mnist.source, DataSource::BundledSample { .. }));
}

/// The published mean and standard deviation are those of all 60,000 training images; 4,000 of
/// them, and not quite in the original proportion of digits, come within one percent.
#[test]
fn the_sample_is_normalized_to_mean_zero_and_deviation_one() {
    let train = Mnist::bundled_sample().train;
    let all: Vec<usize> = (0..train.len()).collect();
    let images = train.batch(&all).images;
    let count = images.len() as f64;
    let mean = images.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    let squares = images.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>();
    let deviation = (squares / count - mean * mean).sqrt();
    assert!(mean.abs() < 0.01, "{mean}");
    assert!((deviation - 1.0).abs() < 0.01, "{deviation}");
}

#[test]
fn the_sample_files_can_be_loaded_as_a_directory() {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample");
    let options = MnistOptions {
        directory: Some(sample.clone()),
        ..Default::default()
    };
    let loaded = Mnist::load(&options).expect("valid files");
    assert_eq!(loaded.source, DataSource::Directory(sample));
    let bundled = Mnist::bundled_sample();
    for (a, b) in [(loaded.train, bundled.train), (loaded.test, bundled.test)] {
        assert_eq!(a.labels(), b.labels());
        assert!((0..a.len()).all(|index| a.image(index) == b.image(index)));
    }
}

/// Guards the files against accidents; after a deliberate change take the new values from the
/// failure.
#[test]
fn the_sample_files_are_the_committed_ones() {
    let sample = Path::new(env!("CARGO_MANIFEST_DIR")).join("sample");
    for (name, expected) in SHA256 {
        let file = std::fs::read(sample.join(name)).expect("committed");
        let digest: [u8; 32] = Sha256::digest(file).into();
        let found = digest.map(|byte| format!("{byte:02x}")).concat();
        assert_eq!(found, expected, "{name}");
    }
}

const SHA256: [(&str, &str); 4] = [
    (
        "t10k-images-idx3-ubyte.gz",
        "103ba106b8b07cc1b092877935b4ddcd617d32102c6eb71d9401b5bb5005c437",
    ),
    (
        "t10k-labels-idx1-ubyte.gz",
        "9ed1dc30e9f5d567f384bf438faae9743c15b59ed73cd27524d3b16ac9f3314b",
    ),
    (
        "train-images-idx3-ubyte.gz",
        "cb5b922f77f1007d9aa1b0afe76dd7ebe8452feac9956d63dc2dfb4f1ef4ba9d",
    ),
    (
        "train-labels-idx1-ubyte.gz",
        "45d4ad6c57f37ea3b6940ed61c545f0e996d154d8b493c9c82b4860f3e242081",
    ),
];
