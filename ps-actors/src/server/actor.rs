//! The actor around the pure core: takes a message, steps the core, performs the effects.
//!
//! The first server of a group holds the coordinator besides its shard. Its decisions go to
//! the other servers in order, one [`Follow`] at a time per server. A caller whose answer
//! has to wait is kept under its ticket; a caller that goes away is noticed by the lease.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorFutureExt, AsyncContext, Context, Handler, MessageResult, Response, WrapFuture,
};
use tokio::sync::oneshot;

use super::consistency::{Consistency, Reduction};
use super::coordinator::Coordinator;
use super::ledger::Outcome;
use super::messages::{
    ApplyGradients, Decision, Follow, GetStatus, GetWeights, Heartbeat, Join, Leave, Pull, Push,
    PushPull, Pushed, ReportLost, ServerError, ServerStatus, SetConsistency, SetLearningRate,
    Stage,
};
use super::protocol::{Answer, Effect, Event, Membership, Refusal, Stamp, Ticket};
use super::shard::{PullAnswer, Shard, ShardError};
use crate::actor::{ActorRef, RestartPolicy, Spawn, SpawnError};
use crate::ids::{Incarnation, WorkerId};
use crate::rule::UpdateRule;
use crate::weights::{Gradients, Weights};

/// How many decisions another server may be behind before gradients are refused.
const MAX_BEHIND: usize = 4096;

/// What a parameter server does with gradients.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ServerConfig {
    /// When gradients are applied. Default: [`Consistency::Bsp`].
    pub consistency: Consistency,
    /// How the gradients of one update become one. Default: [`Reduction::Mean`].
    pub reduction: Reduction,
    /// The learning rate. Default: 0.01.
    pub learning_rate: f64,
    /// The largest norm that a gradient may have. Default: infinity, which still refuses
    /// gradients that contain NaN or infinity.
    pub max_norm: f64,
    /// How long a member may be silent before it counts as lost. Too short: workers with slow
    /// steps must join again and again. Too long: a dead worker holds up synchronous rounds.
    /// Default: `None`, for ever; then a driver must send [`ReportLost`].
    pub lease: Option<Duration>,
    /// How many different workers must have joined before the first round of
    /// [`Consistency::Bsp`] or [`Consistency::KofN`] closes, so that who comes first does not train
    /// alone. A worker that is reported lost is not waited for. Default: 0.
    pub wait_for_workers: usize,
    /// How many versions are kept besides the current one, for pulls that want one version of
    /// several servers. Each costs as much memory as the weights. Default: 0; a group of
    /// several servers keeps at least 4.
    pub num_kept_versions: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            consistency: Consistency::Bsp,
            reduction: Reduction::Mean,
            learning_rate: 0.01,
            max_norm: f64::INFINITY,
            lease: None,
            wait_for_workers: 0,
            num_kept_versions: 0,
        }
    }
}

/// A server setting that cannot work.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum ConfigError {
    /// Not a usable learning rate.
    #[error("the learning rate must be a finite number, 0 or more, but is {0}")]
    LearningRate(f64),
    /// Not a usable limit.
    #[error("the largest gradient norm must be a positive number or infinity, but is {0}")]
    MaxNorm(f64),
    /// A lease that is over at once.
    #[error("the lease must be longer than zero")]
    Lease,
    /// No round could close.
    #[error("k-of-n needs k of at least 1")]
    NoQuorum,
}

impl ServerConfig {
    /// Checks every setting that can be checked without knowing the workers.
    ///
    /// # Errors
    /// When a setting cannot work; the error says what it has to be.
    pub fn check(&self) -> Result<(), ConfigError> {
        check_learning_rate(self.learning_rate)?;
        check_consistency(self.consistency)?;
        if self.max_norm.is_nan() || self.max_norm <= 0.0 {
            return Err(ConfigError::MaxNorm(self.max_norm));
        }
        match self.lease {
            Some(lease) if lease.is_zero() => Err(ConfigError::Lease),
            _ => Ok(()),
        }
    }
}

fn check_learning_rate(rate: f64) -> Result<(), ConfigError> {
    match rate.is_finite() && rate >= 0.0 {
        true => Ok(()),
        false => Err(ConfigError::LearningRate(rate)),
    }
}

fn check_consistency(consistency: Consistency) -> Result<(), ConfigError> {
    match consistency {
        Consistency::KofN { k: 0 } => Err(ConfigError::NoQuorum),
        _ => Ok(()),
    }
}

/// Holds weights, or a contiguous range of them, and applies gradients to them.
#[derive(Debug)]
pub struct ParameterServer {
    shard: Shard,
    role: Role,
    callers: BTreeMap<Ticket, Caller>,
    next_ticket: u64,
}

