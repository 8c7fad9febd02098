//! What a shard does with one decision of the first server.

use super::config::check_learning_rate;
use super::messages::{Decision, ServerError};
use super::shard::{Shard, ShardAnswer};
use crate::chaos::reached;

impl Decision {
    /// Lets a shard follow this decision. Returns the calls that can be answered now.
    ///
    /// # Errors
    /// If the decision does not fit those before it, or the shard.
    pub(super) fn apply_to(self, shard: &mut Shard) -> Result<Vec<ShardAnswer>, ServerError> {
        let answers = match self {
            Self::Stage(id, gradient) => shard.stage_decided(id, &gradient)?,
            Self::Complete(id, gradient) => shard.complete(id, &gradient)?,
            Self::Update {
                update,
                learning_rate,
            } => {
                check_learning_rate(learning_rate)?;
                reached!(ServerApplies {
                    range: shard.range(),
                    version: update.version,
                });
                #[cfg(feature = "chaos")]
                let gradients = update.named_for_a_watch();
                let answers = shard.update(update, learning_rate)?;
                reached!(ServerApplied {
                    range: shard.range(),
                    num_weights: shard.weights().layout().num_weights(),
                    version: shard.weights().version(),
                    gradients: &gradients,
                });
                answers
            }
            Self::Save(version) => shard.save_at(version),
            Self::Discard(id) => {
                shard.discard(id);
                Vec::new()
            }
            Self::Fence { worker, below } => {
                shard.fence(worker, below);
                Vec::new()
            }
        };
        Ok(answers)
    }
}

#[cfg(feature = "chaos")]
impl super::protocol::Update {
    /// Returns the gradients of the update, if somebody is told of them.
    fn named_for_a_watch(&self) -> Vec<crate::ids::GradientId> {
        match crate::chaos::points::is_watched() {
            true => self.gradients.iter().map(|one| one.id).collect(),
            false => Vec::new(),
        }
    }
}
