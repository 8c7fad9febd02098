//! A sample of the real MNIST, as gzip-compressed IDX files: 400 training images and 100 test images of each digit. `ps-data`
//! reads them. The README of this package says where they come from and what licence they have (CC BY-SA 3.0).
//!
//! ```
//! // gzip
//! assert!(ps_mnist_sample::TRAIN_IMAGES.starts_with(&[0x1f, 0x8b]));
//! ```

/// 4,000 training images of 28×28 pixels.
pub static TRAIN_IMAGES: &[u8] = include_bytes!("../train-images-idx3-ubyte.gz");
/// The labels of the training images.
pub static TRAIN_LABELS: &[u8] = include_bytes!("../train-labels-idx1-ubyte.gz");
/// 1,000 test images of 28×28 pixels.
pub static TEST_IMAGES: &[u8] = include_bytes!("../t10k-images-idx3-ubyte.gz");
/// The labels of the test images.
pub static TEST_LABELS: &[u8] = include_bytes!("../t10k-labels-idx1-ubyte.gz");
