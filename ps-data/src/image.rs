//! Labelled images in memory, and the normalized batches made from them.
//!
//! Pixels are stored as `u8`. They are normalized with a table of 256 entries while they are copied into a
//! batch. A clone shares the pixels, so every worker of a process can own a data set.

use std::fmt;
use std::sync::{Arc, OnceLock};

use burn_dataset::{Dataset, DatasetError};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::DataError;

/// Maps a pixel `x` in `0..=255` to `(x / 255 - mean) / std`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    /// Mean of the training pixels, as a fraction of 255.
    pub mean: f32,
    /// Standard deviation of the training pixels, as a fraction of 255.
    pub std: f32,
}

impl Normalization {
    /// Mean and standard deviation of MNIST's training pixels, as PyTorch's MNIST example has
    /// them: <https://github.com/pytorch/examples/blob/main/mnist/main.py>.
    pub const MNIST: Self = Self {
        mean: 0.1307,
        std: 0.3081,
    };

    /// Mean and standard deviation of FashionMNIST's training pixels.
    pub const FASHION_MNIST: Self = Self {
        mean: 0.2860,
        std: 0.3530,
    };

    /// Maps pixels to fractions in `0.0..=1.0`.
    pub const UNIT: Self = Self {
        mean: 0.0,
        std: 1.0,
    };

    /// The same operations in the same order and precision as torchvision's `ToTensor` and
    /// `Normalize`.
    fn table(self) -> [f32; 256] {
        std::array::from_fn(|pixel| (pixel as f32 / 255.0 - self.mean) / self.std)
    }
}

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Split {
    /// The examples for training.
    Train,
    /// The examples for testing.
    Test,
}

/// One normalized example: the item of [`ImageDataset`] as a burn `Dataset`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageItem {
    /// Normalized pixels, row-major `[channels, height, width]`.
    pub image: Vec<f32>,
    /// The index of the class, from 0.
    pub label: u8,
}

/// A normalized batch, in the layout that tensor libraries use.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageBatch {
    /// Normalized pixels, row-major `[batch, channels, height, width]`.
    pub images: Vec<f32>,
    /// Class indexes, `[batch]`.
    pub labels: Vec<i32>,
    /// `[batch, channels, height, width]`.
    pub dims: [usize; 4],
}

impl ImageBatch {
    /// Number of examples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }
}

/// Labelled `u8` images of one size.
///
/// Implements burn's [`Dataset`] with normalized [`ImageItem`]s.
///
/// ```
/// use ps_data::{ImageDataset, Normalization};
///
/// // Two images of 1×2 pixels with one channel, of 10 classes.
/// let pixels = vec![0, 255, 128, 0];
/// let images = ImageDataset::new(pixels, vec![3, 9], [1, 1, 2], 10, Normalization::UNIT)?;
/// assert_eq!((images.len(), images.dims()), (2, [1, 1, 2]));
/// let batch = images.batch(&[1, 0]);
/// assert_eq!((batch.labels, batch.dims), (vec![9, 3], [2, 1, 1, 2]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct ImageDataset {
    pixels: Arc<[u8]>,
    labels: Arc<[u8]>,
    dims: [usize; 3],
    num_classes: usize,
    normalization: Normalization,
    table: Arc<[f32; 256]>,
    /// The digest of all the above. It is computed when it is first asked for.
    digest: Arc<OnceLock<[u8; 32]>>,
}

impl ImageDataset {
    /// Joins row-major pixels `[len, channels, height, width]` and labels `[len]`.
    ///
    /// # Errors
    ///
    /// [`DataError::Inconsistent`] if the lengths do not agree with `dims`, a dimension is zero, a
    /// label is not below `num_classes`, or the normalization is not finite or divides by zero.
    pub fn new(
        pixels: Vec<u8>,
        labels: Vec<u8>,
        dims: [usize; 3],
        num_classes: usize,
        normalization: Normalization,
    ) -> Result<Self, DataError> {
        let inconsistent = |reason| Err(DataError::Inconsistent { reason });
        let expected = dims
            .iter()
            .try_fold(labels.len(), |product, &dim| product.checked_mul(dim));
        if dims.contains(&0) {
            return inconsistent(format!("a dimension of {dims:?} is zero"));
        }
        if expected != Some(pixels.len()) {
            let (found, count) = (pixels.len(), labels.len());
            return inconsistent(format!("{found} pixels are not {count} images of {dims:?}"));
        }
        if let Some(label) = labels.iter().find(|&&l| usize::from(l) >= num_classes) {
            return inconsistent(format!("label {label} is not below {num_classes}"));
        }
        Self {
            pixels: pixels.into(),
            labels: labels.into(),
            dims,
            num_classes,
            normalization: Normalization::UNIT,
            table: Arc::new(Normalization::UNIT.table()),
            digest: Arc::default(),
        }
        .with_normalization(normalization)
    }

