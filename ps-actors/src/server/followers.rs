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

use super::actor::{ParameterServer, Role};
use super::messages::{Decision, Follow, ServerError};
use super::shard::Shard;
use crate::chaos;
use crate::ids::{GradientId, Version};
use crate::weights::Gradient;

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

/// What a follower knows about the first server.
#[derive(Clone, Debug)]
pub(super) struct Following {
    secret: GroupSecret,
    next_number: u64,
    /// The answer to the last `Follow` that was taken. After an error no other `Follow` is taken.
    last: Result<(), ServerError>,
}

impl Following {
    pub(super) fn new(secret: GroupSecret) -> Self {
        Self {
            secret,
            next_number: 0,
            last: Ok(()),
        }
    }

    /// Returns the answer to a `Follow` that must not be taken, or has already been taken. Returns `None`
    /// if it must be taken now.
    fn answer(&self, follow: &Follow) -> Option<Result<(), ServerError>> {
        let refused = |reason: String| Some(Err(ServerError::NotFollowed { reason }));
        let is_first: bool = self.secret.0.ct_eq(&follow.secret.0).into();
        if !is_first {
            return refused("only the first server of the group decides".to_owned());
        }
        let (number, next) = (follow.number, self.next_number);
        if number < next || self.last.is_err() {
            return Some(self.last.clone());
        }
        match number > next {
            true => refused(format!("message {number} came before message {next}")),
            false => None,
        }
    }

    /// Gives the decisions of a `Follow` to `follow_one`, unless they were taken before. The result is the
    /// same each time.
    pub(super) fn take(
        &mut self,
        follow: Follow,
        follow_one: impl FnMut(Decision) -> Result<(), ServerError>,
    ) -> Result<(), ServerError> {
        if let Some(answer) = self.answer(&follow) {
            return answer;
        }
        let taken = follow.decisions.into_iter().try_for_each(follow_one);
        self.next_number += 1;
        self.last = taken.clone();
        taken
    }
}

impl ParameterServer {
    /// Follows the first server's decisions, once. Returns the ids of the missing gradients.
    pub(super) fn take(&mut self, follow: Follow) -> Result<Vec<GradientId>, ServerError> {
        self.take_decisions(follow)?;
        Ok(self.shard.lacking(MAX_LACKING))
    }

