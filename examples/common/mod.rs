//! What the MNIST examples share: options, and loading the data.

use std::path::PathBuf;

use anyhow::Result;
use ps::prelude::*;

pub(crate) mod cluster;
pub(crate) mod output;

// Options of every MNIST example. No doc comment: `--help` would take it for the program's.
#[derive(Clone, clap::Args)]
pub(crate) struct DataArgs {
    /// Directory with the four MNIST files. Default: $PS_MNIST_DIR, the cache, a download, or the
    /// sample of the real data that is built in.
    #[arg(long)]
    pub(crate) data_dir: Option<PathBuf>,
    /// Do not try to download MNIST.
    #[arg(long)]
    pub(crate) offline: bool,
    /// Where to compute, such as flex, ndarray, tch, tch:cuda:0, cuda:0 or wgpu, if compiled in.
    #[arg(long, default_value = default_device_name())]
    pub(crate) device: String,
    #[command(flatten)]
    pub(crate) cluster: cluster::ClusterArgs,
}

// Options of those that train with workers.
#[derive(Clone, clap::Args)]
#[allow(dead_code, reason = "not every example has them")]
pub(crate) struct Common {
    #[command(flatten)]
    pub(crate) data: DataArgs,
    /// Number of workers.
    #[arg(long, default_value_t = 2)]
    pub(crate) num_workers: usize,
    /// Examples per batch of one worker.
    #[arg(long, default_value_t = 128)]
    pub(crate) batch_size: usize,
    /// Iterations; in each, every worker computes one gradient.
    #[arg(long, default_value_t = 200)]
    pub(crate) iterations: u64,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-2)]
    pub(crate) learning_rate: f64,
    /// Seed of the initial weights and the order of examples.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

impl DataArgs {
    /// Turns logging on, loads MNIST and says where it comes from.
    pub(crate) fn mnist(&self) -> Result<Mnist> {
        let rank = self.cluster.begin();
        let (directory, offline) = (self.data_dir.clone(), self.offline);
        let mnist = Mnist::load(&MnistOptions {
            directory,
            offline,
            ..MnistOptions::default()
        })?;
        // Every process loads it; one says so.
        if rank == 0 {
            let (train, test) = (mnist.train.len(), mnist.test.len());
            output::say!(
                "MNIST, {train} training and {test} test images: {}",
                mnist.source
            );
        }
        Ok(mnist)
    }
}

#[allow(dead_code, reason = "the examples that use `Trainer` leave this to it")]
impl Common {
    /// The settings of the worker with this rank.
    pub(crate) fn worker(&self, rank: usize) -> WorkerConfig {
        WorkerConfig {
            worker: WorkerId(rank as u32),
            num_workers: self.num_workers,
            batch_size: self.batch_size,
            seed: self.seed,
        }
    }
}
