//! An actor of this process that other processes call.
//!
//! Messages are read on the network's thread and go into the actor's queue like any other. The thread
//! that completes the call, which is the actor's own, also writes the result. No other thread is woken
//! for it.

use std::any::type_name;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context as TaskContext, Poll, Wake, Waker};

use actix::{Actor, Context, Handler, Message};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::Remote;
use super::process::Process;
use super::reference::on_behalf_of;
use super::table::Table;
use crate::actor::actor_ref::Handle;
use crate::actor::call::ReplySlot;
use crate::actor::error::error_chain;
use crate::actor::mailbox::Mailbox;
use crate::actor::{CallError, NotDelivered, Undelivered, UnknownOutcome};
use crate::codec::{self, Encoded};
use crate::net::admission::Admission;
use crate::net::connection::{Ended, Frame, Peer};
use crate::net::frame::{self, Kind, OutFrame};
use crate::net::outbox::Outbox;

/// An actor of any type that other processes can call.
pub(crate) trait Callee: Send + Sync {
    fn name(&self) -> &Arc<str>;
    fn schema(&self) -> u64;
    fn type_name(&self) -> &'static str;
    fn call(&self, code: u32, incoming: Incoming);
    fn stop(&self);
    fn kill(&self);
    fn ended(&self) -> watch::Receiver<bool>;
    fn admission(&self) -> &Arc<Admission>;
    /// The `Arc<Handle<A>>` without its type, while there is one.
    fn handle(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>>;
}

/// Whether an exported actor is kept alive.
pub(crate) enum Keep<A: Actor> {
    Strong(Arc<Handle<A>>),
    Weak(Weak<Handle<A>>),
}

/// A [`Callee`] that may keep its actor alive.
pub(crate) struct Exported<A: Actor> {
    pub(crate) handle: Keep<A>,
    pub(crate) mailbox: Arc<Mailbox<A>>,
    pub(crate) table: Arc<Table<A>>,
    pub(crate) admission: Arc<Admission>,
}

impl<A: Remote> Callee for Exported<A> {
    fn name(&self) -> &Arc<str> {
        self.mailbox.name()
    }

    fn schema(&self) -> u64 {
        self.table.schema()
    }

    fn type_name(&self) -> &'static str {
        type_name::<A>()
    }

    fn call(&self, code: u32, incoming: Incoming) {
        self.table.serve(&self.mailbox, code, incoming);
    }

    fn stop(&self) {
        self.mailbox.close();
    }

    fn kill(&self) {
        self.mailbox.kill();
    }

    fn ended(&self) -> watch::Receiver<bool> {
        self.mailbox.ended()
    }

    fn admission(&self) -> &Arc<Admission> {
        &self.admission
    }

    fn handle(&self) -> Option<Arc<dyn std::any::Any + Send + Sync>> {
        match &self.handle {
            Keep::Strong(handle) => Some(Arc::clone(handle) as _),
            Keep::Weak(handle) => handle.upgrade().map(|handle| handle as _),
        }
    }
}

/// A call that has arrived.
pub(crate) struct Incoming {
    frame: Frame,
    connection: Arc<Calls>,
}

/// What is done with a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    Send,
    /// It is dropped, because the message was sent with `tell`.
    Forget,
    /// It is kept here, and the caller gets a ticket.
    Keep,
}

impl Incoming {
    pub(crate) fn is_told(&self) -> bool {
        self.frame.kind == Kind::Tell
    }

    /// Tells the caller that its message was refused.
    pub(crate) fn refuse(self, reason: String) {
        let actor = Arc::clone(&self.connection.actor_name);
        let error = CallError::NotDelivered {
            actor,
            reason: NotDelivered::Refused { reason },
            message: Undelivered::elsewhere("a message"),
        };
        self.connection.reply_error(self.frame.call, &error);
    }
}

