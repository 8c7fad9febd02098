//! Why a shard did not do what a message asked.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{MAX_STAGED, MAX_STAGED_OF_STRANGERS};
use crate::ids::{GradientId, Incarnation, Version, WorkerId};

/// Why a shard did not do what a message asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ShardError {
    /// The gradient is of a model with another number of weights.
    #[error(
        "{id} is over weights {got:?}, but must be over {expected:?}: its model is another one"
    )]
    WrongRange {
        /// The id of the gradient.
        id: GradientId,
        /// The range that the gradient covers.
        got: Range<usize>,
        /// The range that the gradient must cover.
        expected: Range<usize>,
    },
    /// The gradient takes other weights for those of buffers than the model has.
    #[error(
        "{id} trains weights {got:?} of its range, but must train {expected:?}: its model is another one"
    )]
    WrongBuffers {
        /// The id of the gradient.
        id: GradientId,
        /// The range of trained weights in the gradient.
        got: Range<usize>,
        /// The range of trained weights in the model.
        expected: Range<usize>,
    },
    /// The worker's incarnation is over.
    #[error("{id} is fenced off: valid is {least} or later")]
    Fenced {
        /// The id of the gradient.
        id: GradientId,
        /// The lowest incarnation that is still valid.
        least: Incarnation,
    },
    /// The worker has staged too many gradients that it has not pushed.
    #[error("{worker} has {MAX_STAGED} gradients staged already; push them first")]
    TooManyStaged {
        /// The worker with the staged gradients.
        worker: WorkerId,
    },
    /// The worker's incarnation is not known here, and too many gradients of unknown incarnations are
    /// staged.
    #[error(
        "{id} is of an incarnation that is not known here (yet), and {MAX_STAGED_OF_STRANGERS} such \
         gradients are staged already; join, or try again"
    )]
    TooManyStrangers {
        /// The id of the gradient.
        id: GradientId,
    },
    /// The version is no longer kept.
    #[error("version {asked:?} is gone: the oldest that is kept is {oldest:?}; pull a later one")]
    VersionGone {
        /// The version that the pull asked for.
        asked: Version,
        /// The oldest version that is kept.
        oldest: Version,
    },
    /// An update does not follow the one before it.
    #[error("an update would make version {got:?}, but the next one is {expected:?}")]
    WrongUpdate {
        /// The version that the update would make.
        got: Version,
        /// The version that the next update must make.
        expected: Version,
    },
    /// An update names no gradient, names one of them twice, or is clipped in an impossible way.
    #[error(
        "the update that makes version {version:?} names no gradient, or one of them twice, or is clipped \
         in an impossible way"
    )]
    BadUpdate {
        /// The version that the update would make.
        version: Version,
    },
}
