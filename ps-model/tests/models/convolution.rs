//! The convolution of our own, against burn's.

use ps_model::burn::nn::conv::{Conv2d, Conv2dConfig};
use ps_model::burn::tensor::{Device, Tensor, TensorData};
use ps_model::{Rng, conv2d, seeded};

use crate::support::{default_device, on_each_device};

fn random<const D: usize>(rng: &mut Rng, shape: [usize; D], device: &Device) -> Tensor<D> {
    let values = rng.uniform_within(1.0, shape.iter().product());
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("f32")
}

fn assert_close(case: &str, what: &str, ours: &[f32], burns: &[f32]) {
    assert_eq!(ours.len(), burns.len(), "{case}: {what}");
    let largest = burns
        .iter()
        .fold(0.0, |largest: f32, x| largest.max(x.abs()));
    for (index, (ours, burns)) in ours.iter().zip(burns).enumerate() {
        // Sums of up to 25,000 products, in two orders.
        let difference = (ours - burns).abs() / largest;
        assert!(
            difference < 1e-5,
            "{case}: {what}[{index}]: {ours}, not {burns}"
        );
    }
}

/// Compares output and gradients; `images` are what the layer sees, in `[batch, channels, ..]`.
fn check(case: &str, layer: &Conv2d, images: &Tensor<4>) {
    type Convolution = fn(&Conv2d, Tensor<4>) -> Tensor<4>;
    let run = |convolution: Convolution| {
        let images = images.clone().detach().require_grad();
        let output = convolution(layer, images.clone());
        let shape = output.dims();
        let weights = random(&mut Rng::new(9), shape, &output.device());
        let gradients = (output.clone() * weights).sum().backward();
        let bias = layer.bias.as_ref().map(|bias| bias.val().grad(&gradients));
        (
            shape,
            [
                numbers(output),
                numbers(images.grad(&gradients).expect("tracked")),
                numbers(layer.weight.val().grad(&gradients).expect("tracked")),
                bias.flatten().map_or(Vec::new(), numbers),
            ],
        )
    };
    let ours = run(conv2d);
    let burns = run(|layer, images| layer.forward(images));
    assert_eq!(ours.0, burns.0, "{case}");
    let names = ["output", "images", "weight", "bias"];
    for ((name, ours), burns) in names.iter().zip(&ours.1).zip(&burns.1) {
        assert_close(case, name, ours, burns);
    }
}

#[test]
fn output_and_gradients_are_burns() {
    on_each_device(|name, device| {
        let device = device.clone().autodiff();
        let rng = &mut Rng::new(4);
        // [batch, channels, height, width, outputs, size]
        for sizes in [
            [2, 1, 28, 28, 3, 3],
            [3, 5, 9, 13, 7, 3],
            [1, 2, 4, 40, 13, 1],
            [2, 3, 8, 6, 6, 2],
            [1, 4, 5, 5, 1, 5],
            [1, 1, 1, 1, 1, 1],
        ] {
            let [batch, channels, height, width, outputs, size] = sizes;
            let layer = seeded::conv2d(rng, [channels, outputs], size, &device);
            let images = random(rng, [batch, channels, height, width], &device);
            check(&format!("{name} {sizes:?}"), &layer, &images);
            // The same numbers, not in the order of memory.
            let images = random(rng, [batch, channels, width, height], &device);
            let images = images.swap_dims(2, 3);
            check(&format!("{name} {sizes:?}, transposed"), &layer, &images);
        }
    });
}

#[test]
fn an_oblong_kernel_a_stride_and_a_layer_without_bias_work_too() {
    on_each_device(|name, device| {
        let device = device.clone().autodiff();
        let rng = &mut Rng::new(5);
        let images = random(rng, [2, 3, 10, 11], &device);
        let config = |size: [usize; 2]| Conv2dConfig::new([3, 4], size);
        for (case, config) in [
            ("oblong", config([2, 4])),
            ("stride", config([3, 3]).with_stride([2, 1])),
            ("no bias", config([3, 3]).with_bias(false)),
        ] {
            check(&format!("{name} {case}"), &config.init(&device), &images);
        }
    });
}

#[test]
fn without_autodiff_the_output_is_the_same() {
    on_each_device(|name, device| {
        let rng = &mut Rng::new(6);
        let layer = seeded::conv2d(rng, [3, 8], 3, device);
        let images = random(rng, [2, 3, 10, 11], device);
        let ours = numbers(conv2d(&layer, images.clone()));
        assert_close(name, "output", &ours, &numbers(layer.forward(images)));
    });
}

#[test]
fn images_with_other_channels_are_refused_as_by_burn() {
    let device = &default_device();
    let layer = seeded::conv2d(&mut Rng::new(7), [3, 8], 3, device);
    let run = || numbers(conv2d(&layer, Tensor::zeros([1, 2, 10, 10], device)));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    assert!(result.is_err());
}
