//! Another server of a simulated group: a shard that follows.

use std::collections::BTreeMap;
use std::ops::Range;

use super::first::shard;
use super::messages::{CallId, Input, Reply, Request, Response, Turn};
use super::settings::{Mistake, Settings};
use super::states::State;
use crate::checkpoint::Start;
use crate::server::ServerState;
use crate::server::followers::{GroupSecret, MAX_LACKING};
use crate::server::following::Following;
use crate::server::messages::{Decision, Follow, ServerError};
use crate::server::protocol::Ticket;
use crate::server::shard::{Shard, ShardAnswer, ShardState};

#[cfg_attr(test, derive(Clone))]
#[derive(Debug)]
pub(super) struct FollowingServer {
    shard: Shard,
    following: Following,
    waiting: BTreeMap<Ticket, CallId>,
    next_ticket: u64,
    mistake: Option<Mistake>,
}

impl FollowingServer {
    pub(super) fn new(settings: &Settings, start: Start<'_>, range: Range<usize>) -> Self {
        let (shard, _) = shard(settings, start, range, false);
        Self {
            shard,
            following: Following::new(GroupSecret::made_of(settings.seed)),
            waiting: BTreeMap::new(),
            next_ticket: 0,
            mistake: settings.mistake,
        }
    }

    pub(super) fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Describes everything that decides what the server does next.
    #[cfg(test)]
    pub(super) fn description(&self) -> String {
        let (shard, waiting) = (self.shard.description(), &self.waiting);
        format!("{shard} {:?} {waiting:?}", self.following)
    }

    pub(super) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn handle(&mut self, input: Input, turn: &mut Turn<'_>) {
        match input {
            Input::Called(call, request) => self.called(call, request, turn),
            Input::CallerGone(call) => {
                let mut found = self.waiting.iter().filter(|(_, waits)| **waits == call);
                if let Some((&ticket, _)) = found.next() {
                    self.waiting.remove(&ticket);
                    self.shard.cancel(ticket);
                }
            }
            Input::Answered(..) | Input::Lost(_) | Input::Ended(_) | Input::Timer(_) => {}
        }
    }

    fn called(&mut self, call: CallId, request: Request, turn: &mut Turn<'_>) {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        match request {
            Request::Stage(id, gradient) => match self.shard.stage(id, &gradient) {
                Ok(answers) => {
                    self.answer(answers, turn);
                    turn.reply(call, Ok(Response::Done));
                }
                Err(error) => turn.reply(call, Err(error.into())),
            },
            Request::Pull(wanted) => match self.shard.pull(ticket, wanted) {
                Some(answer) => {
                    turn.reply(
                        call,
                        answer.map(Response::Pulled).map_err(ServerError::from),
                    );
                }
                None => _ = self.waiting.insert(ticket, call),
            },
            Request::GetSavedState(version) if self.mistake == Some(Mistake::TornCheckpoint) => {
                let mut state = self.shard.state();
                state.weights = state.weights.at(version);
                turn.reply(call, Ok(self.state(state)));
            }
            Request::GetSavedState(version) => match self.shard.saved_state(ticket, version) {
                Some(answer) => {
                    let reply = answer.map(|state| self.state(state));
                    turn.reply(call, reply.map_err(ServerError::from));
                }
                None => _ = self.waiting.insert(ticket, call),
            },
            Request::Follow(follow) => {
                let reply = self.follow(follow, turn);
                turn.reply(call, reply);
            }
            _ => turn.reply(call, Err(ServerError::NotFirst)),
        }
    }

    fn follow(&mut self, follow: Follow, turn: &mut Turn<'_>) -> Reply {
        let (shard, mut answers) = (&mut self.shard, Vec::new());
        let mut is_new = follow.decisions.is_empty();
        let mut follow_one = |decision: Decision| {
            is_new = true;
            answers.extend(decision.apply_to(shard)?);
            Ok(())
        };
        let taken = match self.mistake {
            Some(Mistake::FollowsTwice) => follow.decisions.into_iter().try_for_each(follow_one),
            _ => self.following.take(follow, &mut follow_one),
        };
        if !is_new {
            turn.reached(State::FollowTakenAgain);
        }
        self.answer(answers, turn);
        taken?;
        Ok(Response::Followed(self.shard.lacking(MAX_LACKING)))
    }

    fn state(&self, state: ShardState) -> Response {
        Response::State(Box::new(ServerState {
            weights: state.weights,
            rule: state.rule,
            learning_rate: self.shard.learning_rate(),
            coordinator: None,
        }))
    }

    fn answer(&mut self, answers: Vec<ShardAnswer>, turn: &mut Turn<'_>) {
        for answer in answers {
            let (ticket, reply) = match answer {
                ShardAnswer::Pull(ticket, weights) => (ticket, weights.map(Response::Pulled)),
                ShardAnswer::State(ticket, state) => (ticket, state.map(|s| self.state(s))),
            };
            if let Some(call) = self.waiting.remove(&ticket) {
                turn.reply(call, reply.map_err(ServerError::from));
            }
        }
    }
}
