//! How the first server of a group tells the others its decisions, and how they know that it is the first.
//!
//! Decisions are sent in order, one [`Follow`] at a time per server. So they pile up here, where their
//! number is bounded, and not at the other servers. Each `Follow` has a number. If a follower has already
//! taken this number, it gives the same answer again and changes nothing. So a lost connection ends
//! nothing: the first server sends the `Follow` again. Each `Follow` also carries the group's secret, so
//! nobody else can decide (PS-10).
//!
//! The numbers of a gradient are not part of a decision, because the worker has staged the parts before its
//! push. If it has not, or if a part was lost, the answer to the `Follow` names the missing gradients. The
//! first server then sends them (S-9). For this, it keeps each gradient that it applied until all servers
//! have it. So a group never waits for something that nobody will send.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::time::{Duration, Instant};

use actix::{ActorFutureExt, AsyncContext, Context};
use ps_runtime::actor::{ActorRef, CallError, NotDelivered};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::actor::{First, ParameterServer, Role};
use super::messages::{Decision, Follow, ServerError};
use super::shard::Shard;
use super::status::LostServer;
use crate::chaos;
use crate::ids::{GradientId, Version};
use crate::weights::Gradient;

#[cfg(test)]
mod tests;

/// How many decisions another server may be behind. If it is further behind, gradients are refused.
const MAX_BEHIND: usize = 4096;

/// How many bytes of gradients are kept for another server, not counting those of the two latest updates.
/// If there are more, gradients are refused.
const MAX_KEPT: usize = 1 << 30;

/// How many bytes of numbers one message to another server may hold (see [`weight`]), unless a single
/// decision needs more.
const MAX_TOLD: usize = 64 << 20;

/// How many missing gradients another server names in one answer.
pub(super) const MAX_LACKING: usize = 1024;

/// How long another server may be out of reach before the group is broken. If the server is known to have
/// ended, the group is broken at once.
const PATIENCE: Duration = Duration::from_secs(120);

/// The shortest and the longest pause before a `Follow` is sent again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// A random number that only the servers of one group know.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct GroupSecret([u8; 16]);

impl GroupSecret {
    /// # Panics
    /// If the operating system gives no random numbers.
    pub(crate) fn random() -> Self {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the system gives random numbers");
        Self(bytes)
    }

    /// Compares in a time that says nothing about the secret.
    pub(super) fn is(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }

    /// Returns a secret that is always the same for the same number.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn made_of(number: u64) -> Self {
        Self(u128::from(number).to_le_bytes())
    }
}

impl fmt::Debug for GroupSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupSecret(..)")
    }
}

/// Another server of the group, from the point of view of the first one. The simulator has no actors in it.
#[derive(Clone, Debug)]
pub(super) struct Follower<S = ActorRef<ParameterServer>> {
    server: S,
    /// Decisions that have not been sent to it yet.
    undelivered: VecDeque<Decision>,
    /// Decisions that are being sent, until it is known to have them.
    telling: Vec<Decision>,
    /// The gradients of updates that it is not known to have made.
    kept: BTreeMap<GradientId, Gradient>,
    /// Those of the kept gradients whose update has been sent.
    unconfirmed: Vec<GradientId>,
    /// The number of the `Follow` that is under way, or of the next one.
    number: u64,
    out_of_reach_since: Option<Instant>,
    gone: Option<String>,
}

impl<S> Follower<S> {
    pub(super) fn new(server: S) -> Self {
        Self {
            server,
            undelivered: VecDeque::new(),
            telling: Vec::new(),
            kept: BTreeMap::new(),
            unconfirmed: Vec::new(),
            number: 0,
            out_of_reach_since: None,
            gone: None,
        }
    }

    /// Queues a decision. If it is an update, also keeps its gradients, which are still in the first
    /// server's own shard.
    pub(super) fn queue(&mut self, decision: Decision, own: &Shard) {
        // Nothing more is sent to this server. And nothing more is decided, except for calls that are
        // already being handled.
        if self.gone.is_some() {
            return;
        }
        if let Decision::Update { update, .. } = &decision {
            let named = update.gradients.iter().map(|one| one.id);
            let kept = named.filter_map(|id| Some((id, own.staged(id)?.clone())));
            self.kept.extend(kept);
        }
        self.undelivered.push_back(decision);
    }

