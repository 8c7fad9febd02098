//! Models of 16-bit floats whose workers are in other processes.

use ps::actors::cluster::Transport;
use ps::actors::net::memory::MemoryNetwork;
use ps::actors::weights::Precision;
use ps::actors::worker::GradientSource;
use ps::model::burn;
use ps::model::burn::data::dataset::InMemDataset;
use ps::model::burn::module::{Module, Param, RunningState};
use ps::model::burn::nn::{BatchNorm, BatchNormConfig};
use ps::model::burn::optim::AdamConfig;
use ps::model::burn::tensor::{Device, FloatDType, Tensor};
use ps::prelude::*;
use ps::source::ModelSource;

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

/// With running statistics, all of one type.
#[derive(Module, Debug)]
struct Normalized {
    norm: BatchNorm,
}

impl Normalized {
    fn new(dtype: FloatDType, device: &Device) -> Self {
        let mut norm = BatchNormConfig::new(3).init(device);
        let parameter = |value| {
            let value = Tensor::<1>::full([3], value, device);
            Param::from_tensor(value.cast(dtype))
        };
        (norm.gamma, norm.beta) = (parameter(1.0), parameter(0.0));
        norm.running_mean = RunningState::new(norm.running_mean.value().cast(dtype));
        norm.running_var = RunningState::new(norm.running_var.value().cast(dtype));
        Self { norm }
    }
}

impl Model for Normalized {
    type Batch = Vec<f32>;

    fn loss(&self, _: &Vec<f32>, _: &mut Step) -> Tensor<1> {
        self.norm.gamma.val().sum()
    }

    fn num_examples(xs: &Vec<f32>) -> usize {
        xs.len()
    }
}

fn data() -> impl Examples<Batch = Vec<f32>> {
    let numbers = (1..=64).map(|i| i as f32 / 64.0).collect();
    collated(InMemDataset::new(numbers), |items: Vec<f32>| items)
}

fn precision<M: Model<Batch = Vec<f32>>>(model: &M, device: &Device) -> Precision {
    let config = WorkerConfig {
        worker: WorkerId(0),
        num_workers: 1,
        batch_size: 8,
        seed: 1,
    };
    let source = ModelSource::new(model, device, &data(), config).unwrap();
    source.precision()
}

/// S-23
#[test]
fn weights_travel_in_the_type_that_all_of_them_have() {
    use FloatDType::{BF16, F16, F32};
    let device = select_device(default_device_name()).unwrap();
    for (dtypes, expected) in [
        ([BF16, BF16], Precision::Bf16),
        ([F16, F16], Precision::F16),
        ([F32, F32], Precision::F32),
        ([BF16, F16], Precision::F32),
        ([BF16, F32], Precision::F32),
    ] {
        let model = Factors::new(dtypes, &device);
        assert_eq!(precision(&model, &device), expected, "{dtypes:?}");
    }
    // What is frozen does not travel.
    let mut frozen = Factors::new([F32, BF16], &device);
    frozen.first = frozen.first.set_require_grad(false);
    assert_eq!(precision(&frozen, &device), Precision::Bf16);
    // Steps on short batches compute with the servers' own statistics.
    let normalized = Normalized::new(BF16, &device);
    assert_eq!(precision(&normalized, &device), Precision::F32);
}

fn trainer(dtypes: [FloatDType; 2]) -> Trainer<Factors, impl Examples<Batch = Vec<f32>>> {
    let device = select_device(default_device_name()).unwrap();
    Trainer::new(Factors::new(dtypes, &device), data())
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
