//! The server's side of each message.

use std::time::{Duration, Instant};

use actix::{ActorFutureExt, Handler, MessageResult, Response, ResponseActFuture, WrapFuture};
use futures_util::future::try_join_all;
use ps_runtime::actor::error_chain;
use ps_runtime::remote::{Messages, Remote};
use tokio::sync::oneshot::{self, error::TryRecvError};

use super::actor::{First, ParameterServer, Role, outcome};
use super::applied_parts::{AppliedParts, GetAppliedParts, Given};
use super::config::{check_consistency, check_learning_rate};
use super::ledger::Outcome;
use super::messages::{
    ApplyGradients, ApplyKept, Follow, GetStatus, GetWeights, Heartbeat, Join, Leave, Pull, Push,
    PushPull, Pushed, ReportLost, ServerError, ServerStatus, SetConsistency, SetLearningRate,
    SetPaused, Stage,
};
use super::protocol::{Answer, Event, Membership, Ticket};
use super::saving::{ForgetSavedStates, GetSavedState, TakeCheckpoint};
use super::waiting::{Caller, MAX_FETCHING, check_room};
use crate::ids::GradientId;
use crate::schedule::Record;
use crate::update_log::{LogUpdates, UpdateLog};
use crate::weights::Weights;

/// Answers at once if the answer is already known. Otherwise answers later, if the caller still waits.
pub(super) fn now_or_later<T: 'static, R: 'static>(
    server: &ParameterServer,
    ticket: Ticket,
    mut answer: oneshot::Receiver<T>,
    result: impl Fn(T) -> Result<R, ServerError> + 'static,
) -> Response<Result<R, ServerError>> {
    match answer.try_recv() {
        Ok(answer) => Response::reply(result(answer)),
        Err(TryRecvError::Closed) => Response::reply(Err(ServerError::Stopping)),
        Err(TryRecvError::Empty) => {
            let answer = server.waiting.answer(ticket, answer);
            Response::fut(async move { answer.await.and_then(result) })
        }
    }
}

impl Remote for ParameterServer {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<GetWeights>()
            .add::<Pull>()
            .add::<ApplyGradients>()
            .add::<ApplyKept>()
            .add::<Join>()
            .add::<Leave>()
            .add::<ReportLost>()
            .add::<Heartbeat>()
            .add::<Stage>()
            .add::<Push>()
            .add::<PushPull>()
            .add::<SetConsistency>()
            .add::<SetLearningRate>()
            .add::<GetStatus>()
            .add::<TakeCheckpoint>()
            .add::<GetSavedState>()
            .add::<ForgetSavedStates>()
            .add::<Follow>()
            .add::<SetPaused>()
            .add::<GetAppliedParts>();
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

    fn handle(&mut self, message: Pull, _: &mut Self::Context) -> Self::Result {
        let Pull { wanted, precision } = message;
        let travelling = move |weights: Weights| weights.travelling_as(precision);
        let ticket = self.waiting.ticket();
        if let Some(answer) = self.shard.pull(ticket, wanted) {
            return Response::reply(answer.map(travelling).map_err(ServerError::from));
        }
        if let Err(full) = self.waiting.check_room_for_pull() {
            self.shard.cancel(ticket);
            return Response::reply(Err(full));
        }
        let (caller, weights) = oneshot::channel();
        self.waiting.insert(ticket, Caller::Pull(caller));
        now_or_later(self, ticket, weights, move |weights| {
            weights.map(travelling)
        })
    }
}

impl Handler<ApplyGradients> for ParameterServer {
    type Result = Result<Weights, ServerError>;

    fn handle(&mut self, message: ApplyGradients, ctx: &mut Self::Context) -> Self::Result {
        self.apply(&message, ctx)
    }
}

impl Handler<ApplyKept> for ParameterServer {
    type Result = ResponseActFuture<Self, Result<Weights, ServerError>>;

    fn handle(&mut self, message: ApplyKept, _: &mut Self::Context) -> Self::Result {
        if let Err(full) = check_room(self.num_fetching < MAX_FETCHING, MAX_FETCHING) {
            return Box::pin(actix::fut::ready(Err(full)));
        }
        self.num_fetching += 1;
        let ApplyKept {
            gradients,
            reduction,
        } = message;
        let fetched = try_join_all(gradients.into_iter().map(|kept| async move {
            let reason = |error: &dyn std::error::Error| error_chain(error);
            match kept.take().await {
                Ok(Ok(gradients)) => Ok(gradients),
                Ok(Err(error)) => Err(reason(&error)),
                Err(error) => Err(reason(&error)),
            }
        }));
        let applied = fetched.into_actor(self).map(move |fetched, server, ctx| {
            server.num_fetching -= 1;
            let gradients = fetched.map_err(|reason| ServerError::NotFetched { reason })?;
            let message = ApplyGradients {
                gradients,
                reduction,
            };
            server.apply(&message, ctx)
        });
        Box::pin(applied)
    }
}

