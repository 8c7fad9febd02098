//! A call over the connection to an actor of another process, from its frame to its reply.
//!
//! The message is kept until the reply arrives, so that it can be handed back if it was not delivered.
//! The thread that waits for a reply also reads it.

use std::marker::PhantomData;
use std::sync::Arc;

use super::caller::RemoteActor;
use super::reference::on_behalf_of;
use super::table::Decode;
use crate::actor::book::Book;
use crate::actor::call::{Call, Route};
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
pub(super) type Called<M, R> = Result<Arc<Call<There<M, R>>>, CallError>;

/// The route of a call to an actor of another process.
pub(crate) struct There<M, R> {
    remote: Arc<RemoteActor>,
    number: u64,
    decode: Decode<R>,
    message: PhantomData<fn(M)>,
}

/// What a call ends with.
pub(crate) enum Ended<M> {
    /// The reply has arrived. The thread that waits for it reads it.
    Replied(M, Frame),
    Lost(CallError),
}

impl<M, R> There<M, R> {
    /// The route of the call whose frame has this number.
    pub(super) fn new(remote: Arc<RemoteActor>, number: u64, decode: Decode<R>) -> Self {
        Self {
            remote,
            number,
            decode,
            message: PhantomData,
        }
    }
}

impl<M: Send + 'static, R> There<M, R> {
    /// Reads a reply.
    fn read_frame(
        &self,
        message: M,
        frame: Frame,
        deadline: Option<Deadline>,
    ) -> Result<R, CallError> {
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
                        (&mut reason, deadline)
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
}

impl<M: Send + 'static, R> Route for There<M, R> {
    type Message = M;
    type Result = R;
    type Waiting = M;
    type Outcome = Ended<M>;

    fn book(&self) -> &Book {
        self.remote.book()
    }

    fn take_back(&self) -> bool {
        self.remote.cancel(self.number)
    }

    fn undelivered(&self, message: M, reason: NotDelivered) -> CallError {
        self.book().undelivered(message, reason)
    }

    fn read(&self, outcome: Ended<M>, deadline: Option<Deadline>) -> Result<R, CallError> {
        match outcome {
            Ended::Replied(message, frame) => self.read_frame(message, frame, deadline),
            Ended::Lost(error) => Err(error),
        }
    }

    fn loss(&self, outcome: Ended<M>) -> Option<CallError> {
        match outcome {
            // A result.
            Ended::Replied(_, frame) if frame.code == 0 => None,
            outcome => self.read(outcome, None).err(),
        }
    }
}

impl<M: Send + 'static, R> RemoteCall for Call<There<M, R>> {
    fn arrived(&self, frame: Frame) {
        self.settle_waiting(|message| Ended::Replied(message, frame));
    }

    fn lost(&self, reason: Lost) {
        let book = self.route().book();
        self.settle_waiting(|message| {
            Ended::Lost(match reason {
                Lost::NotDelivered(reason) => book.undelivered(message, reason),
                Lost::Unknown(reason) => CallError::Unknown {
                    actor: Arc::clone(book.name()),
                    reason,
                },
            })
        });
    }
}
