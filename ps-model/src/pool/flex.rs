//! Max-pooling as an operation of burn's backend `flex`, with its backward pass.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Autodiff, Flex};
use burn::tensor::{DType, Tensor};
use pulp::Arch;

use super::kernel::Windows;
use crate::conv::flex::{numbers, tensor};

/// Pools on `flex`, with or without autodiff. Returns `None` for tensors that this module does not support.
pub(super) fn max_pool2d(x: &Tensor<4>, size: usize) -> Option<Tensor<4>> {
    type Recorded = Autodiff<Flex>;
    let [batch, channels, height, width] = x.dims();
    // A position in a window is stored in one byte.
    if x.dtype() != DType::F32 || !(1..=16).contains(&size) || size > height.min(width) {
        return None;
    }
    let windows = Windows {
        planes: batch * channels,
        height,
        width,
        size,
    };
    let shape = [batch, channels, height / size, width / size];
    let pool = |x: FlexTensor| {
        let (largest, places) = windows.largest(Arch::new(), numbers(&x.to_contiguous()));
        (tensor(largest, shape), places)
    };
    if let Ok(x) = x.clone().try_into_primitive::<Flex>() {
        return Some(Tensor::from_primitive::<Flex>(pool(x).0));
    }
    let (x, node) = x
        .clone()
        .try_into_primitive::<Recorded>()
        .ok()?
        .into_parts();
    let (output, places) = pool(x);
    let prepared = MaxPool.prepare::<NoCheckpointing>([node]);
    let output = match prepared.compute_bound().stateful() {
        OpsKind::Tracked(step) => step.finish((windows, batch, Arc::new(places)), output),
        OpsKind::UnTracked(step) => step.finish(output),
    };
    Some(Tensor::from_primitive::<Recorded>(output))
}

/// The backward pass.
#[derive(Debug)]
struct MaxPool;

impl Backward<Flex, 1> for MaxPool {
    /// The windows, the batch size, and where in each window the largest number was.
    type State = (Windows, usize, Arc<Vec<u8>>);

    fn backward(
        self,
        ops: Ops<Self::State, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let dy = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let (windows, batch, places) = ops.state;
        let [Some(node)] = ops.parents else { return };
        let dx = windows.spread(numbers(&dy), &places);
        let channels = windows.planes / batch.max(1);
        let shape = [batch, channels, windows.height, windows.width];
        gradients.register::<Flex>(node.id, tensor(dx, shape));
    }
}
