//! How the first server of a group tells the others what it decided, and how they know that it is the
//! first.
//!
//! Decisions go out in order, one [`Follow`] at a time per server, so that they pile up here, where
//! their number is bounded, rather than there. Each `Follow` has a number: one that was taken already is
//! answered as the first time and changes nothing, so a lost connection ends nothing, and the first
//! server asks again. Each also carries the group's secret: nobody else decides (PS-6).

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

use actix::{ActorFutureExt, AsyncContext, Context};
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use super::actor::{ParameterServer, Role};
use super::messages::{Decision, Follow, ServerError};
use ps_runtime::actor::{ActorRef, CallError, NotDelivered};

/// How many decisions another server may be behind before gradients are refused.
const MAX_BEHIND: usize = 4096;

/// How long another server may be out of reach before the group is broken. It is broken at once when
/// the server is known to have ended.
const PATIENCE: Duration = Duration::from_secs(120);

/// The shortest and the longest time between two tries to tell it.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// What the servers of one group know, and nobody else.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct GroupSecret([u8; 16]);

impl GroupSecret {
    /// # Panics
    /// When the system gives no random numbers.
    pub(crate) fn random() -> Self {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).expect("the system gives random numbers");
        Self(bytes)
    }

    /// One that is the same every time.
    #[cfg(test)]
    pub(crate) fn made_of(number: u64) -> Self {
        Self(u128::from(number).to_le_bytes())
    }
}

impl fmt::Debug for GroupSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GroupSecret(..)")
    }
}

/// Another server of the group, as the first one sees it.
#[derive(Debug)]
pub(super) struct Follower {
    server: ActorRef<ParameterServer>,
    /// Decisions that it was not told yet.
    undelivered: VecDeque<Decision>,
    /// Those that it is being told, until it is known to have them.
    telling: Vec<Decision>,
    /// The number of the `Follow` under way, or of the next one.
    number: u64,
    out_of_reach_since: Option<Instant>,
    gone: Option<String>,
}

impl Follower {
    pub(super) fn new(server: ActorRef<ParameterServer>) -> Self {
        Self {
            server,
            undelivered: VecDeque::new(),
            telling: Vec::new(),
            number: 0,
            out_of_reach_since: None,
            gone: None,
        }
    }

    pub(super) fn queue(&mut self, decision: Decision) {
        // Nobody is told any more, and nothing is decided either, but for what is under way.
        if self.gone.is_none() {
            self.undelivered.push_back(decision);
        }
    }

    /// Says why the group as a whole cannot do what it would be asked to.
    pub(super) fn check(&self, index: usize) -> Result<(), ServerError> {
        if let Some(reason) = &self.gone {
            let reason = reason.clone();
            return Err(ServerError::GroupBroken { index, reason });
        }
        match self.undelivered.len() {
            num_behind if num_behind > MAX_BEHIND => {
                Err(ServerError::FollowerBehind { index, num_behind })
            }
            _ => Ok(()),
        }
    }

    /// Whether there is something to tell it now.
    fn take_undelivered(&mut self) -> bool {
        if !self.telling.is_empty() || self.undelivered.is_empty() || self.gone.is_some() {
            return false;
        }
        self.telling.extend(self.undelivered.drain(..));
        true
    }

    fn lose(&mut self, index: usize, reason: String) {
        tracing::error!(server = index, %reason, "a server of the group is gone");
        self.undelivered.clear();
        self.telling.clear();
        self.gone = Some(reason);
    }
}

/// What became of a `Follow`.
enum Told {
    Taken,
    /// It may have been taken, and can be sent again.
    Again(String),
    Gone(String),
}

impl ParameterServer {
    /// Sends each follower what it was not told yet.
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

    /// Tells a follower what it is to be told, for the first time or again.
    fn tell(&mut self, index: usize, ctx: &mut Context<Self>) {
        let Role::First(first) = &mut self.role else {
            return;
        };
        let follower = &first.followers[index];
        let told = follower.server.ask(Follow {
            secret: first.secret.clone(),
            number: follower.number,
            decisions: follower.telling.clone(),
        });
        let told = async move {
            match told.await {
                Ok(Ok(())) => Told::Taken,
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
            Told::Taken => {
                follower.telling.clear();
                follower.number += 1;
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

    /// Refuses work that the group as a whole could not do.
    pub(super) fn check_followers(&mut self) -> Result<(), ServerError> {
        let mut followers = self.coordinate()?.followers.iter().enumerate();
        followers.try_for_each(|(index, follower)| follower.check(index + 1))
    }
}

/// Whether a call may go better next time, and the called actor may well be alive.
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

/// What a follower knows about who decides.
#[derive(Debug)]
pub(super) struct Following {
    secret: GroupSecret,
    next_number: u64,
    /// The answer to the last `Follow` that was taken. After an error nothing more is.
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

    /// Returns the answer to a `Follow` that is not to be taken, or is taken already; else it is to be
    /// taken now.
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
}

impl ParameterServer {
    /// Follows the first server's decisions, once.
    pub(super) fn take(&mut self, follow: Follow) -> Result<(), ServerError> {
        let Role::Follower(following) = &self.role else {
            let reason = "this server decides by itself".to_owned();
            return Err(ServerError::NotFollowed { reason });
        };
        if let Some(answer) = following.answer(&follow) {
            return answer;
        }
        let mut decisions = follow.decisions.into_iter();
        let taken = decisions.try_for_each(|decision| self.follow(decision));
        if let Role::Follower(following) = &mut self.role {
            following.next_number += 1;
            following.last = taken.clone();
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::ServerConfig;
    use super::super::consistency::Reduction;
    use super::super::protocol::{Summand, Update};
    use super::*;
    use crate::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
    use crate::rule::Sgd;
    use crate::weights::{Gradient, Layout, Weights};

    fn follower(secret: &GroupSecret) -> ParameterServer {
        let initial = Weights::initial(Layout::flat(2), vec![1.0; 2]);
        let (rule, config) = (Box::new(Sgd::new()), ServerConfig::default());
        ParameterServer::follower(&initial, 0..2, rule, config, secret.clone())
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
