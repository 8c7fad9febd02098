//! The larger convolutional net of PyTorch's parameter-server guide.

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

/// A classifier of 28×28 grey images into 10 classes, with 1,199,882 parameters.
///
/// The layers are: convolutions 1→32 and 32→64 of size 3 with ReLU between them, max-pool 2, dropout of
/// whole channels with probability 0.25, fully connected 9216→128, ReLU, dropout with probability 0.5,
/// fully connected 128→10, log-softmax. This is `Net` of
/// <https://docs.pytorch.org/tutorials/intermediate/rpc_param_server_tutorial.html>. As there, no ReLU
/// follows the second convolution, and both dropouts are `Dropout2d`. For the input of the second one,
/// `[batch, 128]`, that is ordinary dropout.
///
/// It is used like [`ConvNet`](crate::ConvNet), which has an example.
#[derive(Module, Debug)]
pub struct Net {
    conv1: Conv2d,
    conv2: Conv2d,
    fc1: Linear,
    fc2: Linear,
    dropout1: f64,
    dropout2: f64,
}

impl Net {
    /// The number of classes.
    pub const NUM_CLASSES: usize = 10;

    /// Makes a net. Its initial weights follow from `seed` alone ([`seeded`]).
    #[must_use]
    pub fn init(seed: u64, device: &Device) -> Self {
        let rng = &mut Rng::new(seed);
        Self {
            conv1: seeded::conv2d(rng, [1, 32], 3, device),
            conv2: seeded::conv2d(rng, [32, 64], 3, device),
            fc1: seeded::linear(rng, [9216, 128], device),
            fc2: seeded::linear(rng, [128, Self::NUM_CLASSES], device),
            dropout1: 0.25,
            dropout2: 0.5,
        }
    }

    /// Changes the probabilities of the two dropouts. `[0.0, 0.0]` switches dropout off.
    ///
    /// # Panics
    ///
    /// If one is not in `0.0..=1.0`.
    #[must_use]
    pub fn with_dropout(mut self, probabilities: [f64; 2]) -> Self {
        assert!(
            probabilities.iter().all(|p| (0.0..=1.0).contains(p)),
            "dropout probabilities lie in 0..=1, not {probabilities:?}"
        );
        [self.dropout1, self.dropout2] = probabilities;
        self
    }

    /// Computes log probabilities, with dropout if `step` is a training step.
    ///
    /// `images: [batch, 1, 28, 28]`; result: `[batch, 10]`.
    ///
    /// # Panics
    ///
    /// If the images have other dimensions.
    #[must_use]
    pub fn forward(&self, images: Tensor<4>, step: &mut Step) -> Tensor<2> {
        let [batch, channels, height, width] = images.dims();
        assert_eq!(
            [channels, height, width],
            [1, 28, 28],
            "Net takes images of [1, 28, 28]"
        );
        let x = relu(conv2d(&self.conv1, images));
        debug_assert_eq!(x.dims(), [batch, 32, 26, 26]);
        let x = conv2d(&self.conv2, x);
        debug_assert_eq!(x.dims(), [batch, 64, 24, 24]);
        let x = max_pool2d(x, 2);
        debug_assert_eq!(x.dims(), [batch, 64, 12, 12]);
        let x = step.dropout_channels(x, self.dropout1);
        let x = relu(self.fc1.forward(x.reshape([batch, 9216])));
        let x = step.dropout(x, self.dropout2);
        log_softmax(self.fc2.forward(x), 1)
    }
}

impl Model for Net {
    type Batch = ImageBatch;

    fn loss(&self, batch: &ImageBatch, step: &mut Step) -> Tensor<1> {
        batch.assert_num_classes(Self::NUM_CLASSES);
        let log_probabilities = self.forward(batch.images_on(step.device()), step);
        nll_loss(log_probabilities, batch.labels_on(step.device()))
    }

    fn num_examples(batch: &ImageBatch) -> usize {
        batch.num_examples()
    }

    fn evaluate(&self, batch: &ImageBatch, device: &Device) -> Evaluation {
        batch.assert_num_classes(Self::NUM_CLASSES);
        let step = &mut Step::evaluation(device);
        let log_probabilities = self.forward(batch.images_on(device), step);
        Evaluation::of_classifier(log_probabilities, batch.labels_on(device))
    }
}

impl Part for Net {
    type Input = Tensor<4>;
    type Output = Tensor<2>;

    fn forward(&self, images: Tensor<4>, step: &mut Step) -> Tensor<2> {
        Self::forward(self, images, step)
    }

    fn check_input(&self, shape: &[usize]) -> Result<(), String> {
        check_image_shape(shape)
    }
}
