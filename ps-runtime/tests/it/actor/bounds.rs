//! The bound on pending calls.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, mpsc};
use std::task::Poll;
use std::time::Duration;

use ps_runtime::actor::NotDelivered;
use ps_runtime::{ActorRef, CallError, Spawn};
use tokio::sync::oneshot;

use super::ON;
use crate::actor::probe::{
    Count, Gate, InContext, Probe, SOON, UntilCallerGone, act, eventually, response,
    wait_until_arrived,
};
use ps_runtime::test_util::Parked;

fn bounded(max_pending: usize) -> ActorRef<Probe> {
    let options = Spawn::new().max_pending(max_pending);
    ON.start(options, Probe::default).unwrap()
}

/// Polls once.
async fn is_pending<F: Future>(mut future: Pin<&mut F>) -> bool {
    poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_pending())).await
}

/// for an actor of another process, the bound is that of the calling process. R-13: the message
/// that is handed back is the caller's.
#[test]
fn of_2000_calls_exactly_max_pending_are_taken() {
    let actor = bounded(16);
    let gate = Gate::hold(&actor);
    let (taken, refused): (Vec<_>, Vec<_>) = (0..2000)
        .map(|tag| (tag, actor.clone().ask(Count(tag)).timeout(SOON)))
        .map(|(tag, reply)| (tag, reply, actor.pending()))
        .partition(|(tag, ..)| *tag < 15);
    assert_eq!(actor.pending(), 16, "the gate and 15 calls");
    for (tag, reply, pending) in refused {
        assert_eq!(pending, 16);
        let error = reply.wait().unwrap_err();
        assert!(matches!(
            &error,
            CallError::NotDelivered {
                reason: NotDelivered::QueueFull { limit: 16 },
                ..
            }
        ));
        assert_eq!(error.into_message::<Count>().unwrap(), Count(tag));
    }
    assert!(
        actor
            .tell(Count(0))
            .unwrap_err()
            .to_string()
            .contains("16 pending calls")
    );
    drop(gate);
    for (tag, reply, _) in taken {
        assert_eq!(reply.wait().unwrap(), tag + 1);
    }
    eventually("the gate's slot is free", || actor.pending() == 0);
}

///
#[test]
fn responses_under_way_count_against_the_bound() {
    let actor = bounded(2);
    let (send, future) = response();
    let running = actor.ask(InContext::new(future));
    actor.ask(act(|_, _| ())).wait_timeout(SOON).unwrap();
    let gate = Gate::hold(&actor);
    assert_eq!(actor.pending(), 2);
    assert!(actor.tell(Count(0)).is_err());
    drop(gate);
    send.send(1).unwrap();
    running.wait_timeout(SOON).unwrap();
}

///
#[test]
fn a_slot_is_free_as_soon_as_the_reply_is_seen() {
    let actor = bounded(1);
    for count in 1..=2000 {
        assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), count);
    }
}

///
#[test]
fn calls_taken_back_free_their_slots_and_their_memory() {
    let actor = bounded(8);
    let gate = Gate::hold(&actor);
    let marker = Arc::new(());
    let kept = actor.ask(Count(0));
    let num_calls = if actor.is_local() { 100_000 } else { 10_000 };
    for _ in 0..num_calls {
        let marker = Arc::clone(&marker);
        let reply = actor.ask(act(move |_, _| drop(marker)));
        assert_eq!(actor.pending(), 3);
        drop(reply);
    }
    wait_until_arrived(&actor);
    assert_eq!(Arc::strong_count(&marker), 1, "all messages are dropped");
    drop(gate);
    assert_eq!(kept.wait_timeout(SOON).unwrap(), 1);
}

///
#[actix::test]
async fn callers_that_wait_for_room_are_served_in_the_order_they_came() {
    let actor = bounded(1);
    let gate = Gate::hold(&actor);
    let (order, mut served) = tokio::sync::mpsc::unbounded_channel();
    for index in 0..20 {
        let (actor, order) = (actor.clone(), order.clone());
        let (waiting, waits) = oneshot::channel();
        actix::spawn(async move {
            let mut ready = std::pin::pin!(actor.ask_when_ready(Count(index)));
            assert!(is_pending(ready.as_mut()).await);
            waiting.send(()).unwrap();
            let reply = ready.await;
            order.send((index, reply.await.unwrap())).unwrap();
        });
        waits.await.unwrap();
    }
    // No overtaking: the slots that get free belong to those who wait.
    assert!(actor.tell(Count(99)).is_err());
    drop((gate, order));
    // The replies come over several tasks, in any order; the counts tell when each was handled.
    let mut counts = Vec::new();
    while let Some(served) = served.recv().await {
        counts.push(served);
    }
    counts.sort_unstable();
    assert!(
        counts
            .into_iter()
            .eq((0..20).map(|index| (index, index + 1)))
    );
}

///
#[actix::test]
async fn callers_that_wait_for_room_get_their_message_back_when_the_actor_stops() {
    let actor = bounded(1);
    let gate = Gate::hold(&actor);
    let mut ready = std::pin::pin!(actor.ask_when_ready(Count(4)));
    assert!(is_pending(ready.as_mut()).await);
    actor.stop();
    // Those who wait for an actor elsewhere hear of its end, not of its `stop`.
    let gate = actor.is_local().then_some(gate);
    let error = ready.await.await.unwrap_err();
    assert_eq!(error.into_message::<Count>().unwrap(), Count(4));
    drop(gate);
}

///
#[actix::test]
async fn a_wait_for_room_that_is_dropped_leaves_no_trace() {
    let actor = bounded(1);
    let gate = Gate::hold(&actor);
    {
        let mut ready = std::pin::pin!(actor.ask_when_ready(Count(4)));
        assert!(is_pending(ready.as_mut()).await);
    }
    drop(gate);
    let reply = actor.ask_when_ready(Count(5)).await;
    assert_eq!(reply.timeout(SOON).await.unwrap(), 1);
}

/// the slot is free.
#[test]
fn a_handler_that_waits_hears_that_its_caller_has_gone() {
    let actor = bounded(2);
    let (says, heard) = mpsc::channel();
    let wait = || actor.ask(UntilCallerGone(Parked::new(says.clone())));
    // The call behind it gets through, so there is a slot, and what came before has begun.
    let has_begun = || {
        let next = || actor.ask(act(|_, _| ())).wait_timeout(SOON);
        eventually("there is a slot", || next().is_ok());
    };
    // Dropped.
    let reply = wait();
    has_begun();
    assert!(heard.try_recv().is_err());
    drop(reply);
    heard.recv_timeout(SOON).unwrap();
    has_begun();
    // Timed out.
    let reply = wait().timeout(Duration::from_millis(300));
    has_begun();
    let timed_out = reply.wait().unwrap_err();
    assert!(timed_out.may_have_run(), "{timed_out}");
    heard.recv_timeout(SOON).unwrap();
    has_begun();
}

/// of a told message nobody ever waited for a result.
#[test]
fn a_told_message_has_no_caller_that_could_go() {
    let actor = bounded(2);
    let (says, heard) = mpsc::channel();
    actor.tell(UntilCallerGone(Parked::new(says))).unwrap();
    actor.ask(act(|_, _| ())).wait_timeout(SOON).unwrap();
    assert_eq!(actor.pending(), 1);
    actor.kill();
    // Its end is that of the actor.
    assert!(heard.recv_timeout(SOON).is_err());
}
