//! The pieces together: softmax regression on the bundled sample, through sharded batches.

use ps_data::{Batches, ImageBatch, Mnist, SamplerConfig};

const PIXELS: usize = 28 * 28;
const CLASSES: usize = 10;

/// `logits[class] = weights[class] · image`; the bias is left out.
fn logits(weights: &[f32], image: &[f32]) -> [f32; CLASSES] {
    std::array::from_fn(|class| {
        let row = &weights[class * PIXELS..(class + 1) * PIXELS];
        row.iter().zip(image).map(|(w, x)| w * x).sum()
    })
}

fn examples(batch: &ImageBatch) -> impl Iterator<Item = (&[f32], usize)> {
    let labels = batch.labels.iter().map(|&label| label as usize);
    batch.images.chunks_exact(PIXELS).zip(labels)
}

/// One step of gradient descent on the mean negative log likelihood.
fn step(weights: &mut [f32], batch: &ImageBatch, learning_rate: f32) {
    let scale = learning_rate / batch.len() as f32;
    for (image, label) in examples(batch) {
        let logits = logits(weights, image);
        let largest = logits.iter().copied().fold(f32::MIN, f32::max);
        let exponentials = logits.map(|logit| (logit - largest).exp());
        let sum: f32 = exponentials.iter().sum();
        for class in 0..CLASSES {
            let target = f32::from(u8::from(class == label));
            let gradient = scale * (exponentials[class] / sum - target);
            let row = &mut weights[class * PIXELS..(class + 1) * PIXELS];
            row.iter_mut()
                .zip(image)
                .for_each(|(w, x)| *w -= gradient * x);
        }
    }
}

fn accuracy(weights: &[f32], batch: &ImageBatch) -> f64 {
    let best = |image| {
        let logits = logits(weights, image);
        (0..CLASSES).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
    };
    let right = examples(batch).filter(|&(image, label)| best(image) == Some(label));
    right.count() as f64 / batch.len() as f64
}

/// Reaches 86 %; guessing gives 10 %. The limit leaves room for other rounding. Wrong pairing of
/// images and labels stays far below it.
#[test]
fn a_linear_model_learns_the_sample_through_two_shards() {
    let mnist = Mnist::bundled_sample();
    let mut shards: Vec<Batches<ImageBatch>> = (0..2)
        .map(|shard| {
            let config = SamplerConfig {
                shard,
                num_shards: 2,
                drop_last: true,
                ..SamplerConfig::new(mnist.train.len(), 50)
            };
            Batches::of_images(&mnist.train, config).expect("valid")
        })
        .collect();
    let mut weights = vec![0.0; CLASSES * PIXELS];
    while shards[0].cursor().epoch < 4 {
        for shard in &mut shards {
            let batch = shard.next_batch().expect("in memory");
            step(&mut weights, &batch, 0.01);
        }
    }
    let all: Vec<usize> = (0..mnist.test.len()).collect();
    let accuracy = accuracy(&weights, &mnist.test.batch(&all));
    assert!(accuracy > 0.8, "{accuracy}");
}
