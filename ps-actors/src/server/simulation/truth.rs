//! What an observer who sees everything knows about a run, and checks at every step.
//!
//! It keeps all updates that were decided, computes the weights of each version again with one server, and
//! remembers what workers were told. A mistake is an error with the fact that is wrong.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::disk::Recovered;
use super::messages::{Micros, Note};
use super::settings::{Problem, Saving, Settings, micros};
use crate::checkpoint::{Checkpoint, Start};
use crate::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
use crate::server::Consistency;
use crate::server::ledger::Outcome;
use crate::server::protocol::Update;
use crate::server::shard::Shard;
use crate::weights::{Gradient, Weights};

/// A member as the observer sees it: what PS-4 says about it.
#[derive(Clone, Copy, Debug)]
struct Member {
    incarnation: Incarnation,
    first_clock: Clock,
    next_clock: Clock,
    first_progress: u64,
}

impl Member {
    fn progress(&self, clock: Clock) -> u64 {
        self.first_progress + clock.0.saturating_sub(self.first_clock.0)
    }
}

/// How servers were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    Process,
    Power,
}

#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub(super) struct Truth {
    settings: Arc<Settings>,
    generation: u32,
    /// The updates that count, from the one that makes version 1, with their times.
    history: Vec<(Update, Micros)>,
    /// The weights of each version, from version 0.
    weights: Vec<Weights>,
    shard: Shard,
    /// The steps that are in the weights, with the version that each made.
    applied: BTreeMap<(WorkerId, Clock), Version>,
    /// What workers were told: that a gradient was applied, in which update.
    acknowledged: BTreeMap<GradientId, Version>,
    members: BTreeMap<WorkerId, Member>,
    pub(super) num_applied: u64,
    pub(super) staleness: (u64, u64),
    /// Acknowledged gradients that were lost with servers, as the setting allows.
    pub(super) num_lost: u64,
    /// Whether the power was lost at any time. Then the log may have a gap before the newest checkpoint.
    has_lost_power: bool,
    /// Whether the latest group may have lost what was logged.
    may_lose_logged: bool,
    is_checked: bool,
}

impl Truth {
    pub(super) fn new(settings: Arc<Settings>) -> Self {
        let initial = settings.initial();
        let shard = whole(&settings, &initial);
        Self {
            is_checked: settings.problem == Problem::Counting,
            settings,
            generation: 0,
            history: Vec::new(),
            weights: vec![initial],
            shard,
            applied: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            members: BTreeMap::new(),
            num_applied: 0,
            staleness: (0, 0),
            num_lost: 0,
            has_lost_power: false,
            may_lose_logged: false,
        }
    }

    /// Takes a note of a process, and checks it.
    ///
    /// # Errors
    /// If a guarantee is broken. The error says which.
    pub(super) fn note(&mut self, note: &Note, now: Micros) -> Result<(), String> {
        match note {
            Note::Decided(update) => self.decided(update, now),
            &Note::Joined(worker, incarnation, clock) => {
                self.joined(worker, incarnation, clock);
                Ok(())
            }
            Note::NoMember(worker) => {
                self.members.remove(worker);
                Ok(())
            }
            &Note::Begins(worker, incarnation, clock) => self.begins(worker, incarnation, clock),
            &Note::Acknowledged(id, outcome) => self.acknowledged(id, outcome),
            Note::Pulled(generation, weights) => self.pulled(*generation, weights),
            Note::Reached(_) => Ok(()),
        }
    }

    fn decided(&mut self, update: &Update, now: Micros) -> Result<(), String> {
        let before = self.version();
        for one in &update.gradients {
            let staleness = one.staleness(before);
            self.num_applied += 1;
            self.staleness.0 += staleness;
            self.staleness.1 = self.staleness.1.max(staleness);
            if let Some(member) = self.members.get_mut(&one.id.worker)
                && member.incarnation == one.id.incarnation
            {
                member.next_clock = member.next_clock.max(one.id.clock.next());
            }
        }
        if !self.is_checked {
            self.history.push((update.clone(), now));
            return Ok(());
        }
        if update.version != before.next() {
            return Err(format!("{} was decided after {before}", update.version));
        }
        for one in &update.gradients {
            let step = (one.id.worker, one.id.clock);
            if let Some(earlier) = self.applied.insert(step, update.version) {
                let again = update.version;
                return Err(format!(
                    "{} was applied by {earlier} and by {again}",
                    one.id
                ));
            }
        }
        let settings = Arc::clone(&self.settings);
        for one in &update.gradients {
            let gradient = gradient(&settings, one.id, &self.weights);
            let staged = self.shard.stage_decided(one.id, &gradient);
            staged.map_err(|error| error.to_string())?;
        }
        let made = self.shard.update(update.clone(), settings.learning_rate());
        made.map_err(|error| error.to_string())?;
        if self.version() == before {
            return Err(format!(
                "{} has gradients with other numbers",
                update.version
            ));
        }
        self.weights.push(self.shard.weights().clone());
        self.history.push((update.clone(), now));
        Ok(())
    }

