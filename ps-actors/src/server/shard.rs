//! One server's part of the weights, as a pure state machine.
//!
//! Gradients are *staged* here first. Then the coordinator's [`Update`]s name those that are applied, in an
//! order that is the same for all shards. This module uses no clock, randomness, input, output or actor.
//!
//! The current weights are updated in place if nobody holds a snapshot of them. Otherwise the new weights
//! are written into a recycled buffer. With several shards, the latest few versions are kept. So a pull of
//! all shards can get one version although the shards are not updated at the same instant.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use ps_runtime::buffer::{Buffer, BufferPool};
use ps_runtime::parallel::{PART_LEN, for_each, vectorized};
use serde::{Deserialize, Serialize};

use super::consistency::Reduction;
use super::protocol::{Summand, Ticket, Update};
use crate::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use crate::rule::{SavedRule, UpdateRule};
use crate::weights::{Gradient, Segment, Weights};

/// How many undecided gradients of one worker may be staged.
pub(super) const MAX_STAGED: usize = 32;

/// How many gradients may be staged of incarnations that the coordinator has not confirmed, for all workers
/// together. The confirmation may arrive a little later than a new member's first gradient. But any process
/// can make up an incarnation.
pub(super) const MAX_STAGED_OF_STRANGERS: usize = 32;

/// How many saved states are kept until the checkpoint that they are for has been written. The state of an
/// older checkpoint is no longer fetched when a newer one has begun.
const MAX_SAVED: usize = 2;

/// The version of the weights that a pull asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullVersion {
    /// The current version.
    Latest,
    /// This version or a later one. The pull waits until it exists.
    AtLeast(Version),
    /// Exactly this version. The pull waits until it exists.
    Exactly(Version),
}

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
    /// An update names no gradient, or names one of them twice.
    #[error("the update that makes version {version:?} names no gradient, or one of them twice")]
    BadUpdate {
        /// The version that the update would make.
        version: Version,
    },
}

/// The answer to a call that had to wait for a version.
#[derive(Debug)]
pub(super) enum ShardAnswer {
    /// The snapshot of this shard's range for a pull, or [`ShardError::VersionGone`].
    Pull(Ticket, Result<Weights, ShardError>),
    /// The state for a checkpoint.
    State(Ticket, Result<ShardState, ShardError>),
}

/// All state of a shard at one version. A clone shares the numbers.
#[derive(Clone, Debug)]
pub(super) struct ShardState {
    /// The weights of the shard's range.
    pub weights: Weights,
    /// The state of the update rule for this range.
    pub rule: SavedRule,
}

/// The state machine; see the module's text.
#[derive(Debug)]
pub(super) struct Shard {
    current: Weights,
    /// Earlier versions, oldest first.
    history: VecDeque<Weights>,
    num_kept: usize,
    rule: Box<dyn UpdateRule>,
    learning_rate: f64,
    pool: BufferPool,
    staged: BTreeMap<GradientId, Gradient>,
    fences: BTreeMap<WorkerId, Incarnation>,
    /// Updates that wait for at least one of their gradients, in order.
    undone_updates: VecDeque<(Update, f64)>,
    waiting_pulls: BTreeMap<Ticket, PullVersion>,
    /// The versions whose state must be saved when they are made.
    unsaved: BTreeSet<Version>,
    /// Saved states that nobody has asked this shard to forget; at most [`MAX_SAVED`].
    saved: BTreeMap<Version, ShardState>,
    waiting_for_states: BTreeMap<Ticket, Version>,
}

impl Shard {
    /// Takes the part `range` of `initial`, and keeps `num_kept` versions besides the current one.
    ///
    /// # Panics
    /// If `initial` does not cover `range`.
    #[must_use]
    pub(super) fn new(
        initial: &Weights,
        range: Range<usize>,
        rule: Box<dyn UpdateRule>,
        learning_rate: f64,
        num_kept: usize,
    ) -> Self {
        // One buffer is for the next version, one is for a sum, and the others are those that readers give
        // back.
        let pool = BufferPool::new(num_kept + 4);
        let mut data = pool.take(range.len());
        data.copy_from_slice(&initial.read(range.clone()));
        let segment = Segment {
            start: range.start,
            data: Arc::new(data),
        };
        let layout = Arc::clone(initial.layout());
        Self {
            current: Weights::new(initial.version(), layout, Arc::new([segment])),
            history: VecDeque::new(),
            num_kept,
            rule,
            learning_rate,
            pool,
            staged: BTreeMap::new(),
            fences: BTreeMap::new(),
            undone_updates: VecDeque::new(),
            waiting_pulls: BTreeMap::new(),
            unsaved: BTreeSet::new(),
            saved: BTreeMap::new(),
            waiting_for_states: BTreeMap::new(),
        }
    }

