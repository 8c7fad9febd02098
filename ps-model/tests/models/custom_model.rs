//! A model of a user's own: not a classifier, not of images.

use ps_model::burn;
use ps_model::burn::module::Module;
use ps_model::burn::nn::Linear;
use ps_model::burn::optim::AdamConfig;
use ps_model::burn::tensor::{Device, Tensor, TensorData};
use ps_model::{BurnRule, LocalModel, Model, Rng, Step, StepSeed, seeded};

use crate::support::{default_device, on_each_device};

/// y = f(x₁, x₂) by one hidden layer.
#[derive(Module, Debug)]
struct Regression {
    hidden: Linear,
    output: Linear,
}

struct Points {
    x: Vec<[f32; 2]>,
    y: Vec<f32>,
}

impl Regression {
    fn init(seed: u64, device: &Device) -> Self {
        let rng = &mut Rng::new(seed);
        Self {
            hidden: seeded::linear(rng, [2, 16], device),
            output: seeded::linear(rng, [16, 1], device),
        }
    }
}

impl Model for Regression {
    type Batch = Points;

    fn loss(&self, points: &Points, step: &mut Step) -> Tensor<1> {
        let n = points.y.len();
        let x = TensorData::new(points.x.concat(), [n, 2]);
        let y = TensorData::new(points.y.clone(), [n, 1]);
        let x = Tensor::<2>::from_data(x, step.device());
        let predicted = self.output.forward(self.hidden.forward(x).tanh());
        (predicted - Tensor::from_data(y, step.device()))
            .square()
            .mean()
    }

    fn num_examples(points: &Points) -> usize {
        points.y.len()
    }
}

fn points(seed: u64, count: usize) -> Points {
    let mut rng = Rng::new(seed);
    let x: Vec<[f32; 2]> = (0..count)
        .map(|_| [0, 1].map(|_| 2.0 * rng.uniform() - 1.0))
        .collect();
    let y = x.iter().map(|[a, b]| a * a - 0.5 * b).collect();
    Points { x, y }
}

#[test]
fn gradients_agree_with_finite_differences() {
    const SEED: u64 = 21;
    on_each_device(|name, device| {
        let model = Regression::init(SEED, device);
        let mut model = LocalModel::new(model, device).expect("a flat view");
        let batch = points(SEED, 64);
        let weights = model.weights().expect("a working device");
        let mut gradient = vec![0.0; weights.len()];
        model
            .gradient(&batch, StepSeed::default(), &mut gradient)
            .expect("a good batch");
        assert_eq!(gradient.len(), 2 * 16 + 16 + 16 + 1);

        let mut loss_at = |index: usize, shift: f32| {
            let mut shifted = weights.clone();
            shifted[index] += shift;
            model.load(&shifted).expect("as many weights");
            model.evaluate(&batch).expect("a good batch").mean_loss()
        };
        // The error of a central difference is of order h² (1e-4 here), that of the losses, in
        // single precision, about 1e-7 / h.
        let h = 1e-2;
        for (index, slope) in gradient.iter().enumerate() {
            let difference = (loss_at(index, h) - loss_at(index, -h)) / (2.0 * f64::from(h));
            assert!(
                (difference - f64::from(*slope)).abs() < 5e-4,
                "{name}, seed {SEED}: slope {index} is {slope}, finite difference {difference}"
            );
        }
    });
}

#[test]
fn it_learns_with_a_burn_optimizer_and_evaluates_without_a_method_for_that() {
    const SEED: u64 = 22;
    let device = default_device();
    let mut model = LocalModel::new(Regression::init(SEED, &device), &device).expect("a flat view");
    let mut rule = BurnRule::new(&AdamConfig::new(), &device).expect("elementwise");
    let mut weights = model.weights().expect("a working device");
    let test = points(SEED + 1, 100);
    let before = model.evaluate(&test).expect("a good batch");
    assert_eq!(before.num_examples, 100);
    assert_eq!(before.accuracy(), None);

    let mut gradient = vec![0.0; weights.len()];
    for clock in 0..300 {
        let seed = StepSeed {
            clock,
            ..StepSeed::default()
        };
        model.load(&weights).expect("as many weights");
        model
            .gradient(&points(clock, 32), seed, &mut gradient)
            .expect("a good batch");
        rule.step(&mut weights, &gradient, 1e-2)
            .expect("a good step");
    }
    model.load(&weights).expect("as many weights");
    let after = model.evaluate(&test).expect("a good batch").mean_loss();
    assert!(
        after < 0.05 * before.mean_loss(),
        "seed {SEED}: {} became {after}",
        before.mean_loss()
    );
}
