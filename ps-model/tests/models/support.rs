//! What several test modules share: the devices to test on, batches of images.

use ps_model::burn::tensor::Device;
use ps_model::{ImageBatch, Rng, compiled_devices, select_device};

/// Says on which device alone the tests run.
const ONE_DEVICE: &str = "PS_TEST_DEVICE";

/// Runs a test on each backend that is compiled in and available on this machine, on its device without
/// autodiff. If `PS_TEST_DEVICE` names a device, runs it there only.
pub(crate) fn on_each_device(mut test: impl FnMut(&str, &Device)) {
    on_each_device_except(&[], |name, device| test(name, device));
}

/// Like [`on_each_device`], without the backends named.
pub(crate) fn on_each_device_except(skipped: &[&str], mut test: impl FnMut(&str, &Device)) {
    let names = match std::env::var(ONE_DEVICE) {
        Ok(_) => vec![one_name()],
        Err(_) => compiled_devices(),
    };
    for name in names {
        if skipped.contains(&name) {
            eprintln!("skipped on {name}");
            continue;
        }
        match select_device(name) {
            Ok(device) => test(name, &device.inner()),
            // The CPU backends work everywhere; a GPU may be missing.
            Err(error) if ["cuda", "wgpu"].contains(&name) => eprintln!("skipped: {error}"),
            Err(error) => panic!("{error}"),
        }
    }
}

/// The device for tests of which one is enough, without autodiff.
pub(crate) fn default_device() -> Device {
    let device = select_device(one_name());
    device.expect("the device for the tests works").inner()
}

/// The name of [`default_device`]: what `PS_TEST_DEVICE` says, or the default of the build.
pub(crate) fn one_name() -> &'static str {
    let Ok(wanted) = std::env::var(ONE_DEVICE) else {
        return ps_model::default_device_name();
    };
    let name = compiled_devices().into_iter().find(|name| *name == wanted);
    name.unwrap_or_else(|| panic!("{ONE_DEVICE} is {wanted:?}, which is not compiled in"))
}

/// Random images in -2..2, labels 0, 7, 4, 1, ...; the batch of `expected/gradients.py`.
pub(crate) fn random_images(seed: u64, batch: usize) -> ImageBatch {
    let mut rng = Rng::new(seed);
    // Exact: a uniform number is a multiple of 2⁻²⁴, and 4 a power of two.
    let images = (0..batch * 28 * 28).map(|_| (rng.uniform() - 0.5) * 4.0);
    let labels = (0..batch as i64).map(|i| 7 * i % 10);
    ImageBatch::new(images.collect(), labels.collect(), [batch, 1, 28, 28], 10)
        .expect("images and labels match")
}

/// The Euclidean norm.
pub(crate) fn norm(numbers: &[f32]) -> f64 {
    numbers
        .iter()
        .map(|x| f64::from(*x).powi(2))
        .sum::<f64>()
        .sqrt()
}