    /// Lets the server save its state at this version, once it has followed all decisions until then.
    pub(super) fn queue_save(&mut self, version: Version) {
        if self.gone.is_none() {
            self.undelivered.push_back(Decision::Save(version));
        }
    }

    /// Returns an error if this server prevents the group from doing its work.
    pub(super) fn check(&self, index: usize) -> Result<(), ServerError> {
        if let Some(reason) = &self.gone {
            let reason = reason.clone();
            return Err(ServerError::GroupBroken { index, reason });
        }
        let num_behind = self.undelivered.len();
        match num_behind > MAX_BEHIND || self.keeps_too_much() {
            true => Err(ServerError::FollowerBehind {
                index,
                num_behind,
                num_kept_bytes: self.num_kept_bytes(),
            }),
            false => Ok(()),
        }
    }

    /// Whether this server's delay costs too much memory. The gradients of the two latest updates do not
    /// count, because they have to be kept in any case: a round may have thousands of gradients.
    fn keeps_too_much(&self) -> bool {
        let told = self.telling.iter().chain(&self.undelivered);
        let updates = || told.filter(|decision| matches!(decision, Decision::Update { .. }));
        self.num_kept_bytes() > MAX_KEPT && updates().count() > 2
    }

    /// Returns how many bytes of gradients are kept for this server.
    fn num_kept_bytes(&self) -> usize {
        // All gradients have the same size, because each covers the whole model.
        let size = self.kept.values().next().map_or(0, num_bytes);
        size.saturating_mul(self.kept.len())
    }

    /// Moves as many decisions as fit into one message to `telling`. Returns whether there is something to
    /// send now.
    pub(super) fn take_undelivered(&mut self) -> bool {
        if !self.telling.is_empty() || self.gone.is_some() {
            return false;
        }
        let mut room = MAX_TOLD;
        while let Some(decision) = self.undelivered.front() {
            let (weight, is_first) = (weight(decision), self.telling.is_empty());
            if weight > room && !is_first {
                break;
            }
            room = room.saturating_sub(weight);
            self.telling.extend(self.undelivered.pop_front());
        }
        !self.telling.is_empty()
    }

    /// Returns the message with the decisions in `telling`. It is the same until they are taken.
    pub(super) fn follow(&self, secret: &GroupSecret) -> Follow {
        Follow {
            secret: secret.clone(),
            number: self.number,
            decisions: self.telling.clone(),
        }
    }

    /// Notes that the server has taken the decisions, and queues the gradients that it lacks.
    pub(super) fn taken(&mut self, lacking: Vec<GradientId>) -> Result<(), String> {
        self.number += 1;
        let mut completed = BTreeSet::new();
        for decision in self.telling.drain(..) {
            match decision {
                Decision::Update { update, .. } => {
                    let named = update.gradients.iter().map(|one| one.id);
                    self.unconfirmed.extend(named);
                }
                Decision::Complete(id, _) => _ = completed.insert(id),
                _ => {}
            }
        }
        if lacking.is_empty() {
            for id in self.unconfirmed.drain(..) {
                self.kept.remove(&id);
            }
        }
        for id in lacking.into_iter().rev() {
            let kept = self.kept.get(&id).filter(|_| !completed.contains(&id));
            let Some(gradient) = kept else {
                return Err(format!("it says that it lacks {id}, which it has"));
            };
            tracing::debug!(%id, "was not staged on another server; sending it the numbers");
            let complete = Decision::Complete(id, gradient.clone());
            self.undelivered.push_front(complete);
        }
        Ok(())
    }

    pub(super) fn lose(&mut self, index: usize, reason: String) {
        tracing::error!(server = index, %reason, "a server of the group is gone");
        self.undelivered.clear();
        self.telling.clear();
        self.kept.clear();
        self.gone = Some(reason);
    }
}

fn num_bytes(gradient: &Gradient) -> usize {
    size_of_val(gradient.values())
}

