//! A batch of labelled images in host memory, checked when it is made.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Why numbers do not make a batch.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BatchError {
    /// There are no images.
    #[error("a batch needs at least one example")]
    Empty,
    /// The number of values is not the product of the dimensions.
    #[error("images of dimensions {dims:?} have {expected} numbers, got {got}")]
    ImageLength {
        /// `[batch, channels, height, width]` as given.
        dims: [usize; 4],
        /// The product of the dimensions, or `usize::MAX` if it is larger.
        expected: usize,
        /// The length of `images`.
        got: usize,
    },
    /// The number of labels differs from the number of images.
    #[error("{images} images need as many labels, got {labels}")]
    LabelCount {
        /// The number of images.
        images: usize,
        /// The number of labels.
        labels: usize,
    },
    /// A label is not one of the classes. (On some backends, burn would not report this.)
    #[error("label {label} of example {example} is not in 0..{num_classes}")]
    LabelOutOfRange {
        /// The position in the batch.
        example: usize,
        /// The label that was given for it.
        label: i64,
        /// The number of classes.
        num_classes: usize,
    },
}

/// Labelled images, `[batch, channels, height, width]` in row-major order.
///
/// ```
/// use ps_model::{BatchError, ImageBatch};
///
/// // Two images of 2×2 pixels with one channel, and their classes.
/// let pixels = vec![0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7];
/// let batch = ImageBatch::new(pixels.clone(), vec![1, 0], [2, 1, 2, 2], 10)?;
/// assert_eq!(batch.num_examples(), 2);
///
/// let error = ImageBatch::new(pixels, vec![1, 10], [2, 1, 2, 2], 10).unwrap_err();
/// assert!(matches!(error, BatchError::LabelOutOfRange { label: 10, .. }));
/// # Ok::<(), BatchError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct ImageBatch {
    images: Vec<f32>,
    labels: Vec<i64>,
    dims: [usize; 4],
    num_classes: usize,
}

impl ImageBatch {
    /// Makes a batch of images and labels. Labels count from 0.
    ///
    /// # Errors
    ///
    /// If the lengths do not match `dims`, the batch is empty, or a label is not below
    /// `num_classes`.
    pub fn new(
        images: Vec<f32>,
        labels: Vec<i64>,
        dims: [usize; 4],
        num_classes: usize,
    ) -> Result<Self, BatchError> {
        let expected = dims.iter().fold(1_usize, |n, dim| n.saturating_mul(*dim));
        if images.len() != expected {
            return Err(BatchError::ImageLength {
                dims,
                expected,
                got: images.len(),
            });
        }
        if expected == 0 {
            return Err(BatchError::Empty);
        }
        if labels.len() != dims[0] {
            return Err(BatchError::LabelCount {
                images: dims[0],
                labels: labels.len(),
            });
        }
        let is_class = |label: &i64| usize::try_from(*label).is_ok_and(|label| label < num_classes);
        if let Some(example) = labels.iter().position(|label| !is_class(label)) {
            return Err(BatchError::LabelOutOfRange {
                example,
                label: labels[example],
                num_classes,
            });
        }
        Ok(Self {
            images,
            labels,
            dims,
            num_classes,
        })
    }

    /// Returns the number of examples, at least 1.
    #[must_use]
    pub const fn num_examples(&self) -> usize {
        self.dims[0]
    }

    /// Returns `[batch, channels, height, width]`.
    #[must_use]
    pub const fn dims(&self) -> [usize; 4] {
        self.dims
    }

    /// Returns the number of classes that the labels were checked against.
    #[must_use]
    pub const fn num_classes(&self) -> usize {
        self.num_classes
    }

    /// Returns the pixels in row-major order.
    #[must_use]
    pub fn images(&self) -> &[f32] {
        &self.images
    }

    /// Returns the label of each example, in `0..num_classes`.
    #[must_use]
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Panics unless every label is one of a model's classes.
    pub(crate) fn assert_num_classes(&self, num_classes: usize) {
        assert!(
            self.num_classes <= num_classes,
            "the labels are of {} classes, the model knows {num_classes}",
            self.num_classes
        );
    }

    /// Copies the images to `device`: `[batch, channels, height, width]`.
    #[must_use]
    pub fn images_on(&self, device: &Device) -> Tensor<4> {
        Tensor::from_data(TensorData::new(self.images.clone(), self.dims), device)
    }

    /// Copies the labels to `device`: `[batch]`.
    #[must_use]
    pub fn labels_on(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(
            TensorData::new(self.labels.clone(), [self.labels.len()]),
            device,
        )
    }
}

/// Says what is wrong with the shape of a batch of MNIST-like images.
pub(crate) fn check_image_shape(shape: &[usize]) -> Result<(), String> {
    match shape {
        [batch, 1, 28, 28] if *batch > 0 => Ok(()),
        _ => Err("images have shape [batch, 1, 28, 28]".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(numbers: usize, labels: &[i64], dims: [usize; 4]) -> Result<ImageBatch, BatchError> {
        ImageBatch::new(vec![0.0; numbers], labels.to_vec(), dims, 10)
    }

    #[test]
    fn only_matching_parts_make_a_batch() {
        let good = batch(8, &[0, 9], [2, 1, 2, 2]).expect("matching parts");
        assert_eq!(good.num_examples(), 2);

        assert_eq!(batch(0, &[], [0, 1, 2, 2]), Err(BatchError::Empty));
        assert_eq!(
            batch(7, &[0, 1], [2, 1, 2, 2]),
            Err(BatchError::ImageLength {
                dims: [2, 1, 2, 2],
                expected: 8,
                got: 7
            })
        );
        assert_eq!(
            batch(8, &[0], [2, 1, 2, 2]),
            Err(BatchError::LabelCount {
                images: 2,
                labels: 1
            })
        );
        for (example, labels) in [(1, [0, 10]), (0, [-1, 0]), (1, [0, i64::MIN])] {
            assert_eq!(
                batch(8, &labels, [2, 1, 2, 2]),
                Err(BatchError::LabelOutOfRange {
                    example,
                    label: labels[example],
                    num_classes: 10
                })
            );
        }
        // Dimensions whose product overflows are wrong, not a wrapped-around match.
        assert!(batch(0, &[], [usize::MAX, 2, 1, 1]).is_err());
    }
}
