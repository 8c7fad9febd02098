//! The nets learn.

use ps_model::{ConvNet, ImageBatch, LocalModel, Rng, StepSeed};

use crate::support::on_each_device;

/// Noise with a bright bar, whose row tells the class.
fn bars(seed: u64, batch: usize) -> ImageBatch {
    let mut rng = Rng::new(seed);
    let mut images = rng.uniform_within(0.5, batch * 784);
    let mut labels = Vec::new();
    for image in images.chunks_mut(784) {
        let class = rng.next_u64() % 10;
        let row = 2 + 2 * class as usize;
        for pixel in &mut image[row * 28..(row + 2) * 28] {
            *pixel += 2.0;
        }
        labels.push(class as i64);
    }
    ImageBatch::new(images, labels, [batch, 1, 28, 28], 10).expect("images and labels match")
}

#[test]
fn convnet_learns_to_tell_bars_apart() {
    const SEED: u64 = 6;
    on_each_device(|name, device| {
        let mut model = LocalModel::new(ConvNet::init(SEED, device), device).expect("a flat view");
        let mut weights = model.weights().expect("a working device");
        let mut gradient = vec![0.0; weights.len()];
        let mut losses = Vec::new();
        for clock in 0..100 {
            let seed = StepSeed {
                seed: SEED,
                worker: 0,
                clock,
            };
            model.load(&weights).expect("as many weights");
            let loss = model
                .gradient(&bars(clock, 64), seed, &mut gradient)
                .expect("a good batch");
            losses.push(loss);
            for (weight, slope) in weights.iter_mut().zip(&gradient) {
                *weight -= 0.1 * slope;
            }
        }
        model.load(&weights).expect("as many weights");
        let result = model.evaluate(&bars(1_000, 200)).expect("a good batch");
        // It starts at ln 10, about 2.3, guessing.
        assert!(
            losses[0] > 2.0 && losses[99] < 0.5,
            "{name}, seed {SEED}: {losses:?}"
        );
        assert!(
            result.accuracy() > Some(0.9),
            "{name}, seed {SEED}: {result:?}"
        );
    });
}