    /// Returns the current weights of this shard's range.
    #[must_use]
    pub(super) fn weights(&self) -> &Weights {
        &self.current
    }

    /// Returns the range of weights that this shard holds.
    #[must_use]
    pub(super) fn range(&self) -> Range<usize> {
        self.current.range()
    }

    /// Returns the learning rate of updates that are decided from now on.
    #[must_use]
    pub(super) fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Changes the learning rate of updates that are decided from now on.
    pub(super) fn set_learning_rate(&mut self, learning_rate: f64) {
        self.learning_rate = learning_rate;
    }

    /// Returns how many workers the shard has records of.
    #[cfg(test)]
    pub(in crate::server) fn num_fences(&self) -> usize {
        self.fences.len()
    }

    /// Returns how many gradients wait here for the coordinator's decision.
    #[must_use]
    pub(super) fn num_staged(&self) -> usize {
        self.staged.len()
    }

    /// Keeps a gradient until the coordinator decides whether it is applied. The gradient covers all
    /// weights of the model, or those of this shard. Staging it again changes nothing. A gradient with a
    /// norm that is not finite is not kept, because no coordinator accepts it (PS-6). If updates waited for
    /// this gradient, they may be possible now: the caller must send the answers that are returned.
    ///
    /// # Errors
    /// If the gradient covers other weights, its worker's incarnation is over, or too many gradients are
    /// staged. The last applies to one worker, and to all workers together whose incarnation is not known
    /// here.
    pub(super) fn stage(
        &mut self,
        id: GradientId,
        gradient: &Gradient,
    ) -> Result<Vec<ShardAnswer>, ShardError> {
        let fence = self
            .fences
            .get(&id.worker)
            .filter(|&&least| id.incarnation < least);
        if let Some(&least) = fence.filter(|_| !self.is_awaited(id)) {
            return Err(ShardError::Fenced { id, least });
        }
        let is_known = |id: &GradientId| self.fences.get(&id.worker) == Some(&id.incarnation);
        if !self.staged.contains_key(&id) && !self.is_awaited(id) {
            let worker = id.worker;
            let first = GradientId {
                worker,
                incarnation: Incarnation(0),
                clock: Clock(0),
            };
            let of_worker = self.staged.range(first..);
            let of_worker = of_worker.take_while(|(staged, _)| staged.worker == worker);
            if of_worker.count() >= MAX_STAGED {
                return Err(ShardError::TooManyStaged { worker });
            }
            let strangers = || self.staged.keys().filter(|staged| !is_known(staged));
            if !is_known(&id) && strangers().count() >= MAX_STAGED_OF_STRANGERS {
                return Err(ShardError::TooManyStrangers { id });
            }
        }
        self.stage_decided(id, gradient)
    }

    /// Keeps a gradient that the coordinator itself sent and will decide on at once.
    ///
    /// # Errors
    /// If the gradient covers other weights.
    pub(crate) fn stage_decided(
        &mut self,
        id: GradientId,
        gradient: &Gradient,
    ) -> Result<Vec<ShardAnswer>, ShardError> {
        let (got, expected) = (gradient.range(), self.range());
        if got != expected && got != (0..self.current.layout().num_weights()) {
            return Err(ShardError::WrongRange { id, got, expected });
        }
        if gradient.norm().is_finite() {
            // It is kept as it arrived, because the first server may have to send it on.
            self.staged.entry(id).or_insert_with(|| gradient.clone());
        }
        Ok(self.do_updates())
    }

    /// Takes a gradient that an update waits for. It replaces whatever is staged under its id. A gradient
    /// that has already been applied changes nothing.
    ///
    /// # Errors
    /// If the gradient covers other weights.
    pub(crate) fn complete(
        &mut self,
        id: GradientId,
        gradient: &Gradient,
    ) -> Result<Vec<ShardAnswer>, ShardError> {
        match self.is_awaited(id) {
            true => {
                self.staged.remove(&id);
                self.stage_decided(id, gradient)
            }
            false => Ok(Vec::new()),
        }
    }

