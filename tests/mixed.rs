//! Workers on several devices in one training (M-6): on every backend that is compiled in and finds a device here.

use ps::model::DeviceError;
use ps::model::burn::tensor::Device;
use ps::prelude::*;

/// The largest difference between a weight of a training on one backend and of the same training on several.
/// Their gradients differ by rounding, in the last digits of an `f32`.
const TOLERANCE: f32 = 1e-5;

/// The backends whose devices are GPUs, with the names under which a device may be found. `wgpu:cpu` is a program that
/// computes as a GPU does, such as Mesa's lavapipe.
const GPUS: [(&str, &[&str]); 3] = [
    ("cuda", &["cuda"]),
    ("tch", &["tch:cuda"]),
    ("wgpu", &["wgpu", "wgpu:cpu"]),
];

/// The backends that compute on any CPU. `tch` is LibTorch, which has to be installed to be compiled in.
const CPUS: [&str; 3] = ["flex", "ndarray", "tch"];

/// Says of each backend that is not compiled in that it is skipped.
fn devices_of_cpu() -> Vec<Device> {
    let compiled = compiled_devices();
    let (found, skipped): (Vec<&str>, Vec<&str>) =
        CPUS.into_iter().partition(|name| compiled.contains(name));
    for name in skipped {
        println!("skipped: the feature `{name}` is off");
    }
    let devices = found.into_iter().map(|name| {
        println!("on {name}");
        select_device(name).unwrap()
    });
    devices.collect()
}

/// Says of each backend that finds no device why it finds none.
fn gpus() -> Vec<Device> {
    let compiled = compiled_devices();
    let mut found = Vec::new();
    for (backend, names) in GPUS.into_iter().filter(|(one, _)| compiled.contains(one)) {
        let mut selected = names.iter().map(|name| select_device(name));
        match selected.find_map(Result::ok) {
            Some(device) => {
                println!("{backend}: {device:?}");
                found.push(device);
            }
            None => {
                let error = select_device(names[0]).unwrap_err();
                assert!(
                    matches!(error, DeviceError::Unavailable { .. }),
                    "{error:?}"
                );
                println!("skipped: {error}");
            }
        }
    }
    found
}

fn train(devices: Vec<Device>, num_workers: usize, iterations: u64) -> Report {
    let Mnist { train, .. } = Mnist::bundled_sample();
    Trainer::new(ConvNet::init(1, &devices[0]), train)
        .devices(devices)
        .workers(num_workers)
        .batch_size(16)
        .learning_rate(0.1)
        .iterations(iterations)
        .run()
        .unwrap()
}

fn largest_difference(one: &Report, other: &Report) -> f32 {
    let (one, other) = (one.weights.to_vec(), other.weights.to_vec());
    let differences = one.iter().zip(&other).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

#[test]
fn workers_on_several_backends_train_as_on_one() {
    let devices = devices_of_cpu();
    assert!(devices.len() >= 2, "{devices:?}");
    let mixed = train(devices.clone(), 4, 40);
    assert_eq!(mixed.num_applied, 160);
    for device in devices {
        let one = train(vec![device.clone()], 4, 40);
        let largest = largest_difference(&mixed, &one);
        println!("{device:?} alone: a weight differs by up to {largest}");
        assert!(largest < TOLERANCE, "{largest} with {device:?} alone");
    }
}

/// A few updates, because a GPU may be a program for a CPU.
#[test]
fn a_gpu_and_a_cpu_train_together_as_a_cpu_alone() {
    let cpu = devices_of_cpu().swap_remove(0);
    for gpu in gpus() {
        let mixed = train(vec![cpu.clone(), gpu.clone()], 2, 3);
        let one = train(vec![cpu.clone()], 2, 3);
        let largest = largest_difference(&mixed, &one);
        println!("{gpu:?}: a weight differs by up to {largest}");
        assert!(largest < TOLERANCE, "{largest} with {gpu:?}");
        assert_ne!(one.weights.to_vec(), initial(&cpu), "nothing was trained");
    }
}

fn initial(device: &Device) -> Vec<f32> {
    let model = ConvNet::init(1, device);
    initial_weights(&model, device).unwrap().to_vec()
}
