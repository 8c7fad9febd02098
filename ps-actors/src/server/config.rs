//! The settings of a parameter server.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::consistency::{Consistency, Reduction};
use super::partition::Cut;
use crate::ids::Version;
use crate::rule::PlaceError;

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
    /// What is done to the combined gradient of each update before the update rule gets it. Default:
    /// [`Clipping::Off`].
    pub clipping: Clipping,
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
    /// Where a group may cut the weights to split them over its servers. Default: [`Cut::Anywhere`].
    pub cut: Cut,
    /// Whether a worker computes its next gradient while its push is on its way, in [`Consistency::Asp`] and
    /// [`Consistency::Ssp`] (S-24). The gradient is then computed on weights without the update of that push. This pays
    /// where the transfer takes a large part of a step. Default: `false`. Other modes do not heed it.
    pub overlap: bool,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            consistency: Consistency::Bsp,
            reduction: Reduction::Mean,
            learning_rate: 0.01,
            max_norm: f64::INFINITY,
            clipping: Clipping::Off,
            worker_lease: None,
            wait_for_workers: 0,
            num_kept_versions: 0,
            cut: Cut::default(),
            overlap: false,
        }
    }
}

/// What is done to the combined gradient of an update: the mean or sum of the workers' gradients.
///
/// [`ServerConfig::max_norm`] is something else: it refuses single gradients.
///
/// ```
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{ApplyGradients, Clipping, ParameterServer, ServerConfig};
/// # use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
/// # use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(2), vec![0.0, 0.0]);
/// let config = ServerConfig {
///     learning_rate: 1.0,
///     clipping: Clipping::Norm(1.0),
///     ..ServerConfig::default()
/// };
/// let server = ParameterServer::new(&initial, Sgd::new(), config)?.spawn()?;
/// # let id = GradientId { worker: WorkerId(0), incarnation: Incarnation(1), clock: Clock(0) };
/// # let gradient = Gradient::new(vec![3.0, -4.0]);
/// # let update =
/// #     GradientUpdate { id, computed_on: Version(0), loss: 0.0, num_examples: 1, gradient };
/// // `update` is a worker's gradient: [3.0, -4.0], of norm 5.
/// let weights = server.ask(ApplyGradients::mean([update])).flatten().wait()?;
/// assert_eq!(weights.to_vec(), [-0.6, 0.8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub enum Clipping {
    /// The combined gradient is not clipped.
    #[default]
    Off,
    /// If the Euclidean norm of the combined gradient over all weights of the model is above this positive
    /// number, the gradient is multiplied by one factor, so that its norm is this number.
    Norm(f64),
    /// Each number of the combined gradient is limited to the range from minus this positive number to this
    /// number.
    Value(f32),
}

impl std::fmt::Display for Clipping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Norm(limit) => write!(f, "norm {limit}"),
            Self::Value(limit) => write!(f, "value {limit}"),
        }
    }
}

impl Clipping {
    fn check(self) -> Result<(), ConfigError> {
        match self {
            Self::Norm(limit) if limit.is_nan() || limit <= 0.0 => {
                Err(ConfigError::Clipping(limit))
            }
            Self::Value(limit) if limit.is_nan() || limit <= 0.0 => {
                Err(ConfigError::Clipping(limit.into()))
            }
            _ => Ok(()),
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
    /// The limit of [`Clipping`] is NaN, zero, or negative.
    #[error("a gradient can only be clipped to a positive number, but the limit is {0}")]
    Clipping(f64),
    /// The worker lease is too short.
    #[error("the worker lease must be at least {MIN_LEASE:?}, but is {0:?}")]
    Lease(Duration),
    /// `k` is 0 in [`Consistency::KofN`].
    #[error("k-of-n needs k of at least 1")]
    NoQuorum,
    /// The update rule cannot update the parameters of a server.
    #[error(transparent)]
    Rule(#[from] PlaceError),
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
        self.clipping.check()?;
        match self.worker_lease {
            Some(lease) if lease < MIN_LEASE => Err(ConfigError::Lease(lease)),
            _ => Ok(()),
        }
    }
}

pub(crate) fn check_learning_rate(rate: f64) -> Result<(), ConfigError> {
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