    /// Returns a staged gradient as it arrived: over all weights of the model, or over those of this shard.
    pub(crate) fn staged(&self, id: GradientId) -> Option<&Gradient> {
        self.staged.get(&id)
    }

    /// Returns the ids of at most `most` gradients that updates wait for. Those of the earliest update come
    /// first.
    pub(crate) fn lacking(&self, most: usize) -> Vec<GradientId> {
        let updates = self.undone_updates.iter();
        let named = updates.flat_map(|(update, _)| &update.gradients);
        let lacking = named.filter(|one| !self.has(one)).map(|one| one.id);
        lacking.take(most).collect()
    }

    /// Whether the numbers of a gradient are staged here that were checked. Each part of a gradient has the
    /// norm of the whole gradient, so the norms are compared.
    fn has(&self, one: &Summand) -> bool {
        let staged = self.staged.get(&one.id);
        staged.is_some_and(|staged| staged.norm().to_bits() == one.norm.to_bits())
    }

    /// Forgets a gradient that will not be applied.
    pub(super) fn discard(&mut self, id: GradientId) {
        if !self.is_awaited(id) {
            self.staged.remove(&id);
        }
    }

    /// Forgets the gradients of a worker's earlier incarnations, and accepts no more of them.
    pub(super) fn fence(&mut self, worker: WorkerId, below: Incarnation) {
        self.fences.insert(worker, below);
        let over = |id: &GradientId| id.worker == worker && id.incarnation < below;
        let mut staged = std::mem::take(&mut self.staged);
        staged.retain(|id, _| !over(id) || self.is_awaited(*id));
        self.staged = staged;
    }

    /// Applies an update with this learning rate. If one of its gradients is not staged here yet, or has
    /// other numbers than those that were checked, this update and all later ones wait. Returns the pulls
    /// that can be answered now.
    ///
    /// # Errors
    /// If the update is not the next one (PS-5), or names no gradient, or names one twice.
    pub(super) fn update(
        &mut self,
        update: Update,
        learning_rate: f64,
    ) -> Result<Vec<ShardAnswer>, ShardError> {
        let version = update.version;
        let latest = self.undone_updates.back();
        let latest = latest.map_or(self.current.version(), |(update, _)| update.version);
        // The last possible version has no next version: `next` returns the same one.
        let expected = latest.next();
        if version != expected || version == latest {
            let got = version;
            return Err(ShardError::WrongUpdate { got, expected });
        }
        let distinct: BTreeSet<GradientId> = update.gradients.iter().map(|one| one.id).collect();
        if distinct.is_empty() || distinct.len() < update.gradients.len() {
            return Err(ShardError::BadUpdate { version });
        }
        self.undone_updates.push_back((update, learning_rate));
        Ok(self.do_updates())
    }

    /// Answers a pull at once, or, if its version does not exist yet, later under `ticket`.
    pub(super) fn pull(
        &mut self,
        ticket: Ticket,
        wanted: PullVersion,
    ) -> Option<Result<Weights, ShardError>> {
        let answer = self.look_up(wanted);
        if answer.is_none() {
            self.waiting_pulls.insert(ticket, wanted);
        }
        answer
    }

    /// Forgets a waiting call whose caller has gone.
    pub(super) fn cancel(&mut self, ticket: Ticket) {
        self.waiting_pulls.remove(&ticket);
        self.waiting_for_states.remove(&ticket);
    }

    /// Returns all state of the shard as it is now.
    pub(super) fn state(&self) -> ShardState {
        ShardState {
            weights: self.current.clone(),
            rule: SavedRule::from(self.rule.save()),
        }
    }

    /// Saves the state at this version, now or when the version is made. It is kept for
    /// [`saved_state`](Self::saved_state). Returns the calls that can be answered now.
    pub(super) fn save_at(&mut self, version: Version) -> Vec<ShardAnswer> {
        let mut answers = Vec::new();
        if version >= self.current.version() {
            self.unsaved.insert(version);
            self.save_if_asked(&mut answers);
        }
        answers
    }

