//! The actor around the pure core: it takes a message, steps the core, and performs the effects.
//!
//! The first server of a group holds the coordinator besides its shard. Its decisions go to the other
//! servers in order (`followers`). A caller whose answer has to wait is kept under its ticket until it is
//! answered or has gone (`waiting`). Members that are silent for too long are declared lost (`leases`).

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, Instant};

use actix::{Actor, AsyncContext, Context, StreamHandler};
use ps_runtime::actor::{ActorRef, RestartPolicy, Spawn, SpawnError};
use tokio::sync::oneshot;

use super::applied_parts::PartRecorder;
use super::config::{Clipping, ConfigError, ServerConfig};
use super::coordinator::Coordinator;
use super::followers::{Follower, GroupSecret};
use super::following::Following;
use super::leases::Leases;
use super::ledger::Outcome;
use super::messages::{Decision, Pushed, ServerError};
use super::protocol::{Answer, Effect, Event, Refusal, Ticket};
use super::replay::{LogEntry, entries, restore};
use super::shard::{Shard, ShardAnswer};
use super::stall::{STALL, Stall};
use super::update_times::UpdateTimes;
use super::waiting::{Caller, MAX_CALLS, Waiting};
use crate::chaos::reached;
use crate::checkpoint::{Rest, Start};
use crate::ids::WorkerId;
use crate::rule::{SavedRule, UpdateRule};
use crate::schedule::{ScheduleWriter, ScheduledUpdate, WeightsChecksum};
use crate::update_log::{Replaced, UpdateLog};
use crate::weights::{Gradient, Weights};

/// An actor that holds weights, or a contiguous range of them, and applies gradients to them.
///
/// ```
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{Consistency, GetStatus, ParameterServer, ServerConfig, SetConsistency};
/// use ps_actors::weights::{Layout, Weights};
///
/// let initial = Weights::initial(Layout::flat(3), vec![0.5; 3]);
/// let server = ParameterServer::new(&initial, Sgd::new(), ServerConfig::default())?.spawn()?;
///
/// server.ask(SetConsistency(Consistency::Asp)).wait()??;
/// let status = server.ask(GetStatus).wait()?;
/// assert_eq!(status.range, 0..3);
/// assert_eq!(status.coordinator.unwrap().consistency, Consistency::Asp);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct ParameterServer {
    pub(super) shard: Shard,
    pub(super) role: Role,
    pub(super) waiting: Waiting,
    /// How many messages are fetching their gradients from other processes.
    pub(super) num_fetching: usize,
    pub(super) stall: Stall,
    update_times: UpdateTimes,
    /// For a server that follows.
    pub(super) parts: PartRecorder,
}

#[derive(Debug)]
pub(super) enum Role {
    First(Box<First>),
    Follower(Following),
}

#[derive(Debug)]
pub(super) struct First {
    pub(super) coordinator: Coordinator,
    pub(super) followers: Vec<Follower>,
    /// Shows the followers that this is the first server.
    pub(super) secret: GroupSecret,
    pub(super) leases: Leases,
    pub(super) clipping: Clipping,
    /// Whether workers overlap their pushes with their next gradients, where the mode allows it.
    overlap: bool,
    /// Writes the schedule of the updates, if it is recorded.
    pub(super) schedule: Option<ScheduleWriter>,
    pub(super) update_log: Option<UpdateLog>,
}

