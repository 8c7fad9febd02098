//! Models of 16-bit floats whose workers are in other processes.

use ps::actors::cluster::Transport;
use ps::actors::net::memory::MemoryNetwork;
use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::{Module, Param};
use ps::model::burn::optim::AdamConfig;
use ps::model::burn::tensor::{Device, FloatDType, Tensor};
use ps::prelude::*;

use crate::nodes::with_two_nodes;

const NUM_WEIGHTS: usize = 37;

/// One number of each type, or all of one type.
#[derive(Module, Debug)]
struct Factors {
    first: Param<Tensor<1>>,
    rest: Param<Tensor<1>>,
}

impl Factors {
    fn new([first, rest]: [FloatDType; 2], device: &Device) -> Self {
        let number = |len: usize, dtype| {
            let numbers: Vec<f32> = (0..len).map(|i| 0.1 * i as f32).collect();
            Param::from_tensor(Tensor::<1>::from_floats(numbers.as_slice(), device).cast(dtype))
        };
        Self {
            first: number(1, first),
            rest: number(NUM_WEIGHTS - 1, rest),
        }
    }
}

impl Model for Factors {
    type Batch = Vec<f32>;

    fn loss(&self, xs: &Vec<f32>, step: &mut Step) -> Tensor<1> {
        let device = step.device();
        let x = xs.iter().sum::<f32>() / xs.len() as f32;
        let far = |factors: &Param<Tensor<1>>| {
            let factors = factors.val().cast(FloatDType::F32).mul_scalar(x);
            factors.sub_scalar(1.0).square().sum()
        };
        (far(&self.first) + far(&self.rest)).to_device(device)
    }

    fn num_examples(xs: &Vec<f32>) -> usize {
        xs.len()
    }
}

fn trainer(dtypes: [FloatDType; 2]) -> Trainer<Factors, impl Examples<Batch = Vec<f32>>> {
    let device = select_device(default_device_name()).unwrap();
    let numbers = (1..=64).map(|i| i as f32 / 64.0).collect();
    let data = collated(InMemDataset::new(numbers), |items: Vec<f32>| items);
    Trainer::new(Factors::new(dtypes, &device), data)
        .device(&device)
        .workers(2)
        .servers(2)
        .optimizer(AdamConfig::new())
        .learning_rate(0.01)
        .batch_size(8)
        .iterations(10)
}

/// S-23, M-1: what travels is rounded, and the result is not.
#[test]
fn models_of_16_bit_floats_have_the_same_bits_in_one_process_and_in_three() {
    use FloatDType::{BF16, F16, F32};
    for dtypes in [[BF16, BF16], [F16, F16], [BF16, F32], [F32, BF16]] {
        let make = || trainer(dtypes);
        let hosts = make().hosts(Hosts::new()).unwrap();
        let network = Transport::Memory(MemoryNetwork::new());
        let several = with_two_nodes(network, hosts, |cluster| make().run_on(cluster).unwrap());
        let one = make().run().unwrap();
        let weights = one.weights.to_vec();
        assert!(several.weights.to_vec() == weights, "{dtypes:?}");
        let is_exact = |weight: &f32| weight.to_bits() & 0x1fff != 0;
        let num_exact = weights.iter().filter(|weight| is_exact(weight)).count();
        assert!(num_exact > NUM_WEIGHTS / 2, "{dtypes:?}: {weights:?}");
    }
}
