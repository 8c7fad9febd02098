//! An actor that does what a test tells it to, and gates to hold it where the test wants it.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, AtomicResponse, Context, Handler, Message, MessageResult,
    ResponseActFuture, ResponseFuture, WrapFuture,
};
use futures_util::FutureExt;
use ps_runtime::actor::{NotDelivered, UnknownOutcome, caller_gone};
use ps_runtime::remote::{Messages, Remote};
use ps_runtime::{ActorRef, CallError};
use serde::{Deserialize, Deserializer, Serialize};
use tokio::sync::oneshot;

pub(crate) use ps_runtime::test_util::{Parked, SOON, eventually};

/// What probes have seen, in order.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn push(&self, entry: impl ToString) {
        self.0.lock().unwrap().push(entry.to_string());
    }

    pub(crate) fn entries(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

/// Counts living values; dropped with the state that holds it.
#[derive(Clone, Default)]
pub(crate) struct Census(Arc<AtomicUsize>);

#[derive(Debug)]
pub(crate) struct Citizen(Arc<AtomicUsize>);

impl Census {
    pub(crate) fn citizen(&self) -> Citizen {
        self.0.fetch_add(1, Ordering::SeqCst);
        Citizen(Arc::clone(&self.0))
    }

    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl Drop for Citizen {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

type StartedHook = Box<dyn FnOnce(&mut Context<Probe>) + Send>;

#[derive(Default)]
pub(crate) struct Probe {
    pub(crate) count: u64,
    pub(crate) log: Log,
    pub(crate) on_started: Option<StartedHook>,
    pub(crate) _citizen: Option<Citizen>,
    pub(crate) refuse_to_stop: bool,
}

impl Probe {
    pub(crate) fn with_log(log: &Log) -> Self {
        Self {
            log: log.clone(),
            ..Self::default()
        }
    }
}

impl Actor for Probe {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.log.push("started");
        if let Some(hook) = self.on_started.take() {
            hook(ctx);
        }
    }

    fn stopping(&mut self, _: &mut Self::Context) -> actix::Running {
        self.log.push("stopping");
        if self.refuse_to_stop {
            actix::Running::Continue
        } else {
            actix::Running::Stop
        }
    }

    fn stopped(&mut self, _: &mut Self::Context) {
        self.log.push("stopped");
    }
}

/// What a probe takes from elsewhere; [`Do`] with the results that the tests ask for.
impl Remote for Probe {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Do<()>>()
            .add::<Do<String>>()
            .add::<Count>()
            .add::<OnTask>()
            .add::<InContext>()
            .add::<Atomic>()
            .add::<UntilCallerGone>()
            .add::<Unreadable>();
    }
}

type Action<R> = Box<dyn FnOnce(&mut Probe, &mut Context<Probe>) -> R + Send>;

/// Runs a closure in the handler and replies with its value.
#[derive(Serialize, Deserialize)]
#[serde(bound = "R: 'static")]
pub(crate) struct Do<R>(Parked<Action<R>>);

impl<R: Send + 'static> Message for Do<R> {
    type Result = R;
}

impl<R: Send + 'static> Handler<Do<R>> for Probe {
    type Result = MessageResult<Do<R>>;

    fn handle(&mut self, Do(action): Do<R>, ctx: &mut Context<Self>) -> Self::Result {
        MessageResult(action.take()(self, ctx))
    }
}

pub(crate) fn act<R>(
    action: impl FnOnce(&mut Probe, &mut Context<Probe>) -> R + Send + 'static,
) -> Do<R> {
    Do(Parked::new(Box::new(action)))
}

/// Adds one, logs the tag, replies with the count.
#[derive(Message, Debug, PartialEq, Serialize, Deserialize)]
#[rtype(result = "u64")]
pub(crate) struct Count(pub(crate) u64);

impl Handler<Count> for Probe {
    type Result = u64;

    fn handle(&mut self, Count(tag): Count, _: &mut Context<Self>) -> u64 {
        self.count += 1;
        self.log.push(tag);
        self.count
    }
}

type BoxedFuture = Pin<Box<dyn Future<Output = u64> + Send>>;

/// Responds with a future on a task of its own.
#[derive(Serialize, Deserialize)]
pub(crate) struct OnTask(Parked<BoxedFuture>);

impl OnTask {
    pub(crate) fn new(future: impl Future<Output = u64> + Send + 'static) -> Self {
        Self(Parked::new(Box::pin(future)))
    }
}

impl Message for OnTask {
    type Result = u64;
}

impl Handler<OnTask> for Probe {
    type Result = ResponseFuture<u64>;

    fn handle(&mut self, OnTask(future): OnTask, _: &mut Context<Self>) -> Self::Result {
        future.take()
    }
}

/// Responds with a future inside the actor's context, and counts it when it is done.
#[derive(Serialize, Deserialize)]
pub(crate) struct InContext(Parked<BoxedFuture>);

impl InContext {
    pub(crate) fn new(future: impl Future<Output = u64> + Send + 'static) -> Self {
        Self(Parked::new(Box::pin(future)))
    }
}

