//! A worker in Python with PyTorch, `examples/python/torch_worker.py`, over HTTP.
//!
//! Runs when `PS_TORCH_PYTHON` names a Python interpreter that can import `torch`.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ps::actors::cluster::{Cluster, ClusterConfig, Hosts};
use ps::actors::http;
use ps::actors::ids::JoinRequest;
use ps::actors::net::Token;
use ps::actors::worker::SourceError;
use ps::model::burn::tensor::Device;
use ps::model::{LocalModel, StepSeed};
use ps::prelude::*;

mod layers;

const PYTHON_PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/python");
const TOKEN: &str = "the-token-of-this-test";
const BATCH: usize = 64;

fn python() -> Option<String> {
    let python = std::env::var("PS_TORCH_PYTHON").ok();
    if python.is_none() {
        println!("skipped: PS_TORCH_PYTHON names no Python interpreter with torch");
    }
    python
}

/// Pixels and labels that follow from the index of the example alone: a bright column at a place
/// that depends on the label, and some noise.
fn example(index: usize) -> (Vec<u8>, u8) {
    let label = (index * 7 + index / 10) % 10;
    let pixel = |place: usize| {
        let noise = (index * 31 + place * 17) % 97;
        let is_bright = place % 28 / 2 == label + 2;
        (noise + if is_bright { 150 } else { 0 }) as u8
    };
    ((0..28 * 28).map(pixel).collect(), label as u8)
}

/// Writes examples as MNIST does, without compression.
fn write_data(name: &str, num_examples: usize) -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&directory).unwrap();
    let header = |numbers: &[u32]| -> Vec<u8> {
        numbers
            .iter()
            .flat_map(|number| number.to_be_bytes())
            .collect()
    };
    let mut images = header(&[2051, num_examples as u32, 28, 28]);
    let mut labels = header(&[2049, num_examples as u32]);
    for (pixels, label) in (0..num_examples).map(example) {
        images.extend(pixels);
        labels.push(label);
    }
    std::fs::write(directory.join("train-images-idx3-ubyte"), images).unwrap();
    std::fs::write(directory.join("train-labels-idx1-ubyte"), labels).unwrap();
    directory
}

fn batch(examples: std::ops::Range<usize>) -> ImageBatch {
    let (mut images, mut labels) = (Vec::new(), Vec::new());
    for (pixels, label) in examples.clone().map(example) {
        let normalized = |pixel: u8| (f32::from(pixel) / 255.0 - 0.1307) / 0.3081;
        images.extend(pixels.into_iter().map(normalized));
        labels.push(i64::from(label));
    }
    ImageBatch::new(images, labels, [examples.len(), 1, 28, 28], 10).unwrap()
}

fn listen(servers: &ServerGroup) -> Cluster {
    let config = ClusterConfig {
        token: Some(Token::new(TOKEN).unwrap()),
        ..ClusterConfig::default()
    };
    let routes = http::routes(servers.clone());
    let any = (Ipv4Addr::LOCALHOST, 0).into();
    Cluster::listen_with(config, any, Hosts::new(), routes).unwrap()
}