/// Reads a message of type `M` and hands it to the actor.
pub(crate) fn serve<A, M>(mailbox: &Arc<Mailbox<A>>, incoming: Incoming, then: Then)
where
    A: Actor<Context = Context<A>> + Handler<M>,
    M: Message + Serialize + DeserializeOwned + Send + 'static,
    M::Result: Serialize + DeserializeOwned + Send,
{
    let Incoming { frame, connection } = incoming;
    let Frame {
        call: number,
        header,
        bulk,
        admitted,
        deadline,
        ..
    } = frame;
    let message = on_behalf_of(&connection.process, || codec::decode::<M>(&header, bulk));
    let message = match message {
        Ok(message) => message,
        Err(error) => {
            let error = CallError::NotDelivered {
                actor: Arc::clone(mailbox.name()),
                reason: NotDelivered::Refused {
                    reason: error_chain(&error),
                },
                message: Undelivered::elsewhere(type_name::<M>()),
            };
            return connection.reply_error(number, &error);
        }
    };
    // A message sent with `tell` is answered, too, but without its result: the sender counts its loss.
    let admitted = admitted.map(|admitted| Box::new(admitted) as _);
    match mailbox.push_with(message, admitted, deadline) {
        Ok(call) => {
            connection.last_taken.fetch_max(number, Ordering::Relaxed);
            let reply = Arc::new(Answer {
                slot: call,
                then,
                number,
                connection: Arc::clone(&connection),
                is_over: AtomicBool::new(false),
            });
            connection.lock().insert(number, Arc::clone(&reply) as _);
            reply.poll();
        }
        Err(error) => connection.reply_error(number, &error),
    }
}

/// The calls under way on one connection.
pub(crate) struct Calls {
    process: Arc<Process>,
    outbox: Arc<Outbox>,
    actor_name: Arc<str>,
    admission: Arc<Admission>,
    /// How many numbers the caller accepts in one message.
    max_numbers: u64,
    running: Mutex<HashMap<u64, Arc<dyn Cancel>>>,
    /// The number of the last call that was queued. The numbers increase.
    last_taken: AtomicU64,
}

trait Cancel: Send + Sync {
    fn cancel(&self);
}

impl Calls {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<dyn Cancel>>> {
        // Each operation on the map is whole.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reply(&self, call: u64, code: u32, contents: Encoded) {
        // If the connection is lost, the caller's own process tells the caller.
        let _ = self
            .outbox
            .send(OutFrame::new(Kind::Reply, call, code, contents).counted(&self.admission));
    }

    fn reply_error(&self, call: u64, error: &CallError) {
        let encoded = codec::encode(error).or_else(|_| {
            // The text of a panic can be longer than the limit of a header.
            let short = CallError::Unknown {
                actor: Arc::clone(&self.actor_name),
                reason: UnknownOutcome::BadReply {
                    reason: "the call failed with an error too long to send".to_owned(),
                },
            };
            codec::encode(&short)
        });
        self.reply(call, 1, encoded.unwrap_or_default());
    }
}

/// Sends the result of a call when it is ready.
struct Answer<R> {
    slot: Arc<dyn ReplySlot<R>>,
    then: Then,
    number: u64,
    connection: Arc<Calls>,
    is_over: AtomicBool,
}

impl<R: Serialize + Send + 'static> Answer<R> {
    /// Checks for the result. Called once when the call was queued, and at each wake-up.
    fn poll(self: &Arc<Self>) {
        if self.is_over.load(Ordering::Acquire) {
            return;
        }
        let waker = Waker::from(Arc::clone(self));
        let mut cx = TaskContext::from_waker(&waker);
        let Poll::Ready(result) = self.slot.poll(&mut cx) else {
            return;
        };
        self.is_over.store(true, Ordering::Release);
        self.connection.lock().remove(&self.number);
        let result = match result {
            Ok(result) => result,
            Err(error) => return self.connection.reply_error(self.number, &error),
        };
        let process = &self.connection.process;
        let text = |error: codec::CodecError| error_chain(&error);
        let max_numbers = self.connection.max_numbers;
        let encoded = on_behalf_of(process, || match self.then {
            Then::Forget => Ok(Encoded::default()),
            Then::Send => {
                let encoded = codec::encode(&result).map_err(text)?;
                let checked = frame::check(&encoded, max_numbers);
                checked.map_err(|error| format!("it cannot be sent: {error}"))?;
                Ok(encoded)
            }
            Then::Keep => {
                let ticket = process.keep_result(codec::encode(&result).map_err(text)?)?;
                codec::encode(&ticket).map_err(text)
            }
        });
        match encoded {
            Ok(encoded) => self.connection.reply(self.number, 0, encoded),
            Err(reason) => {
                let error = CallError::Unknown {
                    actor: Arc::clone(&self.connection.actor_name),
                    reason: UnknownOutcome::BadReply { reason },
                };
                self.connection.reply_error(self.number, &error);
            }
        }
    }
}

