//! Actors are ordinary actix actors: what their contexts do.

use std::time::Duration;

use actix::{ActorContext, Addr, AsyncContext};
use ps_runtime::actor::{NotDelivered, UnknownOutcome};
use ps_runtime::{ActorRef, CallError};

use super::ON;
use crate::actor::probe::{
    Atomic, Count, Gate, InContext, Log, Probe, SOON, act, assert_gave_up_before_it_began,
    eventually, response, wait_until_arrived,
};

fn logging() -> (ActorRef<Probe>, Log) {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    (actor, log)
}

///
#[test]
fn an_atomic_response_pauses_the_actor() {
    let (actor, log) = logging();
    let gate = Gate::hold(&actor);
    let (send, future) = response();
    let atomic = actor.ask(Atomic::new(future));
    let next = actor.ask(Count(1));
    drop(gate);
    // The message after the atomic one waits in the queue, though the thread is free: it can
    // still be taken back once the atomic one has begun.
    eventually("the atomic response begins", || {
        log.entries().contains(&"atomic begins".to_owned())
    });
    let later = actor.ask(Count(2));
    wait_until_arrived(&actor);
    let after = Duration::from_millis(20);
    let error = later.wait_timeout(after).unwrap_err();
    assert_gave_up_before_it_began(&actor, after, error);
    wait_until_arrived(&actor);
    send.send(3).unwrap();
    assert_eq!(atomic.wait_timeout(SOON).unwrap(), 3);
    assert_eq!(next.wait_timeout(SOON).unwrap(), 1);
    assert_eq!(
        log.entries(),
        ["started", "atomic begins", "atomic ends", "1"]
    );
}

///
#[test]
fn responses_in_the_context_interleave_with_other_messages() {
    let (actor, log) = logging();
    let (send, future) = response();
    let slow = actor.ask(InContext::new(future));
    assert_eq!(actor.ask(Count(1)).wait_timeout(SOON).unwrap(), 1);
    send.send(9).unwrap();
    assert_eq!(slow.wait_timeout(SOON).unwrap(), 9);
    assert_eq!(log.entries(), ["started", "1", "response 9"]);
}

///
#[test]
fn waiting_in_the_started_hook_holds_the_queue_back() {
    let log = Log::default();
    let (send, mut receive) = std::sync::mpsc::channel::<tokio::sync::oneshot::Receiver<u64>>();
    let (open, opened) = tokio::sync::oneshot::channel();
    send.send(opened).unwrap();
    let actor = ON.spawn({
        let log = log.clone();
        move || {
            let opened = receive.recv().unwrap();
            let on_started = move |ctx: &mut actix::Context<Probe>| {
                ctx.wait(actix::fut::wrap_future(async move {
                    opened.await.unwrap();
                }));
            };
            receive = std::sync::mpsc::channel().1;
            Probe {
                on_started: Some(Box::new(on_started)),
                ..Probe::with_log(&log)
            }
        }
    });
    let taken_back = actor.ask(Count(1));
    wait_until_arrived(&actor);
    let after = Duration::from_millis(20);
    let error = taken_back.wait_timeout(after).unwrap_err();
    assert_gave_up_before_it_began(&actor, after, error);
    wait_until_arrived(&actor);
    let reply = actor.ask(Count(2));
    open.send(0).unwrap();
    assert_eq!(reply.wait_timeout(SOON).unwrap(), 1);
}

#[test]
fn messages_to_self_and_timers_work_as_in_actix() {
    let (actor, log) = logging();
    let (done, is_done) = std::sync::mpsc::channel();
    actor
        .ask(act(|_, ctx| {
            ctx.notify(Count(1));
            let me: Addr<Probe> = ctx.address();
            me.try_send(Count(2)).expect("actix's mailbox has room");
            ctx.run_later(Duration::ZERO, move |probe, _| {
                probe.log.push("timer");
                done.send(()).unwrap();
            });
        }))
        .wait_timeout(SOON)
        .unwrap();
    is_done.recv_timeout(SOON).unwrap();
    let mut seen = log.entries();
    seen.sort();
    assert_eq!(seen, ["1", "2", "started", "timer"]);
}

///
#[test]
fn a_busy_queue_does_not_starve_timers_and_streams() {
    let (actor, log) = logging();
    let gate = Gate::hold(&actor);
    // A message to itself is an item of the context, as timers and streams are.
    let notify = act(|_, ctx| ctx.notify(Count(12345)));
    actor.tell(notify).unwrap();
    let replies: Vec<_> = (0..900).map(|tag| actor.ask(Count(tag))).collect();
    wait_until_arrived(&actor);
    drop(gate);
    for reply in replies {
        reply.wait_timeout(SOON).unwrap();
    }
    let position = log.entries().iter().position(|entry| entry == "12345");
    let position = position.expect("the message to itself ran");
    assert!(position < 200, "it had to wait for {position} others");
}

///
#[test]
fn an_actor_that_stops_itself_answers_the_running_call_and_hands_back_the_queued() {
    let (actor, log) = logging();
    let gate = Gate::hold(&actor);
    let (_send, future) = response();
    let in_flight = actor.ask(InContext::new(future));
    let stopping = actor.ask(act(|_, ctx| {
        ctx.stop();
        "bye".to_owned()
    }));
    let queued = actor.ask(Count(5));
    wait_until_arrived(&actor);
    drop(gate);
    assert_eq!(stopping.wait_timeout(SOON).unwrap(), "bye");
    let error = queued.wait_timeout(SOON).unwrap_err();
    assert!(matches!(
        &error,
        CallError::NotDelivered {
            reason: NotDelivered::Stopped { panic: None },
            ..
        }
    ));
    assert_eq!(error.into_message::<Count>().unwrap(), Count(5));
    assert!(matches!(
        in_flight.wait_timeout(SOON).unwrap_err(),
        CallError::Unknown {
            reason: UnknownOutcome::Stopped,
            ..
        }
    ));
    actor.shutdown(SOON).wait().unwrap();
    assert_eq!(log.entries(), ["started", "stopping", "stopped"]);
}
