//! Tensors that travel from one process to another in the middle of a computation.

use std::fmt::Debug;

use burn::tensor::{Device, Gradients, Tensor, TensorData};

use super::PartError;
use crate::flat::new_leaf;

/// A tensor in host memory, row-major.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Array {
    /// The length of each dimension.
    pub shape: Vec<usize>,
    /// The numbers, as many as the product of the dimensions.
    pub values: Vec<f32>,
}

impl Array {
    fn check(&self) -> Result<(), PartError> {
        let mut sizes = self.shape.iter();
        let expected = sizes.try_fold(1_usize, |product, &size| product.checked_mul(size));
        match expected {
            Some(expected) if expected == self.values.len() => Ok(()),
            _ => Err(PartError::WrongCount {
                shape: self.shape.clone(),
                got: self.values.len(),
            }),
        }
    }
}

/// The input or output of a [`Part`](crate::Part): a float tensor of any rank.
pub trait Activation: Clone + Debug + Send + sealed::Sealed + 'static {
    /// The number of dimensions.
    const RANK: usize;

    /// Copies an array to a device.
    ///
    /// # Errors
    ///
    /// If the array has another rank, or if the number of its values is not the product of its shape.
    fn from_array(array: Array, device: &Device) -> Result<Self, PartError>;

    /// Copies the numbers to host memory.
    fn to_array(&self) -> Array;

    /// Returns the dimensions.
    fn shape(&self) -> Vec<usize>;

    /// Returns the device, without autodiff.
    fn plain_device(&self) -> Device;

    /// Returns the device, with autodiff, and with gradient checkpointing if that is on.
    #[doc(hidden)]
    fn training_device(&self) -> Device;

    /// Makes it a leaf of a new graph, with a gradient.
    #[doc(hidden)]
    fn into_leaf(self) -> Self;

    #[doc(hidden)]
    fn is_recorded(&self) -> bool;

    /// Returns the gradient of a leaf.
    #[doc(hidden)]
    fn take_gradient(&self, gradients: &mut Gradients) -> Option<Array>;

    /// Returns a tensor of one number. Its gradient with respect to `self` is `gradient`, which has the
    /// shape of `self`.
    #[doc(hidden)]
    fn dot(self, gradient: Self) -> Tensor<1>;
}

mod sealed {
    pub trait Sealed {}
}

impl<const D: usize> sealed::Sealed for Tensor<D> {}

impl<const D: usize> Activation for Tensor<D> {
    const RANK: usize = D;

    fn from_array(array: Array, device: &Device) -> Result<Self, PartError> {
        if array.shape.len() != D {
            return Err(PartError::WrongRank {
                expected: D,
                got: array.shape,
            });
        }
        array.check()?;
        let data = TensorData::new(array.values, array.shape);
        Ok(Self::from_data(data, device))
    }

    fn to_array(&self) -> Array {
        let shape = self.dims().to_vec();
        let data = self.clone().inner().into_data();
        let values = data.try_into_vec().expect("parts compute with f32");
        Array { shape, values }
    }

    fn shape(&self) -> Vec<usize> {
        self.dims().to_vec()
    }

    fn plain_device(&self) -> Device {
        self.device().inner()
    }

    fn training_device(&self) -> Device {
        self.device().autodiff()
    }

    fn into_leaf(self) -> Self {
        new_leaf(self)
    }

    fn is_recorded(&self) -> bool {
        self.is_tracked()
    }

    fn take_gradient(&self, gradients: &mut Gradients) -> Option<Array> {
        Some(self.grad_remove(gradients)?.to_array())
    }

    fn dot(self, gradient: Self) -> Tensor<1> {
        (self * gradient).sum()
    }
}
