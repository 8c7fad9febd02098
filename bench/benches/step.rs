//! A training step, that is loss and gradient of a batch prepared ahead, of both nets on one thread:
//! `cargo bench -p ps-bench --bench step`.
//!
//! Beside it the same nets of burn's own layers and, if `PS_BENCH_PYTHON` names a Python that
//! has PyTorch, PyTorch's on one thread (`step.py`). The steps take turns; each line is a median, and
//! the median of the ratios to our step before.

use std::error::Error;
use std::io::{BufRead, BufReader, Lines, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use ps::model::burn;
use ps::model::burn::module::Module;
use ps::model::burn::nn::Linear;
use ps::model::burn::nn::conv::Conv2d;
use ps::model::burn::tensor::activation::{log_softmax, relu};
use ps::model::burn::tensor::module::max_pool2d;
use ps::model::burn::tensor::ops::MaxPoolOptions;
use ps::model::burn::tensor::{Device, Tensor};
use ps::model::{LocalModel, Rng, Step, StepSeed, seeded};
use ps::prelude::*;

fn main() -> Result<(), Box<dyn Error>> {
    let device = std::env::var("PS_BENCH_DEVICE").unwrap_or(default_device_name().to_owned());
    let device = select_device(&device)?;
    let rounds = std::env::var("PS_BENCH_ROUNDS").map_or(Ok(40), |rounds| rounds.parse())?;
    let torch = std::env::var_os("PS_BENCH_PYTHON");
    let mut torch = torch.map(|python| Torch::start(&python)).transpose()?;
    let net = Net::init(1, &device);
    compare(
        "Net",
        32,
        net,
        BurnNet::init(&device),
        &device,
        rounds,
        &mut torch,
    )?;
    let net = ConvNet::init(1, &device);
    let burns = BurnConvNet::init(&device);
    compare("ConvNet", 128, net, burns, &device, 10 * rounds, &mut torch)?;
    if let Some(Torch {
        mut process, input, ..
    }) = torch
    {
        drop(input);
        process.wait()?;
    }
    Ok(())
}

fn compare<A, B>(
    name: &str,
    batch: usize,
    ours: A,
    burns: B,
    device: &Device,
    rounds: u64,
    torch: &mut Option<Torch>,
) -> Result<(), Box<dyn Error>>
where
    A: Model<Batch = ImageBatch>,
    B: Model<Batch = ImageBatch>,
{
    let data = Mnist::bundled_sample().train;
    let batch = Examples::batch(&data, &(0..batch).collect::<Vec<usize>>());
    let ours = LocalModel::new(ours, device)?;
    let burns = LocalModel::new(burns, device)?;
    let mut gradient = vec![0.0; ours.num_weights()];
    let mut times = [const { Vec::new() }; 3];
    for clock in 0..rounds + 2 {
        let seed = StepSeed {
            seed: 1,
            worker: 0,
            clock,
        };
        let started = Instant::now();
        ours.gradient(&batch, seed, &mut gradient)?;
        times[0].push(1e3 * started.elapsed().as_secs_f64());
        let started = Instant::now();
        burns.gradient(&batch, seed, &mut gradient)?;
        times[1].push(1e3 * started.elapsed().as_secs_f64());
        if let Some(torch) = torch {
            times[2].push(torch.step(name)?);
        }
    }
    println!("{name}, batch {}, {rounds} rounds:", batch.num_examples());
    let version = torch.as_ref().map_or("", |torch| &torch.version);
    let names = ["ours", "burn's own layers", &format!("PyTorch {version}")];
    for (name, theirs) in names.iter().zip(&times) {
        if theirs.is_empty() {
            continue;
        }
        // The first ones warm up.
        let ratios = theirs.iter().zip(&times[0]).skip(2);
        let ratio = median(ratios.map(|(theirs, ours)| theirs / ours));
        let time = median(theirs.iter().skip(2).copied());
        println!("  {name:<24} {time:8.2} ms   {ratio:.2}");
    }
    Ok(())
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut numbers: Vec<f64> = numbers.collect();
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

/// A Python process that does steps when told.
struct Torch {
    process: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    version: String,
}

impl Torch {
    fn start(python: &std::ffi::OsStr) -> Result<Self, Box<dyn Error>> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/step.py");
        let mut process = Command::new(python)
            .arg(script)
            .env("OMP_NUM_THREADS", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = process.stdin.take().ok_or("no pipe")?;
        let output = process.stdout.take().ok_or("no pipe")?;
        let mut output = BufReader::new(output).lines();
        let version = output.next().ok_or("Python ended")??;
        Ok(Self {
            process,
            input,
            output,
            version,
        })
    }

    fn step(&mut self, net: &str) -> Result<f64, Box<dyn Error>> {
        writeln!(self.input, "{net}")?;
        Ok(self.output.next().ok_or("Python ended")??.parse()?)
    }
}

/// [`Net`] as burn computes it.
#[derive(Module, Debug)]
struct BurnNet {
    conv1: Conv2d,
    conv2: Conv2d,
    fc1: Linear,
    fc2: Linear,
}

impl BurnNet {
    fn init(device: &Device) -> Self {
        let rng = &mut Rng::new(1);
        Self {
            conv1: seeded::conv2d(rng, [1, 32], 3, device),
            conv2: seeded::conv2d(rng, [32, 64], 3, device),
            fc1: seeded::linear(rng, [9216, 128], device),
            fc2: seeded::linear(rng, [128, 10], device),
        }
    }
}

impl Model for BurnNet {
    type Batch = ImageBatch;

    fn loss(&self, batch: &ImageBatch, step: &mut Step) -> Tensor<1> {
        let x = relu(self.conv1.forward(batch.images_on(step.device())));
        let x = max_pool2d(self.conv2.forward(x), MaxPoolOptions::new([2, 2]));
        let x = step.dropout_channels(x, 0.25);
        let x = relu(self.fc1.forward(x.reshape([-1, 9216])));
        let x = step.dropout(x, 0.5);
        let log_probabilities = log_softmax(self.fc2.forward(x), 1);
        nll_loss(log_probabilities, batch.labels_on(step.device()))
    }

    fn num_examples(batch: &ImageBatch) -> usize {
        batch.num_examples()
    }
}

/// [`ConvNet`] as burn computes it.
#[derive(Module, Debug)]
struct BurnConvNet {
    conv1: Conv2d,
    fc: Linear,
}

impl BurnConvNet {
    fn init(device: &Device) -> Self {
        let rng = &mut Rng::new(1);
        Self {
            conv1: seeded::conv2d(rng, [1, 3], 3, device),
            fc: seeded::linear(rng, [192, 10], device),
        }
    }
}

impl Model for BurnConvNet {
    type Batch = ImageBatch;

    fn loss(&self, batch: &ImageBatch, step: &mut Step) -> Tensor<1> {
        let x = self.conv1.forward(batch.images_on(step.device()));
        let x = relu(max_pool2d(x, MaxPoolOptions::new([3, 3])));
        let x = self.fc.forward(x.reshape([-1, 192]));
        nll_loss(log_softmax(x, 1), batch.labels_on(step.device()))
    }

    fn num_examples(batch: &ImageBatch) -> usize {
        batch.num_examples()
    }
}
