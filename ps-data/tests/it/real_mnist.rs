//! The full MNIST, where `PS_MNIST_DIR` names it.

use ps_data::{ImageDataset, Mnist, MnistOptions};

/// Loads the full data set, or says that the test is skipped.
fn real_mnist() -> Option<Mnist> {
    if std::env::var_os("PS_MNIST_DIR").is_none_or(|value| value.is_empty()) {
        println!("skipped: PS_MNIST_DIR does not name the full MNIST");
        return None;
    }
    Some(Mnist::load(&MnistOptions::default()).expect("PS_MNIST_DIR names the full MNIST"))
}

fn histogram(data: &ImageDataset) -> [usize; 10] {
    let mut counts = [0; 10];
    data.labels()
        .iter()
        .for_each(|&label| counts[usize::from(label)] += 1);
    counts
}

/// Counts as known for MNIST; the mean and deviation of the training pixels are those that the
/// normalization is made of, rounded to four digits.
#[test]
fn the_full_mnist_is_the_published_one() {
    let Some(mnist) = real_mnist() else { return };
    let train = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949];
    assert_eq!(histogram(&mnist.train), train);
    let test = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009];
    assert_eq!(histogram(&mnist.test), test);
    assert_eq!(mnist.train.labels()[..8], [5, 0, 4, 1, 9, 2, 1, 3]);
    assert_eq!(mnist.test.labels()[..8], [7, 2, 1, 0, 4, 1, 4, 9]);

    let pixels = (0..mnist.train.len()).flat_map(|index| mnist.train.image(index));
    let (mut sum, mut squares, mut count) = (0u64, 0u64, 0u64);
    for &pixel in pixels {
        sum += u64::from(pixel);
        squares += u64::from(pixel).pow(2);
        count += 1;
    }
    let mean = sum as f64 / count as f64 / 255.0;
    let deviation = (squares as f64 / count as f64 / 255.0f64.powi(2) - mean * mean).sqrt();
    assert!((mean - 0.1307).abs() < 5e-5 && (deviation - 0.3081).abs() < 5e-5);
}

#[test]
fn the_sample_is_the_first_of_each_digit_of_the_full_mnist() {
    let Some(mnist) = real_mnist() else { return };
    let sample = Mnist::bundled_sample();
    let pairs = [(&mnist.train, &sample.train), (&mnist.test, &sample.test)];
    for (full, sample) in pairs {
        let per_digit = sample.len() / 10;
        let mut next = 0;
        let mut taken = [0; 10];
        for index in 0..full.len() {
            let label = full.label(index);
            taken[usize::from(label)] += 1;
            if taken[usize::from(label)] <= per_digit {
                assert_eq!(sample.label(next), label);
                assert_eq!(sample.image(next), full.image(index));
                next += 1;
            }
        }
        assert_eq!(next, sample.len());
    }
}
