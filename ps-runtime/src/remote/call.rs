//! One call to an actor of another process, from its frame to its reply.
//!
//! The message is kept until the reply arrives, so that it can be handed back if it was not delivered.
//! The thread that waits for a reply also reads it.

use std::any::type_name;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll, Waker};

use super::caller::RemoteActor;
use super::reference::on_behalf_of;
use super::table::Decode;
use crate::actor::book::ActorId;
use crate::actor::call::{GiveUp, ReplySlot};
use crate::actor::error::error_chain;
use crate::actor::{CallError, NotDelivered, UnknownOutcome};
use crate::codec;
use crate::deadline::Deadline;
use crate::net::connection::Frame;

/// A call as the connection sees it.
pub(super) trait RemoteCall: Send + Sync {
    fn arrived(&self, frame: Frame);
    fn lost(&self, reason: Lost);
}

/// Why a call gets no reply.
pub(super) enum Lost {
    NotDelivered(NotDelivered),
    Unknown(UnknownOutcome),
}

/// A call that was started, or an error that hands its message back.
pub(super) type Called<M, R> = Result<Arc<Call<M, R>>, CallError>;

/// One call to an actor of another process.
pub(crate) struct Call<M, R> {
    remote: Arc<RemoteActor>,
    number: u64,
    told: bool,
    deadline: Option<Deadline>,
    decode: Decode<R>,
    state: Mutex<CallState<M>>,
}

struct CallState<M> {
    stage: Stage<M>,
    waker: Option<Waker>,
}

enum Stage<M> {
    /// The message is kept, to be handed back if it cannot be delivered.
    Waiting(M),
    /// The reply has arrived. The thread that waits for it reads it.
    Arrived(M, Frame),
    Lost(CallError),
    Over,
}

impl<M: Send + 'static, R> Call<M, R> {
    /// Makes a call that waits for its reply. Its number is that of its frame.
    pub(super) fn new(
        remote: Arc<RemoteActor>,
        number: u64,
        told: bool,
        decode: Decode<R>,
        message: M,
    ) -> Self {
        Self {
            remote,
            number,
            told,
            deadline: None,
            decode,
            state: Mutex::new(CallState {
                stage: Stage::Waiting(message),
                waker: None,
            }),
        }
    }

    /// Sets the caller's time limit.
    pub(super) fn due(mut self, deadline: Option<Deadline>) -> Self {
        self.deadline = deadline;
        self
    }

    fn lock(&self) -> MutexGuard<'_, CallState<M>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the call from waiting to the next stage, and wakes the caller.
    fn conclude(&self, next: impl FnOnce(M) -> Stage<M>) {
        let mut state = self.lock();
        let stage = mem::replace(&mut state.stage, Stage::Over);
        let Stage::Waiting(message) = stage else {
            // The caller has given up.
            state.stage = stage;
            return;
        };
        state.stage = next(message);
        let waker = state.waker.take();
        // The slot is free before the caller can see the reply and make the next call.
        self.remote.book().release_slot();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Reads a reply.
    fn read(&self, message: M, frame: Frame) -> Result<R, CallError> {
        let Frame {
            code, header, bulk, ..
        } = frame;
        let actor = || Arc::clone(self.remote.name());
        let unreadable = |error: &codec::CodecError| CallError::Unknown {
            actor: actor(),
            reason: UnknownOutcome::BadReply {
                reason: error_chain(error),
            },
        };
        on_behalf_of(self.remote.process(), || match code {
            0 => (self.decode)(&header, bulk).map_err(|error| unreadable(&error)),
            _ => Err(match codec::decode::<CallError>(&header, bulk) {
                Ok(CallError::NotDelivered { mut reason, .. }) => {
                    if let (NotDelivered::TimedOut { after }, Some(deadline)) =
                        (&mut reason, &self.deadline)
                    {
                        // The other side knows only the time that was left when the call was written.
                        *after = deadline.after();
                    }
                    self.remote.book().undelivered(message, reason)
                }
                Ok(other) => other,
                Err(error) => unreadable(&error),
            }),
        })
    }

    /// Ends a call whose caller gives up. Returns the message if nothing of it was written.
    fn withdraw(&self) -> Option<Result<M, ()>> {
        let mut state = self.lock();
        let Stage::Waiting(_) = &state.stage else {
            return None;
        };
        let Stage::Waiting(message) = mem::replace(&mut state.stage, Stage::Over) else {
            unreachable!("the stage was checked under the same lock");
        };
        let waker = state.waker.take();
        drop(state);
        drop(waker);
        let never_left = self.remote.cancel(self.number);
        self.remote.book().release_slot();
        Some(if never_left { Ok(message) } else { Err(()) })
    }
}