    fn version(&self) -> Version {
        match self.is_checked {
            true => self.shard.weights().version(),
            false => Version(self.history.len() as u64),
        }
    }

    fn slowest(&self) -> Option<u64> {
        let members = self.members.values();
        members
            .map(|member| member.progress(member.next_clock))
            .min()
    }

    fn joined(&mut self, worker: WorkerId, incarnation: Incarnation, clock: Clock) {
        let known = self.members.get(&worker);
        if known.is_some_and(|known| known.incarnation == incarnation) {
            return;
        }
        self.members.remove(&worker);
        let member = Member {
            incarnation,
            first_clock: clock,
            next_clock: clock,
            first_progress: self.slowest().unwrap_or(0),
        };
        self.members.insert(worker, member);
    }

    /// PS-4.
    fn begins(
        &self,
        worker: WorkerId,
        incarnation: Incarnation,
        clock: Clock,
    ) -> Result<(), String> {
        let Consistency::Ssp { bound } = self.settings.consistency else {
            return Ok(());
        };
        let member = self.members.get(&worker);
        let member = member.filter(|member| member.incarnation == incarnation);
        let (Some(member), Some(slowest)) = (member, self.slowest()) else {
            return Ok(());
        };
        match member.progress(clock) <= slowest + bound {
            true => Ok(()),
            false => Err(format!(
                "{worker} begins a step at progress {}, and the slowest is at {slowest} (PS-4)",
                member.progress(clock)
            )),
        }
    }

    fn acknowledged(&mut self, id: GradientId, outcome: Outcome) -> Result<(), String> {
        if !self.is_checked {
            return Ok(());
        }
        match outcome {
            Outcome::Applied { version, .. } => {
                match self.has(id, version) {
                    true => _ = self.acknowledged.insert(id, version),
                    // Its servers were lost while the answer was under way.
                    false => self.lose(id, version)?,
                }
                Ok(())
            }
            Outcome::DroppedLate { .. } | Outcome::RefusedNorm { .. } => {
                match self.applied.get(&(id.worker, id.clock)) {
                    Some(version) => Err(format!("{id} is {outcome:?}, but is part of {version}")),
                    None => Ok(()),
                }
            }
        }
    }

    fn has(&self, id: GradientId, version: Version) -> bool {
        let update = version
            .0
            .checked_sub(1)
            .and_then(|index| self.history.get(index as usize));
        update.is_some_and(|(update, _)| update.gradients.iter().any(|one| one.id == id))
    }

    /// PS-5: a version has the same weights for every reader.
    fn pulled(&self, generation: u32, weights: &Weights) -> Result<(), String> {
        if !self.is_checked || generation != self.generation {
            return Ok(());
        }
        let version = weights.version();
        match self.weights.get(version.0 as usize) {
            Some(expected) if same_bits(&expected.to_vec(), &weights.to_vec()) => Ok(()),
            Some(_) => Err(format!("{version} was read with other weights (PS-5)")),
            None => Err(format!("{version} was read and was never made")),
        }
    }

    fn lose(&mut self, id: GradientId, version: Version) -> Result<(), String> {
        self.num_lost += 1;
        let may_lose = match self.settings.saving {
            Saving::Nothing | Saving::Checkpoints => true,
            Saving::Log { .. } => self.may_lose_logged,
            Saving::SyncedLog => false,
        };
        match may_lose {
            true => Ok(()),
            false => Err(format!(
                "{id} was acknowledged as part of {version} and is lost"
            )),
        }
    }

