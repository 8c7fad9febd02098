//! The settings of a parameter server.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use crate::ids::Version;

/// The shortest worker lease. Leases are checked four times per lease, by timers that count in
/// milliseconds.
const MIN_LEASE: Duration = Duration::from_millis(10);

/// The settings of a parameter server.
///
/// ```
/// use std::time::Duration;
///
/// use ps_actors::server::{Consistency, ServerConfig};
///
/// let config = ServerConfig {
///     consistency: Consistency::Ssp { bound: 3 },
///     learning_rate: 1e-3,
///     max_norm: 1e3,
///     worker_lease: Some(Duration::from_secs(10)),
///     ..ServerConfig::default()
/// };
/// assert_eq!(config.check(), Ok(()));
///
/// let wrong = ServerConfig { learning_rate: -1.0, ..config };
/// assert!(wrong.check().is_err());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerConfig {
    /// When gradients are applied. Default: [`Consistency::Bsp`].
    pub consistency: Consistency,
    /// How the gradients of one update are combined. Default: [`Reduction::Mean`].
    pub reduction: Reduction,
    /// The learning rate: a number from 0 to the largest `f32`. Default: 0.01.
    pub learning_rate: f64,
    /// The largest Euclidean norm that a gradient may have; a positive number. A gradient with a larger
    /// norm is refused. Too low: useful gradients are refused. Too high: one bad batch can spoil the
    /// weights. Default: infinity. Gradients that contain NaN or infinity are refused in any case.
    pub max_norm: f64,
    /// How long a member may be silent before it counts as lost; at least 10 ms. Workers send heartbeats
    /// while they compute. Too short: a worker on a busy machine or a slow network must join again and
    /// again. Too long: a dead worker holds up synchronous rounds. Default: `None`, which means for ever. A
    /// driver must then send [`ReportLost`](super::ReportLost) for each dead worker.
    pub worker_lease: Option<Duration>,
    /// How many different workers must have joined before the first round of [`Consistency::Bsp`] or
    /// [`Consistency::KofN`] closes, so that the first worker does not train alone. The server does not
    /// wait for a worker that is reported lost. Default: 0.
    pub wait_for_workers: usize,
    /// How many versions of the weights are kept besides the current one. They are for pulls that need the
    /// same version from several servers. Each version takes as much memory as the weights. Default: 0. A
    /// group of several servers keeps at least 4.
    pub num_kept_versions: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            consistency: Consistency::Bsp,
            reduction: Reduction::Mean,
            learning_rate: 0.01,
            max_norm: f64::INFINITY,
            worker_lease: None,
            wait_for_workers: 0,
            num_kept_versions: 0,
        }
    }
}

/// A server setting that cannot work.
#[derive(Clone, Debug, PartialEq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ConfigError {
    /// The learning rate is negative, NaN, or too large for `f32`.
    #[error("the learning rate must be a number from 0 to {max:.1e}, but is {0:?}", max = f32::MAX)]
    LearningRate(f64),
    /// The largest gradient norm is NaN, zero, or negative.
    #[error("the largest gradient norm must be a positive number or infinity, but is {0}")]
    MaxNorm(f64),
    /// The worker lease is too short.
    #[error("the worker lease must be at least {MIN_LEASE:?}, but is {0:?}")]
    Lease(Duration),
    /// `k` is 0 in [`Consistency::KofN`].
    #[error("k-of-n needs k of at least 1")]
    NoQuorum,
    /// The checkpoint has the state of another update rule.
    #[error("the checkpoint is of another update rule: {0}")]
    RuleState(String),
    /// The parts of the checkpoint are of different versions.
    #[error("the record of gradients is of {of}, but the weights are of {weights}")]
    Versions {
        /// The version of the record.
        of: Version,
        /// The version of the weights.
        weights: Version,
    },
}

impl ServerConfig {
    /// Checks every setting that can be checked without knowing the workers.
    ///
    /// # Errors
    /// If a setting cannot work. The error says which values the setting may have.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_learning_rate(self.learning_rate)?;
        check_consistency(self.consistency)?;
        if self.max_norm.is_nan() || self.max_norm <= 0.0 {
            return Err(ConfigError::MaxNorm(self.max_norm));
        }
        match self.worker_lease {
            Some(lease) if lease < MIN_LEASE => Err(ConfigError::Lease(lease)),
            _ => Ok(()),
        }
    }
}

pub(super) fn check_learning_rate(rate: f64) -> Result<(), ConfigError> {
    // Weights are `f32`: a larger rate would be infinite there.
    match (0.0..=f64::from(f32::MAX)).contains(&rate) {
        true => Ok(()),
        false => Err(ConfigError::LearningRate(rate)),
    }
}

pub(super) fn check_consistency(consistency: Consistency) -> Result<(), ConfigError> {
    match consistency {
        Consistency::KofN { k: 0 } => Err(ConfigError::NoQuorum),
        _ => Ok(()),
    }
}