    /// Returns a data set with another normalization that shares the same images.
    ///
    /// # Errors
    ///
    /// [`DataError::Inconsistent`] if the mean is not finite or the standard deviation not a
    /// finite positive number.
    pub fn with_normalization(mut self, normalization: Normalization) -> Result<Self, DataError> {
        let Normalization { mean, std } = normalization;
        let table = normalization.table();
        if !(std > 0.0 && std.is_finite()) || table.iter().any(|value| !value.is_finite()) {
            let reason = format!("cannot normalize by mean {mean} and standard deviation {std}");
            return Err(DataError::Inconsistent { reason });
        }
        self.normalization = normalization;
        self.table = Arc::new(table);
        self.digest = Arc::default();
        Ok(self)
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// `[channels, height, width]` of every image.
    pub fn dims(&self) -> [usize; 3] {
        self.dims
    }

    /// Number of classes. Every label is below it.
    pub fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// The normalization that maps pixels to floats.
    pub fn normalization(&self) -> Normalization {
        self.normalization
    }

    /// SHA-256 of everything that determines the contents of batches: pixels, labels, dimensions, number of
    /// classes and normalization. Two data sets with the same digest give the same batches.
    ///
    /// The first call reads all pixels. Clones share the result.
    pub fn digest(&self) -> [u8; 32] {
        *self.digest.get_or_init(|| {
            let Normalization { mean, std } = self.normalization;
            let [channels, height, width] = self.dims;
            let mut hash = Sha256::new();
            for number in [self.len(), channels, height, width, self.num_classes] {
                hash.update((number as u64).to_le_bytes());
            }
            hash.update(mean.to_le_bytes());
            hash.update(std.to_le_bytes());
            hash.update(&self.labels);
            hash.update(&self.pixels);
            hash.finalize().into()
        })
    }

    /// Raw pixels of one image, row-major `[channels, height, width]`.
    ///
    /// # Panics
    ///
    /// If `index >= len()`.
    pub fn image(&self, index: usize) -> &[u8] {
        let len = self.image_len();
        &self.pixels[index * len..(index + 1) * len]
    }

    /// Class index of one image.
    ///
    /// # Panics
    ///
    /// If `index >= len()`.
    pub fn label(&self, index: usize) -> u8 {
        self.labels[index]
    }

    /// Class indexes of all images.
    pub fn labels(&self) -> &[u8] {
        &self.labels
    }

    /// Copies the examples at `indices` into a normalized batch, in that order.
    ///
    /// # Panics
    ///
    /// If an index is not below `len()`.
    pub fn batch(&self, indices: &[usize]) -> ImageBatch {
        let mut batch = ImageBatch::default();
        self.batch_into(indices, &mut batch);
        batch
    }

    /// Like [`batch`](Self::batch), but reuses the memory of an earlier batch.
    ///
    /// # Panics
    ///
    /// If an index is not below `len()`.
    pub fn batch_into(&self, indices: &[usize], batch: &mut ImageBatch) {
        let [channels, height, width] = self.dims;
        batch.dims = [indices.len(), channels, height, width];
        batch.images.clear();
        batch.images.reserve(indices.len() * self.image_len());
        batch.labels.clear();
        for &index in indices {
            batch.images.extend(self.normalized(index));
            batch.labels.push(i32::from(self.label(index)));
        }
    }

    fn image_len(&self) -> usize {
        self.dims.iter().product()
    }

    fn normalized(&self, index: usize) -> impl Iterator<Item = f32> {
        self.image(index)
            .iter()
            .map(|&pixel| self.table[usize::from(pixel)])
    }
}

impl Dataset<ImageItem> for ImageDataset {
    fn get(&self, index: usize) -> Result<ImageItem, DatasetError> {
        Ok(ImageItem {
            image: self.normalized(index).collect(),
            label: self.label(index),
        })
    }