#[derive(Debug)]
enum Role {
    First(Box<First>),
    Follower,
}

#[derive(Debug)]
struct First {
    coordinator: Coordinator,
    followers: Vec<Follower>,
    lease: Option<Duration>,
    last_heard: BTreeMap<WorkerId, Instant>,
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
enum Caller {
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

    fn coordinate(&mut self) -> Result<&mut First, ServerError> {
        match &mut self.role {
            Role::First(first) => Ok(first),
            Role::Follower => Err(ServerError::NotFirst),
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    /// Steps the coordinator and performs what it decides.
    fn step(&mut self, event: Event, ctx: &mut Context<Self>) -> Result<(), ServerError> {
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

    fn follow(&mut self, decision: Decision) -> Result<(), ServerError> {
        let answers = match decision {
            Decision::Stage(id, gradient) => self.shard.stage_decided(id, &gradient)?,
            Decision::Update {
                update,
                learning_rate,
            } => self.shard.update(update, learning_rate),
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

    fn answer_pulls(&mut self, answers: Vec<PullAnswer>) {
        for PullAnswer { ticket, weights } in answers {
            if let Some(Caller::Pull(caller)) = self.callers.remove(&ticket) {
                let _ = caller.send(weights.map_err(ServerError::from));
            }
        }
    }

    /// Hands `event` to the coordinator on behalf of a worker and returns where its answer will
    /// arrive.
    fn step_for(
        &mut self,
        worker: WorkerId,
        event: impl FnOnce(Ticket) -> Event,
        ctx: &mut Context<Self>,
    ) -> Result<oneshot::Receiver<Result<Answer, Refusal>>, ServerError> {
        self.coordinate()?.last_heard.insert(worker, Instant::now());
        let ticket = self.ticket();
        let (caller, answer) = oneshot::channel();
        self.callers.insert(ticket, Caller::Worker(worker, caller));
        self.step(event(ticket), ctx)?;
        Ok(answer)
    }

    fn push(
        &mut self,
        gradients: Gradients,
        then_start: bool,
        ctx: &mut Context<Self>,
    ) -> Result<oneshot::Receiver<Result<Answer, Refusal>>, ServerError> {
        self.check_followers()?;
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

    /// Stages a gradient here, unless its worker's life is over: then the coordinator says so.
    fn stage_own(&mut self, gradients: &Gradients) -> Result<(), ServerError> {
        match self.shard.stage(gradients.id, &gradients.gradient) {
            Ok(answers) => self.answer_pulls(answers),
            Err(ShardError::Fenced { .. }) => {}
            Err(other) => return Err(other.into()),
        }
        Ok(())
    }

    fn apply(
        &mut self,
        message: &ApplyGradients,
        ctx: &mut Context<Self>,
    ) -> Result<Weights, ServerError> {
        self.check_followers()?;
        let expected = 0..self.shard.weights().layout().num_weights();
        for Gradients { id, gradient, .. } in &message.gradients {
            // Checked for all before anything is staged anywhere.
            if gradient.range() != expected {
                let (id, got) = (*id, gradient.range());
                return Err(ShardError::WrongRange { id, got, expected }.into());
            }
        }
        for Gradients { id, gradient, .. } in &message.gradients {
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

fn stamp(gradients: &Gradients) -> Stamp {
    let Gradients {
        id,
        computed_on,
        ref gradient,
        ..
    } = *gradients;
    Stamp {
        id,
        computed_on,
        norm: gradient.norm(),
    }
}

/// Waits for a coordinator's answer.
async fn settled(
    answer: oneshot::Receiver<Result<Answer, Refusal>>,
) -> Result<Answer, ServerError> {
    Ok(answer.await.map_err(|_| ServerError::Stopping)??)
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

impl Handler<GetWeights> for ParameterServer {
    type Result = MessageResult<GetWeights>;

    fn handle(&mut self, _: GetWeights, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.shard.weights().clone())
    }
}

impl Handler<Pull> for ParameterServer {
    type Result = Response<Result<Weights, ServerError>>;

    fn handle(&mut self, Pull(wanted): Pull, _: &mut Self::Context) -> Self::Result {
        let ticket = self.ticket();
        if let Some(answer) = self.shard.pull(ticket, wanted) {
            return Response::reply(answer.weights.map_err(ServerError::from));
        }
        let (caller, weights) = oneshot::channel();
        self.callers.insert(ticket, Caller::Pull(caller));
        Response::fut(async move { weights.await.unwrap_or(Err(ServerError::Stopping)) })
    }
}

impl Handler<ApplyGradients> for ParameterServer {
    type Result = Result<Weights, ServerError>;

    fn handle(&mut self, message: ApplyGradients, ctx: &mut Self::Context) -> Self::Result {
        self.apply(&message, ctx)
    }
}

impl Handler<Join> for ParameterServer {
    type Result = Result<Membership, ServerError>;

    fn handle(&mut self, message: Join, ctx: &mut Self::Context) -> Self::Result {
        let Join {
            worker,
            incarnation,
        } = message;
        let event = |ticket| Event::Join {
            ticket,
            worker,
            incarnation,
        };
        let mut answer = self.step_for(worker, event, ctx)?;
        match answer.try_recv().map_err(|_| ServerError::Stopping)?? {
            Answer::Joined(membership) => Ok(membership),
            other => {
                unreachable!("the coordinator answers a join with a membership, not {other:?}")
            }
        }
    }
}

impl Handler<Leave> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: Leave, ctx: &mut Self::Context) -> Self::Result {
        let Leave {
            worker,
            incarnation,
        } = message;
        self.step_for(
            worker,
            |ticket| Event::Leave {
                ticket,
                worker,
                incarnation,
            },
            ctx,
        )?;
        Ok(())
    }
}

impl Handler<ReportLost> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: ReportLost, ctx: &mut Self::Context) -> Self::Result {
        self.step(
            Event::Lost {
                worker: message.worker,
            },
            ctx,
        )
    }
}

impl Handler<Heartbeat> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: Heartbeat, _: &mut Self::Context) -> Self::Result {
        let Heartbeat {
            worker,
            incarnation,
        } = message;
        let first = self.coordinate()?;
        let mut members = first.coordinator.members();
        if !members.any(|member| member == (worker, incarnation)) {
            let least = Incarnation(incarnation.0 + 1);
            return Err(Refusal::NotMember { worker, least }.into());
        }
        drop(members);
        first.last_heard.insert(worker, Instant::now());
        Ok(())
    }
}

impl Handler<Stage> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: Stage, _: &mut Self::Context) -> Self::Result {
        let answers = self.shard.stage(message.id, &message.gradient)?;
        self.answer_pulls(answers);
        Ok(())
    }
}

impl Handler<Push> for ParameterServer {
    type Result = Response<Result<Outcome, ServerError>>;

