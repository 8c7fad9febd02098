//! Why a worker could not do what a message asked.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::SourceError;
use crate::ids::{Clock, WorkerId};
use crate::server::GroupError;

/// Why a worker could not do what a message asked.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum WorkerError {
    /// The worker's [`GradientSource`](super::GradientSource) failed.
    #[error("{worker} could not compute the gradient of {clock}")]
    Source {
        /// The worker that failed.
        worker: WorkerId,
        /// The step whose gradient was being computed.
        clock: Clock,
        /// The error of the [`GradientSource`](super::GradientSource). If it comes from another process, it is only a text, which
        /// includes the sources.
        #[source]
        #[serde(with = "source_text")]
        source: SourceError,
    },
    /// The servers refused a call of the worker, or could not be reached.
    #[error("{worker} could not use its servers")]
    Servers {
        /// The worker that made the call.
        worker: WorkerId,
        /// The error of the call.
        #[source]
        source: GroupError,
    },
    /// Too many gradients in a row were refused; see [`MAX_REFUSED`](super::MAX_REFUSED).
    #[error(
        "training has diverged: {num_refused} gradients of {worker} in a row were refused, and nobody's \
         was applied; the last one's norm was {norm} (the limit is {limit}). A lower learning rate helps \
         most often; check the data for NaN; a limit below infinity may be too low"
    )]
    Diverged {
        /// The worker whose gradients were refused.
        worker: WorkerId,
        /// How many gradients were refused in a row.
        num_refused: u64,
        /// The norm of the last refused gradient.
        norm: f64,
        /// The largest norm that the servers accept.
        limit: f64,
    },
    /// The worker already runs steps.
    #[error("{worker} runs steps already; stop them first")]
    Busy {
        /// The worker that is busy.
        worker: WorkerId,
    },
}

/// Writes an error of any type as the text of it and its sources, and reads it as that text.
mod source_text {
    use super::{Deserialize, Deserializer, Serializer, SourceError};
    use ps_runtime::actor::error_chain;

    pub(super) fn serialize<S: Serializer>(
        error: &SourceError,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&error_chain(error.as_ref()))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<SourceError, D::Error> {
        String::deserialize(deserializer).map(SourceError::from)
    }
}
