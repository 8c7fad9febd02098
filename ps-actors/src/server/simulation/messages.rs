//! What the processes of a simulated run say to each other, and what they do in one turn.

use std::fmt;

use super::dice::Dice;
use super::disk::Record;
use super::states::State;
use crate::ids::{Clock, GradientId, Incarnation, JoinRequest, Version, WorkerId};
use crate::server::ledger::Outcome;
use crate::server::messages::{Follow, ServerError};
use crate::server::protocol::{Membership, Update};
use crate::server::shard::PullVersion;
use crate::server::{GroupError, ServerState};
use crate::weights::{Gradient, GradientUpdate, Weights};

/// Virtual time, in microseconds since the start of the run.
pub(super) type Micros = u64;

/// A process. A group of servers that is started again has another generation, so that nothing that was sent
/// to an earlier one reaches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Address {
    Driver,
    Worker(u32),
    Server { generation: u32, index: u32 },
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Driver => f.write_str("driver"),
            Self::Worker(worker) => write!(f, "worker {worker}"),
            Self::Server { generation, index } => write!(f, "server {generation}.{index}"),
        }
    }
}

/// Names one try of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct CallId {
    pub(super) caller: Address,
    pub(super) number: u64,
}

#[derive(Clone, Debug)]
pub(super) enum Request {
    Join(WorkerId, JoinRequest),
    Leave(WorkerId, Incarnation),
    Heartbeat(WorkerId, Incarnation),
    ReportLost(WorkerId),
    Stage(GradientId, Gradient),
    PushPull(GradientUpdate),
    Pull(PullVersion),
    TakeCheckpoint,
    GetSavedState(Version),
    Follow(Follow),
}

impl Request {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Join(..) => "join",
            Self::Leave(..) => "leave",
            Self::Heartbeat(..) => "heartbeat",
            Self::ReportLost(_) => "report lost",
            Self::Stage(..) => "stage",
            Self::PushPull(_) => "push",
            Self::Pull(_) => "pull",
            Self::TakeCheckpoint => "take checkpoint",
            Self::GetSavedState(_) => "get saved state",
            Self::Follow(_) => "follow",
        }
    }
}

impl Request {
    /// Describes it for a trace.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::Join(_, request) => format!("join by request {:#x}", request.0),
            Self::Stage(id, _) => format!("stage {id}"),
            Self::PushPull(gradients) => format!("push {}", gradients.id),
            Self::Pull(wanted) => format!("pull {wanted:?}"),
            Self::Follow(follow) => {
                let (number, len) = (follow.number, follow.decisions.len());
                format!("follow {len} decisions as number {number}")
            }
            other => other.name().to_owned(),
        }
    }
}

/// Describes an answer for a trace.
pub(super) fn describe(reply: &Reply) -> String {
    match reply {
        Ok(Response::Joined(membership)) => {
            format!(
                "joined in {} at {}",
                membership.incarnation, membership.next_clock
            )
        }
        Ok(Response::Pushed(outcome, _)) => format!("{outcome:?}"),
        Ok(Response::Pulled(weights)) => format!("weights of {}", weights.version()),
        Ok(Response::State(state)) => format!("state of {}", state.weights.version()),
        Ok(Response::Followed(lacking)) => format!("followed, lacks {}", lacking.len()),
        Ok(Response::Done) => "done".to_owned(),
        Err(error) => error.to_string(),
    }
}

#[derive(Clone, Debug)]
pub(super) enum Response {
    Joined(Membership),
    Pushed(Outcome, Weights),
    Pulled(Weights),
    State(Box<ServerState>),
    Followed(Vec<GradientId>),
    Done,
}

pub(super) type Reply = Result<Response, ServerError>;

/// What reaches a process.
#[derive(Clone, Debug)]
pub(super) enum Input {
    /// Another process calls this one.
    Called(CallId, Request),
    /// The caller no longer waits for the answer.
    CallerGone(CallId),
    /// The answer to a call of this process.
    Answered(CallId, Reply),
    /// The connection was lost. The call may have been handled.
    Lost(CallId),
    /// The called process has ended.
    Ended(CallId),
    Timer(Timer),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Timer {
    /// A worker has computed its gradient, in the phase with this number.
    Computed(u64),
    /// A worker pushes again what the servers could not take, in the phase with this number.
    PushAgain(u64),
    Beat,
    CheckLeases,
    /// The first server sends a follower its decisions again.
    TellAgain(usize),
    /// The driver takes a checkpoint.
    Checkpoint,
}

/// What a process does, in order. A crash may come between any two actions.
#[derive(Clone, Debug)]
pub(super) enum Action {
    Call(Address, CallId, Request),
    Reply(CallId, Reply),
    /// Writes to the log.
    Append(Record),
    /// Waits until the log is on the disk.
    Sync,
    /// Begins a new segment of the log.
    Rotate(Version),
    Timer(Micros, Timer),
    /// A worker begins to compute, for so long.
    Compute(Micros, Timer),
}

/// What an observer who sees everything learns. No process acts on it.
#[derive(Clone, Debug)]
pub(super) enum Note {
    Reached(State),
    /// The first server has decided an update.
    Decided(Update),
    /// A worker has become a member, at this clock.
    Joined(WorkerId, Incarnation, Clock),
    /// A membership is over.
    NoMember(WorkerId),
    /// A worker begins this step.
    Begins(WorkerId, Incarnation, Clock),
    /// A worker got the answer to its push.
    Acknowledged(GradientId, Outcome),
    /// A worker has all weights of one version, from the servers of this generation.
    Pulled(u32, Weights),
}

/// What a process may use while it handles one input.
pub(super) struct Turn<'a> {
    pub(super) now: Micros,
    pub(super) dice: &'a mut Dice,
    pub(super) actions: Vec<Action>,
    pub(super) notes: Vec<Note>,
}

impl<'a> Turn<'a> {
    pub(super) fn new(now: Micros, dice: &'a mut Dice) -> Self {
        Self {
            now,
            dice,
            actions: Vec::new(),
            notes: Vec::new(),
        }
    }

    pub(super) fn reached(&mut self, state: State) {
        self.notes.push(Note::Reached(state));
    }

    pub(super) fn reply(&mut self, call: CallId, reply: Reply) {
        self.actions.push(Action::Reply(call, reply));
    }

    pub(super) fn timer(&mut self, after: Micros, timer: Timer) {
        self.actions.push(Action::Timer(after, timer));
    }
}

/// Numbers the calls of one process.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    caller: Address,
    next: u64,
}

impl Calls {
    /// `num_starts` counts how often the process was started before.
    pub(super) fn new(caller: Address, num_starts: u32) -> Self {
        let next = u64::from(num_starts) << 40;
        Self { caller, next }
    }

    pub(super) fn next(&mut self) -> CallId {
        self.next += 1;
        CallId {
            caller: self.caller,
            number: self.next,
        }
    }

    pub(super) fn call(&mut self, to: Address, request: Request, turn: &mut Turn<'_>) -> CallId {
        let id = self.next();
        turn.actions.push(Action::Call(to, id, request));
        id
    }
}

/// Makes the error that a group's client would get.
pub(super) fn group_error(index: usize, source: ServerError) -> GroupError {
    GroupError::Server { index, source }
}
