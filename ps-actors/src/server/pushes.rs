//! How gradients come in: a worker's push, and a driver's gradients that make an update at once.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use actix::Context;
use tokio::sync::oneshot;

use super::actor::ParameterServer;
use super::ledger::Outcome;
use super::messages::{ApplyGradients, Decision, ServerError};
use super::protocol::{Answer, Event, Stamp, Ticket};
use super::shard::ShardError;
use super::waiting::Caller;
use crate::ids::{GradientId, Incarnation, WorkerId};
use crate::weights::{GradientUpdate, Weights};

impl ParameterServer {
    /// Takes a push. Its answer goes to `caller`, now or later.
    pub(super) fn push(
        &mut self,
        gradients: GradientUpdate,
        caller: Caller,
        ctx: &mut Context<Self>,
    ) -> Result<Ticket, ServerError> {
        self.check_followers()?;
        self.check_range(&gradients)?;
        let worker = gradients.id.worker;
        self.waiting.check_room_for_push(worker)?;
        let stamp = stamp(&gradients);
        self.stage_own(&gradients)?;
        let then_start = matches!(caller, Caller::PushPull(..));
        let event = |ticket| Event::Push {
            ticket,
            stamp,
            then_start,
        };
        self.step_with(caller, worker, event, ctx)
    }

    /// Refuses a gradient that is not over exactly the weights of the model.
    fn check_range(&self, gradients: &GradientUpdate) -> Result<(), ShardError> {
        let expected = 0..self.shard.weights().layout().num_weights();
        let (id, got) = (gradients.id, gradients.gradient.range());
        match got == expected {
            true => self.shard.check_buffers(id, &gradients.gradient),
            false => Err(ShardError::WrongRange { id, got, expected }),
        }
    }

    /// Stages a gradient here. If its worker is not a member, nothing is staged, and the coordinator
    /// refuses the push.
    fn stage_own(&mut self, gradients: &GradientUpdate) -> Result<(), ServerError> {
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

    /// Whether a push with this id was accepted and waits. If not, nobody has checked what is staged under
    /// the id, and the gradient that is checked now replaces it (PS-6).
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
            // All gradients are checked before any is staged.
            self.check_range(gradients)?;
        }
        for GradientUpdate { id, gradient, .. } in &message.gradients {
            // A pending gradient was checked when it was pushed, and this call will be refused.
            if !self.is_pending(*id)? {
                self.decide(Decision::Discard(*id))?;
                self.decide(Decision::Stage(*id, gradient.clone()))?;
            }
        }
        let ticket = self.waiting.ticket();
        let (caller, mut answer) = oneshot::channel();
        let worker = message
            .gradients
            .first()
            .map_or(WorkerId(0), |g| g.id.worker);
        self.waiting.insert(ticket, Caller::Worker(worker, caller));
        let stamps = message.gradients.iter().map(stamp).collect();
        self.step(
            Event::Apply {
                ticket,
                stamps,
                reduction: message.reduction,
                newest: newest_incarnation(),
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
}

/// The latest incarnation that a worker may have that never joined. Such a worker was made at most an hour
/// ahead of this machine's clock.
fn newest_incarnation() -> Incarnation {
    const TOLERANCE: Duration = Duration::from_secs(3600);
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let micros = (now.unwrap_or_default() + TOLERANCE).as_micros();
    Incarnation(u64::try_from(micros).unwrap_or(u64::MAX))
}

fn stamp(gradients: &GradientUpdate) -> Stamp {
    let GradientUpdate {
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
