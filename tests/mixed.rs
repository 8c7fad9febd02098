//! Workers on several devices in one training (M-6): on every backend of the CPU that is compiled in.

use ps::model::burn::tensor::Device;
use ps::prelude::*;

/// The largest difference between a weight of a training on one backend and of the same training on several.
/// Their gradients differ by rounding, in the last digits of an `f32`.
const TOLERANCE: f32 = 1e-5;

fn devices() -> Vec<Device> {
    let compiled = compiled_devices().into_iter();
    let of_cpu = compiled.filter(|name| ["flex", "ndarray", "tch"].contains(name));
    of_cpu.map(|name| select_device(name).unwrap()).collect()
}

fn train(devices: Vec<Device>) -> Report {
    let Mnist { train, test, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &devices[0]), train)
        .devices(devices)
        .workers(4)
        .batch_size(16)
        .learning_rate(0.1)
        .iterations(40)
        .test_data(test)
        .run()
        .unwrap()
}

#[test]
fn workers_on_several_backends_train_as_on_one() {
    let devices = devices();
    assert!(devices.len() >= 2, "{devices:?}");
    let mixed = train(devices.clone());
    assert_eq!(mixed.num_applied, 160);
    for device in devices {
        let one = train(vec![device.clone()]);
        let (mixed, one) = (mixed.weights.to_vec(), one.weights.to_vec());
        let differences = mixed.iter().zip(&one).map(|(a, b)| (a - b).abs());
        let largest = differences.fold(0.0, f32::max);
        assert!(largest < TOLERANCE, "{largest} with {device:?} alone");
    }
}
