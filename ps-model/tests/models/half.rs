//! Parameters of 16-bit floats: the weights are exact, and the model computes with rounded ones (M-1).

use std::ops::Range;

use ps_model::burn;
use ps_model::burn::module::{Module, Param};
use ps_model::burn::tensor::{DType, Device, FloatDType, Tensor};
use ps_model::{FlatView, LocalModel, Model, Step, StepSeed};

use crate::support::on_each_device_except;

/// The squared distance of `factor · x + offset` from `2 · x + 1`.
#[derive(Module, Debug)]
struct Line {
    factor: Param<Tensor<1>>,
    offset: Param<Tensor<1>>,
}

impl Line {
    fn new(dtype: FloatDType, device: &Device) -> Self {
        let number = |number: f32| {
            Param::from_tensor(Tensor::<1>::from_floats([number], device).cast(dtype))
        };
        Self {
            factor: number(1.0),
            offset: number(0.0),
        }
    }
}

impl Model for Line {
    type Batch = Vec<f32>;

    fn loss(&self, xs: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        let xs = Tensor::<1>::from_floats(xs.as_slice(), step.device());
        let wanted = xs.clone().mul_scalar(2.0).add_scalar(1.0);
        let xs = step.dropout(xs.cast(self.factor.val().dtype()), 0.0);
        let output = xs * self.factor.val() + self.offset.val();
        (output.cast(FloatDType::F32) - wanted).square().mean()
    }

    fn num_examples(xs: &Vec<f32>) -> usize {
        xs.len()
    }
}

const XS: [f32; 4] = [-1.0, -0.5, 0.5, 1.0];

/// Takes steps of plain SGD on weights of `f32`, as a server does. Returns the weights and the last loss.
fn train(dtype: FloatDType, rate: f32, num_steps: u64, device: &Device) -> (Vec<f32>, f32) {
    let mut local = LocalModel::new(Line::new(dtype, device), device).expect("a flat view");
    let mut weights = local.weights().expect("weights");
    let mut gradient = vec![0.0; weights.len()];
    let mut loss = f32::NAN;
    for clock in 0..num_steps {
        local.load(&weights).expect("its own weights");
        let step = StepSeed {
            seed: 1,
            worker: 0,
            clock,
        };
        loss = local
            .gradient(&XS.to_vec(), step, &mut gradient)
            .expect("a step");
        for (weight, slope) in weights.iter_mut().zip(&gradient) {
            *weight -= rate * slope;
        }
    }
    (weights, loss)
}

#[test]
fn models_of_16_bit_floats_learn_what_those_of_32_bits_learn() {
    on_each_device_except(&["ndarray"], |name, device| {
        let (expected, _) = train(FloatDType::F32, 0.2, 40, device);
        // 8 bits and 11 bits of precision, at numbers up to 2.
        for (dtype, tolerance) in [(FloatDType::BF16, 2e-2), (FloatDType::F16, 2e-3)] {
            let (weights, loss) = train(dtype, 0.2, 40, device);
            for (weight, expected) in weights.iter().zip(&expected) {
                let difference = (weight - expected).abs();
                assert!(
                    difference < tolerance,
                    "{weight} and {expected}, {dtype:?} on {name}"
                );
            }
            assert!(loss < 1e-3, "{loss}, {dtype:?} on {name}");
        }
    });
}

/// A step that is too small for the model's own numbers: 1 + 1e-3 is 1 in `bf16`.
#[test]
fn small_steps_add_up_in_the_weights_although_each_is_lost_in_the_model() {
    on_each_device_except(&["ndarray"], |name, device| {
        let (weights, _) = train(FloatDType::BF16, 1e-3, 40, device);
        let (expected, _) = train(FloatDType::F32, 1e-3, 40, device);
        for (weight, expected) in weights.iter().zip(&expected) {
            let difference = (weight - expected).abs();
            assert!(difference < 2e-3, "{weight} and {expected} on {name}");
        }
        assert!(weights[0] > 1.02, "{} on {name}", weights[0]);
    });
}

#[test]
fn a_view_reads_and_writes_16_bit_floats_as_rounded_numbers_of_32() {
    on_each_device_except(&["ndarray"], |name, device| {
        for (dtype, is) in [
            (FloatDType::BF16, DType::BF16),
            (FloatDType::F16, DType::F16),
        ] {
            let line = Line::new(dtype, device);
            let view = FlatView::new(&line).expect("a flat view");
            assert_eq!(view.read_weights(&line), [1.0, 0.0], "{name}");
            let wanted = [1.0 + 1e-5, 0.25];
            let read = |range: Range<usize>| wanted[range].to_vec();
            let line = view.write_weights(line, read);
            let line = line.expect("two numbers");
            assert_eq!(line.factor.val().dtype(), is, "{name}");
            assert_eq!(view.read_weights(&line), [1.0, 0.25], "{name}");
        }
    });
}
