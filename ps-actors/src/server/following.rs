//! How the other servers of a group follow the first one. Its side is in `followers`.

use super::actor::{ParameterServer, Role};
use super::applied_parts::Given;
use super::followers::{GroupSecret, MAX_LACKING};
use super::messages::{Decision, Follow, ServerError};
use crate::ids::GradientId;

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
        let is_first = self.secret.is(&follow.secret);
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
        let (shard, parts) = (&mut self.shard, &mut self.parts);
        let mut answers = Vec::new();
        let taken = following.take(follow, |decision| {
            let doing = parts.begin(|| Given::by(&decision));
            answers.extend(decision.apply_to(shard)?);
            parts.done(doing, shard.weights().version());
            Ok(())
        });
        self.answer_pulls(answers);
        taken
    }
}