fn start(python: &str, cluster: &Cluster, data: &Path, options: &[&str]) -> Child {
    Command::new(python)
        .arg(format!("{PYTHON_PATH}/torch_worker.py"))
        .args(["--address", &cluster.address().unwrap().to_string()])
        .args(["--batch-size", &BATCH.to_string()])
        .arg("--data-dir")
        .arg(data)
        .args(options)
        .env("PS_TOKEN", TOKEN)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Runs a program that uses the modules of the examples; its first argument is the servers' address.
fn script(python: &str, program: &str, cluster: &Cluster) -> Command {
    let mut command = Command::new(python);
    command
        .args(["-c", program, &cluster.address().unwrap().to_string()])
        .env("PS_TOKEN", TOKEN)
        .env("PYTHONPATH", PYTHON_PATH)
        .stdout(Stdio::piped());
    command
}

#[track_caller]
fn finish(worker: Child) -> String {
    let output = worker.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{}: {text}", output.status);
    text
}

fn latest(servers: &ServerGroup) -> Weights {
    let servers = servers.clone();
    run(async move { servers.pull(PullVersion::Latest).await.unwrap() })
}

/// The weights are what the last gradient was.
#[derive(Debug)]
struct Assign;

impl UpdateRule for Assign {
    fn update(&mut self, weights: &mut [f32], gradient: &[f32], _: f64) {
        weights.copy_from_slice(gradient);
    }
}

/// The tests of the modules, `tests/python`, with what this Python has of NumPy and PyTorch.
#[test]
fn the_tests_of_the_python_modules_pass() {
    let Some(python) = python() else { return };
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python");
    let output = Command::new(python)
        .args(["-m", "unittest", "discover", "-v", "-s", tests])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    println!("{told}");
    assert!(output.status.success(), "{told}");
}

/// Batches of no examples, files that lie elsewhere, a rank that is none: one line, no traceback.
#[test]
fn wrong_settings_of_the_pytorch_worker_are_errors_without_a_traceback() {
    let Some(python) = python() else { return };
    let data = write_data("torch-settings", 10);
    let nowhere = data.join("nowhere");
    let worker = format!("{PYTHON_PATH}/torch_worker.py");
    for (data, option, value, expected) in [
        (&data, "--batch-size", "11", "there are 10 examples"),
        (&data, "--batch-size", "0", "at least 1"),
        (&data, "--worker", "1", "not one of 0 to 0"),
        (&nowhere, "--worker", "0", "cannot read the data directory"),
    ] {
        let mut command = Command::new(&python);
        command.arg(&worker).arg("--data-dir").arg(data);
        let output = command.args([option, value]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{option} {value}");
        assert!(
            told.contains("error: ") && told.contains(expected),
            "{told}"
        );
        assert!(!told.contains("Traceback"), "{told}");
    }
}

/// The two compute the same in 32 bits, in sums of up to 64 · 676 terms of another order: the
/// largest component of the gradient is about 0.1, and a few of its last bits may differ.
const TOLERANCE: f32 = 1e-6;

#[test]
fn pytorch_computes_the_gradient_that_burn_computes() {
    let Some(python) = python() else { return };
    let device = select_device(default_device_name()).unwrap();
    let model = ConvNet::init(3, &device);
    let initial = initial_weights(&model, &device).unwrap();
    let assign = |_| -> Box<dyn UpdateRule> { Box::new(Assign) };
    let servers = ServerGroup::spawn(&initial, 1, ServerConfig::default(), assign).unwrap();
    let cluster = listen(&servers);
    let data = write_data("torch-gradient", 2 * BATCH);
    finish(start(&python, &cluster, &data, &["--steps", "1"]));

    let got = latest(&servers);
    assert_eq!(got.version(), Version(1));
    let mut local = LocalModel::new(model, &device).unwrap();
    local.load(&initial.to_vec()).unwrap();
    let mut expected = vec![0.0; local.num_weights()];
    local
        .gradient(&batch(0..BATCH), StepSeed::default(), &mut expected)
        .unwrap();
    let mut largest = 0.0f32;
    for parameter in initial.layout().parameters() {
        for index in parameter.range.clone() {
            let (got, expected) = (got.to_vec()[index], expected[index]);
            let difference = (got - expected).abs();
            largest = largest.max(difference);
            let name = &parameter.name;
            assert!(
                difference <= TOLERANCE,
                "{name}, weight {index}: {got} and {expected}"
            );
        }
    }
    let scale = expected
        .iter()
        .fold(0.0f32, |largest, g| largest.max(g.abs()));
    println!("largest difference {largest:e}, largest component {scale}");
    assert!(scale > 0.01, "there is something to compare");
}

const STEPS: u64 = 30;
/// Ten full batches and a smaller one, which both workers take in turn: its gradient has less weight.
const NUM_EXAMPLES: usize = 10 * BATCH + 20;

/// Takes the batches that `torch_worker.py` takes as one of two workers.
struct LikePython {
    model: LocalModel<ConvNet>,
    worker: WorkerId,
}

impl GradientSource for LikePython {
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        self.model.load(&weights.to_vec())?;
        let num_batches = NUM_EXAMPLES.div_ceil(BATCH);
        let first = (clock.0 as usize * 2 + self.worker.0 as usize) % num_batches * BATCH;
        let batch = batch(first..NUM_EXAMPLES.min(first + BATCH));
        let mut gradient = vec![0.0; self.model.num_weights()];
        let seed = StepSeed::default();
        let loss = self.model.gradient(&batch, seed, &mut gradient)?;
        Ok(LocalGradient {
            gradient: Gradient::new(gradient),
            loss,
            num_examples: ConvNet::num_examples(&batch),
        })
    }
}

fn spawn_rust_worker(worker: WorkerId) -> ActorRef<DataWorker<LikePython>> {
    spawn(move || {
        let (model, device) = initial_model();
        let model = LocalModel::new(model, &device).unwrap();
        DataWorker::new(worker, LikePython { model, worker })
    })
}

fn initial_model() -> (ConvNet, Device) {
    let device = select_device(default_device_name()).unwrap();
    (ConvNet::init(4, &device), device)
}

/// Trains with a worker in Rust, and returns the weights. `other` starts the second worker and waits for its end.
fn train_with(other: impl FnOnce(&ServerGroup)) -> Vec<f32> {
    let config = ServerConfig {
        wait_for_workers: 2,
        learning_rate: 0.1,
        ..ServerConfig::default()
    };
    let (model, device) = initial_model();
    let initial = initial_weights(&model, &device).unwrap();
    let sgd = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
    let servers = ServerGroup::spawn(&initial, 2, config, sgd).unwrap();
    let rust = spawn_rust_worker(WorkerId(0));
    let summary = rust.ask(RunSteps {
        servers: servers.clone(),
        num_steps: STEPS,
    });
    other(&servers);
    assert_eq!(summary.wait().unwrap().unwrap().num_applied, STEPS);
    let weights = latest(&servers);
    assert_eq!(weights.version(), Version(STEPS));
    weights.to_vec()
}

/// Synchronous rounds of one gradient from each (PS-3, M-6): what a worker is made with changes nothing but rounding.
#[test]
fn a_rust_worker_and_a_pytorch_worker_train_as_two_rust_workers() {
    let Some(python) = python() else { return };
    let data = write_data("torch-training", NUM_EXAMPLES);

    let mut told = String::new();
    let mixed = train_with(|servers| {
        let cluster = listen(servers);
        let steps = STEPS.to_string();
        let options = ["--steps", &steps, "--worker", "1", "--num-workers", "2"];
        told = finish(start(&python, &cluster, &data, &options));
    });
    let rust = train_with(|servers| {
        let other = spawn_rust_worker(WorkerId(1));
        let summary = other.ask(RunSteps {
            servers: servers.clone(),
            num_steps: STEPS,
        });
        assert_eq!(summary.wait().unwrap().unwrap().num_applied, STEPS);
    });

    let differences = mixed.iter().zip(&rust).map(|(a, b)| (a - b).abs());
    let largest = differences.fold(0.0, f32::max);
    println!("after {STEPS} rounds, a weight differs by up to {largest:e}");
    // As for several backends in one run, see `tests/mixed.rs`.
    assert!(largest < 1e-5, "{largest:e}");
    let losses = told.lines().filter_map(|line| {
        let (_, rest) = line.split_once("loss ")?;
        rest.split(',').next()?.parse::<f32>().ok()
    });
    let losses: Vec<f32> = losses.collect();
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < first, "{told}");
    assert!(told.lines().all(|line| line.contains("applied")), "{told}");
}

