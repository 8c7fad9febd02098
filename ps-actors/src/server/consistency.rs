//! The two choices that decide what a training run computes: [`Consistency`] and [`Reduction`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// When a pushed gradient is applied, and how many steps the workers may be apart.
///
/// It is written as `bsp`, `asp`, `ssp:3` or `k-of-n:2`:
///
/// ```
/// use ps_actors::server::Consistency;
///
/// assert_eq!("ssp:3".parse(), Ok(Consistency::Ssp { bound: 3 }));
/// assert_eq!(Consistency::KofN { k: 2 }.to_string(), "k-of-n:2");
///
/// let error = "ssp".parse::<Consistency>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "`ssp` is no consistency mode: use bsp, asp, ssp:BOUND or k-of-n:K with K ≥ 1"
/// );
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Consistency {
    /// Bulk synchronous: each round is one update, made of one gradient of every live worker. With
    /// [`Reduction::Mean`], the result is that of one worker on the joined batch, up to rounding.
    Bsp,
    /// Asynchronous: each gradient is applied when it arrives. No worker waits. Slow workers push gradients
    /// that they computed on old weights.
    Asp,
    /// Stale synchronous: like `Asp`, but a worker waits before it starts a step that is more than `bound`
    /// steps ahead of the slowest live worker's step (Ho et al., NIPS 2013,
    /// <https://papers.nips.cc/paper/4894>). With `bound` 0 all workers take the same step.
    Ssp {
        /// How many steps a worker may be ahead of the slowest live worker.
        bound: u64,
    },
    /// Backup workers: a round closes with the gradients of the first `k` distinct workers. Gradients that
    /// arrive later were computed on old weights. They are dropped and counted (Chen et al., 2016,
    /// <https://arxiv.org/abs/1604.00981>). With fewer than `k` live workers, a round needs all of them.
    KofN {
        /// How many distinct workers close a round; at least 1.
        k: usize,
    },
}

impl Consistency {
    /// Checks the mode against the number of workers that will take part.
    ///
    /// # Errors
    /// If `k` is 0 or more than `num_workers`.
    pub fn check(self, num_workers: usize) -> Result<(), ConsistencyError> {
        match self {
            Self::KofN { k } if k == 0 || k > num_workers => {
                Err(ConsistencyError::NotAmongWorkers { k, num_workers })
            }
            _ => Ok(()),
        }
    }

    /// Returns whether a worker may compute its next gradient while it pushes the one before; see
    /// [`ServerConfig::overlap`](super::ServerConfig::overlap).
    ///
    /// ```
    /// use ps_actors::server::Consistency;
    ///
    /// assert!(Consistency::Ssp { bound: 2 }.may_overlap());
    /// assert!(!Consistency::Bsp.may_overlap());
    /// ```
    #[must_use]
    pub fn may_overlap(self) -> bool {
        matches!(self, Self::Asp | Self::Ssp { .. })
    }

    /// Returns how many updates there are at most if each worker takes `num_steps` steps. A schedule of the learning
    /// rate that is this long does not end before the run.
    ///
    /// ```
    /// use ps_actors::server::Consistency;
    ///
    /// assert_eq!(Consistency::Bsp.most_updates(100, 4), 100);
    /// assert_eq!(Consistency::Asp.most_updates(100, 4), 400);
    /// // Most rounds have 2 gradients. Those of the last worker that is left have one.
    /// assert_eq!(Consistency::KofN { k: 2 }.most_updates(100, 4), 250);
    /// ```
    #[must_use]
    pub fn most_updates(self, num_steps: u64, num_workers: usize) -> u64 {
        let num_workers = num_workers as u64;
        match self {
            Self::Bsp => num_steps,
            Self::Asp | Self::Ssp { .. } => num_steps.saturating_mul(num_workers),
            // Each round has all workers.
            Self::KofN { k } if k as u64 >= num_workers => num_steps,
            // When fewer than k workers are left, one of them is in all rounds. All others need k gradients each.
            Self::KofN { k } => {
                let others = num_steps.saturating_mul(num_workers - 1) / (k as u64).max(1);
                num_steps.saturating_add(others)
            }
        }
    }
}

impl fmt::Display for Consistency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bsp => f.write_str("bsp"),
            Self::Asp => f.write_str("asp"),
            Self::Ssp { bound } => write!(f, "ssp:{bound}"),
            Self::KofN { k } => write!(f, "k-of-n:{k}"),
        }
    }
}

