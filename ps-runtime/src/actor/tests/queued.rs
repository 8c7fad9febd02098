//! What a call holds, and its waker.

use std::sync::{Arc, mpsc};
use std::task::{Context as TaskContext, Waker};
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use tokio::sync::oneshot;

use crate::actor::background::block_on;
use crate::actor::call::{Call, GiveUp, ReplySlot};
use crate::actor::queued::{Held, Here};
use crate::actor::{ActorRef, spawn};

/// Answers when its channel says so.
struct Gate;

impl Actor for Gate {
    type Context = Context<Self>;
}

#[derive(Message)]
#[rtype(result = "()")]
struct Later(oneshot::Receiver<()>);

impl Handler<Later> for Gate {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, Later(open): Later, _: &mut Context<Self>) -> Self::Result {
        Box::pin(async move { open.await.unwrap_or(()) })
    }
}

#[derive(Message)]
#[rtype(result = "()")]
struct Block(mpsc::Receiver<()>);

impl Handler<Block> for Gate {
    type Result = ();

    fn handle(&mut self, Block(open): Block, _: &mut Context<Self>) {
        let _ = open.recv();
    }
}

/// Says on its channel when it is dropped.
struct Witness(mpsc::Sender<()>);

impl Drop for Witness {
    fn drop(&mut self) {
        let _ = self.0.send(());
    }
}

fn held() -> (Option<Held>, mpsc::Receiver<()>) {
    let (sender, dropped) = mpsc::channel();
    (Some(Box::new(Witness(sender))), dropped)
}

/// Blocks the actor until the returned sender is dropped.
fn block(gate: &ActorRef<Gate>) -> mpsc::Sender<()> {
    let (open, blocked) = mpsc::channel();
    gate.tell(Block(blocked)).unwrap();
    open
}

#[test]
fn what_a_call_holds_is_kept_until_its_handler_has_returned_but_not_for_its_response() {
    let gate = spawn(|| Gate);
    let blocked = block(&gate);
    let (held, dropped) = held();
    let (open, later) = oneshot::channel();
    let call = gate.mailbox_here().push_with(Later(later), held, None);
    let call = call.unwrap();
    assert_eq!(dropped.try_recv(), Err(mpsc::TryRecvError::Empty));
    drop(blocked);
    dropped.recv().unwrap();
    // The response is still under way.
    assert_eq!(gate.pending(), 1);
    drop(open);
    block_on(std::future::poll_fn(|cx| call.poll(cx)), None)
        .unwrap()
        .unwrap();
}

#[test]
fn what_a_call_holds_goes_with_a_call_that_never_begins() {
    let gate = spawn(|| Gate);
    let _blocked = block(&gate);
    let (first, first_dropped) = held();
    let (second, second_dropped) = held();
    let push = |held| {
        let (_, never) = mpsc::channel();
        let call = gate.mailbox_here().push_with(Block(never), held, None);
        call.unwrap()
    };
    let taken_back = push(first);
    let _killed = push(second);
    taken_back.abandon();
    first_dropped.recv().unwrap();
    assert_eq!(second_dropped.try_recv(), Err(mpsc::TryRecvError::Empty));
    gate.kill();
    second_dropped.recv().unwrap();
}

/// A waker that closes its channel when its last clone is dropped.
fn wakes_nobody() -> (Waker, mpsc::Receiver<()>) {
    struct Nobody(#[expect(dead_code, reason = "kept for its end")] Witness);

    impl std::task::Wake for Nobody {
        fn wake(self: Arc<Self>) {}
    }

    let (sender, dropped) = mpsc::channel();
    (Waker::from(Arc::new(Nobody(Witness(sender)))), dropped)
}

/// The waker of a remote call owns the call, and the connection that it came on.
#[test]
fn a_call_that_was_given_up_lets_go_of_its_waker() {
    let gate = spawn(|| Gate);
    let blocked = block(&gate);
    let push = || {
        let (open, later) = oneshot::channel();
        let call = gate.mailbox_here().push_with(Later(later), None, None);
        (call.expect("there is room"), open)
    };
    let is_forgotten = |call: &Call<Here<Gate, Later>>, end: fn(&Call<Here<Gate, Later>>)| {
        let (waker, dropped) = wakes_nobody();
        assert!(call.poll(&mut TaskContext::from_waker(&waker)).is_pending());
        end(call);
        // A later poll does not keep its waker either.
        assert!(call.poll(&mut TaskContext::from_waker(&waker)).is_pending());
        drop(waker);
        assert_eq!(dropped.try_recv(), Ok(()));
    };
    let abandon: fn(&Call<Here<Gate, Later>>) = |call| call.abandon();
    let give_up: fn(&Call<Here<Gate, Later>>) = |call| {
        assert!(call.give_up(GiveUp::TimedOut(Duration::ZERO)).is_err());
    };
    let calls: Vec<_> = std::iter::repeat_with(push).take(4).collect();
    is_forgotten(&calls[0].0, abandon);
    is_forgotten(&calls[1].0, give_up);
    drop(blocked);
    // The others are running when a call behind them has run.
    let (open, later) = oneshot::channel();
    open.send(()).expect("the other end is here");
    gate.ask(Later(later)).wait().expect("it is answered");
    is_forgotten(&calls[2].0, abandon);
    is_forgotten(&calls[3].0, give_up);
}
