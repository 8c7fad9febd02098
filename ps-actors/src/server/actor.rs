//! The actor around the pure core: takes a message, steps the core, performs the effects.
//!
//! The first server of a group holds the coordinator besides its shard. Its decisions go to
//! the other servers in order, one [`Follow`] at a time per server. A caller whose answer
//! has to wait is kept under its ticket; a caller that goes away is noticed by the lease.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use actix::{Actor, ActorFutureExt, AsyncContext, Context};
use tokio::sync::oneshot;

use super::config::{ConfigError, ServerConfig};
use super::coordinator::Coordinator;
use super::ledger::Outcome;
use super::messages::{ApplyGradients, Decision, Follow, ServerError};
use super::protocol::{Answer, Effect, Event, Refusal, Stamp, Ticket};
use super::shard::{PullAnswer, Shard, ShardError};
use crate::actor::{ActorRef, RestartPolicy, Spawn, SpawnError};
use crate::ids::{GradientId, Incarnation, WorkerId};
use crate::rule::UpdateRule;
use crate::weights::{Gradients, Weights};

/// How many decisions another server may be behind before gradients are refused.
const MAX_BEHIND: usize = 4096;

/// Holds weights, or a contiguous range of them, and applies gradients to them.
#[derive(Debug)]
pub struct ParameterServer {
    pub(super) shard: Shard,
    pub(super) role: Role,
    pub(super) callers: BTreeMap<Ticket, Caller>,
    next_ticket: u64,
}

#[derive(Debug)]
pub(super) enum Role {
    First(Box<First>),
    Follower,
}

#[derive(Debug)]
pub(super) struct First {
    pub(super) coordinator: Coordinator,
    followers: Vec<Follower>,
    lease: Option<Duration>,
    pub(super) last_heard: BTreeMap<WorkerId, Instant>,
}

/// Another server of the group, as the first one sees it.
#[derive(Debug)]
struct Follower {
    server: ActorRef<ParameterServer>,
    /// Decisions that it was not told yet.
    undelivered: VecDeque<Decision>,
    is_telling: bool,
    gone: Option<String>,
}

#[derive(Debug)]
pub(super) enum Caller {
    Pull(oneshot::Sender<Result<Weights, ServerError>>),
    Worker(WorkerId, oneshot::Sender<Result<Answer, Refusal>>),
}

impl ParameterServer {
    /// Makes a server that holds all of `initial`.
    ///
    /// # Errors
    /// When a setting cannot work.
    pub fn new(
        initial: &Weights,
        rule: impl UpdateRule,
        config: ServerConfig,
    ) -> Result<Self, ConfigError> {
        Self::first(initial, initial.range(), Box::new(rule), config, Vec::new())
    }

    /// Makes the first server of a group: it decides, and `followers` hold the other ranges.
    pub(crate) fn first(
        initial: &Weights,
        range: Range<usize>,
        rule: Box<dyn UpdateRule>,
        config: ServerConfig,
        followers: Vec<ActorRef<Self>>,
    ) -> Result<Self, ConfigError> {
        config.check()?;
        let coordinator = Coordinator::new(config.consistency, config.reduction, config.max_norm)
            .wait_for_workers(config.wait_for_workers);
        let followers = followers
            .into_iter()
            .map(|server| Follower {
                server,
                undelivered: VecDeque::new(),
                is_telling: false,
                gone: None,
            })
            .collect();
        let first = First {
            coordinator,
            followers,
            lease: config.lease,
            last_heard: BTreeMap::new(),
        };
        Ok(Self::with_role(
            initial,
            range,
            rule,
            config,
            Role::First(Box::new(first)),
        ))
    }

    /// Makes another server of a group.
    pub(crate) fn follower(
        initial: &Weights,
        range: Range<usize>,
        rule: Box<dyn UpdateRule>,
        config: ServerConfig,
    ) -> Self {
        Self::with_role(initial, range, rule, config, Role::Follower)
    }