    /// Answers with the state at this version, at once or later under `ticket`. It is an error if the state
    /// was not saved, or is no longer kept.
    pub(super) fn saved_state(
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
    pub(super) fn forget_states(&mut self, until: Version) {
        self.saved.retain(|&version, _| version > until);
    }

    fn save_if_asked(&mut self, answers: &mut Vec<ShardAnswer>) {
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

    fn look_up(&self, wanted: PullVersion) -> Option<Result<Weights, ShardError>> {
        let current = self.current.version();
        match wanted {
            PullVersion::Latest => Some(Ok(self.current.clone())),
            PullVersion::AtLeast(version) => (version <= current).then(|| Ok(self.current.clone())),
            PullVersion::Exactly(version) if version > current => None,
            PullVersion::Exactly(asked) => {
                let mut kept = self.history.iter().chain([&self.current]);
                let oldest = self.history.front().unwrap_or(&self.current).version();
                let found = kept.find(|weights| weights.version() == asked).cloned();
                Some(found.ok_or(ShardError::VersionGone { asked, oldest }))
            }
        }
    }

    /// Whether an update that has been decided still has to apply this gradient.
    fn is_awaited(&self, id: GradientId) -> bool {
        self.undone_updates
            .iter()
            .any(|(update, _)| update.gradients.iter().any(|one| one.id == id))
    }

    fn do_updates(&mut self) -> Vec<ShardAnswer> {
        let mut answers = Vec::new();
        while let Some((update, _)) = self.undone_updates.front() {
            if !update.gradients.iter().all(|one| self.has(one)) {
                break;
            }
            let (update, learning_rate) =
                self.undone_updates.pop_front().expect("there is a front");
            self.apply(&update, learning_rate);
            // Calls are answered after every single version, because one may wait for exactly this version.
            self.answer_pulls(&mut answers);
            self.save_if_asked(&mut answers);
        }
        answers
    }

    fn answer_pulls(&mut self, answers: &mut Vec<ShardAnswer>) {
        let waiting = std::mem::take(&mut self.waiting_pulls);
        for (ticket, wanted) in waiting {
            match self.look_up(wanted) {
                Some(weights) => answers.push(ShardAnswer::Pull(ticket, weights)),
                None => _ = self.waiting_pulls.insert(ticket, wanted),
            }
        }
    }

    fn apply(&mut self, update: &Update, learning_rate: f64) {
        let range = self.range();
        let gradients: Vec<Gradient> = update
            .gradients
            .iter()
            .map(|one| {
                let staged = self.staged.remove(&one.id);
                let staged = staged.expect("checked by the caller, each named once");
                staged.slice(range.clone())
            })
            .collect();
        let sum;
        let gradient = match &gradients[..] {
            [single] => single.values(),
            several => {
                let shares = shares(update);
                sum = reduce(several, shares.as_deref(), update.reduction, &self.pool);
                &sum
            }
        };
        self.write(gradient, learning_rate, update.version);
    }

    fn write(&mut self, gradient: &[f32], learning_rate: f64, version: Version) {
        let segment = self.current.segments[0].clone();
        let (start, layout) = (segment.start, Arc::clone(self.current.layout()));
        let old = std::mem::replace(
            &mut self.current,
            Weights::new(version, Arc::clone(&layout), Arc::new([])),
        );
        let mut old_data = segment.data;
        if self.num_kept > 0 {
            self.history.push_back(old);
            while self.history.len() > self.num_kept {
                self.history.pop_front();
            }
        } else {
            drop(old);
        }
        let data = match Arc::get_mut(&mut old_data) {
            Some(unshared) => {
                self.rule.update(unshared, gradient, learning_rate);
                old_data
            }
            None => {
                let mut next = self.pool.take(old_data.len());
                self.rule
                    .update_into(&old_data, gradient, learning_rate, &mut next);
                Arc::new(next)
            }
        };
        self.current = Weights::new(version, layout, Arc::new([Segment { start, data }]));
    }
}

/// Copies exist only while a test explores what may happen. They are of shards with plain SGD.
#[cfg(test)]
impl Clone for Shard {
    fn clone(&self) -> Self {
        let mut rule = crate::rule::Sgd::new();
        rule.restore(self.rule.save()).expect("plain SGD");
        Self {
            current: self.current.clone(),
            history: self.history.clone(),
            num_kept: self.num_kept,
            rule: Box::new(rule),
            learning_rate: self.learning_rate,
            pool: self.pool.clone(),
            staged: self.staged.clone(),
            fences: self.fences.clone(),
            undone_updates: self.undone_updates.clone(),
            waiting_pulls: self.waiting_pulls.clone(),
            unsaved: self.unsaved.clone(),
            saved: self.saved.clone(),
            waiting_for_states: self.waiting_for_states.clone(),
        }
    }
}

#[cfg(test)]
impl Shard {
    /// Describes everything that decides what the shard does next.
    pub(in crate::server) fn description(&self) -> String {
        let versions: Vec<u64> = self.history.iter().map(|w| w.version().0).collect();
        let staged: Vec<_> = self.staged.keys().collect();
        format!(
            "{:?} {versions:?} {:?} {staged:?} {:?} {:?} {:?}",
            self.current.version(),
            self.current.to_vec(),
            self.fences,
            self.undone_updates,
            self.waiting_pulls
        )
    }
}

/// Returns the weight of each gradient in a mean of batches of different sizes. Returns `None` if all have
/// the same weight.
fn shares(update: &Update) -> Option<Vec<f32>> {
    let sizes = update.gradients.iter().map(|one| one.num_examples);
    let smallest = sizes.clone().min().unwrap_or(0);
    if update.reduction == Reduction::Sum || smallest == 0 || sizes.clone().all(|n| n == smallest) {
        return None;
    }
    // This sum is exact, because each number is at most `MAX_EXAMPLES`.
    let all: f64 = sizes.clone().map(|n| n as f64).sum();
    Some(sizes.map(|n| (n as f64 / all) as f32).collect())
}

/// Adds gradients element by element, in their order. Each is multiplied by its weight, if there are
/// weights. Otherwise the sum is divided by the number of gradients for a mean.
fn reduce(
    gradients: &[Gradient],
    weights: Option<&[f32]>,
    reduction: Reduction,
    pool: &BufferPool,
) -> Buffer {
    let (first, rest) = gradients.split_first().expect("an update has gradients");
    let scale = match reduction {
        Reduction::Mean => 1.0 / gradients.len() as f32,
        Reduction::Sum => 1.0,
    };
    let mut sum = pool.take(first.values().len());
    let num_bytes = size_of_val(&sum[..]);
    let parts = (0..).step_by(PART_LEN).zip(sum.chunks_mut(PART_LEN));
    for_each(num_bytes, parts, |(start, sum)| {
        let part = start..start + sum.len();
        vectorized(
            #[inline(always)]
            || {
                let first = &first.values()[part.clone()];
                if let Some(weights) = weights {
                    for (sum, value) in sum.iter_mut().zip(first) {
                        *sum = value * weights[0];
                    }
                    for (gradient, weight) in rest.iter().zip(&weights[1..]) {
                        for (sum, value) in sum.iter_mut().zip(&gradient.values()[part.clone()]) {
                            *sum += value * weight;
                        }
                    }
                    return;
                }
                sum.copy_from_slice(first);
                for gradient in rest {
                    for (sum, value) in sum.iter_mut().zip(&gradient.values()[part.clone()]) {
                        *sum += value;
                    }
                }
                for sum in sum.iter_mut() {
                    *sum *= scale;
                }
            },
        );
    });
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_are_added_up_as_short_ones() {
        let gradients: Vec<Gradient> = (1..4)
            .map(|k| {
                Gradient::new(
                    (0..3_000_001)
                        .map(|i| (i % 1013 * k) as f32)
                        .collect::<Vec<_>>(),
                )
            })
            .collect();
        for (reduction, scale) in [(Reduction::Sum, 1.0), (Reduction::Mean, 1.0f32 / 3.0)] {
            let got = reduce(&gradients, None, reduction, &BufferPool::new(0));
            let [a, b, c] = [0, 1, 2].map(|k| gradients[k].values());
            let is_right = |i: usize| got[i] == (a[i] + b[i] + c[i]) * scale;
            assert!((0..got.len()).all(is_right), "{reduction}");
        }
        let weights = [0.5, 0.125, 0.375];
        let got = reduce(
            &gradients,
            Some(&weights),
            Reduction::Mean,
            &BufferPool::new(0),
        );
        let [a, b, c] = [0, 1, 2].map(|k| gradients[k].values());
        let is_right = |i: usize| got[i] == a[i] * 0.5 + b[i] * 0.125 + c[i] * 0.375;
        assert!((0..got.len()).all(is_right));
    }
}
