//! The calls that wait for their answers: their callers, how many there may be, and their end.
//!
//! A waiting call occupies a slot of the actor. The actor has more slots than calls that may wait. So
//! status, heartbeats, joining and leaving never queue behind waiting calls (PS-9). A call whose caller has
//! gone stops waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::time::Instant;

use futures_util::{Stream, stream};
use ps_runtime::actor::caller_gone;
use tokio::sync::{mpsc, oneshot};

use super::messages::{Pushed, ServerError};
use super::protocol::{Answer, MAX_WORKERS, Refusal, Ticket};
use super::saving::ServerState;
use crate::ids::WorkerId;
use crate::weights::Weights;

/// How many pulls may wait, and how many pushes. This is enough for one push of every possible worker.
pub(super) const MAX_WAITING: usize = MAX_WORKERS;

/// How many messages may be fetching their gradients from other processes.
pub(super) const MAX_FETCHING: usize = 1024;

/// Slots for the calls that do not wait.
const RESERVE: usize = 4096;

/// How many calls of a server may be queued or running. A worker's only push may always wait, so up to
/// twice `MAX_WAITING` pushes may wait.
pub(super) const MAX_CALLS: usize = 3 * MAX_WAITING + MAX_FETCHING + RESERVE;

/// The caller that an answer goes to.
#[derive(Debug)]
pub(super) enum Caller {
    Pull(oneshot::Sender<Result<Weights, ServerError>>),
    State(oneshot::Sender<Result<ServerState, ServerError>>),
    Worker(WorkerId, oneshot::Sender<Result<Answer, Refusal>>),
    /// With the time at which the push came.
    PushPull(
        WorkerId,
        Instant,
        oneshot::Sender<Result<Pushed, ServerError>>,
    ),
}

impl Caller {
    fn worker(&self) -> Option<WorkerId> {
        match self {
            Self::Worker(worker, _) | Self::PushPull(worker, ..) => Some(*worker),
            Self::Pull(_) | Self::State(_) => None,
        }
    }

    /// Whether it waits for a version of the weights.
    fn is_pull(&self) -> bool {
        matches!(self, Self::Pull(_) | Self::State(_))
    }
}

/// The calls that wait.
#[derive(Debug)]
pub(super) struct Waiting {
    callers: BTreeMap<Ticket, Caller>,
    num_pulls: usize,
    next_ticket: u64,
    left: mpsc::UnboundedSender<Ticket>,
    /// The receiver of `left`, until the actor takes it.
    leaving: Option<mpsc::UnboundedReceiver<Ticket>>,
}

impl Waiting {
    pub(super) fn new() -> Self {
        // The number of waiting calls bounds this channel.
        let (left, leaving) = mpsc::unbounded_channel();
        Self {
            callers: BTreeMap::new(),
            num_pulls: 0,
            next_ticket: 0,
            left,
            leaving: Some(leaving),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.callers.len()
    }

    pub(super) fn ticket(&mut self) -> Ticket {
        self.next_ticket += 1;
        Ticket(self.next_ticket)
    }

    pub(super) fn insert(&mut self, ticket: Ticket, caller: Caller) {
        self.num_pulls += usize::from(caller.is_pull());
        self.callers.insert(ticket, caller);
    }

    pub(super) fn remove(&mut self, ticket: Ticket) -> Option<Caller> {
        let caller = self.callers.remove(&ticket)?;
        self.num_pulls -= usize::from(caller.is_pull());
        Some(caller)
    }

    /// Returns the workers whose calls wait.
    pub(super) fn workers(&self) -> BTreeSet<WorkerId> {
        self.callers.values().filter_map(Caller::worker).collect()
    }

    /// Checks that one more pull may wait.
    pub(super) fn check_room_for_pull(&self) -> Result<(), ServerError> {
        check_room(self.num_pulls < MAX_WAITING, MAX_WAITING)
    }

    /// Checks that a push of this worker may wait. Its only push may always wait, because others may wait
    /// for it.
    pub(super) fn check_room_for_push(&self, worker: WorkerId) -> Result<(), ServerError> {
        let has_room = self.callers.len() - self.num_pulls < MAX_WAITING;
        let is_only = || {
            let mut workers = self.callers.values().filter_map(Caller::worker);
            workers.all(|waiting| waiting != worker)
        };
        check_room(has_room || is_only(), MAX_WAITING)
    }

    /// Waits for the answer with this ticket, as long as the caller waits. Must be called by the handler
    /// itself.
    pub(super) fn answer<T: 'static>(
        &self,
        ticket: Ticket,
        answer: oneshot::Receiver<T>,
    ) -> impl Future<Output = Result<T, ServerError>> + 'static {
        let (gone, left) = (caller_gone(), self.left.clone());
        async move {
            tokio::select! {
                biased;
                answer = answer => answer.map_err(|_| ServerError::Stopping),
                () = gone => {
                    // This fails only when the actor ends, and then it forgets all calls.
                    let _ = left.send(ticket);
                    Err(ServerError::Stopping)
                }
            }
        }
    }

    /// Returns the tickets of callers that have gone, as a stream of small groups for the actor.
    pub(super) fn leaving(&mut self) -> Option<impl Stream<Item = Vec<Ticket>> + 'static> {
        let leaving = self.leaving.take()?;
        Some(stream::unfold(leaving, |mut leaving| async move {
            let mut left = Vec::new();
            let any = leaving.recv_many(&mut left, 1024).await > 0;
            any.then_some((left, leaving))
        }))
    }
}

pub(super) fn check_room(has_room: bool, limit: usize) -> Result<(), ServerError> {
    match has_room {
        true => Ok(()),
        false => Err(ServerError::TooManyWaiting { limit }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pull() -> Caller {
        Caller::Pull(oneshot::channel().0)
    }

    fn push(worker: u32) -> Caller {
        Caller::Worker(WorkerId(worker), oneshot::channel().0)
    }

    /// PS-9.
    #[test]
    fn pulls_and_repeated_pushes_leave_room_for_the_push_that_others_wait_for() {
        let mut waiting = Waiting::new();
        for _ in 0..MAX_WAITING {
            waiting.check_room_for_pull().unwrap();
            let ticket = waiting.ticket();
            waiting.insert(ticket, pull());
        }
        let refused = waiting.check_room_for_pull().unwrap_err();
        assert!(refused.to_string().contains("65536"), "{refused}");
        let mut tickets = Vec::new();
        for _ in 0..MAX_WAITING {
            waiting.check_room_for_push(WorkerId(7)).unwrap();
            let ticket = waiting.ticket();
            waiting.insert(ticket, push(7));
            tickets.push(ticket);
        }
        assert!(waiting.check_room_for_push(WorkerId(7)).is_err());
        waiting.check_room_for_push(WorkerId(8)).unwrap();
        assert!(waiting.len() < MAX_CALLS);
        // Who has gone makes room.
        waiting.remove(tickets[0]).unwrap();
        waiting.check_room_for_push(WorkerId(7)).unwrap();
        assert!(waiting.remove(tickets[0]).is_none());
        assert_eq!(waiting.workers(), BTreeSet::from([WorkerId(7)]));
    }
}