impl Handler<Join> for ParameterServer {
    type Result = Result<Membership, ServerError>;

    fn handle(&mut self, message: Join, ctx: &mut Self::Context) -> Self::Result {
        let Join { worker, request } = message;
        let event = |ticket| Event::Join {
            ticket,
            worker,
            request,
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
    type Result = Result<Option<Duration>, ServerError>;

    fn handle(&mut self, message: Heartbeat, _: &mut Self::Context) -> Self::Result {
        let Heartbeat {
            worker,
            incarnation,
        } = message;
        let First {
            coordinator,
            leases,
            ..
        } = self.coordinate()?;
        let is_member = coordinator.check_member(worker, incarnation);
        is_member.map_err(|refusal| leases.explain(refusal))?;
        leases.heard(worker, Instant::now());
        Ok(leases.lease())
    }
}

impl Handler<Stage> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: Stage, _: &mut Self::Context) -> Self::Result {
        let Stage { id, gradient } = message;
        let doing = self.parts.begin(|| Some(Given::Part(id)));
        let answers = self.shard.stage(id, &gradient)?;
        self.parts.done(doing, self.shard.weights().version());
        self.answer_pulls(answers);
        Ok(())
    }
}

impl Handler<Push> for ParameterServer {
    type Result = Response<Result<Outcome, ServerError>>;

    fn handle(&mut self, Push(gradients): Push, ctx: &mut Self::Context) -> Self::Result {
        let (caller, answer) = oneshot::channel();
        let caller = Caller::Worker(gradients.id.worker, caller);
        match self.push(gradients, caller, ctx) {
            Err(error) => Response::reply(Err(error)),
            Ok(ticket) => now_or_later(self, ticket, answer, |answer| Ok(outcome(answer?))),
        }
    }
}

impl Handler<PushPull> for ParameterServer {
    type Result = Response<Result<Pushed, ServerError>>;

    fn handle(&mut self, message: PushPull, ctx: &mut Self::Context) -> Self::Result {
        let PushPull {
            gradients,
            precision,
        } = message;
        let (caller, answer) = oneshot::channel();
        let caller = Caller::PushPull(gradients.id.worker, Instant::now(), caller);
        match self.push(gradients, caller, ctx) {
            Err(error) => Response::reply(Err(error)),
            Ok(ticket) => now_or_later(self, ticket, answer, move |pushed| {
                let mut pushed = pushed?;
                pushed.weights = pushed.weights.travelling_as(precision);
                Ok(pushed)
            }),
        }
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

impl Handler<SetPaused> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, message: SetPaused, ctx: &mut Self::Context) -> Self::Result {
        self.step(Event::SetPaused(message.0), ctx)
    }
}

/// Only the first server has a schedule. It cannot be asked from another process.
impl Handler<Record> for ParameterServer {
    type Result = ();

    fn handle(&mut self, Record(writer): Record, _: &mut Self::Context) {
        if let Role::First(first) = &mut self.role {
            first.schedule = Some(writer);
        }
    }
}

/// Only the first server has a log. It cannot be asked from another process.
impl Handler<LogUpdates> for ParameterServer {
    type Result = Result<(), ServerError>;

    fn handle(&mut self, LogUpdates(log): LogUpdates, _: &mut Self::Context) -> Self::Result {
        let version = self.shard.weights().version();
        let first = self.coordinate()?;
        log.begin(version);
        first.update_log = Some(log);
        Ok(())
    }
}

impl Handler<GetStatus> for ParameterServer {
    type Result = MessageResult<GetStatus>;

    fn handle(&mut self, _: GetStatus, _: &mut Self::Context) -> Self::Result {
        let learning_rate = match self.role {
            Role::First(_) => self.shard.next_learning_rate(),
            Role::Follower(_) => self.shard.learning_rate(),
        };
        let (coordinator, log, lost) = match &self.role {
            Role::First(first) => (
                Some(first.coordinator.status()),
                first.update_log.as_ref().map(UpdateLog::status),
                first.lost_server(),
            ),
            Role::Follower(_) => (None, None, None),
        };
        MessageResult(ServerStatus {
            version: self.shard.weights().version(),
            range: self.shard.range(),
            num_staged: self.shard.num_staged(),
            num_waiting: self.waiting.len(),
            learning_rate,
            coordinator,
            log,
            lost,
        })
    }
}

impl Handler<GetAppliedParts> for ParameterServer {
    type Result = MessageResult<GetAppliedParts>;

    fn handle(
        &mut self,
        GetAppliedParts { from }: GetAppliedParts,
        _: &mut Self::Context,
    ) -> Self::Result {
        MessageResult(match self.role {
            Role::First(_) => AppliedParts::default(),
            Role::Follower(_) => self.parts.from(from),
        })
    }
}

impl Handler<Follow> for ParameterServer {
    type Result = Result<Vec<GradientId>, ServerError>;

    fn handle(&mut self, follow: Follow, _: &mut Self::Context) -> Self::Result {
        self.take(follow)
    }
}