/// The size of a decision in a message, in bytes of numbers. The header and the number of buffers are
/// limited more tightly than the numbers. So what they need is counted as more bytes than it has.
fn weight(decision: &Decision) -> usize {
    const EACH: usize = 64 << 10;
    const EACH_NAME: usize = 2 << 10;
    EACH + match decision {
        Decision::Stage(_, gradient) | Decision::Complete(_, gradient) => num_bytes(gradient),
        Decision::Update { update, .. } => EACH_NAME.saturating_mul(update.gradients.len()),
        Decision::Discard(_) | Decision::Fence { .. } | Decision::Save(_) => 0,
    }
}

/// The outcome of sending a `Follow`.
enum Told {
    /// It was taken, and these gradients are missing.
    Taken(Vec<GradientId>),
    /// It may have been taken. It can be sent again.
    Again(String),
    Gone(String),
}

impl First {
    /// Returns a server of the group that is gone.
    pub(super) fn lost_server(&self) -> Option<LostServer> {
        let mut followers = self.followers.iter().enumerate();
        followers.find_map(|(index, follower)| {
            let reason = follower.gone.clone()?;
            let index = index + 1;
            Some(LostServer { index, reason })
        })
    }
}

impl ParameterServer {
    /// Sends each follower the decisions that it does not have yet.
    pub(super) fn tell_followers(&mut self, ctx: &mut Context<Self>) {
        let Role::First(first) = &mut self.role else {
            return;
        };
        let followers = first.followers.iter_mut().enumerate();
        let idle: Vec<usize> = followers
            .filter_map(|(index, follower)| follower.take_undelivered().then_some(index))
            .collect();
        for index in idle {
            self.tell(index, ctx);
        }
    }

    /// Sends a follower its decisions, for the first time or again.
    fn tell(&mut self, index: usize, ctx: &mut Context<Self>) {
        let Role::First(first) = &mut self.role else {
            return;
        };
        let follower = &first.followers[index];
        let told = chaos::ask(&follower.server, follower.follow(&first.secret));
        let told = async move {
            match told.await {
                Ok(Ok(lacking)) => Told::Taken(lacking),
                Ok(Err(refused)) => Told::Gone(refused.to_string()),
                Err(lost) if is_passing(&lost) => Told::Again(lost.to_string()),
                Err(lost) => Told::Gone(lost.to_string()),
            }
        };
        let told = actix::fut::wrap_future::<_, Self>(told);
        ctx.spawn(told.map(move |told, server: &mut Self, ctx| server.was_told(index, told, ctx)));
    }

    fn was_told(&mut self, index: usize, told: Told, ctx: &mut Context<Self>) {
        let Role::First(first) = &mut self.role else {
            return;
        };
        let follower = &mut first.followers[index];
        match told {
            Told::Taken(lacking) => {
                if let Err(nonsense) = follower.taken(lacking) {
                    return follower.lose(index + 1, nonsense);
                }
                if follower.out_of_reach_since.take().is_some() {
                    tracing::info!(server = index + 1, "a server of the group is back in reach");
                }
                self.tell_followers(ctx);
            }
            Told::Again(reason) => {
                let since = *follower.out_of_reach_since.get_or_insert_with(Instant::now);
                let elapsed = since.elapsed();
                if elapsed > PATIENCE {
                    let reason = format!("out of reach for {PATIENCE:?}: {reason}");
                    return follower.lose(index + 1, reason);
                }
                tracing::warn!(server = index + 1, %reason, "out of reach; telling it again");
                let pause = (elapsed / 4).clamp(PAUSES.0, PAUSES.1);
                ctx.run_later(pause, move |server, ctx| server.tell(index, ctx));
            }
            Told::Gone(reason) => follower.lose(index + 1, reason),
        }
    }

    /// Refuses a call if the group as a whole cannot handle it.
    pub(super) fn check_followers(&mut self) -> Result<(), ServerError> {
        let mut followers = self.coordinate()?.followers.iter().enumerate();
        followers.try_for_each(|(index, follower)| follower.check(index + 1))
    }
}

/// Whether the call may succeed next time, because the called actor may still be alive.
fn is_passing(error: &CallError) -> bool {
    let is_full = matches!(
        error,
        CallError::NotDelivered {
            reason: NotDelivered::QueueFull { .. },
            ..
        }
    );
    is_full || error.is_connection_lost()
}
