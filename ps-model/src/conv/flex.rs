//! The convolution as an operation of burn's backend `flex`, with its backward pass.

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Autodiff, Flex};
use burn::nn::PaddingConfig2d;
use burn::nn::conv::Conv2d;
use burn::tensor::{DType, Tensor, TensorData};
use pulp::Arch;

use super::kernel::{self, Sizes};

/// The backend `flex` with autodiff, without gradient checkpointing.
type Recorded = Autodiff<Flex, NoCheckpointing>;

/// Convolves on `flex`, with or without autodiff. Returns `None` for tensors or layers that this module
/// does not support.
pub(super) fn conv2d(layer: &Conv2d, images: &Tensor<4>) -> Option<Tensor<4>> {
    let weight = layer.weight.val();
    let bias = layer.bias.as_ref()?.val();
    let [batch, channels, height, width] = images.dims();
    let [outputs, inputs, kernel_height, kernel_width] = weight.dims();
    let applies = layer.stride == [1, 1]
        && layer.dilation == [1, 1]
        && layer.groups == 1
        && matches!(layer.padding, PaddingConfig2d::Valid)
        && inputs == channels
        && (1..=height).contains(&kernel_height)
        && (1..=width).contains(&kernel_width)
        && [images.dtype(), weight.dtype(), bias.dtype()] == [DType::F32; 3];
    if !applies {
        return None;
    }
    let sizes = Sizes {
        batch,
        input: [channels, height, width],
        outputs,
        kernel: [kernel_height, kernel_width],
    };
    if let Ok(x) = images.clone().try_into_primitive::<Flex>() {
        let weight = weight.try_into_primitive::<Flex>().ok()?;
        let bias = bias.try_into_primitive::<Flex>().ok()?;
        let output = forward(&sizes, &x, &weight, &bias);
        return Some(Tensor::from_primitive::<Flex>(output));
    }
    let x = images.clone().try_into_primitive::<Recorded>().ok()?;
    let (x, x_node) = x.into_parts();
    let (weight, weight_node) = weight.try_into_primitive::<Recorded>().ok()?.into_parts();
    let (bias, bias_node) = bias.try_into_primitive::<Recorded>().ok()?.into_parts();
    let output = forward(&sizes, &x, &weight, &bias);
    let nodes = [x_node, weight_node, bias_node];
    let output = match Convolution
        .prepare::<NoCheckpointing>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(step) => step.finish((sizes, x, weight), output),
        OpsKind::UnTracked(step) => step.finish(output),
    };
    Some(Tensor::from_primitive::<Recorded>(output))
}

fn forward(sizes: &Sizes, x: &FlexTensor, weight: &FlexTensor, bias: &FlexTensor) -> FlexTensor {
    let [x, weight, bias] = [x, weight, bias].map(FlexTensor::to_contiguous);
    let [x, weight, bias] = [&x, &weight, &bias].map(numbers);
    let output = kernel::forward(Arch::new(), sizes, x, weight, bias);
    let [channels, height, width] = sizes.output();
    tensor(output, [sizes.batch, channels, height, width])
}

/// The backward pass.
#[derive(Debug)]
struct Convolution;

impl Backward<Flex, 3> for Convolution {
    /// The sizes, the input and the weights.
    type State = (Sizes, FlexTensor, FlexTensor);

    fn backward(
        self,
        ops: Ops<Self::State, 3>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let (sizes, x, weight) = ops.state;
        let [x_node, weight_node, bias_node] = ops.parents;
        let [channels, height, width] = sizes.input;
        if let Some(node) = x_node {
            let weight = weight.to_contiguous();
            let dx = kernel::input_gradient(Arch::new(), &sizes, numbers(&weight), numbers(&dy));
            let dx = tensor(dx, [sizes.batch, channels, height, width]);
            gradients.register::<Flex>(node.id, dx);
        }
        if weight_node.is_some() || bias_node.is_some() {
            let x = x.to_contiguous();
            let (dw, db) = kernel::weight_gradient(Arch::new(), &sizes, numbers(&x), numbers(&dy));
            let [kernel_height, kernel_width] = sizes.kernel;
            if let Some(node) = weight_node {
                let dw = tensor(dw, [sizes.outputs, channels, kernel_height, kernel_width]);
                gradients.register::<Flex>(node.id, dw);
            }
            if let Some(node) = bias_node {
                gradients.register::<Flex>(node.id, tensor(db, [sizes.outputs]));
            }
        }
    }
}

pub(crate) fn numbers(tensor: &FlexTensor) -> &[f32] {
    tensor
        .as_slice()
        .expect("the tensor is contiguous and of f32")
}

pub(crate) fn tensor<const D: usize>(numbers: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(numbers, shape))
}
