//! The settings of a parameter server.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};

/// The shortest lease: it is looked after four times as often, and timers have milliseconds.
const MIN_LEASE: Duration = Duration::from_millis(10);

/// What a parameter server does with gradients.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServerConfig {
    /// When gradients are applied. Default: [`Consistency::Bsp`].
    pub consistency: Consistency,
    /// How the gradients of one update become one. Default: [`Reduction::Mean`].
    pub reduction: Reduction,
    /// The learning rate. Default: 0.01.
    pub learning_rate: f64,
    /// The largest norm that a gradient may have. Default: infinity, which still refuses
    /// gradients that contain NaN or infinity.
    pub max_norm: f64,
    /// How long a member may be silent before it counts as lost; at least 10 ms. Workers send heartbeats
    /// while they compute. Too short: a worker on a busy machine or a slow network must join again and
    /// again. Too long: a dead worker holds up synchronous rounds.
    /// Default: `None`, for ever; then a driver must send [`ReportLost`](super::ReportLost).
    pub worker_lease: Option<Duration>,
    /// How many different workers must have joined before the first round of
    /// [`Consistency::Bsp`] or [`Consistency::KofN`] closes, so that who comes first does not train
    /// alone. A worker that is reported lost is not waited for. Default: 0.
    pub wait_for_workers: usize,
    /// How many versions are kept besides the current one, for pulls that want one version of
    /// several servers. Each costs as much memory as the weights. Default: 0; a group of
    /// several servers keeps at least 4.
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
    /// Not a usable learning rate.
    #[error("the learning rate must be a number from 0 to {max:.1e}, but is {0:?}", max = f32::MAX)]
    LearningRate(f64),
    /// Not a usable limit.
    #[error("the largest gradient norm must be a positive number or infinity, but is {0}")]
    MaxNorm(f64),
    /// A lease that is over at once.
    #[error("the lease must be at least {MIN_LEASE:?}, but is {0:?}")]
    Lease(Duration),
    /// No round could close.
    #[error("k-of-n needs k of at least 1")]
    NoQuorum,
}

impl ServerConfig {
    /// Checks every setting that can be checked without knowing the workers.
    ///
    /// # Errors
    /// When a setting cannot work; the error says what it has to be.
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
