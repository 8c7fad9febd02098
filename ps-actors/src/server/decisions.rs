//! What a shard does with one decision of the first server.

use super::config::check_learning_rate;
use super::messages::{Decision, ServerError};
use super::shard::{Shard, ShardAnswer};

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
                shard.update(update, learning_rate)?
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