    fn take_decisions(&mut self, follow: Follow) -> Result<(), ServerError> {
        let Role::Follower(following) = &mut self.role else {
            let reason = "this server decides by itself".to_owned();
            return Err(ServerError::NotFollowed { reason });
        };
        let (shard, mut answers) = (&mut self.shard, Vec::new());
        let taken = following.take(follow, |decision| {
            answers.extend(decision.apply_to(shard)?);
            Ok(())
        });
        self.answer_pulls(answers);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::ServerConfig;
    use super::super::consistency::Reduction;
    use super::super::protocol::{Summand, Update};
    use super::*;
    use crate::checkpoint::Rest;
    use crate::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
    use crate::rule::Sgd;
    use crate::weights::{Gradient, Layout, Weights};

    fn follower(secret: &GroupSecret) -> ParameterServer {
        let initial = Weights::initial(Layout::flat(2), vec![1.0; 2]);
        let (rule, config) = (Box::new(Sgd::new()), ServerConfig::default());
        let rest = Rest::default();
        let follower =
            ParameterServer::follower(&initial, 0..2, rest, rule, config, secret.clone());
        follower.expect("the settings work")
    }

    fn id(clock: u64) -> GradientId {
        GradientId {
            worker: WorkerId(0),
            incarnation: Incarnation(1),
            clock: Clock(clock),
        }
    }

    fn update(version: u64, gradients: Vec<GradientId>) -> Vec<Decision> {
        let stage = |id| Decision::Stage(id, Gradient::new(vec![1.0; 2]));
        let mut decisions: Vec<_> = gradients.iter().copied().map(stage).collect();
        decisions.push(decide(version, gradients, 0.5));
        decisions
    }

    fn decide(version: u64, gradients: Vec<GradientId>, learning_rate: f64) -> Decision {
        Decision::Update {
            update: Update {
                version: Version(version),
                gradients: gradients
                    .into_iter()
                    .map(|id| Summand {
                        id,
                        computed_on: Version(0),
                        norm: Gradient::new(vec![1.0; 2]).norm(),
                        num_examples: 1,
                    })
                    .collect(),
                reduction: Reduction::Sum,
            },
            learning_rate,
        }
    }

    fn follow(secret: &GroupSecret, number: u64, decisions: Vec<Decision>) -> Follow {
        Follow {
            secret: secret.clone(),
            number,
            decisions,
        }
    }

    #[test]
    fn a_stranger_is_not_followed_and_does_not_learn_the_secret() {
        let secret = GroupSecret::random();
        let mut server = follower(&secret);
        let stranger = GroupSecret::random();
        let error = server
            .take(follow(&stranger, 0, update(1, vec![id(0)])))
            .unwrap_err();
        assert!(error.to_string().contains("only the first"), "{error}");
        assert_eq!(server.shard.weights().version(), Version(0));
        let text = format!("{:?}", follow(&secret, 0, Vec::new()));
        assert!(text.contains("GroupSecret(..)"), "{text}");
        server
            .take(follow(&secret, 0, update(1, vec![id(0)])))
            .unwrap();
        assert_eq!(server.shard.weights().to_vec(), [0.5; 2]);
    }

    #[test]
    fn what_is_told_again_counts_once_and_is_answered_as_the_first_time() {
        let secret = GroupSecret::random();
        let mut server = follower(&secret);
        for number in [0, 0, 1, 0, 1] {
            let decisions = update(number + 1, vec![id(number)]);
            server.take(follow(&secret, number, decisions)).unwrap();
        }
        assert_eq!(server.shard.weights().version(), Version(2));
        let gap = follow(&secret, 3, update(3, vec![id(2)]));
        assert!(server.take(gap).is_err());
        assert_eq!(server.shard.weights().to_vec(), [0.0; 2]);
    }

    /// S-9
    #[test]
    fn what_is_lacking_is_said_until_it_is_there_and_counts_once() {
        let secret = GroupSecret::random();
        let mut server = follower(&secret);
        let complete = |clock| Decision::Complete(id(clock), Gradient::new(vec![1.0; 2]));
        let named = vec![id(0), id(1)];
        for _ in 0..2 {
            let update = follow(&secret, 0, vec![decide(1, named.clone(), 0.5)]);
            assert_eq!(server.take(update).unwrap(), named);
        }
        let forged = Gradient::new(vec![9.0; 2]);
        server.shard.stage(id(0), &forged).unwrap();
        let lacking = server.take(follow(&secret, 1, vec![complete(0)])).unwrap();
        assert_eq!(lacking, [id(1)]);
        let twice = vec![complete(1), complete(1), complete(0)];
        assert_eq!(server.take(follow(&secret, 2, twice)).unwrap(), []);
        assert_eq!(server.shard.weights().to_vec(), [0.0; 2]);
        assert_eq!(server.shard.num_staged(), 0);
    }

    #[test]
    fn the_first_server_keeps_what_another_one_may_lack_and_no_longer() {
        let first = || {
            let other = follower(&GroupSecret::random());
            let mut own = follower(&GroupSecret::random()).shard;
            own.stage(id(0), &Gradient::new(vec![1.0; 2])).unwrap();
            let mut told = Follower::new(other.spawn().unwrap());
            told.queue(decide(1, vec![id(0)], 0.5), &own);
            assert!(told.take_undelivered());
            told
        };
        let mut told = first();
        told.taken(vec![id(0)]).unwrap();
        assert!(told.take_undelivered());
        assert!(matches!(told.telling[..], [Decision::Complete(..)]));
        told.taken(Vec::new()).unwrap();
        assert!(told.kept.is_empty() && !told.take_undelivered());
        // Nonsense, also when it would go on for ever.
        assert!(first().taken(vec![id(7)]).is_err());
        let mut told = first();
        told.taken(vec![id(0)]).unwrap();
        assert!(told.take_undelivered());
        assert!(told.taken(vec![id(0)]).is_err());
    }

    /// S-9: there are two reasons, and the text is true for both.
    #[test]
    fn a_server_that_is_too_slow_is_named_with_its_delay_and_its_cost() {
        let own = follower(&GroupSecret::random()).shard;
        let fresh = || Follower::new(follower(&GroupSecret::random()).spawn().unwrap());
        let mut late = fresh();
        for clock in 0..=MAX_BEHIND as u64 {
            late.check(1).unwrap();
            late.queue(Decision::Discard(id(clock)), &own);
        }
        let mut costly = fresh();
        let large = Gradient::new(vec![0.0; 40 << 18]);
        for clock in 0..30 {
            costly.kept.insert(id(clock), large.clone());
        }
        for version in 1..=3 {
            costly.check(1).unwrap();
            costly.queue(decide(version, vec![id(version)], 0.5), &own);
        }
        for (server, delay, cost) in [
            (late, "is 4097 decisions behind", "0 MiB of gradients"),
            (costly, "is 3 decisions behind", "1200 MiB of gradients"),
        ] {
            let text = server.check(1).unwrap_err().to_string();
            assert!(text.contains(delay) && text.contains(cost), "{text}");
        }
    }

    #[test]
    fn no_message_to_another_server_is_too_large_to_be_sent() {
        let server = follower(&GroupSecret::random());
        let mut told = Follower::new(server.spawn().unwrap());
        let own = follower(&GroupSecret::random()).shard;
        let large = Gradient::new(vec![0.0; 40 << 18]);
        for clock in 0..4 {
            told.queue(Decision::Stage(id(clock), large.clone()), &own);
        }
        (0..2000).for_each(|clock| told.queue(Decision::Discard(id(clock)), &own));
        let mut sizes = Vec::new();
        while told.take_undelivered() {
            sizes.push(told.telling.len());
            told.taken(Vec::new()).unwrap();
        }
        // Of 40 MiB each, of which one fits into 64; the last one goes with others.
        assert_eq!(sizes[..3], [1, 1, 1]);
        assert_eq!(sizes.iter().sum::<usize>(), 2004);
        assert!(sizes.iter().all(|&size| size <= 1024), "{sizes:?}");
    }

    #[test]
    fn decisions_that_cannot_be_followed_are_errors_and_change_nothing() {
        let secret = GroupSecret::random();
        for decisions in [
            update(2, vec![id(0)]),
            update(0, vec![id(0)]),
            update(1, Vec::new()),
            update(1, vec![id(0), id(0)]),
            vec![decide(1, vec![id(0)], f64::NAN)],
            vec![decide(1, vec![id(0)], -1.0)],
        ] {
            let mut server = follower(&secret);
            let bad = follow(&secret, 0, decisions);
            let error = server.take(bad.clone()).unwrap_err();
            let again = server.take(bad).unwrap_err();
            assert_eq!(error.to_string(), again.to_string());
            let version = server.shard.weights().version();
            assert_eq!(version, Version(0), "{error}");
        }
    }
}
