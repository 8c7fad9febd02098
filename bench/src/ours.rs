//! Our own contender in training: servers and workers as `Trainer` makes them, in this process or
//! in several.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use ps::prelude::*;

use crate::measure::{Training, measure};

/// Trains and measures: what `compare` starts once per run.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Ours {
    #[command(flatten)]
    training: Training,
    #[arg(long, default_value = default_device_name())]
    device: String,
    #[arg(long, default_value_t = 2)]
    num_workers: usize,
    #[arg(long, default_value = "bsp")]
    consistency: Consistency,
    /// Run as this many processes: a driver that holds the server, and the homes of the workers.
    #[arg(long)]
    processes: Option<u32>,
    #[arg(long)]
    data_dir: Option<PathBuf>,
}

/// The first examples of a data set.
#[derive(Clone)]
struct First(ImageDataset, usize);

impl Examples for First {
    type Batch = ImageBatch;

    fn num_examples(&self) -> usize {
        self.1.min(self.0.len())
    }

    fn batch(&self, indices: &[usize]) -> ImageBatch {
        Examples::batch(&self.0, indices)
    }
}

impl Ours {
    pub(crate) fn run(self) -> Result<()> {
        let device = select_device(&self.device)?;
        let mnist = Mnist::load(&MnistOptions {
            directory: self.data_dir.clone(),
            ..MnistOptions::default()
        })?;
        match self.training.model.as_str() {
            "net" => self.train(Net::init(0, &device), mnist),
            _ => self.train(ConvNet::init(0, &device), mnist),
        }
    }

    fn train<M: Model<Batch = ImageBatch>>(self, model: M, mnist: Mnist) -> Result<()> {
        let device = select_device(&self.device)?;
        let options = LaunchOptions {
            processes: self.processes,
            ..LaunchOptions::default()
        };
        let hosts = host_workers(Hosts::new(), &model, &device, &mnist.train);
        let Some(cluster) = Cluster::launch(&options, ClusterConfig::default(), hosts)? else {
            return Ok(());
        };
        let config = ServerConfig {
            consistency: self.consistency,
            learning_rate: self.training.learning_rate,
            wait_for_workers: self.num_workers,
            ..ServerConfig::default()
        };
        let initial = initial_weights(&model, &device)?;
        let servers = ServerGroup::spawn(&initial, 1, config, |_| Box::new(Sgd::new()))?;
        let worker = |rank| WorkerConfig {
            worker: WorkerId(rank as u32),
            num_workers: self.num_workers,
            batch_size: self.training.batch_size,
            seed: 0,
        };
        // All at once: each makes its batches ready.
        let started: Vec<_> = (0..self.num_workers)
            .map(|rank| cluster.spawn::<ModelWorker<M>>(worker(rank)))
            .collect();
        let workers = started.into_iter().map(|worker| worker.wait());
        let workers = workers.collect::<Result<Vec<_>, _>>()?;

        let train = |num_steps| {
            let run = || RunSteps {
                servers: servers.clone(),
                num_steps,
            };
            let replies: Vec<_> = workers.iter().map(|worker| worker.ask(run())).collect();
            for reply in replies {
                let report = reply.wait()??;
                ensure!(report.num_applied == num_steps, "a gradient was lost");
            }
            Ok(())
        };
        let test = First(mnist.test, self.training.num_test);
        let mut evaluator = None;
        let evaluate = || {
            let weights = run(servers.pull(PullVersion::Latest))?;
            if evaluator.is_none() {
                evaluator = Some(Evaluator::new(&model, &device, &test)?);
            }
            let evaluator = evaluator.as_mut().context("it was made above")?;
            Ok(evaluator.accuracy_percent(&weights)?)
        };
        measure(&self.training, self.num_workers, train, evaluate)
    }
}