impl FromStr for Consistency {
    type Err = ConsistencyError;

    fn from_str(text: &str) -> Result<Self, ConsistencyError> {
        let unknown = || ConsistencyError::Unknown {
            text: text.to_owned(),
        };
        match text.split_once(':') {
            None if text == "bsp" => Ok(Self::Bsp),
            None if text == "asp" => Ok(Self::Asp),
            Some(("ssp", bound)) => Ok(Self::Ssp {
                bound: bound.parse().map_err(|_| unknown())?,
            }),
            Some(("k-of-n", k)) => match k.parse().map_err(|_| unknown())? {
                0 => Err(unknown()),
                k => Ok(Self::KofN { k }),
            },
            _ => Err(unknown()),
        }
    }
}

/// A consistency mode that does not exist or cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ConsistencyError {
    /// The text does not name a mode.
    #[error("`{text}` is no consistency mode: use bsp, asp, ssp:BOUND or k-of-n:K with K ≥ 1")]
    Unknown {
        /// The text that was read as a mode.
        text: String,
    },
    /// `k` is 0 or more than the number of workers.
    #[error("k-of-n:{k} needs k between 1 and the number of workers, which is {num_workers}")]
    NotAmongWorkers {
        /// The `k` of the mode.
        k: usize,
        /// How many workers there are.
        num_workers: usize,
    },
}

/// How the gradients of one update are combined into one.
///
/// ```
/// use ps_actors::server::Reduction;
///
/// assert_eq!("sum".parse(), Ok(Reduction::Sum));
/// assert_eq!(Reduction::default(), Reduction::Mean);
/// ```
///
/// [`ApplyGradients`](super::ApplyGradients) and [`ServerConfig::reduction`](super::ServerConfig::reduction) take one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reduction {
    /// The mean of the gradients, weighted with the number of examples of each batch. This is what one
    /// worker computes on the joined batch, so a learning rate means the same for any number of workers.
    ///
    /// If the number of examples of one batch is not known (0), all gradients of the update have the same
    /// weight. If all batches have the same size, the bits are those of the plain mean. A gradient of a
    /// batch with more than 2³² examples is refused.
    #[default]
    Mean,
    /// The sum of the gradients, as in Ray's parameter-server example. With n workers, a step is n times as
    /// long.
    Sum,
}

impl fmt::Display for Reduction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mean => "mean",
            Self::Sum => "sum",
        })
    }
}

impl FromStr for Reduction {
    type Err = ReductionError;

    fn from_str(text: &str) -> Result<Self, ReductionError> {
        match text {
            "mean" => Ok(Self::Mean),
            "sum" => Ok(Self::Sum),
            _ => Err(ReductionError {
                text: text.to_owned(),
            }),
        }
    }
}

/// The text does not name a reduction.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is no reduction: use mean or sum")]
pub struct ReductionError {
    text: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use ps_runtime::test_util::check_error_crosses;

    #[test]
    fn every_mode_reads_back_what_it_prints() {
        let modes = [
            Consistency::Bsp,
            Consistency::Asp,
            Consistency::Ssp { bound: 0 },
            Consistency::Ssp { bound: 3 },
            Consistency::KofN { k: 2 },
        ];
        for mode in modes {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for reduction in [Reduction::Mean, Reduction::Sum] {
            assert_eq!(reduction.to_string().parse(), Ok(reduction));
        }
    }

    #[test]
    fn wrong_modes_say_what_would_be_right() {
        for text in [
            "", "BSP", "ssp", "ssp:", "ssp:-1", "ssp:x", "k-of-n:0", "k-of-n", "asp:1",
        ] {
            let error = text.parse::<Consistency>().unwrap_err().to_string();
            assert!(error.contains("ssp:BOUND"), "{text}: {error}");
        }
        assert!("average".parse::<Reduction>().is_err());
    }

    #[test]
    fn errors_cross_a_wire() {
        let unknown = "average".parse::<Consistency>().unwrap_err();
        let not_among = Consistency::KofN { k: 3 }.check(2).unwrap_err();
        for sent in [unknown, not_among] {
            assert_eq!(check_error_crosses(&sent), sent);
        }
    }

    #[test]
    fn k_must_be_among_the_workers() {
        assert_eq!(Consistency::KofN { k: 2 }.check(2), Ok(()));
        for k in [0, 3] {
            let error = Consistency::KofN { k }.check(2).unwrap_err().to_string();
            assert!(error.contains("number of workers, which is 2"), "{error}");
        }
    }
}
