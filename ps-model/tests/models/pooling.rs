//! The max-pooling of our own, against burn's.

use ps_model::burn::tensor::module;
use ps_model::burn::tensor::ops::MaxPoolOptions;
use ps_model::burn::tensor::{Device, Tensor, TensorData};
use ps_model::{Rng, max_pool2d};

use crate::support::{on_each_device, on_each_device_except};

type Pool = fn(Tensor<4>, usize) -> Tensor<4>;

fn burns(x: Tensor<4>, size: usize) -> Tensor<4> {
    module::max_pool2d(x, MaxPoolOptions::new([size, size]))
}

/// Output, and the gradient of a sum with different weights.
fn run(pool: Pool, x: &Tensor<4>, size: usize) -> [(Vec<usize>, Vec<f32>); 2] {
    let x = x.clone().detach().require_grad();
    let output = pool(x.clone(), size);
    let count = output.shape().num_elements();
    let weights = Rng::new(4).uniform_within(1.0, count);
    let weights = TensorData::new(weights, output.shape());
    let weights = Tensor::from_data(weights, &output.device());
    let gradients = (output.clone() * weights).sum().backward();
    let gradient = x.grad(&gradients).expect("it is tracked");
    [output, gradient].map(|tensor| {
        let shape = tensor.dims().to_vec();
        (shape, tensor.into_data().try_to_vec().expect("f32"))
    })
}

fn random(shape: [usize; 4], device: &Device) -> Tensor<4> {
    let values = Rng::new(7).uniform_within(1.0, shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), &device.clone().autodiff())
}

#[test]
fn pooling_gives_burns_numbers_and_gradients() {
    on_each_device(|name, device| {
        for (shape, size) in [
            ([2, 3, 26, 26], 3),
            ([1, 64, 24, 24], 2),
            ([3, 1, 7, 9], 1),
            // Columns and rows that fill no window.
            ([2, 2, 8, 11], 3),
            ([1, 1, 5, 5], 5),
        ] {
            let x = random(shape, device);
            let (ours, burns) = (run(max_pool2d, &x, size), run(burns, &x, size));
            assert_eq!(ours, burns, "{name}: {shape:?}, {size}");
            let plain = x.inner();
            let plain = [max_pool2d(plain.clone(), size), self::burns(plain, size)];
            let [ours, burns] = plain.map(|x| x.into_data().try_to_vec::<f32>().expect("f32"));
            assert_eq!(ours, burns, "{name}: {shape:?}, {size}, without autodiff");
        }
    });
}

/// As in PyTorch: `torch.nn.functional.max_pool2d` of these windows, with their gradients.
#[test]
fn the_first_of_equal_numbers_gets_the_gradient_and_nan_stays() {
    // `ndarray` drops NaN.
    on_each_device_except(&["ndarray"], |name, device| {
        let x = [
            [1.0, 1.0, 0.0, 2.0, -3.0, -2.0],
            [1.0, 1.0, 2.0, 0.0, -2.0, -4.0],
        ];
        let x = Tensor::<2>::from_floats(x, &device.clone().autodiff()).reshape([1, 1, 2, 6]);
        let [(_, output), (_, gradient)] = run(max_pool2d, &x, 2);
        assert_eq!(output, [1.0, 2.0, -2.0], "{name}");
        let weights = Rng::new(4).uniform_within(1.0, 3);
        let [a, b, c] = weights[..] else {
            panic!("three")
        };
        let expected = [a, 0.0, 0.0, b, 0.0, c, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(gradient, expected, "{name}");
        for place in 0..4 {
            let mut x = [1.0; 4];
            x[place] = f32::NAN;
            let x = Tensor::<1>::from_floats(x, device).reshape([1, 1, 2, 2]);
            let output = max_pool2d(x, 2).into_scalar::<f32>();
            assert!(output.is_nan(), "{name}, place {place}: {output}");
        }
    });
}
