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

use ps_runtime::buffer::BufferPool;
use serde::{Deserialize, Serialize};

use super::config::Clipping;
use super::protocol::{Clip, Summand, Ticket, Update};
use crate::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use crate::rule::UpdateRule;
use crate::weights::{Gradient, Segment, Weights};

mod error;
mod saved;
mod sum;

pub use error::ShardError;
pub(super) use saved::ShardState;
use sum::{clip, moves_of_buffers, norm_above, reduce, shares};

/// How many undecided gradients of one worker may be staged.
pub(super) const MAX_STAGED: usize = 32;

/// How many gradients may be staged of incarnations that the coordinator has not confirmed, for all workers
/// together. The confirmation may arrive a little later than a new member's first gradient. But any process
/// can make up an incarnation.
pub(super) const MAX_STAGED_OF_STRANGERS: usize = 32;

/// The version of the weights that a pull asks for.
///
/// For an example, see [`Push`](super::Push).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PullVersion {
    /// The current version.
    Latest,
    /// This version or a later one. The pull waits until it exists.
    AtLeast(Version),
    /// Exactly this version. The pull waits until it exists.
    Exactly(Version),
}

/// The answer to a call that had to wait for a version.
#[derive(Debug)]
pub(super) enum ShardAnswer {
    /// The snapshot of this shard's range for a pull, or [`ShardError::VersionGone`].
    Pull(Ticket, Result<Weights, ShardError>),
    /// The state for a checkpoint.
    State(Ticket, Result<ShardState, ShardError>),
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
    /// Whether the learning rate was set while the server ran. Then the rule's schedule is over.
    is_rate_set: bool,
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
        let segment = Segment::new(range.start, Arc::new(data));
        let layout = Arc::clone(initial.layout());
        Self {
            current: Weights::new(initial.version(), layout, Arc::new([segment])),
            history: VecDeque::new(),
            num_kept,
            rule,
            learning_rate,
            is_rate_set: false,
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

    /// Returns the learning rate of the latest update, or the one that was set since then.
    #[must_use]
    pub(super) fn learning_rate(&self) -> f64 {
        self.learning_rate
    }

    /// Returns the learning rate of the next update, if it is decided now.
    pub(super) fn next_learning_rate(&mut self) -> f64 {
        self.learning_rate_of(self.current.version().next())
    }

    /// Returns the learning rate of the update that makes `version`, if it is decided now.
    ///
    /// # Panics
    /// If the rule's schedule gives no usable rate. The server then stops (S-8).
    pub(super) fn learning_rate_of(&mut self, version: Version) -> f64 {
        match self.is_rate_set {
            true => self.learning_rate,
            false => self.rule.learning_rate(version, self.learning_rate),
        }
    }

    /// Changes the learning rate of updates that are decided from now on. A schedule ends.
    pub(super) fn set_learning_rate(&mut self, learning_rate: f64) {
        self.learning_rate = learning_rate;
        self.is_rate_set = true;
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
    /// If the gradient covers other weights, or has other buffers than the model.
    pub(crate) fn stage_decided(
        &mut self,
        id: GradientId,
        gradient: &Gradient,
    ) -> Result<Vec<ShardAnswer>, ShardError> {
        let (got, expected) = (gradient.range(), self.range());
        if got != expected && got != (0..self.current.layout().num_weights()) {
            return Err(ShardError::WrongRange { id, got, expected });
        }
        self.check_buffers(id, gradient)?;
        if gradient.norm().is_finite() {
            // It is kept as it arrived, because the first server may have to send it on.
            self.staged.entry(id).or_insert_with(|| gradient.clone());
        }
        Ok(self.do_updates())
    }

    /// Checks that the gradient takes the same weights for those of buffers as the layout does.
    pub(crate) fn check_buffers(
        &self,
        id: GradientId,
        gradient: &Gradient,
    ) -> Result<(), ShardError> {
        let Range { start, end } = gradient.range();
        let num_trainable = self.current.layout().num_trainable();
        let (got, expected) = (gradient.trained(), start..num_trainable.clamp(start, end));
        match got == expected {
            true => Ok(()),
            false => Err(ShardError::WrongBuffers { id, got, expected }),
        }
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

    /// Returns how the combined gradient of `update` is clipped. All its gradients are staged here, over all
    /// weights of the model. So the answer does not depend on the number of servers.
    pub(super) fn decide_clip(&self, update: &Update, clipping: Clipping) -> Clip {
        let limit = match clipping {
            Clipping::Off => return Clip::None,
            Clipping::Value(limit) => return Clip::Value(limit),
            Clipping::Norm(limit) => limit,
        };
        let staged = update.gradients.iter().map(|one| self.staged(one.id));
        let Some(gradients) = staged.collect::<Option<Vec<_>>>() else {
            return Clip::None;
        };
        let norm = norm_above(&gradients, update, limit);
        // No factor makes a sum finite that is not.
        match norm.filter(|norm| norm.is_finite()) {
            Some(norm) => Clip::Scale((limit / norm) as f32),
            None => Clip::None,
        }
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
    /// If the update is not the next one (PS-5), names no gradient or one twice, or is clipped in an impossible
    /// way.
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
        let is_possible = update.clip.is_possible();
        if distinct.is_empty() || distinct.len() < update.gradients.len() || !is_possible {
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

    /// Makes the updates whose gradients are all here, in order.
    fn do_updates(&mut self) -> Vec<ShardAnswer> {
        let mut answers = Vec::new();
        while let Some((update, _)) = self.undone_updates.front() {
            if !update.gradients.iter().all(|one| self.has(one)) {
                break;
            }
            let (update, learning_rate) =
                self.undone_updates.pop_front().expect("there is a front");
            {
                // Their buffers come back before anybody is answered.
                let gradients = self.take_gradients(&update);
                let shares = shares(&update);
                let weights = &self.current.segments[0].data[..];
                let moved = moves_of_buffers(&gradients, &update, shares.as_deref(), weights);
                let mut sum;
                let gradient = match &gradients[..] {
                    [single] if update.clip == Clip::None && moved.is_empty() => single.values(),
                    several => {
                        sum = match several {
                            [single] => {
                                let mut copy = self.pool.take(single.values().len());
                                copy.copy_from_slice(single.values());
                                copy
                            }
                            _ => reduce(several, shares.as_deref(), update.reduction, &self.pool),
                        };
                        let num_trained = sum.len() - moved.len();
                        sum[num_trained..].fill(0.0);
                        clip(&mut sum[..num_trained], update.clip);
                        &sum
                    }
                };
                self.learning_rate = learning_rate;
                self.write(gradient, &moved, learning_rate, update.version);
            }
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

    /// Takes the gradients of an update out of those that are staged. Only this shard's part of each is left.
    fn take_gradients(&mut self, update: &Update) -> Vec<Gradient> {
        let range = self.range();
        let named = update.gradients.iter();
        let taken = named.map(|one| {
            let staged = self.staged.remove(&one.id);
            let staged = staged.expect("checked by the caller, each named once");
            staged.slice(range.clone())
        });
        taken.collect()
    }

    /// Lets the rule change the weights by one gradient. The last weights are those of buffers, from which `moved` is
    /// subtracted, whatever the rule does.
    fn write(&mut self, gradient: &[f32], moved: &[f32], learning_rate: f64, version: Version) {
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
        let first = old_data.len() - moved.len();
        let buffers = old_data[first..].iter().zip(moved);
        let buffers: Vec<f32> = buffers.map(|(old, moved)| old - moved).collect();
        let data = match Arc::get_mut(&mut old_data) {
            Some(unshared) => {
                self.rule.update(unshared, gradient, learning_rate);
                unshared[first..].copy_from_slice(&buffers);
                old_data
            }
            None => {
                let mut next = self.pool.take(old_data.len());
                self.rule
                    .update_into(&old_data, gradient, learning_rate, &mut next);
                next[first..].copy_from_slice(&buffers);
                Arc::new(next)
            }
        };
        self.current = Weights::new(version, layout, Arc::new([Segment::new(start, data)]));
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
            is_rate_set: self.is_rate_set,
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