impl<R: Serialize + Send + 'static> Wake for Answer<R> {
    fn wake(self: Arc<Self>) {
        self.poll();
    }
}

impl<R: Send + 'static> Cancel for Answer<R> {
    fn cancel(&self) {
        self.is_over.store(true, Ordering::Release);
        self.slot.abandon();
    }
}

/// Whether the caller's frames are still accepted: `false` once its node was declared lost.
pub(crate) type MaySpeak = Box<dyn Fn() -> bool + Send>;

/// The called side of a connection.
pub(crate) struct Server {
    callee: Arc<dyn Callee>,
    calls: Arc<Calls>,
    last_call: Option<u64>,
    may_speak: MaySpeak,
    /// Keeps the actor exported until the connection ends.
    _hold: super::process::Hold,
}

impl Server {
    pub(crate) fn new(
        process: &Arc<Process>,
        callee: Arc<dyn Callee>,
        outbox: Arc<Outbox>,
        hold: super::process::Hold,
        may_speak: MaySpeak,
        max_numbers: u64,
    ) -> Self {
        let calls = Arc::new(Calls {
            process: Arc::clone(process),
            outbox,
            actor_name: Arc::clone(callee.name()),
            admission: Arc::clone(callee.admission()),
            max_numbers,
            running: Mutex::default(),
            last_taken: AtomicU64::new(0),
        });
        Self {
            callee,
            calls,
            last_call: None,
            may_speak,
            _hold: hold,
        }
    }

    /// Tells the caller when the actor has ended, and which calls it never took.
    pub(crate) fn watch(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut ended = self.callee.ended();
        let calls: Weak<Calls> = Arc::downgrade(&self.calls);
        async move {
            // An error means that the actor's mailbox is gone, and the actor with it.
            let _ = ended.wait_for(|ended| *ended).await;
            if let Some(calls) = calls.upgrade() {
                // The actor takes no more calls, so this number is final.
                let last_taken = calls.last_taken.load(Ordering::Relaxed);
                let _ = calls.outbox.send(OutFrame::signal(Kind::Ended, last_taken));
                calls.outbox.finish();
            }
        }
    }
}

impl Peer for Server {
    fn actor(&self) -> Arc<str> {
        Arc::clone(&self.calls.actor_name)
    }

    fn receive(&mut self, frame: Frame) -> Result<(), Ended> {
        if !(self.may_speak)() {
            let why = "the caller's node was declared lost";
            return Err(Ended::Peer(why.to_owned()));
        }
        match frame.kind {
            Kind::Ask | Kind::Tell => {
                // A cancel could not tell two calls with the same number apart.
                if let Some(last) = self.last_call.filter(|last| frame.call <= *last) {
                    let why = format!("call {} came after call {last}", frame.call);
                    return Err(Ended::Peer(why));
                }
                self.last_call = Some(frame.call);
                let code = frame.code;
                let connection = Arc::clone(&self.calls);
                self.callee.call(code, Incoming { frame, connection });
            }
            Kind::Cancel => {
                let call = self.calls.lock().remove(&frame.call);
                if let Some(call) = call {
                    call.cancel();
                }
            }
            Kind::Stop => self.callee.stop(),
            Kind::Kill => self.callee.kill(),
            Kind::Release => return Err(Ended::Done("the caller has released the actor")),
            Kind::Ping => {}
            Kind::Reply | Kind::Ended | Kind::Probe | Kind::Readable | Kind::Taken => {
                let why = format!("a caller does not send {:?}", frame.kind);
                return Err(Ended::Peer(why));
            }
        }
        Ok(())
    }

    fn admission(&self) -> Option<Arc<Admission>> {
        Some(Arc::clone(&self.calls.admission))
    }

    fn disconnected(&mut self, why: &Arc<str>) {
        self.calls.outbox.close(why);
        let running: Vec<_> = self.calls.lock().drain().collect();
        for (_, call) in running {
            call.cancel();
        }
    }
}