    fn len(&self) -> usize {
        Self::len(self)
    }
}

impl fmt::Debug for ImageDataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageDataset")
            .field("len", &self.len())
            .field("dims", &self.dims)
            .field("num_classes", &self.num_classes)
            .field("normalization", &self.normalization)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three images of 1x2x2 pixels, labels 0, 1, 2.
    fn three() -> ImageDataset {
        let pixels = vec![0, 1, 2, 3, 128, 129, 130, 131, 252, 253, 254, 255];
        ImageDataset::new(pixels, vec![0, 1, 2], [1, 2, 2], 3, Normalization::MNIST)
            .expect("consistent")
    }

    /// Expected values from the formula in double precision; the tolerance is four rounding
    /// steps of the largest value, 2.82.
    #[test]
    fn every_pixel_value_is_normalized_as_the_formula_says() {
        for (x, &value) in Normalization::MNIST.table().iter().enumerate() {
            let expected = (x as f64 / 255.0 - 0.1307) / 0.3081;
            assert!((f64::from(value) - expected).abs() < 1e-6, "{x}: {value}");
        }
    }

    #[test]
    fn a_batch_holds_the_chosen_images_in_the_order_asked() {
        let data = three();
        let batch = data.batch(&[2, 0, 2]);
        assert_eq!(batch.dims, [3, 1, 2, 2]);
        assert_eq!(batch.labels, [2, 0, 2]);
        let table = Normalization::MNIST.table();
        let raw = [252, 253, 254, 255, 0, 1, 2, 3, 252, 253, 254, 255];
        assert_eq!(batch.images, raw.map(|pixel: usize| table[pixel]));
    }

    #[test]
    fn the_digest_tells_data_sets_apart_that_give_other_batches() {
        let data = three();
        assert_eq!(data.digest(), three().digest());
        assert_eq!(data.digest(), data.clone().digest());
        let other = |pixels: Vec<u8>, labels: Vec<u8>, dims, num_classes| {
            ImageDataset::new(pixels, labels, dims, num_classes, Normalization::MNIST).unwrap()
        };
        let pixels = vec![0, 1, 2, 3, 128, 129, 130, 131, 252, 253, 254, 255];
        let mut changed = pixels.clone();
        changed[11] = 254;
        let labels = vec![0, 1, 2];
        let others = [
            other(pixels.clone(), vec![1, 2, 0], [1, 2, 2], 3),
            other(changed, labels.clone(), [1, 2, 2], 3),
            other(pixels.clone(), labels.clone(), [2, 1, 2], 3),
            other(pixels.clone(), labels, [1, 2, 2], 4),
            other(pixels, vec![0, 1], [1, 2, 3], 3),
            data.clone()
                .with_normalization(Normalization::UNIT)
                .unwrap(),
        ];
        for other in others {
            assert_ne!(other.digest(), data.digest(), "{other:?}");
        }
    }

    #[test]
    fn a_reused_batch_equals_a_fresh_one_and_keeps_its_memory() {
        let data = three();
        let mut batch = data.batch(&[0, 1, 2]);
        let memory = batch.images.as_ptr();
        data.batch_into(&[1], &mut batch);
        assert_eq!(batch, data.batch(&[1]));
        assert_eq!(batch.images.as_ptr(), memory);
    }

    #[test]
    fn items_of_the_burn_dataset_equal_the_batch() {
        let data = three();
        let items = Dataset::get_many(&data, vec![1, 2]).expect("in memory");
        let batch = data.batch(&[1, 2]);
        assert_eq!(
            [items[0].image.clone(), items[1].image.clone()].concat(),
            batch.images
        );
        assert_eq!((items[0].label, items[1].label), (1, 2));
        assert_eq!(Dataset::iter(&data).count(), 3);
    }

    #[test]
    fn inconsistent_parts_are_refused() {
        let check = |pixels: usize, labels: &[u8], dims, normalization, expected: &str| {
            let (pixels, labels) = (vec![0; pixels], labels.to_vec());
            let error = ImageDataset::new(pixels, labels, dims, 3, normalization)
                .expect_err(expected)
                .to_string();
            assert!(error.contains(expected), "{error}");
        };
        let unit = Normalization::UNIT;
        check(7, &[0, 1], [1, 2, 2], unit, "7 pixels are not 2 images");
        check(8, &[0, 3], [1, 2, 2], unit, "label 3 is not below 3");
        check(0, &[0, 1], [0, 2, 2], unit, "is zero");
        check(4, &[0], [usize::MAX, 2, 2], unit, "4 pixels are not 1");
        for std in [0.0, -1.0, f32::NAN, f32::INFINITY, 1e-44] {
            let normalization = Normalization { mean: 0.5, std };
            check(4, &[0], [1, 2, 2], normalization, "cannot normalize");
        }
    }
}
