//! Flags of a training on MNIST.

#[cfg(feature = "mnist")]
use std::path::PathBuf;

use ps_actors::ids::WorkerId;
#[cfg(feature = "mnist")]
use ps_data::{DataError, Mnist, MnistOptions};
use ps_model::burn::tensor::Device;
use ps_model::{DeviceError, default_device_name, select_device_for};

use super::LOCAL_RANK;
#[cfg(feature = "mnist")]
use super::{IS_QUIET, RANK, say};
use crate::observe::Settings;
use crate::source::WorkerConfig;

// No doc comments on these types: `--help` would take them for the program's own text.

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Data and device")]
pub struct DataArgs {
    /// Directory with the four MNIST files. Default: $PS_MNIST_DIR, the cache, a download, or the
    /// sample of the real data that is built in.
    #[cfg(feature = "mnist")]
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// Do not try to download MNIST.
    #[cfg(feature = "mnist")]
    #[arg(long)]
    pub offline: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
pub struct DeviceArgs {
    /// Where to compute, such as flex, ndarray, tch, tch:cuda, cuda, cuda:0 or wgpu, if compiled in. Without a
    /// number, the processes of a host take its GPUs in turn.
    #[arg(long, default_value = default_device_name())]
    pub device: String,
}

impl DeviceArgs {
    /// Returns the device to compute on. In a program with [`ClusterArgs`](super::ClusterArgs), the processes of a
    /// host take its GPUs in turn, if the name has no number.
    ///
    /// # Errors
    /// When it is not compiled in, or does not exist.
    pub fn device(&self) -> Result<Device, DeviceError> {
        let local_rank = LOCAL_RANK.get().copied().unwrap_or(0);
        select_device_for(&self.device, local_rank as usize)
    }
}

impl DataArgs {
    /// Loads MNIST. The driver prints where it comes from. A download shows its progress on a terminal, unless the user
    /// wants to see none (`--quiet`).
    ///
    /// # Errors
    /// When the files are not there or are damaged.
    #[cfg(feature = "mnist")]
    pub fn mnist(&self) -> Result<Mnist, DataError> {
        let mnist = Mnist::load(&MnistOptions {
            directory: self.data_dir.clone(),
            offline: self.offline,
            shows_progress: !IS_QUIET.get().is_some_and(|&is_quiet| is_quiet),
            ..MnistOptions::default()
        })?;
        if RANK.get().is_none_or(|&rank| rank == 0) {
            let (train, test) = (mnist.train.len(), mnist.test.len());
            say!(
                "MNIST, {train} training and {test} test images: {}",
                mnist.source
            );
        }
        Ok(mnist)
    }

    /// Returns the device to compute on, as [`DeviceArgs::device`].
    ///
    /// # Errors
    /// When it is not compiled in, or does not exist.
    pub fn device(&self) -> Result<Device, DeviceError> {
        self.device.device()
    }
}

#[allow(missing_docs, reason = "see above")]
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Training")]
pub struct TrainArgs {
    /// Number of workers.
    #[arg(long, default_value_t = 2)]
    pub num_workers: usize,
    /// Examples per batch of one worker.
    #[arg(long, default_value_t = 128)]
    pub batch_size: usize,
    /// Iterations; in each, every worker computes one gradient.
    #[arg(long, default_value_t = 200)]
    pub iterations: u64,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-2)]
    pub learning_rate: f64,
    /// Seed of the initial weights and the order of examples.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
}

impl TrainArgs {
    /// Describes a driver's own loop to those who [observe](crate::observe) it. `mode` says when it applies
    /// gradients.
    #[must_use]
    pub fn settings(&self, mode: &str) -> Settings {
        Settings {
            num_workers: self.num_workers,
            num_servers: 1,
            batch_size: self.batch_size,
            steps_per_worker: self.iterations,
            seed: self.seed,
            learning_rate: self.learning_rate,
            consistency: mode.to_owned(),
            ..Settings::default()
        }
    }

    /// Returns the settings of one of the workers.
    #[must_use]
    pub fn worker(&self, number: u32) -> WorkerConfig {
        WorkerConfig {
            worker: WorkerId(number),
            num_workers: self.num_workers,
            batch_size: self.batch_size,
            seed: self.seed,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};
    use ps_model::DeviceError;

    use super::*;

    #[derive(Parser)]
    struct Program {
        #[command(flatten)]
        data: DataArgs,
        #[command(flatten)]
        train: TrainArgs,
    }

    #[test]
    fn the_flag_chooses_the_device() {
        Program::command().debug_assert();
        let device = |flags: &[&str]| {
            let program = Program::parse_from([&["program"], flags].concat());
            assert_eq!(program.train.num_workers, 2);
            program.data.device()
        };
        device(&[]).unwrap();
        device(&["--device", default_device_name()]).unwrap();
        let error = device(&["--device", "abacus"]).unwrap_err();
        assert!(matches!(error, DeviceError::Unknown { name } if name == "abacus"));
    }
}