impl<M: Send + 'static, R> RemoteCall for Call<M, R> {
    fn arrived(&self, frame: Frame) {
        if !self.told {
            return self.conclude(|message| Stage::Arrived(message, frame));
        }
        let mut failed = None;
        self.conclude(|message| {
            if frame.code != 0 {
                failed = Some(self.read(message, frame));
            }
            Stage::Over
        });
        if let Some(Err(error)) = failed {
            self.remote
                .book()
                .count_dead_letter(type_name::<M>(), &error);
        }
    }

    fn lost(&self, reason: Lost) {
        let actor = Arc::clone(self.remote.name());
        let mut told = None;
        self.conclude(|message| {
            let error = match reason {
                Lost::NotDelivered(reason) => self.remote.book().undelivered(message, reason),
                Lost::Unknown(reason) => CallError::Unknown { actor, reason },
            };
            if self.told {
                told = Some(error);
                return Stage::Over;
            }
            Stage::Lost(error)
        });
        if let Some(error) = told {
            self.remote
                .book()
                .count_dead_letter(type_name::<M>(), &error);
        }
    }
}

impl<M: Send + 'static, R: Send> ReplySlot<R> for Call<M, R> {
    fn target(&self) -> ActorId {
        self.remote.book().id()
    }

    fn poll(&self, cx: &mut TaskContext<'_>) -> Poll<Result<R, CallError>> {
        let mut state = self.lock();
        match mem::replace(&mut state.stage, Stage::Over) {
            Stage::Arrived(message, frame) => {
                drop(state);
                Poll::Ready(self.read(message, frame))
            }
            Stage::Lost(error) => Poll::Ready(Err(error)),
            stage => {
                state.stage = stage;
                match &mut state.waker {
                    Some(waker) => waker.clone_from(cx.waker()),
                    none => *none = Some(cx.waker().clone()),
                }
                Poll::Pending
            }
        }
    }

    fn give_up(&self, why: GiveUp) -> Result<R, CallError> {
        let actor = Arc::clone(self.remote.name());
        match self.withdraw() {
            Some(Ok(message)) => {
                let reason = match why {
                    GiveUp::TimedOut(after) => NotDelivered::TimedOut { after },
                    GiveUp::WouldDeadlock => NotDelivered::WouldDeadlock,
                };
                return Err(self.remote.book().undelivered(message, reason));
            }
            Some(Err(())) => {}
            None => {
                let mut state = self.lock();
                match mem::replace(&mut state.stage, Stage::Over) {
                    Stage::Arrived(message, frame) => {
                        drop(state);
                        return self.read(message, frame);
                    }
                    Stage::Lost(error) => return Err(error),
                    Stage::Waiting(_) | Stage::Over => {}
                }
            }
        }
        let reason = match why {
            GiveUp::TimedOut(after) => UnknownOutcome::TimedOut { after },
            GiveUp::WouldDeadlock => UnknownOutcome::WouldDeadlock,
        };
        Err(CallError::Unknown { actor, reason })
    }

    fn abandon(&self) {
        if self.withdraw().is_none() {
            let unread = mem::replace(&mut self.lock().stage, Stage::Over);
            drop(unread);
        }
    }
}