    fn handle(&mut self, Push(gradients): Push, ctx: &mut Self::Context) -> Self::Result {
        match self.push(gradients, false, ctx) {
            Err(error) => Response::reply(Err(error)),
            Ok(answer) => Response::fut(async move { outcome(settled(answer).await?) }),
        }
    }
}

impl Handler<PushPull> for ParameterServer {
    type Result = actix::ResponseActFuture<Self, Result<Pushed, ServerError>>;

    fn handle(&mut self, PushPull(gradients): PushPull, ctx: &mut Self::Context) -> Self::Result {
        let answer = self.push(gradients, true, ctx);
        let outcome = async move { outcome(settled(answer?).await?) };
        Box::pin(outcome.into_actor(self).map(|outcome, server, _| {
            Ok(Pushed {
                outcome: outcome?,
                weights: server.shard.weights().clone(),
            })
        }))
    }
}

fn outcome(answer: Answer) -> Result<Outcome, ServerError> {
    match answer {
        Answer::Settled(outcome) => Ok(outcome),
        other => unreachable!("the coordinator answers a push with its outcome, not {other:?}"),
    }
}

impl Handler<SetConsistency> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: SetConsistency, ctx: &mut Self::Context) -> Self::Result {
        check_consistency(message.0)?;
        self.step(Event::SetConsistency(message.0), ctx)
    }
}

impl Handler<SetLearningRate> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: SetLearningRate, _: &mut Self::Context) -> Self::Result {
        self.coordinate()?;
        check_learning_rate(message.0)?;
        self.shard.set_learning_rate(message.0);
        Ok(())
    }
}

impl Handler<GetStatus> for ParameterServer {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        MessageResult(ServerStatus {
            version: self.shard.weights().version(),
            range: self.shard.range(),
            num_staged: self.shard.num_staged(),
            learning_rate: self.shard.learning_rate(),
            coordinator: match &self.role {
                Role::First(first) => Some(first.coordinator.status()),
                Role::Follower => None,
            },
        })
    }
}

impl Handler<Follow> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, Follow(decisions): Follow, _: &mut Self::Context) -> Self::Result {
        for decision in decisions {
            self.follow(decision)?;
        }
        Ok(())
    }
}