impl ParameterServer {
    /// Makes a server that holds all weights of `start`: initial weights, or a
    /// [`Checkpoint`](crate::checkpoint::Checkpoint) from which it goes on.
    ///
    /// # Errors
    /// If a setting cannot work, or the checkpoint has the state of another update rule.
    pub fn new<'a>(
        start: impl Into<Start<'a>>,
        rule: impl UpdateRule,
        config: ServerConfig,
    ) -> Result<Self, ConfigError> {
        let start = start.into();
        let (rule, secret) = (Box::new(rule), GroupSecret::random());
        let (initial, range) = (start.weights(), start.weights().range());
        let rest = start.rest(range.clone(), true);
        Self::first(initial, range, rest, rule, config, secret, Vec::new())
    }

    /// Makes the first server of a group, which decides. `followers` hold the other ranges.
    pub(crate) fn first(
        initial: &Weights,
        range: Range<usize>,
        mut rest: Rest,
        rule: Box<dyn UpdateRule>,
        config: ServerConfig,
        secret: GroupSecret,
        followers: Vec<ActorRef<Self>>,
    ) -> Result<Self, ConfigError> {
        config.check()?;
        let coordinator = Coordinator::new(config.consistency, config.reduction, config.max_norm)
            .wait_for_workers(config.wait_for_workers);
        let coordinator = match rest.coordinator.take() {
            Some(state) if state.version == initial.version() => coordinator.restore(state),
            Some(state) => {
                let (of, weights) = (state.version, initial.version());
                return Err(ConfigError::Versions { of, weights });
            }
            None => coordinator,
        };
        let first = First {
            coordinator,
            followers: followers.into_iter().map(Follower::new).collect(),
            secret,
            leases: Leases::new(config.worker_lease),
            clipping: config.clipping,
            overlap: config.overlap,
            schedule: None,
            update_log: None,
        };
        let role = Role::First(Box::new(first));
        Self::with_role(initial, range, rest.rule, rule, config, role)
    }

    /// Makes another server of a group.
    pub(crate) fn follower(
        initial: &Weights,
        range: Range<usize>,
        rest: Rest,
        rule: Box<dyn UpdateRule>,
        config: ServerConfig,
        secret: GroupSecret,
    ) -> Result<Self, ConfigError> {
        let role = Role::Follower(Following::new(secret));
        Self::with_role(initial, range, rest.rule, rule, config, role)
    }

    fn with_role(
        initial: &Weights,
        range: Range<usize>,
        saved_rule: SavedRule,
        mut rule: Box<dyn UpdateRule>,
        config: ServerConfig,
        role: Role,
    ) -> Result<Self, ConfigError> {
        rule.place(initial.layout(), range.clone())?;
        restore(rule.as_mut(), saved_rule, range.len())?;
        reached!(ServerMade {
            range: range.clone(),
            version: initial.version(),
        });
        let rate = config.learning_rate;
        let shard = Shard::new(initial, range, rule, rate, config.num_kept_versions);
        Ok(Self {
            shard,
            role,
            waiting: Waiting::new(),
            num_fetching: 0,
            stall: Stall::default(),
            update_times: UpdateTimes::default(),
            parts: PartRecorder::default(),
        })
    }

    /// Starts the server as an actor on a thread of its own.
    ///
    /// It is not restarted after a panic, because a restart would silently go back to the initial weights.
    /// Calls fail instead (S-8).
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn spawn(self) -> Result<ActorRef<Self>, SpawnError> {
        self.spawn_with(Spawn::new())
    }

    /// Starts the server with a name or other options of the actor. Its restart policy and its bound on
    /// pending calls are replaced; see [`ParameterServer::options`].
    ///
    /// # Errors
    /// If the name is taken, or the thread cannot be started.
    #[expect(
        clippy::missing_panics_doc,
        reason = "an actor that is never restarted is made once"
    )]
    pub fn spawn_with(self, options: Spawn) -> Result<ActorRef<Self>, SpawnError> {
        let mut server = Some(self);
        Self::options(options).start(move || server.take().expect("a server is never restarted"))
    }

    /// Adds the options that a server needs, wherever it is hosted. There is no restart, because a restart
    /// would silently go back to the initial weights. There are more slots than calls that may wait, so
    /// that status, heartbeats, joining and leaving never queue behind waiting calls. There are no sockets on
    /// the server's thread, so a server takes no file descriptors; an update rule that needs them asks for
    /// [`Spawn::with_io`].
    pub fn options(options: Spawn) -> Spawn {
        options
            .restart(RestartPolicy::NEVER)
            .max_pending(MAX_CALLS)
            .without_io()
    }

    pub(super) fn coordinate(&mut self) -> Result<&mut First, ServerError> {
        match &mut self.role {
            Role::First(first) => Ok(first),
            Role::Follower(_) => Err(ServerError::NotFirst),
        }
    }

    /// Steps the coordinator and performs what it decides.
    pub(super) fn step(
        &mut self,
        event: Event,
        ctx: &mut Context<Self>,
    ) -> Result<(), ServerError> {
        let First {
            coordinator,
            clipping,
            ..
        } = self.coordinate()?;
        let (mut effects, clipping) = (coordinator.step(event), *clipping);
        for effect in &mut effects {
            if let Effect::Update(update) = effect {
                update.clip = self.shard.decide_clip(update, clipping);
            }
        }
        let rates = self.rates(&effects);
        self.write_ahead(&effects, &rates)?;
        let mut rates = rates.into_iter();
        for effect in effects {
            match effect {
                Effect::Answer { ticket, answer } => self.answer_worker(ticket, answer),
                Effect::Update(update) => {
                    let learning_rate = rates.next().expect("each update has a rate");
                    self.decide(Decision::Update {
                        update,
                        learning_rate,
                    })?;
                }
                Effect::Settled { .. } | Effect::Joined { .. } => {}
                Effect::Discard(id) => self.decide(Decision::Discard(id))?,
                Effect::Fence { worker, below } => {
                    self.decide(Decision::Fence { worker, below })?;
                }
            }
        }
        self.tell_followers(ctx);
        Ok(())
    }

    /// Returns the learning rate of each update among `effects`.
    fn rates(&mut self, effects: &[Effect]) -> Vec<f64> {
        let updates = effects.iter().filter_map(|effect| match effect {
            Effect::Update(update) => Some(update.version),
            _ => None,
        });
        let rates = updates.map(|version| self.shard.learning_rate_of(version));
        rates.collect()
    }

    /// Writes what was decided to the schedule and to the update log, if there are any. Nothing of it is done
    /// or answered before. The schedule comes first, because a run that follows the log needs it.
    ///
    /// # Errors
    /// If this server was replaced, and its log belongs to another server now.
    fn write_ahead(&mut self, effects: &[Effect], rates: &[f64]) -> Result<(), ServerError> {
        let Role::First(first) = &mut self.role else {
            return Ok(());
        };
        if let Some(schedule) = &mut first.schedule {
            let updates = effects.iter().filter_map(|effect| match effect {
                Effect::Update(update) => Some(update),
                _ => None,
            });
            // Later ones change weights that are not there yet.
            let weights = self.shard.weights();
            let checksum = || WeightsChecksum::of(weights, weights.range().len());
            for (index, (update, &rate)) in updates.zip(rates).enumerate() {
                let weights = (index == 0).then(checksum);
                schedule.write(&ScheduledUpdate::of(update, rate, weights));
            }
        }
        #[cfg(feature = "chaos")]
        if effects
            .iter()
            .any(|effect| matches!(effect, Effect::Update(_)))
        {
            reached!(ServerDecided {
                version: first.coordinator.version()
            });
        }
        let Some(log) = &first.update_log else {
            return Ok(());
        };
        for entry in entries(effects, rates) {
            let named = match &entry {
                LogEntry::Update { update, .. } => &update.gradients[..],
                _ => &[],
            };
            let numbers: Vec<&[f32]> = named
                .iter()
                .map(|one| self.shard.staged(one.id).map_or(&[][..], Gradient::values))
                .collect();
            log.append(&entry, &numbers)
                .map_err(|Replaced| ServerError::Stopping)?;
        }
        log.sync_if_always();
        Ok(())
    }

    /// Follows a decision of this server, and queues it for the other servers.
    pub(super) fn decide(&mut self, decision: Decision) -> Result<(), ServerError> {
        let Role::First(first) = &mut self.role else {
            return Err(ServerError::NotFirst);
        };
        for follower in &mut first.followers {
            follower.queue(decision.clone(), &self.shard);
        }
        let made = match &decision {
            Decision::Update { update, .. } => Some(update.version),
            _ => None,
        };
        let began = Instant::now();
        let answers = decision.apply_to(&mut self.shard)?;
        if let Some(version) = made {
            self.update_times.note(version, began.elapsed());
        }
        self.answer_pulls(answers);
        Ok(())
    }

    fn answer_worker(&mut self, ticket: Ticket, answer: Result<Answer, Refusal>) {
        let Role::First(first) = &self.role else {
            return;
        };
        let answer = answer.map_err(|refusal| first.leases.explain(refusal));
        let may_overlap = first.overlap && first.coordinator.consistency().may_overlap();
        // A caller that has gone will ask again, and get the same answer.
        match self.waiting.remove(ticket) {
            Some(Caller::Worker(_, caller)) => _ = caller.send(answer),
            Some(Caller::PushPull(_, since, caller)) => {
                let pushed = answer.map_err(ServerError::from).map(|answer| {
                    let outcome = outcome(answer);
                    let applied = match outcome {
                        Outcome::Applied { version, .. } => self.update_times.of(version),
                        Outcome::DroppedLate { .. } | Outcome::RefusedNorm { .. } => Duration::ZERO,
                    };
                    Pushed {
                        outcome,
                        weights: self.shard.weights().clone(),
                        held: since.elapsed(),
                        applied,
                        may_overlap,
                    }
                });
                _ = caller.send(pushed);
            }
            Some(Caller::Pull(_) | Caller::State(_)) | None => {}
        }
    }

    /// Answers the calls that waited for a version.
    pub(super) fn answer_pulls(&mut self, answers: Vec<ShardAnswer>) {
        for answer in answers {
            let (ShardAnswer::Pull(ticket, _) | ShardAnswer::State(ticket, _)) = &answer;
            // A caller that has gone takes no answer.
            match (self.waiting.remove(*ticket), answer) {
                (Some(Caller::Pull(caller)), ShardAnswer::Pull(_, weights)) => {
                    let _ = caller.send(weights.map_err(ServerError::from));
                }
                (Some(Caller::State(caller)), ShardAnswer::State(_, state)) => {
                    let state = state.map(|state| self.server_state(state, None));
                    let _ = caller.send(state.map_err(ServerError::from));
                }
                _ => {}
            }
        }
    }

    /// Gives `event` to the coordinator for a worker. Returns the receiver of its answer.
    pub(super) fn step_for(
        &mut self,
        worker: WorkerId,
        event: impl FnOnce(Ticket) -> Event,
        ctx: &mut Context<Self>,
    ) -> Result<oneshot::Receiver<Result<Answer, Refusal>>, ServerError> {
        let (caller, answer) = oneshot::channel();
        self.step_with(Caller::Worker(worker, caller), worker, event, ctx)?;
        Ok(answer)
    }

    pub(super) fn step_with(
        &mut self,
        caller: Caller,
        worker: WorkerId,
        event: impl FnOnce(Ticket) -> Event,
        ctx: &mut Context<Self>,
    ) -> Result<Ticket, ServerError> {
        self.coordinate()?;
        let ticket = self.waiting.ticket();
        self.waiting.insert(ticket, caller);
        if let Err(error) = self.step(event(ticket), ctx) {
            self.waiting.remove(ticket);
            return Err(error);
        }
        let First {
            coordinator,
            leases,
            ..
        } = self.coordinate()?;
        // Nothing is recorded about workers that are not members, because there may be any number of them
        // (PS-7).
        if coordinator.incarnation(worker).is_some() {
            leases.heard(worker, Instant::now());
        }
        Ok(ticket)
    }

    /// Forgets calls whose callers have gone. Their gradients stay. They may be pushed again.
    fn forget_callers(&mut self, tickets: Vec<Ticket>) {
        let mut pushes = BTreeSet::new();
        for ticket in tickets {
            match self.waiting.remove(ticket) {
                Some(Caller::Pull(_) | Caller::State(_)) => self.shard.cancel(ticket),
                Some(Caller::Worker(..) | Caller::PushPull(..)) => _ = pushes.insert(ticket),
                // The call was answered in the meantime.
                None => {}
            }
        }
        if let (Role::First(first), false) = (&mut self.role, pushes.is_empty()) {
            first.coordinator.forget_callers(&pushes);
        }
    }

    /// Declares members lost that were silent for longer than the worker lease.
    fn check_leases(&mut self, ctx: &mut Context<Self>) {
        let waiting = self.waiting.workers();
        let Role::First(first) = &mut self.role else {
            return;
        };
        let First {
            coordinator,
            leases,
            ..
        } = &mut **first;
        let members = coordinator.members().map(|(worker, _)| worker);
        let lost = leases.lost(members, &waiting, Instant::now());
        let lease = leases.lease();
        for worker in lost {
            tracing::warn!(%worker, ?lease, "lost: silent for longer than its lease");
            if let Err(error) = self.step(Event::Lost { worker }, ctx) {
                tracing::error!(%error, "could not declare a worker lost");
            }
        }
    }
}

pub(super) fn outcome(answer: Answer) -> Outcome {
    match answer {
        Answer::Settled(outcome) => outcome,
        other => unreachable!("the coordinator answers a push with its outcome, not {other:?}"),
    }
}

impl StreamHandler<Vec<Ticket>> for ParameterServer {
    fn handle(&mut self, left: Vec<Ticket>, _: &mut Self::Context) {
        self.forget_callers(left);
    }

    /// This never happens, because the server owns the sending end. The default would stop the actor.
    fn finished(&mut self, _: &mut Self::Context) {}
}

impl Actor for ParameterServer {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        if let Some(leaving) = self.waiting.leaving() {
            ctx.add_stream(Box::pin(leaving));
        }
        if let Role::First(first) = &self.role {
            if let Some(lease) = first.leases.lease() {
                // An interval must not be so long that adding it to the current time overflows.
                let every = (lease / 4).min(Duration::from_secs(3600));
                ctx.run_interval(every, Self::check_leases);
            }
            ctx.run_interval(STALL, Self::look_for_stall);
        }
    }
}