    fn with_role(
        initial: &Weights,
        range: Range<usize>,
        rule: Box<dyn UpdateRule>,
        config: ServerConfig,
        role: Role,
    ) -> Self {
        let rate = config.learning_rate;
        let shard = Shard::new(initial, range, rule, rate, config.num_kept_versions);
        Self {
            shard,
            role,
            callers: BTreeMap::new(),
            next_ticket: 0,
        }
    }

    /// Starts the server as an actor on a thread of its own.
    ///
    /// It is not restarted after a panic, because a restart would silently go back to the
    /// initial weights: calls fail instead.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn spawn(self) -> Result<ActorRef<Self>, SpawnError> {
        self.spawn_with(Spawn::new())
    }

    /// Starts the server with a name or other options of the actor; its restart policy is
    /// replaced, see [`ParameterServer::spawn`].
    ///
    /// # Errors
    /// When the name is taken, or the thread cannot be started.
    #[expect(
        clippy::missing_panics_doc,
        reason = "an actor that is never restarted is made once"
    )]
    pub fn spawn_with(self, options: Spawn) -> Result<ActorRef<Self>, SpawnError> {
        let mut server = Some(self);
        options
            .restart(RestartPolicy::NEVER)
            .start(move || server.take().expect("a server is never restarted"))
    }

    pub(super) fn coordinate(&mut self) -> Result<&mut First, ServerError> {
        match &mut self.role {
            Role::First(first) => Ok(first),
            Role::Follower => Err(ServerError::NotFirst),
        }
    }

    pub(super) fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Steps the coordinator and performs what it decides.
    pub(super) fn step(
        &mut self,
        event: Event,
        ctx: &mut Context<Self>,
    ) -> Result<(), ServerError> {
        let effects = self.coordinate()?.coordinator.step(event);
        for effect in effects {
            match effect {
                Effect::Answer { ticket, answer } => self.answer_worker(ticket, answer),
                Effect::Update(update) => {
                    let learning_rate = self.shard.learning_rate();
                    self.decide(Decision::Update {
                        update,
                        learning_rate,
                    })?;
                }
                Effect::Discard(id) => self.decide(Decision::Discard(id))?,
                Effect::Fence { worker, below } => {
                    self.decide(Decision::Fence { worker, below })?;
                }
            }
        }
        self.tell_followers(ctx);
        Ok(())
    }

    /// Follows a decision of its own and queues it for the others.
    fn decide(&mut self, decision: Decision) -> Result<(), ServerError> {
        for follower in &mut self.coordinate()?.followers {
            follower.undelivered.push_back(decision.clone());
        }
        self.follow(decision)
    }

    pub(super) fn follow(&mut self, decision: Decision) -> Result<(), ServerError> {
        let answers = match decision {
            Decision::Stage(id, gradient) => self.shard.stage_decided(id, &gradient)?,
            Decision::Update {
                update,
                learning_rate,
            } => self.shard.update(update, learning_rate)?,
            Decision::Discard(id) => {
                self.shard.discard(id);
                Vec::new()
            }
            Decision::Fence { worker, below } => {
                self.shard.fence(worker, below);
                Vec::new()
            }
        };
        self.answer_pulls(answers);
        Ok(())
    }

    /// Sends each follower what it was not told yet, one message at a time, so that decisions
    /// arrive in order and pile up here, where their number is bounded, rather than there.
    fn tell_followers(&mut self, ctx: &mut Context<Self>) {
        let Role::First(first) = &mut self.role else {
            return;
        };
        for (index, follower) in first.followers.iter_mut().enumerate() {
            if follower.is_telling || follower.undelivered.is_empty() || follower.gone.is_some() {
                continue;
            }
            follower.is_telling = true;
            let told = follower
                .server
                .ask(Follow(follower.undelivered.drain(..).collect()));
            let told = async move {
                match told.await {
                    Ok(Ok(())) => None,
                    Ok(Err(refused)) => Some(refused.to_string()),
                    Err(lost) => Some(lost.to_string()),
                }
            };
            let told = actix::fut::wrap_future::<_, Self>(told);
            ctx.spawn(told.map(move |gone, server: &mut Self, ctx| {
                if let Role::First(first) = &mut server.role {
                    let follower = &mut first.followers[index];
                    follower.is_telling = false;
                    if let Some(reason) = gone {
                        tracing::error!(server = index + 1, %reason, "a server of the group is gone");
                        follower.gone = Some(reason);
                    }
                }
                server.tell_followers(ctx);
            }));
        }
    }

    /// Refuses work that the group as a whole could not do.
    fn check_followers(&mut self) -> Result<(), ServerError> {
        for (index, follower) in self.coordinate()?.followers.iter().enumerate() {
            let index = index + 1;
            if let Some(reason) = &follower.gone {
                return Err(ServerError::GroupBroken {
                    index,
                    reason: reason.clone(),
                });
            }
            let num_behind = follower.undelivered.len();
            if num_behind > MAX_BEHIND {
                return Err(ServerError::FollowerBehind { index, num_behind });
            }
        }
        Ok(())
    }

    fn answer_worker(&mut self, ticket: Ticket, answer: Result<Answer, Refusal>) {
        if let Some(Caller::Worker(_, caller)) = self.callers.remove(&ticket) {
            // A caller that has gone away will ask again, and get the same answer.
            let _ = caller.send(answer);
        }
    }

    pub(super) fn answer_pulls(&mut self, answers: Vec<PullAnswer>) {
        for PullAnswer { ticket, weights } in answers {
            if let Some(Caller::Pull(caller)) = self.callers.remove(&ticket) {
                let _ = caller.send(weights.map_err(ServerError::from));
            }
        }
    }

    /// Hands `event` to the coordinator on behalf of a worker and returns where its answer will
    /// arrive.
    pub(super) fn step_for(
        &mut self,
        worker: WorkerId,
        event: impl FnOnce(Ticket) -> Event,
        ctx: &mut Context<Self>,
    ) -> Result<oneshot::Receiver<Result<Answer, Refusal>>, ServerError> {
        let ticket = self.ticket();
        let (caller, answer) = oneshot::channel();
        self.callers.insert(ticket, Caller::Worker(worker, caller));
        self.step(event(ticket), ctx)?;
        let first = self.coordinate()?;
        // Only of members, whose number is bounded: anybody can make up a worker.
        if first.coordinator.life(worker).is_some() {
            first.last_heard.insert(worker, Instant::now());
        }
        Ok(answer)
    }

    pub(super) fn push(
        &mut self,
        gradients: Gradients,
        then_start: bool,
        ctx: &mut Context<Self>,
    ) -> Result<oneshot::Receiver<Result<Answer, Refusal>>, ServerError> {
        self.check_followers()?;
        self.check_range(&gradients)?;
        let stamp = stamp(&gradients);
        self.stage_own(&gradients)?;
        let worker = gradients.id.worker;
        self.step_for(
            worker,
            |ticket| Event::Push {
                ticket,
                stamp,
                then_start,
            },
            ctx,
        )
    }

    /// Refuses a gradient that is not over exactly the weights of the model.
    fn check_range(&self, gradients: &Gradients) -> Result<(), ShardError> {
        let expected = 0..self.shard.weights().layout().num_weights();
        let (id, got) = (gradients.id, gradients.gradient.range());
        match got == expected {
            true => Ok(()),
            false => Err(ShardError::WrongRange { id, got, expected }),
        }
    }

    /// Stages a gradient here, unless its worker is no member: then the coordinator says so.
    fn stage_own(&mut self, gradients: &Gradients) -> Result<(), ServerError> {
        if !self.is_pending(gradients.id)? {
            self.shard.discard(gradients.id);
        }
        match self.shard.stage(gradients.id, &gradients.gradient) {
            Ok(answers) => self.answer_pulls(answers),
            Err(ShardError::Fenced { .. } | ShardError::TooManyStrangers { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        Ok(())
    }

    /// Whether a push of this name was accepted and waits. Otherwise, what is staged under the name was
    /// judged by nobody, and makes room for what is judged now (PS-6).
    fn is_pending(&mut self, id: GradientId) -> Result<bool, ServerError> {
        Ok(self.coordinate()?.coordinator.is_pending(id))
    }

    pub(super) fn apply(
        &mut self,
        message: &ApplyGradients,
        ctx: &mut Context<Self>,
    ) -> Result<Weights, ServerError> {
        self.check_followers()?;
        for gradients in &message.gradients {
            // Checked for all before anything is staged anywhere.
            self.check_range(gradients)?;
        }
        for Gradients { id, gradient, .. } in &message.gradients {
            if !self.is_pending(*id)? {
                self.decide(Decision::Discard(*id))?;
            }
            self.decide(Decision::Stage(*id, gradient.clone()))?;
        }
        let ticket = self.ticket();
        let (caller, mut answer) = oneshot::channel();
        let worker = message
            .gradients
            .first()
            .map_or(WorkerId(0), |g| g.id.worker);
        self.callers.insert(ticket, Caller::Worker(worker, caller));
        let stamps = message.gradients.iter().map(stamp).collect();
        self.step(
            Event::Apply {
                ticket,
                stamps,
                reduction: message.reduction,
                newest: newest_life(),
            },
            ctx,
        )?;
        match answer.try_recv().map_err(|_| ServerError::Stopping)?? {
            Answer::Settled(Outcome::RefusedNorm { norm, limit, .. }) => {
                Err(ServerError::BadNorm { norm, limit })
            }
            _ => Ok(self.shard.weights().clone()),
        }
    }

    /// Declares members lost that were silent for longer than the lease. A member that waits
    /// for us is not silent.
    fn check_leases(&mut self, ctx: &mut Context<Self>) {
        self.callers.retain(|_, caller| match caller {
            Caller::Pull(caller) => !caller.is_closed(),
            Caller::Worker(_, caller) => !caller.is_closed(),
        });
        let waiting: Vec<WorkerId> = self
            .callers
            .values()
            .filter_map(|caller| match caller {
                Caller::Worker(worker, _) => Some(*worker),
                Caller::Pull(_) => None,
            })
            .collect();
        let Role::First(first) = &mut self.role else {
            return;
        };
        let First {
            coordinator,
            last_heard,
            lease: Some(lease),
            ..
        } = &mut **first
        else {
            return;
        };
        let lease = *lease;
        let now = Instant::now();
        for worker in waiting {
            last_heard.insert(worker, now);
        }
        last_heard.retain(|&worker, _| coordinator.life(worker).is_some());
        let lost: Vec<WorkerId> = coordinator
            .members()
            .map(|(worker, _)| worker)
            .filter(|worker| {
                last_heard
                    .get(worker)
                    .is_none_or(|&heard| now - heard > lease)
            })
            .collect();
        for worker in lost {
            tracing::warn!(%worker, ?lease, "lost: not heard of within its lease");
            if let Err(error) = self.step(Event::Lost { worker }, ctx) {
                tracing::error!(%error, "could not declare a worker lost");
            }
        }
    }
}

/// The latest life that a worker which never joined can be in: it was made an hour ahead of this
/// machine's clock at most.
fn newest_life() -> Incarnation {
    const TOLERANCE: Duration = Duration::from_secs(3600);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let micros = (now.unwrap_or_default() + TOLERANCE).as_micros();
    Incarnation(u64::try_from(micros).unwrap_or(u64::MAX))
}

fn stamp(gradients: &Gradients) -> Stamp {
    let Gradients {
        id,
        computed_on,
        num_examples,
        ref gradient,
        ..
    } = *gradients;
    Stamp {
        id,
        computed_on,
        norm: gradient.norm(),
        num_examples: u64::try_from(num_examples).unwrap_or(u64::MAX),
    }
}

impl Actor for ParameterServer {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        if let Role::First(first) = &self.role
            && let Some(lease) = first.lease
        {
            ctx.run_interval(lease / 4, Self::check_leases);
        }
    }
}
