//! A training whose weights say how often each example was in an applied gradient, for the tests that kill
//! processes.
//!
//! The model has one weight per example, whose gradient is -1 for each example of the batch. The learning rate is
//! 1 and the update rule plain SGD, so the weight is exactly the number of times. It has some more weights, whose
//! gradients depend on themselves: their bits depend on which gradients made which update.
//!
//! `--die "RANK POINT NTH"` lets the process of this rank kill itself when it reaches the point for the nth time.
//! A process that was started again does not. RANK `*` means any process but the driver.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Mutex;

use anyhow::{Context as _, Error, Result, bail, ensure};
use burn::data::dataset::InMemDataset;
use burn::module::{Module, Param};
use burn::optim::AdamConfig;
use burn::tensor::{Device, Tensor, TensorData};
use clap::{Parser, ValueEnum};
use ps::actors::chaos::points::{Point, Watch, watch};
use ps::actors::launch::{env, harm};
use ps::cli::{self, CheckpointArgs, ClusterArgs, say};
use ps::prelude::*;

/// Twice two workers' 60 batches of 4 examples.
const NUM_EXAMPLES: usize = 480;
const BATCH_SIZE: usize = 4;
const NUM_OTHERS: usize = 64;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 2)]
    num_workers: usize,
    #[arg(long, default_value_t = 2)]
    num_servers: usize,
    #[arg(long)]
    servers_on_nodes: bool,
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
    #[arg(long)]
    overlap: bool,
    #[arg(long, default_value_t = 3)]
    epochs: u64,
    /// With another one than plain SGD, the weights do not say how often each example was applied.
    #[arg(long, value_enum, default_value_t = Optimizer::Sgd)]
    optimizer: Optimizer,
    #[arg(long)]
    die: Vec<Death>,
    #[command(flatten)]
    cluster: ClusterArgs,
    #[command(flatten)]
    checkpoints: CheckpointArgs,
}

#[derive(Clone, Copy, ValueEnum)]
enum Optimizer {
    Sgd,
    Momentum,
    Adam,
}

fn main() -> ExitCode {
    cli::main(count)
}

fn count(args: Args) -> Result<ExitCode> {
    watch(Deaths::of_this_process(args.die))?;
    let device = select_device(default_device_name())?;
    let examples = collated(InMemDataset::new((0..NUM_EXAMPLES).collect()), |ids| ids)
        .compared_by(|id: &usize| id.to_string());
    let trainer = Trainer::new(Counting::new(&device), examples)
        .device(&device)
        .workers(args.num_workers)
        .servers(args.num_servers)
        .servers_on_nodes(args.servers_on_nodes)
        .consistency(args.consistency)
        .overlap(args.overlap)
        .reduction(Reduction::Sum)
        .learning_rate(1.0)
        .batch_size(BATCH_SIZE)
        .epochs(args.epochs)
        .checkpoints(args.checkpoints.config());
    let trainer = match args.optimizer {
        Optimizer::Sgd => trainer,
        Optimizer::Momentum => trainer.update_rule(|| Sgd::with_momentum(0.9)),
        Optimizer::Adam => trainer.optimizer(AdamConfig::new()),
    };
    let Some(cluster) = args.cluster.launch(trainer.hosts(Hosts::new())?) else {
        return Ok(ExitCode::SUCCESS);
    };
    let report = trainer.run_on(&cluster)?;
    say!("{report}");
    let weights = report.weights.to_vec();
    let counts = report.weights.layout().parameters().iter();
    let counts = counts.clone().find(|one| one.name == "counts");
    let counts = &weights[counts.context("the model has counts")?.range.clone()];
    ensure!(counts.len() == NUM_EXAMPLES, "{} counts", counts.len());
    let (least, most) = counts
        .iter()
        .fold((f32::MAX, f32::MIN), |(least, most), &n| {
            (least.min(n), most.max(n))
        });
    say!("Each example was applied {least} to {most} times.");
    // FNV-1a.
    let hash = weights.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, one| {
        (hash ^ u64::from(one.to_bits())).wrapping_mul(0x0100_0000_01b3)
    });
    say!("The weights have the bits {hash:016x}.");
    Ok(cli::end_of_training(
        report.interrupted,
        report.saved_all().is_some(),
    ))
}

#[derive(Module, Debug)]
struct Counting {
    counts: Param<Tensor<1>>,
    others: Param<Tensor<1>>,
}

