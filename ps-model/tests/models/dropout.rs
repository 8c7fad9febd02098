//! Dropout masks: from the step's seed, the same everywhere, at the right rate.

use ps_model::burn::tensor::{Device, Tensor};
use ps_model::{LocalModel, Net, Step, StepSeed};

use crate::support::{default_device, on_each_device, on_each_device_except, random_images};

const SEED: StepSeed = StepSeed {
    seed: 11,
    worker: 2,
    clock: 40,
};

fn mask(device: &Device, seed: StepSeed, probability: f64, count: usize) -> Vec<f32> {
    let ones = Tensor::<1>::ones([count], device);
    Step::training(device, seed)
        .dropout(ones, probability)
        .into_data()
        .try_into_vec()
        .expect("f32")
}

#[test]
fn masks_depend_on_seed_worker_and_clock_and_on_nothing_else() {
    let reference = mask(&default_device(), SEED, 0.5, 1000);
    on_each_device(|name, device| {
        assert_eq!(mask(device, SEED, 0.5, 1000), reference, "{name}");
    });
    for other in [
        StepSeed { seed: 12, ..SEED },
        StepSeed { worker: 3, ..SEED },
        StepSeed { clock: 41, ..SEED },
    ] {
        let masked = mask(&default_device(), other, 0.5, 1000);
        let equal = masked.iter().zip(&reference).filter(|(a, b)| a == b);
        // Binomial(1000, 1/2): the bounds are more than 6 standard deviations away.
        assert!((400..600).contains(&equal.count()), "{other:?}");
    }
}

#[test]
fn elements_are_dropped_at_the_rate_asked_for_and_the_mean_is_kept() {
    const COUNT: usize = 200_000;
    for probability in [0.1, 0.25, 0.5, 0.9] {
        let mask = mask(&default_device(), SEED, probability, COUNT);
        let dropped = mask.iter().filter(|x| **x == 0.0).count() as f64 / COUNT as f64;
        let deviation = (probability * (1.0 - probability) / COUNT as f64).sqrt();
        assert!(
            (dropped - probability).abs() < 5.0 * deviation,
            "{SEED:?}: dropped {dropped}, not {probability}"
        );
        let scale = mask.iter().copied().fold(0.0, f32::max);
        assert!(mask.iter().all(|x| *x == 0.0 || *x == scale));
        assert!((f64::from(scale) * (1.0 - probability) - 1.0).abs() < 1e-3);
    }
}

#[test]
fn the_ends_of_the_range_are_exact() {
    let device = &default_device();
    assert_eq!(mask(device, SEED, 0.0, 5), [1.0; 5]);
    assert_eq!(mask(device, SEED, 1.0, 5), [0.0; 5]);
}

#[test]
#[should_panic(expected = "a dropout probability lies in 0..=1, not 1.5")]
fn a_probability_above_one_is_refused() {
    mask(&default_device(), SEED, 1.5, 1);
}

#[test]
fn an_evaluation_drops_nothing() {
    let device = default_device();
    let x = Tensor::<2>::ones([3, 4], &device);
    let mut step = Step::evaluation(&device);
    assert!(!step.is_training());
    let y = step.dropout(x.clone(), 0.5);
    assert_eq!(y.into_data(), x.into_data());
}

#[test]
fn channels_are_dropped_whole() {
    on_each_device(|name, device| {
        let ones = Tensor::<4>::ones([8, 16, 3, 2], device);
        let dropped = Step::training(device, SEED).dropout_channels(ones, 0.25);
        let values: Vec<f32> = dropped.into_data().try_into_vec().expect("f32");
        let channels: Vec<&[f32]> = values.chunks(6).collect();
        assert!(
            channels.iter().all(|c| c.iter().all(|x| x == &c[0])),
            "{name}"
        );
        let kept = channels.iter().filter(|c| c[0] != 0.0).count();
        // Binomial(128, 3/4) has mean 96 and standard deviation 5.
        assert!((70..122).contains(&kept), "{name}: kept {kept} of 128");
    });
}

/// Two workers in one process, whatever their threads do, compute what they compute alone.
#[test]
fn gradients_with_dropout_can_be_repeated_also_beside_other_threads() {
    on_each_device_except(&["ndarray"], |name, device| {
        let gradient = |clock| {
            let net = Net::init(1, device);
            let model = LocalModel::new(net, device).expect("a model with a flat view");
            let mut gradient = vec![0.0; model.num_weights()];
            let seed = StepSeed { clock, ..SEED };
            let batch = random_images(3, 2);
            let loss = model
                .gradient(&batch, seed, &mut gradient)
                .expect("a good batch");
            (loss, gradient)
        };
        let alone = gradient(0);
        let together = std::thread::scope(|scope| {
            let workers = [0, 1, 0].map(|clock| scope.spawn(move || gradient(clock)));
            workers.map(|worker| worker.join().expect("no panic"))
        });
        assert!(together[0] == alone && together[2] == alone, "{name}");
        assert!(together[1] != alone, "{name}: another clock, another mask");
    });
}