    /// New servers go on from what was saved. Checks what they go on from.
    pub(super) fn recovered(
        &mut self,
        recovered: &Recovered,
        loss: Loss,
        lost_at: Micros,
        generation: u32,
    ) -> Result<(), String> {
        let version = recovered
            .checkpoint
            .as_ref()
            .map_or(Version(0), Checkpoint::version);
        if version.0 > self.history.len() as u64 {
            return Err(format!(
                "servers go on from {version}, which was never made"
            ));
        }
        self.has_lost_power |= loss == Loss::Power;
        self.may_lose_logged =
            loss == Loss::Power || (self.has_lost_power && recovered.skipped_damaged);
        if let (Saving::Log { sync_every }, Loss::Power) = (self.settings.saving, loss)
            && !recovered.skipped_damaged
        {
            let newest_safe = lost_at.saturating_sub(micros(sync_every) + 1);
            let after = self.history.iter().skip(version.0 as usize);
            if let Some((lost, _)) = after.into_iter().find(|(_, at)| *at < newest_safe) {
                return Err(format!(
                    "{} was lost, and was older than a sync",
                    lost.version
                ));
            }
        }
        let acknowledged = std::mem::take(&mut self.acknowledged);
        for (id, of) in acknowledged {
            match of > version {
                true => self.lose(id, of)?,
                false => _ = self.acknowledged.insert(id, of),
            }
        }
        self.members.clear();
        self.generation = generation;
        self.roll_back(version)?;
        let Some(checkpoint) = &recovered.checkpoint else {
            return Ok(());
        };
        if !same_bits(
            &checkpoint.weights().to_vec(),
            &self.weights[version.0 as usize].to_vec(),
        ) {
            return Err(format!("servers go on from {version} with other weights"));
        }
        let workers: BTreeSet<WorkerId> = self.applied.keys().map(|(worker, _)| *worker).collect();
        for worker in workers {
            let of_worker = self
                .applied
                .range((worker, Clock(0))..=(worker, Clock(u64::MAX)));
            let latest = of_worker
                .last()
                .map_or(Clock(0), |((_, clock), _)| clock.next());
            if checkpoint.next_clock(worker) < latest {
                return Err(format!(
                    "servers go on and forget a step of {worker} before {latest}"
                ));
            }
        }
        Ok(())
    }

    fn roll_back(&mut self, version: Version) -> Result<(), String> {
        let history = std::mem::take(&mut self.history);
        let (num_applied, staleness) = (self.num_applied, self.staleness);
        self.applied.clear();
        self.weights.truncate(1);
        self.shard = whole(&self.settings, &self.weights[0]);
        for (update, at) in history.into_iter().take(version.0 as usize) {
            self.decided(&update, at)?;
        }
        (self.num_applied, self.staleness) = (num_applied, staleness);
        Ok(())
    }

    /// Describes what was applied and what workers know of it.
    #[cfg(test)]
    pub(super) fn description(&self) -> String {
        format!("{:?} {:?}", self.applied, self.acknowledged)
    }

    /// Checks the weights at the end.
    pub(super) fn check_end(&self, weights: &Weights) -> Result<(), String> {
        if !self.is_checked {
            return Ok(());
        }
        let version = weights.version();
        let expected = &self.weights[self.weights.len() - 1];
        if version != expected.version() || !same_bits(&expected.to_vec(), &weights.to_vec()) {
            return Err(format!(
                "the servers end at {version} with other weights than decided"
            ));
        }
        for (&id, &version) in &self.acknowledged {
            if !self.has(id, version) {
                return Err(format!(
                    "{id} was acknowledged as part of {version}, and is not"
                ));
            }
        }
        if self.settings.momentum != 0.0 {
            return Ok(());
        }
        let numbers = weights.to_vec();
        for worker in (0..self.settings.num_workers).map(WorkerId) {
            for clock in (0..self.settings.num_steps).map(Clock) {
                let expected = u64::from(self.applied.contains_key(&(worker, clock)));
                let count = self.settings.count(worker, clock, &numbers)?;
                if count != expected {
                    return Err(format!("{worker}, {clock} is in the weights {count} times"));
                }
            }
        }
        Ok(())
    }
}

fn whole(settings: &Settings, initial: &Weights) -> Shard {
    let range = initial.range();
    super::first::shard(settings, Start::from(initial), range, true).0
}

fn gradient(settings: &Settings, id: GradientId, weights: &[Weights]) -> Gradient {
    // The gradients of this problem do not depend on the weights.
    settings.gradient(id.worker, id.clock, &weights[0])
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    let bits = |numbers: &[f32]| numbers.iter().map(|n| n.to_bits()).collect::<Vec<_>>();
    bits(a) == bits(b)
}
