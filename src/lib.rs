//! Parameter-server training in typed Rust, in the style of Ray.
//!
//! A driver program spawns a [`ParameterServer`](actors::server::ParameterServer), or several that share
//! the weights, and some [`DataWorker`](actors::worker::DataWorker)s. They are actors: each has a thread of
//! its own, and every call returns a future. The workers compute gradients of a [burn](https://burn.dev)
//! model. The servers apply each gradient exactly once: synchronously, asynchronously, or in a mode between
//! the two ([`Consistency`](actors::server::Consistency)).
//!
//! ```text
//!  driver: Trainer, or your own loop
//!      │ spawns, evaluates, saves checkpoints
//!      ├─────────────────────────────┬──────────────────────────────┐
//!      ▼                             ▼                              ▼
//!  DataWorker                    DataWorker                  ParameterServer (one, or several)
//!  model, share of the data      model, share of the data    weights, update rule
//!      │                             │                              ▲
//!      └──────── gradients ──────────┴──────────────────────────────┘
//!                weights back
//! ```
//!
//! There are two ways to write a driver. [`Trainer`] does everything in one call. Or you send the messages
//! yourself:
//!
//! ```
//! use ps::prelude::*;
//!
//! let device = select_device(default_device_name())?;
//! let mnist = Mnist::bundled_sample();
//! let model = ConvNet::init(1, &device);
//!
//! let config = ServerConfig { learning_rate: 0.01, ..ServerConfig::default() };
//! let initial = initial_weights(&model, &device)?;
//! let server = ParameterServer::new(&initial, Sgd::new(), config)?.spawn()?;
//! let workers = [0, 1].map(|rank| {
//!     let config =
//!         WorkerConfig { worker: WorkerId(rank), num_workers: 2, batch_size: 64, seed: 1 };
//!     spawn_worker(&model, &device, &mnist.train, config)
//! });
//! let [one, other] = workers;
//! let (one, other) = (one?, other?);
//!
//! let mut weights = server.ask(GetWeights).wait()?;
//! for _ in 0..3 {
//!     // Both compute at the same time, because a call starts when it is made.
//!     let first = one.ask(ComputeGradients(weights.clone()));
//!     let second = other.ask(ComputeGradients(weights.clone()));
//!     let gradients = [first.wait()??, second.wait()??];
//!     weights = server.ask(ApplyGradients::mean(gradients)).wait()??;
//! }
//! assert_eq!(weights.version(), Version(3));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module | what it holds |
//! |---|---|
//! | [`trainer`], [`report`] | training in one call, and its result |
//! | [`observe`] | what happens in a training, as events |
//! | [`source`] | a burn model with data as a worker's source of gradients; evaluation |
//! | [`served`] | models that live with a server: remote forward and backward |
//! | [`lasting`] | workers for a driver's own loop that are started again when their process is lost |
//! | [`rule`] | a burn optimizer as a server's update rule |
//! | [`learning_rate`] | burn's learning-rate schedulers as a server's schedule |
//! | `learner` (feature `burn-train`) | a training strategy for burn's own `Learner` |
//! | [`export`] | files with a trained model for other programs |
//! | [`data`] | data sets that can be cut into batches |
//! | [`device`] | the device of this process |
//! | [`agreement`] | checks that all processes of a training have the same model and data |
//! | `chaos` (feature `cli`) | follows a plan of faults in a run of real processes |
//! | `runs` (feature) | the directory of a run: events, report and pictures |
//! | `metrics` (feature) | metrics for Prometheus and others |
//! | `tensorboard` (feature) | event files for TensorBoard |
//! | `trace` (feature) | a trace for Perfetto and Chrome |
//! | `otel` (feature) | traces for OpenTelemetry |
//! | [`controls`] | a handle that changes a training while it runs |
//! | `dashboard` (feature) | a page in the browser that shows a training, and controls it |
//! | `cli` (feature) | the command line of a training program: flags, logging, exit codes |
//! | [`actors`], [`model`], [`dataset`] | the crates below, re-exported |

#![warn(clippy::print_stdout)]

pub mod agreement;
mod balance;
#[cfg(feature = "cli")]
pub mod chaos;
#[cfg(feature = "cli")]
pub mod cli;
pub mod controls;
#[cfg(feature = "dashboard")]
pub mod dashboard;
pub mod data;
pub mod device;
pub mod export;
pub mod lasting;
#[cfg(feature = "burn-train")]
pub mod learner;
pub mod learning_rate;
#[cfg(feature = "metrics")]
pub mod metrics;
pub mod observe;
#[cfg(feature = "otel")]
pub mod otel;
pub mod report;
mod resume;
pub mod rule;
#[cfg(feature = "runs")]
pub mod runs;
pub mod served;
pub mod source;
#[cfg(feature = "tensorboard")]
pub mod tensorboard;
#[cfg(feature = "trace")]
pub mod trace;
pub mod trainer;
mod workers;

pub use ps_actors as actors;
pub use ps_data as dataset;
pub use ps_model as model;

pub use report::Report;
pub use trainer::{Replay, ReplayError, TrainError, Trainer};

/// Compiles the README's driver program.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// What a driver program usually needs.
pub mod prelude {
    pub use ps_actors::actor::{ActorRef, CallError, Pending, Reply, Spawn, lookup, run, spawn};
    pub use ps_actors::checkpoint::{Checkpoint, CheckpointConfig, Checkpoints, Start};
    pub use ps_actors::cluster::{
        Cluster, ClusterConfig, Hosted, Hosts, Placement, RemoteRef, Resources, SpawnOn,
    };
    pub use ps_actors::group::ServerGroup;
    pub use ps_actors::ids::{Clock, Version, WorkerId};
    pub use ps_actors::launch::{LaunchOptions, Signal, StopSignal, exit_code};
    pub use ps_actors::remote::{Kept, Messages, Remote};
    pub use ps_actors::rule::{Sgd, UpdateRule};
    pub use ps_actors::server::{
        ApplyGradients, ApplyKept, Consistency, Cut, GetStatus, GetWeights, ParameterServer, Pull,
        PullVersion, Push, PushPull, Reduction, ServerConfig, SetConsistency, SetLearningRate,
        TakeCheckpoint,
    };
    pub use ps_actors::update_log::{LogConfig, LogStatus, LogSync};
    pub use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
    pub use ps_actors::worker::{
        ComputeGradients, DataWorker, GradientSource, LocalGradient, RunSteps,
    };
    pub use ps_data::ImageDataset;
    #[cfg(feature = "mnist")]
    pub use ps_data::{FashionMnist, Mnist, MnistOptions};
    pub use ps_model::{
        ConvNet, Evaluation, ImageBatch, Model, Net, Part, Step, compiled_devices,
        default_device_name, nll_loss, select_device_for,
    };

    pub use crate::agreement::{agree_on_data, agree_on_model};
    pub use crate::data::{Examples, WorkerBatches, batched, collated};
    pub use crate::device::select_device;
    pub use crate::lasting::LastingWorker;
    pub use crate::learning_rate::BurnSchedule;
    pub use crate::report::Report;
    pub use crate::rule::OptimizerRule;
    pub use crate::source::{
        Evaluator, ModelWorker, WorkerConfig, host_workers, initial_weights, model_with_weights,
        spawn_worker, worker_variant,
    };
    pub use crate::trainer::{TrainError, Trainer};
}