impl Counting {
    fn new(device: &Device) -> Self {
        let zeros = |len: usize| Param::from_tensor(Tensor::zeros([len], device));
        Self {
            counts: zeros(NUM_EXAMPLES),
            others: zeros(NUM_OTHERS),
        }
    }
}

impl Model for Counting {
    type Batch = Vec<usize>;

    fn loss(&self, ids: &Vec<usize>, step: &mut Step) -> Tensor<1> {
        let mut named = vec![0.0_f32; NUM_EXAMPLES];
        ids.iter().for_each(|&id| named[id] += 1.0);
        let target = (0..NUM_OTHERS).map(|i| {
            let of_id = |&id: &usize| ((id * NUM_OTHERS + i) as f32 * 0.754_877_7).fract();
            ids.iter().map(of_id).sum::<f32>()
        });
        let target: Vec<f32> = target.collect();
        let tensor = |numbers: Vec<f32>| {
            let shape = [numbers.len()];
            Tensor::<1>::from_data(TensorData::new(numbers, shape), step.device())
        };
        let (named, target) = (tensor(named), tensor(target));
        let away = (self.others.val() - target).square().sum() * 0.01;
        away - (self.counts.val() * named).sum()
    }

    fn num_examples(ids: &Vec<usize>) -> usize {
        ids.len()
    }
}

/// A process kills itself when it reaches a point for the nth time.
#[derive(Clone)]
struct Death {
    /// `None`: any process but the driver.
    rank: Option<u32>,
    point: String,
    nth: u64,
}

impl FromStr for Death {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        let &[rank, point, nth] = &words[..] else {
            bail!("write it as RANK POINT NTH");
        };
        Ok(Self {
            rank: match rank {
                "*" => None,
                rank => Some(rank.parse()?),
            },
            point: point.to_owned(),
            nth: nth.parse()?,
        })
    }
}

/// How often this process reached each point, and at which it dies.
struct Deaths {
    deaths: Vec<Death>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl Deaths {
    fn of_this_process(mut deaths: Vec<Death>) -> Self {
        let number = |name| env::read(name).and_then(|text| text.parse().ok());
        let (rank, attempt) = (number(env::RANK).unwrap_or(0), number(env::ATTEMPT));
        deaths.retain(|death| match death.rank {
            Some(other) => u64::from(other) == rank,
            None => rank != 0,
        });
        if attempt.is_some_and(|attempt| attempt > 0) {
            deaths.clear();
        }
        Self {
            deaths,
            counts: Mutex::default(),
        }
    }

    /// Counts one. Returns whether the process dies here.
    fn is_deadly(&self, point: &'static str) -> bool {
        let mut counts = self.counts.lock().unwrap();
        let count = counts.entry(point).or_default();
        *count += 1;
        let mut deaths = self.deaths.iter();
        deaths.any(|death| death.point == point && death.nth == *count)
    }
}

fn die(point: &str) -> ! {
    // One call of the system, so it is not lost.
    let _ = std::io::stderr().write_all(format!("dies at {point}\n").as_bytes());
    harm::kill_this_process()
}

impl Watch for Deaths {
    fn reached(&self, point: &Point<'_>) {
        let is_first = |range: &std::ops::Range<usize>| range.start == 0;
        let name = match point {
            Point::WorkerComputes { .. } => "worker-computes",
            Point::WorkerStaged(_) => "worker-staged",
            Point::WorkerSent(_) => "worker-sent",
            Point::WorkerTold(..) => "worker-told",
            Point::ServerDecided { .. } => "first-decided",
            Point::ServerApplies { range, .. } if is_first(range) => "first-applies",
            Point::ServerApplies { .. } => "other-applies",
            Point::ServerApplied { range, .. } if is_first(range) => "first-applied",
            Point::ServerApplied { .. } => "other-applied",
            Point::ServerMade { version, .. } if *version == Version(0) => return,
            Point::ServerMade { range, .. } if is_first(range) => "first-restored",
            Point::ServerMade { .. } => "other-restored",
            Point::CheckpointWritten(_) => "checkpoint-written",
            Point::CheckpointNamed(_) => "checkpoint-named",
            Point::LogFollowed(_) => "log-followed",
            Point::LogContinues => "log-continues",
            // Counted below.
            Point::LogCut => die("log-cut"),
            _ => return,
        };
        if self.is_deadly(name) {
            die(name);
        }
    }

    fn cuts_log(&self) -> bool {
        self.is_deadly("log-cut")
    }
}
