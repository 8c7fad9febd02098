//! The small convolutional net of Ray's parameter-server example.

use burn::module::Module;
use burn::nn::Linear;
use burn::nn::conv::Conv2d;
use burn::tensor::activation::{log_softmax, relu};
use burn::tensor::{Device, Tensor};

use crate::batch::{ImageBatch, check_image_shape};
use crate::conv::conv2d;
use crate::loss::nll_loss;
use crate::model::{Evaluation, Model};
use crate::part::Part;
use crate::pool::max_pool2d;
use crate::rng::Rng;
use crate::seeded;
use crate::step::Step;

/// A classifier of 28×28 grey images into 10 classes, with 1,960 parameters.
///
/// The layers are: one convolution 1→3 of size 3, max-pool 3, ReLU, one fully connected layer 192→10,
/// log-softmax. This is `ConvNet` of
/// <https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html>.
///
/// ```
/// use ps_model::{ConvNet, LocalModel, default_device_name, select_device};
///
/// let device = select_device(default_device_name())?;
/// let model = LocalModel::new(ConvNet::init(0, &device), &device)?;
/// assert_eq!(model.num_weights(), 1_960);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Module, Debug)]
pub struct ConvNet {
    conv1: Conv2d,
    fc: Linear,
}

impl ConvNet {
    /// The number of classes.
    pub const NUM_CLASSES: usize = 10;

    /// Makes a net. Its initial weights follow from `seed` alone ([`seeded`]).
    #[must_use]
    pub fn init(seed: u64, device: &Device) -> Self {
        let rng = &mut Rng::new(seed);
        Self {
            conv1: seeded::conv2d(rng, [1, 3], 3, device),
            fc: seeded::linear(rng, [192, Self::NUM_CLASSES], device),
        }
    }

    /// Computes log probabilities.
    ///
    /// `images: [batch, 1, 28, 28]`; result: `[batch, 10]`.
    ///
    /// # Panics
    ///
    /// If the images have other dimensions.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>) -> Tensor<2> {
        let [batch, channels, height, width] = images.dims();
        assert_eq!(
            [channels, height, width],
            [1, 28, 28],
            "ConvNet takes images of [1, 28, 28]"
        );
        let x = conv2d(&self.conv1, images);
        debug_assert_eq!(x.dims(), [batch, 3, 26, 26]);
        let x = relu(max_pool2d(x, 3));
        debug_assert_eq!(x.dims(), [batch, 3, 8, 8]);
        let x = self.fc.forward(x.reshape([batch, 192]));
        log_softmax(x, 1)
    }
}

impl Model for ConvNet {
    type Batch = ImageBatch;

    fn loss(&self, batch: &ImageBatch, step: &mut Step) -> Tensor<1> {
        batch.assert_num_classes(Self::NUM_CLASSES);
        let log_probabilities = self.forward(batch.images_on(step.device()));
        nll_loss(log_probabilities, batch.labels_on(step.device()))
    }

    fn num_examples(batch: &ImageBatch) -> usize {
        batch.num_examples()
    }

    fn evaluate(&self, batch: &ImageBatch, device: &Device) -> Evaluation {
        batch.assert_num_classes(Self::NUM_CLASSES);
        let log_probabilities = self.forward(batch.images_on(device));
        Evaluation::of_classifier(log_probabilities, batch.labels_on(device))
    }
}

impl Part for ConvNet {
    type Input = Tensor<4>;
    type Output = Tensor<2>;

    fn forward(&self, images: Tensor<4>, _step: &mut Step) -> Tensor<2> {
        Self::forward(self, images)
    }

    fn check_input(&self, shape: &[usize]) -> Result<(), String> {
        check_image_shape(shape)
    }
}
