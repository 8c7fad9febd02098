//! What an update log has of the coordinator's decisions, and how a saved state follows them. Pure.
//!
//! A state follows the same entry twice as if it came once. So a log may begin before the checkpoint that it
//! continues.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::config::ConfigError;
use super::coordinator::CoordinatorState;
use super::ledger::Outcome;
use super::protocol::{Effect, Update};
use super::shard::{Shard, ShardError};
use crate::checkpoint::Checkpoint;
use crate::ids::{Clock, GradientId, JoinRequest, Version, WorkerId};
use crate::rule::{SavedRule, UpdateRule};
use crate::weights::Gradient;

/// One entry of an update log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum LogEntry {
    /// A process goes on with the run.
    Began {
        /// Statements about the run, which replace those of the checkpoint.
        facts: BTreeMap<String, String>,
        /// The clock at which all workers go on, if their number has changed.
        restarted_at: Option<Clock>,
    },
    /// A worker joined by this request.
    Joined {
        worker: WorkerId,
        request: JoinRequest,
    },
    /// A gradient was dropped as late or refused.
    Settled { id: GradientId, outcome: Outcome },
    /// Gradients were applied. The numbers of all of them are beside the entry, in the same order.
    Update { update: Update, learning_rate: f64 },
}

/// Returns the log entries of the coordinator's decisions, in order. `rates` are the learning rates of the
/// updates among them.
pub(super) fn entries(effects: &[Effect], rates: &[f64]) -> impl Iterator<Item = LogEntry> {
    let mut rates = rates.iter().copied();
    effects.iter().filter_map(move |effect| match *effect {
        Effect::Update(ref update) => Some(LogEntry::Update {
            update: update.clone(),
            learning_rate: rates.next().expect("each update has a rate"),
        }),
        Effect::Settled { id, outcome } => Some(LogEntry::Settled { id, outcome }),
        Effect::Joined { worker, request } => Some(LogEntry::Joined { worker, request }),
        Effect::Discard(_) | Effect::Fence { .. } | Effect::Answer { .. } => None,
    })
}

/// Why an entry cannot be followed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplayError {
    /// Updates before this one are missing.
    #[error("version {got:?} follows version {have:?}, so updates are missing")]
    Gap { got: Version, have: Version },
    /// The numbers are not those of the update's gradients.
    #[error("{got} numbers are not {num_gradients} gradients of {len} weights each")]
    Numbers {
        got: usize,
        num_gradients: usize,
        len: usize,
    },
    /// The numbers are not those that were checked when the gradients were pushed.
    #[error("the numbers of {id} are not those that were pushed")]
    Norm { id: GradientId },
    /// The update is not one that a server makes.
    #[error(transparent)]
    Shard(#[from] ShardError),
}

/// The state of a checkpoint, which follows the entries of a log.
#[derive(Debug)]
pub(crate) struct Replay {
    /// Holds all weights.
    shard: Shard,
    coordinator: CoordinatorState,
    facts: BTreeMap<String, String>,
}

impl Replay {
    /// Begins with a checkpoint. `rule` is a new one, of the same kind as the servers'.
    ///
    /// # Errors
    /// If the rule does not accept the saved state.
    pub(crate) fn new(
        checkpoint: Checkpoint,
        mut rule: Box<dyn UpdateRule>,
    ) -> Result<Self, ConfigError> {
        let Checkpoint {
            weights,
            rule: saved,
            learning_rate,
            coordinator,
            facts,
            restarted_at: _,
        } = checkpoint;
        let range = weights.range();
        rule.place(weights.layout(), range.clone())?;
        restore(rule.as_mut(), saved, range.len())?;
        Ok(Self {
            shard: Shard::new(&weights, range, rule, learning_rate, 0),
            coordinator,
            facts,
        })
    }

    /// Returns the version of the weights now.
    pub(crate) fn version(&self) -> Version {
        self.shard.weights().version()
    }

    /// Follows an entry. `numbers` are the gradients of an update, one after the other. Returns whether it
    /// was an update that the state did not have yet.
    ///
    /// # Errors
    /// If entries before this one are missing, or this one is damaged. Then the state did not change.
    pub(crate) fn follow(&mut self, entry: LogEntry, numbers: &[f32]) -> Result<bool, ReplayError> {
        match entry {
            LogEntry::Began {
                facts,
                restarted_at,
            } => {
                self.facts = facts;
                if let Some(clock) = restarted_at {
                    self.coordinator.restart_at(clock);
                }
            }
            LogEntry::Joined { worker, request } => self.coordinator.follow_join(worker, request),
            LogEntry::Settled { id, outcome } => self.coordinator.follow_outcome(id, outcome),
            LogEntry::Update {
                update,
                learning_rate,
            } => {
                let (got, have) = (update.version, self.version());
                if got <= have {
                    return Ok(false);
                }
                if got != have.next() {
                    return Err(ReplayError::Gap { got, have });
                }
                self.update(update, learning_rate, numbers)?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn update(
        &mut self,
        update: Update,
        learning_rate: f64,
        numbers: &[f32],
    ) -> Result<(), ReplayError> {
        let (len, num_gradients) = (self.shard.range().len(), update.gradients.len());
        if len.checked_mul(num_gradients) != Some(numbers.len()) {
            let got = numbers.len();
            return Err(ReplayError::Numbers {
                got,
                num_gradients,
                len,
            });
        }
        let parts = (0..num_gradients).map(|i| &numbers[i * len..][..len]);
        // One server's log has all weights.
        let num_trainable = self.shard.weights().layout().num_trainable().min(len);
        let gradient = |part: &[f32]| Gradient::with_buffers(part.to_vec(), num_trainable);
        let gradients: Vec<_> = parts.map(gradient).collect();
        for (one, gradient) in update.gradients.iter().zip(&gradients) {
            if gradient.norm().to_bits() != one.norm.to_bits() || !one.norm.is_finite() {
                return Err(ReplayError::Norm { id: one.id });
            }
        }
        for (one, gradient) in update.gradients.iter().zip(&gradients) {
            self.shard.discard(one.id);
            self.shard.stage_decided(one.id, gradient)?;
        }
        self.shard.update(update.clone(), learning_rate)?;
        self.shard.set_learning_rate(learning_rate);
        self.coordinator.follow_update(&update);
        Ok(())
    }

    /// Returns the state after all entries that were followed.
    pub(crate) fn finish(self) -> Checkpoint {
        let state = self.shard.state();
        Checkpoint {
            weights: state.weights,
            rule: state.rule,
            learning_rate: self.shard.learning_rate(),
            coordinator: self.coordinator,
            facts: self.facts,
            restarted_at: None,
        }
    }
}

/// Gives a saved state, which may come from a file or from another process, to the rule of `len` weights.
///
/// # Errors
/// If the rule does not accept it.
pub(super) fn restore(
    rule: &mut dyn UpdateRule,
    saved: SavedRule,
    len: usize,
) -> Result<(), ConfigError> {
    if saved.is_fresh() || len == 0 {
        return Ok(());
    }
    let mut vectors = saved.vectors.iter();
    if let Some((name, numbers)) = vectors.find(|(_, numbers)| numbers.len() != len) {
        let reason = format!("`{name}` has {} numbers, not {len}", numbers.len());
        return Err(ConfigError::RuleState(reason));
    }
    let restored = rule.restore(saved.into());
    restored.map_err(|error| ConfigError::RuleState(error.to_string()))
}
