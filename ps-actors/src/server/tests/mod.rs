//! The pure core under every schedule that a random generator thinks of: one coordinator and
//! some shards, driven without threads or time.

use std::collections::{BTreeMap, VecDeque};

use super::consistency::{Consistency, Reduction};
use super::coordinator::Coordinator;
use super::protocol::{
    Answer, Clip, Effect, Event, Membership, Refusal, Stamp, Summand, Ticket, Update,
};
use super::shard::{PullVersion, Shard, ShardAnswer, ShardError};
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::rule::Sgd;
use crate::weights::{Gradient, Layout, Weights};

mod bounds;
mod consistency;
mod cost;
mod exactly_once;
mod sharding;

const LEN: usize = 40;

/// The latest incarnation that a worker may have that never joined.
const NEWEST: Incarnation = Incarnation(1_000);

/// A coordinator with its shards. What the coordinator decides reaches shard 0 at once, and
/// the others when [`World::deliver`] says so.
struct World {
    coordinator: Coordinator,
    shards: Vec<Shard>,
    undelivered: Vec<VecDeque<Effect>>,
    answers: BTreeMap<Ticket, Result<Answer, Refusal>>,
    updates: Vec<Update>,
    learning_rate: f64,
    next_ticket: u64,
    /// How many examples the batches of what is pushed from now on have.
    num_examples: u64,
}

impl World {
    fn new(num_shards: usize, consistency: Consistency, reduction: Reduction) -> Self {
        Self::with_rule(num_shards, consistency, reduction, -1.0, Sgd::new)
    }

    /// With learning rate -1 and plain SGD, the weights are the sum of what was applied.
    fn with_rule(
        num_shards: usize,
        consistency: Consistency,
        reduction: Reduction,
        learning_rate: f64,
        rule: impl Fn() -> Sgd,
    ) -> Self {
        let initial = Weights::initial(Layout::flat(LEN), vec![0.0; LEN]);
        let shards = super::partition::partition(LEN, num_shards)
            .into_iter()
            .map(|range| Shard::new(&initial, range, Box::new(rule()), learning_rate, 2))
            .collect();
        Self {
            coordinator: Coordinator::new(consistency, reduction, 1e6),
            shards,
            undelivered: vec![VecDeque::new(); num_shards],
            answers: BTreeMap::new(),
            updates: Vec::new(),
            learning_rate,
            next_ticket: 0,
            num_examples: 32,
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    fn event(&mut self, event: Event) {
        for effect in self.coordinator.step(event) {
            match effect {
                Effect::Answer { ticket, answer } => {
                    let before = self.answers.insert(ticket, answer);
                    assert_eq!(before, None, "a ticket is answered once");
                }
                // These are for an update log only.
                Effect::Settled { .. } | Effect::Joined { .. } => {}
                effect => {
                    if let Effect::Update(update) = &effect {
                        self.updates.push(update.clone());
                    }
                    for undelivered in &mut self.undelivered {
                        undelivered.push_back(effect.clone());
                    }
                    self.deliver(0);
                }
            }
        }
    }

    /// Lets a shard catch up with the coordinator.
    fn deliver(&mut self, shard: usize) {
        while let Some(effect) = self.undelivered[shard].pop_front() {
            let shard = &mut self.shards[shard];
            match effect {
                Effect::Update(update) => {
                    let followed = shard.update(update, self.learning_rate);
                    followed.expect("decisions come in order");
                }
                Effect::Discard(id) => shard.discard(id),
                Effect::Fence { worker, below } => shard.fence(worker, below),
                Effect::Settled { .. } | Effect::Joined { .. } | Effect::Answer { .. } => {
                    unreachable!("no shard is told of it")
                }
            }
        }
    }

    fn deliver_all(&mut self) {
        (0..self.shards.len()).for_each(|shard| self.deliver(shard));
    }

    /// Joins by the request of this number. Incarnations are numbered from 1. If a test numbers its
    /// requests in the same way, it knows which incarnation each request begins.
    fn join(&mut self, worker: u32, request: u64) -> Result<Membership, Refusal> {
        let ticket = self.ticket();
        let (worker, request) = (WorkerId(worker), JoinRequest(request));
        self.event(Event::Join {
            ticket,
            worker,
            request,
        });
        match self.answers[&ticket].clone()? {
            Answer::Joined(membership) => Ok(membership),
            other => panic!("a join is answered with {other:?}"),
        }
    }

    fn stamp(&self, id: GradientId, computed_on: Version, gradient: &Gradient) -> Stamp {
        Stamp {
            id,
            computed_on,
            norm: gradient.norm(),
            num_examples: self.num_examples,
        }
    }

    /// Stages a gradient everywhere and pushes it, as a client does. Returns the ticket.
    fn push(&mut self, id: GradientId, computed_on: u64, values: Vec<f32>) -> Ticket {
        let gradient = Gradient::new(values);
        for shard in 0..self.shards.len() {
            // A fenced or overfull worker still tries its push at the coordinator.
            let staged = self.shards[shard].stage(id, &gradient);
            if let Err(ShardError::TooManyStrangers { .. }) = staged {
                // Its client tries again, when the shard knows of the worker.
                self.deliver(shard);
                let _ = self.shards[shard].stage(id, &gradient);
            }
        }
        let ticket = self.ticket();
        let stamp = self.stamp(id, Version(computed_on), &gradient);
        self.event(Event::Push {
            ticket,
            stamp,
            then_start: true,
        });
        ticket
    }

    /// Applies gradients as one update, as a driver does; each is made of one number.
    fn apply(
        &mut self,
        ids: &[GradientId],
        computed_on: u64,
        number: impl Fn(GradientId) -> f32,
    ) -> Ticket {
        let mut stamps = Vec::new();
        for &id in ids {
            let gradient = Gradient::new(vec![number(id); LEN]);
            stamps.push(self.stamp(id, Version(computed_on), &gradient));
            for shard in 0..self.shards.len() {
                // Decisions come in order: each shard has followed all that were before.
                self.deliver(shard);
                self.shards[shard].stage_decided(id, &gradient).unwrap();
            }
        }
        let (ticket, reduction) = (self.ticket(), Reduction::Sum);
        let newest = NEWEST;
        self.event(Event::Apply {
            ticket,
            stamps,
            reduction,
            newest,
        });
        ticket
    }

    /// The weights of all shards, which must be at the same version.
    fn weights(&mut self) -> Vec<f32> {
        self.deliver_all();
        let version = self.coordinator.version();
        let mut values = Vec::new();
        for shard in &mut self.shards {
            let answer = shard.pull(Ticket(0), PullVersion::Exactly(version));
            values.extend(answer.expect("all is delivered").unwrap().to_vec());
        }
        values
    }

    fn outcome(&self, ticket: Ticket) -> Option<Answer> {
        self.answers
            .get(&ticket)
            .map(|answer| answer.clone().expect("not refused"))
    }
}

fn id(worker: u32, incarnation: u64, clock: u64) -> GradientId {
    let (worker, incarnation) = (WorkerId(worker), Incarnation(incarnation));
    GradientId {
        worker,
        incarnation,
        clock: Clock(clock),
    }
}

/// A small generator with a documented algorithm (SplitMix64), so that a seed that a failing
/// test prints means the same on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % sides as u64) as usize
    }

    fn values(&mut self) -> Vec<f32> {
        (0..LEN)
            .map(|_| self.roll(2001) as f32 / 1000.0 - 1.0)
            .collect()
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.roll(i + 1));
        }
    }
}
