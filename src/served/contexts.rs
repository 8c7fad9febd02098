//! Which computations a part server remembers, and for how long. This module uses no clock or thread.

use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

use ps_actors::ids::{Incarnation, WorkerId};
use serde::{Deserialize, Serialize};

use super::messages::ServedError;
use super::server::PartConfig;

/// Identifies one trainer's computation of one step, on any number of parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContextId {
    /// The trainer whose step it is. A trainer has a number among the workers.
    pub trainer: WorkerId,
    /// The incarnation of the trainer.
    pub incarnation: Incarnation,
    /// The number of the context in that incarnation.
    pub number: u64,
}

impl fmt::Display for ContextId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "context {} of trainer {}", self.number, self.trainer.0)
    }
}

/// The contexts of all trainers.
pub(super) struct Contexts<T> {
    by_id: HashMap<ContextId, Entry<T>>,
    config: PartConfig,
    num_expired: u64,
}

struct Entry<T> {
    value: T,
    last_used: Instant,
}

impl<T> Contexts<T> {
    pub(super) fn new(config: PartConfig) -> Self {
        Self {
            by_id: HashMap::new(),
            config,
            num_expired: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(super) fn num_expired(&self) -> u64 {
        self.num_expired
    }

    pub(super) fn knows(&self, id: ContextId) -> bool {
        self.by_id.contains_key(&id)
    }

    /// Returns a context, and starts its lease again.
    pub(super) fn get(&mut self, id: ContextId, now: Instant) -> Result<&mut T, ServedError> {
        let Some(entry) = self.by_id.get_mut(&id) else {
            let lease = self.config.context_lease.as_millis();
            return Err(ServedError::UnknownContext {
                context: id,
                lease_ms: u64::try_from(lease).unwrap_or(u64::MAX),
            });
        };
        entry.last_used = now;
        Ok(&mut entry.value)
    }

    /// Makes room for a context that is about to begin. Forgets what earlier incarnations of its trainer
    /// left.
    pub(super) fn admit(&mut self, id: ContextId) -> Result<(), ServedError> {
        let is_over =
            |old: &ContextId| old.trainer == id.trainer && old.incarnation < id.incarnation;
        self.by_id.retain(|old, _| !is_over(old));
        let too_many = |limit, whose: &str, setting: &str| ServedError::TooManyContexts {
            context: id,
            limit,
            whose: whose.to_owned(),
            setting: setting.to_owned(),
        };
        let own = self.by_id.keys().filter(|old| old.trainer == id.trainer);
        let limit = self.config.max_contexts_per_trainer;
        if own.count() >= limit {
            let setting = "max_contexts_per_trainer";
            return Err(too_many(limit, "of this trainer", setting));
        }
        let limit = self.config.max_contexts;
        if self.by_id.len() >= limit {
            return Err(too_many(limit, "of all trainers", "max_contexts"));
        }
        Ok(())
    }

    /// Remembers an admitted context.
    pub(super) fn insert(&mut self, id: ContextId, value: T, now: Instant) {
        let last_used = now;
        self.by_id.insert(id, Entry { value, last_used });
    }

    pub(super) fn release(&mut self, id: ContextId) {
        self.by_id.remove(&id);
    }

    /// Forgets contexts that were not used for the length of the lease.
    pub(super) fn expire(&mut self, now: Instant) {
        let lease = self.config.context_lease;
        let before = self.by_id.len();
        self.by_id.retain(|id, entry| {
            let is_kept = now.saturating_duration_since(entry.last_used) <= lease;
            if !is_kept {
                tracing::warn!(%id, ?lease, "a context was not used for the lease: forgotten");
            }
            is_kept
        });
        self.num_expired += (before - self.by_id.len()) as u64;
    }

    /// Returns the time between two looks for contexts to forget.
    pub(super) fn sweep_every(&self) -> Duration {
        let (shortest, longest) = (Duration::from_millis(1), Duration::from_secs(3600));
        (self.config.context_lease / 4).clamp(shortest, longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(trainer: u32, incarnation: u64, number: u64) -> ContextId {
        ContextId {
            trainer: WorkerId(trainer),
            incarnation: Incarnation(incarnation),
            number,
        }
    }

    fn contexts() -> Contexts<&'static str> {
        Contexts::new(PartConfig {
            max_contexts: 3,
            max_contexts_per_trainer: 2,
            context_lease: Duration::from_secs(60),
        })
    }

    fn begin(contexts: &mut Contexts<&'static str>, id: ContextId) -> Result<(), ServedError> {
        contexts.admit(id)?;
        contexts.insert(id, "value", Instant::now());
        Ok(())
    }

    #[test]
    fn the_longest_lease_leaves_a_time_that_a_timer_can_have() {
        let longest = PartConfig {
            context_lease: Duration::MAX,
            ..PartConfig::default()
        };
        let contexts = Contexts::<()>::new(longest);
        assert_eq!(contexts.sweep_every(), Duration::from_secs(3600));
    }

    /// PT-3
    #[test]
    fn a_context_lives_for_a_lease_after_its_last_use() {
        let (mut contexts, start) = (contexts(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        contexts.insert(id(0, 1, 0), "used", start);
        contexts.insert(id(1, 1, 0), "not used", start);
        assert_eq!(*contexts.get(id(0, 1, 0), after(50)).unwrap(), "used");
        contexts.expire(after(60));
        assert_eq!((contexts.len(), contexts.num_expired()), (2, 0));
        contexts.expire(after(61));
        assert_eq!((contexts.len(), contexts.num_expired()), (1, 1));
        let error = contexts.get(id(1, 1, 0), after(61)).unwrap_err();
        assert!(error.to_string().contains("60000 ms"), "{error}");
        contexts.expire(after(111));
        assert_eq!((contexts.len(), contexts.num_expired()), (0, 2));
    }

    /// PT-4
    #[test]
    fn nobody_can_have_more_contexts_than_allowed() {
        let mut contexts = contexts();
        begin(&mut contexts, id(0, 1, 0)).unwrap();
        begin(&mut contexts, id(0, 1, 1)).unwrap();
        let error = begin(&mut contexts, id(0, 1, 2)).unwrap_err().to_string();
        assert!(error.contains("max_contexts_per_trainer"), "{error}");
        // Another trainer is not held up by the first one's.
        begin(&mut contexts, id(1, 1, 0)).unwrap();
        let error = begin(&mut contexts, id(2, 1, 0)).unwrap_err().to_string();
        assert!(error.contains("`PartConfig::max_contexts`"), "{error}");
        contexts.release(id(0, 1, 0));
        begin(&mut contexts, id(2, 1, 0)).unwrap();
    }

    #[test]
    fn a_new_incarnation_of_a_trainer_ends_the_contexts_of_the_earlier_ones() {
        let mut contexts = contexts();
        begin(&mut contexts, id(0, 1, 0)).unwrap();
        begin(&mut contexts, id(0, 1, 1)).unwrap();
        begin(&mut contexts, id(1, 1, 0)).unwrap();
        begin(&mut contexts, id(0, 2, 0)).unwrap();
        assert_eq!(contexts.len(), 2);
        assert!(contexts.knows(id(1, 1, 0)) && contexts.knows(id(0, 2, 0)));
    }
}
