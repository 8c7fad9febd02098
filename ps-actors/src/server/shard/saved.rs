//! The states of a shard that a checkpoint fetches.
//!
//! The coordinator decides at which version the state is saved. It is saved when the shard makes this
//! version, and kept until it has been fetched.

use super::{Shard, ShardAnswer, ShardError, Ticket};
use crate::ids::Version;
use crate::rule::SavedRule;
use crate::weights::Weights;

/// How many saved states are kept until the checkpoint that they are for has been written. The state of an
/// older checkpoint is no longer fetched when a newer one has begun.
const MAX_SAVED: usize = 2;

/// All state of a shard at one version. A clone shares the numbers.
#[derive(Clone, Debug)]
pub(in crate::server) struct ShardState {
    /// The weights of the shard's range.
    pub weights: Weights,
    /// The state of the update rule for this range.
    pub rule: SavedRule,
}

impl Shard {
    /// Returns all state of the shard as it is now.
    pub(in crate::server) fn state(&self) -> ShardState {
        ShardState {
            weights: self.current.clone(),
            rule: SavedRule::from(self.rule.save()),
        }
    }

    /// Saves the state at this version, now or when the version is made. It is kept for
    /// [`saved_state`](Self::saved_state). Returns the calls that can be answered now.
    pub(in crate::server) fn save_at(&mut self, version: Version) -> Vec<ShardAnswer> {
        let mut answers = Vec::new();
        if version >= self.current.version() {
            self.unsaved.insert(version);
            self.save_if_asked(&mut answers);
        }
        answers
    }

    /// Answers with the state at this version, at once or later under `ticket`. It is an error if the state
    /// was not saved, or is no longer kept.
    pub(in crate::server) fn saved_state(
        &mut self,
        ticket: Ticket,
        version: Version,
    ) -> Option<Result<ShardState, ShardError>> {
        let answer = self.look_up_state(version);
        if answer.is_none() {
            self.waiting_for_states.insert(ticket, version);
        }
        answer
    }

    /// Forgets the saved state of this version and of earlier ones.
    pub(in crate::server) fn forget_states(&mut self, until: Version) {
        self.saved.retain(|&version, _| version > until);
    }

    pub(super) fn save_if_asked(&mut self, answers: &mut Vec<ShardAnswer>) {
        let version = self.current.version();
        if self.unsaved.remove(&version) {
            self.saved.insert(version, self.state());
            while self.saved.len() > MAX_SAVED {
                self.saved.pop_first();
            }
        }
        let waiting = std::mem::take(&mut self.waiting_for_states);
        for (ticket, version) in waiting {
            match self.look_up_state(version) {
                Some(state) => answers.push(ShardAnswer::State(ticket, state)),
                None => _ = self.waiting_for_states.insert(ticket, version),
            }
        }
    }

    fn look_up_state(&self, asked: Version) -> Option<Result<ShardState, ShardError>> {
        if let Some(state) = self.saved.get(&asked) {
            return Some(Ok(state.clone()));
        }
        // The decision to save it may not have arrived yet.
        let may_come = asked >= self.current.version();
        let oldest = self.current.version();
        (!may_come).then_some(Err(ShardError::VersionGone { asked, oldest }))
    }
}