impl Message for InContext {
    type Result = u64;
}

impl Handler<InContext> for Probe {
    type Result = ResponseActFuture<Self, u64>;

    fn handle(&mut self, InContext(future): InContext, _: &mut Context<Self>) -> Self::Result {
        Box::pin(future.take().into_actor(self).map(|value, actor, _| {
            actor.log.push(format!("response {value}"));
            value
        }))
    }
}

/// Responds with a future that pauses the actor until it is done.
#[derive(Serialize, Deserialize)]
pub(crate) struct Atomic(Parked<BoxedFuture>);

impl Atomic {
    pub(crate) fn new(future: impl Future<Output = u64> + Send + 'static) -> Self {
        Self(Parked::new(Box::pin(future)))
    }
}

impl Message for Atomic {
    type Result = u64;
}

impl Handler<Atomic> for Probe {
    type Result = AtomicResponse<Self, u64>;

    fn handle(&mut self, Atomic(future): Atomic, _: &mut Context<Self>) -> Self::Result {
        self.log.push("atomic begins");
        AtomicResponse::new(Box::pin(future.take().into_actor(self).map(
            |value, actor, _| {
                actor.log.push("atomic ends");
                value
            },
        )))
    }
}

/// Waits until its caller has gone, and then reports that.
#[derive(Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct UntilCallerGone(pub(crate) Parked<mpsc::Sender<()>>);

impl Handler<UntilCallerGone> for Probe {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, message: UntilCallerGone, _: &mut Context<Self>) -> Self::Result {
        let (gone, says) = (caller_gone(), message.0.take());
        Box::pin(async move {
            gone.await;
            says.send(()).expect("the test listens");
        })
    }
}

/// A message that cannot be read: the process of an actor refuses it before it is queued.
#[derive(Message, Serialize)]
#[rtype(result = "()")]
struct Unreadable;

impl<'de> Deserialize<'de> for Unreadable {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom("it is not to be read"))
    }
}

impl Handler<Unreadable> for Probe {
    type Result = ();

    fn handle(&mut self, _: Unreadable, _: &mut Context<Self>) {}
}

/// Waits until everything sent to the actor before is in its queue, or taken out of it: at once
/// for an actor of this process. Needs a free slot.
pub(crate) fn wait_until_arrived(actor: &ActorRef<Probe>) {
    if !actor.is_local() {
        let refused = actor.ask(Unreadable).wait_timeout(SOON).unwrap_err();
        assert!(refused.to_string().contains("not to be read"), "{refused}");
    }
}

/// Checks the error of a call that timed out before its handler began. An actor of this process hands the
/// message back. For an actor of another process the outcome is unknown.
pub(crate) fn assert_gave_up_before_it_began(
    actor: &ActorRef<Probe>,
    after: Duration,
    error: CallError,
) -> Option<Count> {
    match error {
        CallError::NotDelivered {
            reason, message, ..
        } if actor.is_local() => {
            assert_eq!(reason, NotDelivered::TimedOut { after });
            Some(message.into_message().expect("it was a Count"))
        }
        CallError::Unknown { reason, .. } if !actor.is_local() => {
            assert_eq!(reason, UnknownOutcome::TimedOut { after });
            None
        }
        other => panic!("unexpected: {other:?}"),
    }
}

/// Returns a future and the sender that makes it ready.
pub(crate) fn response() -> (oneshot::Sender<u64>, BoxedFuture) {
    let (sender, receiver) = oneshot::channel();
    let future = receiver.map(|value| value.expect("the test sends a value"));
    (sender, Box::pin(future))
}

/// Keeps an actor inside a handler until it is dropped.
pub(crate) struct Gate {
    entered: mpsc::Receiver<()>,
    _release: mpsc::Sender<()>,
}

impl Gate {
    /// A gate and the message that holds the actor at it.
    pub(crate) fn new() -> (Self, Do<()>) {
        let (entered_by, entered) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let hold = act(move |_, _| {
            entered_by.send(()).expect("the test watches the gate");
            // Ends when the gate is dropped, also by a failing test.
            let _ = released.recv();
        });
        let gate = Self {
            entered,
            _release: release,
        };
        (gate, hold)
    }

    /// Waits until the actor is inside the handler.
    pub(crate) fn wait_until_entered(&self) {
        self.entered
            .recv_timeout(SOON)
            .expect("the actor gets to the gate");
    }

    /// Holds the actor at a new gate. The message is sent with `tell`, so there is no reply.
    pub(crate) fn hold(actor: &ActorRef<Probe>) -> Self {
        let (gate, hold) = Self::new();
        actor.tell(hold).expect("the actor takes the message");
        gate.wait_until_entered();
        gate
    }
}

/// The panic text of a call that failed by a panic.
pub(crate) fn panic_of<R: std::fmt::Debug>(result: Result<R, CallError>) -> String {
    match result {
        Err(CallError::Failed { panic, .. }) => panic.to_string(),
        other => panic!("expected a call that failed by a panic, got {other:?}"),
    }
}
