//! Losses and gradients of both nets, against PyTorch's.
//!
//! `expected/gradients.py` made the expected values, and says how to make them again. It builds
//! initial weights, images and dropout masks by itself, so these tests also pin their bits.

use ps_model::{ConvNet, ImageBatch, LocalModel, Model, Net, StepSeed};

use crate::support::{norm, on_each_device, on_each_device_except, random_images};

/// Compares a model's loss and gradient with a file of lines `loss VALUE`,
/// `PARAMETER norm VALUE` and `PARAMETER INDEX VALUE`.
///
/// `tolerance` is that of a gradient entry, relative to the root mean square of the gradient of
/// its parameter.
fn check<M: Model<Batch = ImageBatch>>(
    device: &str,
    model: &LocalModel<M>,
    batch: &ImageBatch,
    expected: &str,
    tolerance: f64,
) {
    let seed = StepSeed {
        seed: 5,
        worker: 1,
        clock: 3,
    };
    let mut gradient = vec![0.0; model.num_weights()];
    let loss = model
        .gradient(batch, seed, &mut gradient)
        .expect("the batch fits the model");

    let mut worst: f64 = 0.0;
    let mut names = Vec::new();
    let mut rms = 0.0;
    for line in expected.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |word: &str| word.parse::<f64>().expect("a number");
        match words[..] {
            ["loss", value] => {
                let difference = (f64::from(loss) - number(value)).abs();
                assert!(difference < 1e-5, "{device}: loss {loss}, not {value}");
            }
            [name, what, value] => {
                let spec = model.layout().iter().find(|spec| spec.name == name);
                let spec = spec.unwrap_or_else(|| panic!("no parameter {name}"));
                let gradient = &gradient[spec.range.clone()];
                let value = number(value);
                if what == "norm" {
                    names.push(name);
                    rms = value / (gradient.len() as f64).sqrt();
                    let difference = (norm(gradient) - value).abs() / value;
                    assert!(difference < 1e-5, "{device}: norm of {name}: {difference}");
                } else {
                    let entry = gradient[what.parse::<usize>().expect("an index")];
                    let difference = (f64::from(entry) - value).abs() / rms;
                    worst = worst.max(difference);
                    assert!(
                        difference < tolerance,
                        "{device}: {name}[{what}] is {entry}, not {value}: off by {difference} rms"
                    );
                }
            }
            _ => panic!("strange line {line:?}"),
        }
    }
    let layout: Vec<&str> = model.layout().iter().map(|s| s.name.as_str()).collect();
    assert_eq!(layout, names, "every parameter is compared, in order");
    eprintln!("{device}: largest difference {worst:.1e} rms");
}

// The tolerances: each gradient entry is a sum of up to 10⁴ products in single precision (about
// 6e-8 relative error each, adding up like a random walk); measured differences are about a tenth
// of the tolerance.

#[test]
fn gradients_of_convnet_are_those_of_pytorch() {
    on_each_device(|name, device| {
        let model = ConvNet::init(42, device);
        let model = LocalModel::new(model, device).expect("a model with a flat view");
        let expected = include_str!("expected/convnet.txt");
        check(name, &model, &random_images(7, 16), expected, 2e-5);
    });
}

#[test]
fn gradients_of_net_without_dropout_are_those_of_pytorch() {
    // NdArray takes minutes for a few of these convolutions.
    on_each_device_except(&["ndarray"], |name, device| {
        let model = Net::init(42, device).with_dropout([0.0, 0.0]);
        let model = LocalModel::new(model, device).expect("a model with a flat view");
        let expected = include_str!("expected/net.txt");
        check(name, &model, &random_images(7, 4), expected, 2e-5);
    });
}

#[test]
fn gradients_of_net_with_dropout_are_those_of_pytorch_with_the_same_masks() {
    on_each_device_except(&["ndarray"], |name, device| {
        let model =
            LocalModel::new(Net::init(42, device), device).expect("a model with a flat view");
        let expected = include_str!("expected/net_dropout.txt");
        check(name, &model, &random_images(7, 4), expected, 2e-5);
    });
}