/// A step of the worker in Python takes as long as it takes a silent one to be declared dead, twice.
#[test]
fn heartbeats_keep_a_worker_alive_whose_step_takes_longer_than_the_lease() {
    const SLOW_WORKER: &str = "
import sys
from ps_client import Worker
with Worker(sys.argv[1], 0, heartbeat=0.05) as worker:
    print('joined', flush=True)
    sys.stdin.readline()
    print(worker.push_pull(bytes(len(worker.weights)), 1.0, 1), flush=True)
";
    let Some(python) = python() else { return };
    let config = ServerConfig {
        consistency: Consistency::Asp,
        worker_lease: Some(Duration::from_secs(2)),
        ..ServerConfig::default()
    };
    let initial = Weights::initial(Layout::flat(10), vec![0.0; 10]);
    let sgd = |_| -> Box<dyn UpdateRule> { Box::new(Sgd::new()) };
    let servers = ServerGroup::spawn(&initial, 1, config, sgd).unwrap();
    let cluster = listen(&servers);
    let mut slow = script(&python, SLOW_WORKER, &cluster)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(slow.stdout.take().unwrap()).lines();
    assert_eq!(told.next().unwrap().unwrap(), "joined");
    let silent = WorkerId(1);
    for request in 1..=2 {
        run(servers.join(silent, JoinRequest(request))).unwrap();
        let is_member = || {
            let status = run(servers.status()).unwrap();
            let coordinator = status[0].coordinator.as_ref().unwrap();
            let worker = coordinator.workers.get(&silent);
            worker.is_some_and(|worker| worker.is_member)
        };
        while is_member() {
            std::thread::yield_now();
        }
    }
    drop(slow.stdin.take());
    assert_eq!(told.next().unwrap().unwrap(), "applied");
    assert!(slow.wait().unwrap().success());
}
