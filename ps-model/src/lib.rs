//! burn models for a parameter server: losses, flat views, update rules, devices.
//!
//! A parameter server works on flat sequences of `f32` and knows no tensors. This crate is the
//! bridge to [burn](https://burn.dev), and knows no actors.
//!
//! ```text
//!  flat weights ──▶ FlatView ──▶ your Model (a burn module) ──▶ loss      LocalModel does all of this
//!      ▲                               ▲                          │
//!      │                             batch                        ▼
//!   BurnRule ◀─────────────────── flat gradient ◀──────────── backward
//! ```
//!
//! - [`Model`]: the trait to implement for a model of your own, a burn module with a loss. [`ConvNet`] and
//!   [`Net`] are two such models, for 28×28 images.
//! - [`LocalModel`]: a model on a device. It takes flat weights, and computes losses and flat gradients.
//! - [`part`]: a part of a model that other processes compute through, and their side of it.
//! - [`conv2d`], [`max_pool2d`]: the operations of burn, faster on the backend `flex`.
//! - [`FlatView`]: the flat view of any burn module.
//! - [`BurnRule`]: any elementwise burn optimizer (SGD, Adam, ...) as the update rule of a shard. [`WholeRule`]: LAMB and
//!   Muon, for shards of whole parameters.
//! - [`select_device`]: chooses the device to compute on by its name, among the backends compiled in
//!   ([`device`] lists the names).
//! - [`Step`], [`Rng`], [`seeded`]: dropout and initial weights from seeds, with the same bits in every
//!   process.
//!
//! # Example
//!
//! Two workers' gradients, averaged, and a step of Adam:
//!
//! ```
//! use ps_model::burn::optim::AdamConfig;
//! use ps_model::{
//!     BurnRule, ConvNet, ImageBatch, LocalModel, StepSeed, default_device_name, select_device,
//! };
//!
//! let device = select_device(default_device_name())?;
//! let mut model = LocalModel::new(ConvNet::init(1, &device), &device)?;
//! let mut rule = BurnRule::new(&AdamConfig::new(), &device)?;
//! let mut weights = model.weights()?;
//!
//! // The batch of each worker: eight black images of class 0, and eight white images of class 1.
//! let batch = |pixel: f32, label: i64| {
//!     ImageBatch::new(vec![pixel; 8 * 28 * 28], vec![label; 8], [8, 1, 28, 28], 10)
//! };
//! let batches = [batch(-0.4, 0)?, batch(2.8, 1)?];
//!
//! for clock in 0..20 {
//!     model.load(&weights)?;
//!     let mut mean = vec![0.0; weights.len()];
//!     let mut gradient = vec![0.0; weights.len()];
//!     for (worker, batch) in (0..).zip(&batches) {
//!         model.gradient(batch, StepSeed { seed: 1, worker, clock }, &mut gradient)?;
//!         for (mean, slope) in mean.iter_mut().zip(&gradient) {
//!             *mean += slope / batches.len() as f32;
//!         }
//!     }
//!     rule.step(&mut weights, &mean, 0.01)?;
//! }
//!
//! model.load(&weights)?;
//! let result = model.evaluate(&batches[0])? + model.evaluate(&batches[1])?;
//! assert_eq!(result.accuracy(), Some(1.0));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![warn(clippy::print_stdout)]

mod batch;
mod by_parameter;
mod conv;
mod convnet;
pub mod device;
pub mod flat;
mod local;
mod loss;
mod model;
mod net;
mod optimizer;
mod panic;
pub mod part;
mod pool;
mod rest;
mod rng;
mod rule;
mod rule_state;
pub mod seeded;
mod step;
mod stream;
mod survey;
mod whole_rule;

/// The version of burn that the types of this crate come from.
pub use burn;

pub use batch::{BatchError, ImageBatch};
pub use conv::conv2d;
pub use convnet::ConvNet;
pub use device::{
    DeviceError, compiled_devices, default_device_name, select_device, select_device_for,
};
pub use flat::{FlatError, FlatView, Numbers, ParameterSpec, TiedField};
pub use local::{LocalModel, ModelError};
pub use loss::{nll_loss, num_correct};
pub use model::{Evaluation, Model};
pub use net::Net;
pub use optimizer::{OptimizerConfig, ShardRule};
pub use part::{
    Activation, Array, AtSeam, Backward, LocalGradients, MAX_CALLS, Part, PartError, Pass,
    SeamError, Seams,
};
pub use pool::max_pool2d;
pub use rng::Rng;
pub use rule::{BurnRule, ElementwiseConfig, RuleError};
pub use rule_state::{RuleState, StateScalar, StateTensor, StateValue};
pub use step::{Step, StepSeed};
pub use whole_rule::{ShardParameter, WholeConfig, WholeRule};
