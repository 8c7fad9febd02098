//! Calls: when they begin, in what order, and what their callers learn.

use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use ps_runtime::CallError;
use ps_runtime::actor::{NotDelivered, UnknownOutcome};

use super::ON;
use crate::actor::probe::{
    Count, Gate, InContext, Log, Probe, SOON, act, assert_gave_up_before_it_began, eventually,
    response, wait_until_arrived,
};

///
#[test]
fn messages_of_one_sender_begin_in_the_order_sent() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    let mut replies = Vec::new();
    for tag in 0..1000 {
        // Alternating the verbs must not change the order.
        if tag % 2 == 0 {
            actor.tell(Count(tag)).unwrap();
        } else {
            replies.push(actor.ask(Count(tag)));
        }
    }
    for reply in replies {
        reply.wait_timeout(SOON).unwrap();
    }
    let expected: Vec<_> = (0..1000).map(|tag: u64| tag.to_string()).collect();
    assert_eq!(log.entries()[1..], expected);
}

///
#[test]
fn messages_of_many_senders_keep_the_order_of_each() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    std::thread::scope(|scope| {
        for sender in 0..4_u64 {
            let actor = actor.clone();
            scope.spawn(move || {
                let replies: Vec<_> = (0..200)
                    .map(|index| actor.ask(Count(sender * 1000 + index)))
                    .collect();
                for reply in replies {
                    reply.wait_timeout(SOON).unwrap();
                }
            });
        }
    });
    let seen: Vec<u64> = log.entries()[1..]
        .iter()
        .map(|tag| tag.parse().unwrap())
        .collect();
    assert_eq!(seen.len(), 800);
    for sender in 0..4 {
        let own: Vec<_> = seen.iter().filter(|tag| *tag / 1000 == sender).collect();
        assert!(own.is_sorted(), "order of sender {sender}");
    }
}

///
#[test]
fn a_call_starts_without_its_reply_being_polled() {
    let actor = ON.spawn(Probe::default);
    let (ran, runs) = std::sync::mpsc::channel();
    let reply = actor.ask(act(move |_, _| ran.send(()).unwrap()));
    runs.recv_timeout(SOON).expect("the handler runs");
    reply.wait_timeout(SOON).unwrap();
}

///
#[test]
fn a_timeout_before_the_handler_began_takes_the_call_back() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    let gate = Gate::hold(&actor);
    let after = Duration::from_millis(1);
    let reply = actor.ask(Count(7));
    wait_until_arrived(&actor);
    let error = reply.wait_timeout(after).unwrap_err();
    assert_eq!(error.may_have_run(), !actor.is_local());
    if let Some(message) = assert_gave_up_before_it_began(&actor, after, error) {
        assert_eq!(message, Count(7));
    }
    wait_until_arrived(&actor);
    drop(gate);
    assert_eq!(actor.ask(Count(8)).wait_timeout(SOON).unwrap(), 1);
    assert_eq!(log.entries(), ["started", "8"]);
}

/// nobody looks at the reply in time, so nobody takes the call back.
#[test]
fn a_call_whose_time_is_over_in_the_queue_never_begins() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    let gate = Gate::hold(&actor);
    let limit = Duration::from_millis(20);
    let late = actor.ask_within(Count(7), limit);
    let in_time = actor.ask_within(Count(8), SOON);
    let without_limit = actor.ask_within(Count(9), Duration::MAX);
    wait_until_arrived(&actor);
    // Takes as long as the first call has, which has arrived.
    actor.ask(Count(0)).wait_timeout(limit).unwrap_err();
    wait_until_arrived(&actor);
    drop(gate);
    assert_eq!(in_time.wait().unwrap(), 1);
    assert_eq!(without_limit.wait_timeout(SOON).unwrap(), 2);
    let error = late.wait().unwrap_err();
    let CallError::NotDelivered { reason, .. } = &error else {
        panic!("it cannot have begun: {error:?}");
    };
    assert_eq!(*reason, NotDelivered::TimedOut { after: limit });
    assert_eq!(error.into_message::<Count>().unwrap(), Count(7));
    assert_eq!(log.entries(), ["started", "8", "9"]);
    assert_eq!(actor.pending(), 0);
}

///
#[test]
fn a_timeout_after_the_handler_began_says_so_and_the_handler_goes_on() {
    let actor = ON.spawn(Probe::default);
    let (gate, hold) = Gate::new();
    let reply = actor.ask(hold);
    gate.wait_until_entered();
    let after = Duration::from_millis(1);
    let error = reply.wait_timeout(after).unwrap_err();
    assert!(
        matches!(&error, CallError::Unknown { reason, .. } if *reason == UnknownOutcome::TimedOut { after })
    );
    assert!(error.may_have_run());
    assert!(error.into_message::<Count>().is_err());
    // Among the calls of this process, an actor elsewhere counts those that it still waits for.
    let expected = if actor.is_local() { 1 } else { 0 };
    assert_eq!(
        actor.pending(),
        expected,
        "the running handler keeps its slot"
    );
    drop(gate);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
    assert_eq!(actor.pending(), 0);
}

///
#[actix::test]
async fn an_awaited_timeout_fires_in_real_time_while_the_clock_is_paused() {
    tokio::time::pause();
    let actor = ON.spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let reply = actor.ask(Count(0));
    wait_until_arrived(&actor);
    let error = reply.timeout(Duration::from_millis(5)).await.unwrap_err();
    assert_eq!(error.may_have_run(), !actor.is_local());
    wait_until_arrived(&actor);
    drop(gate);
    // A paused clock jumps ahead when its thread is idle; the actor's thread isn't.
    let reply = actor.ask(Count(1)).timeout(SOON).await;
    assert_eq!(reply.unwrap(), 1);
}

///
#[test]
fn the_shorter_of_two_timeouts_holds_and_a_ready_result_beats_a_late_look() {
    let actor = ON.spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let short = Duration::from_millis(1);
    for reply in [
        actor.ask(Count(0)).timeout(short).timeout(SOON),
        actor.ask(Count(0)).timeout(SOON).timeout(short),
        actor.ask(Count(0)).timeout(Duration::MAX).timeout(short),
    ] {
        let error = reply.wait().unwrap_err();
        assert!(error.to_string().contains("1ms"), "{error}");
    }
    wait_until_arrived(&actor);
    drop(gate);
    let reply = actor.ask(Count(0)).timeout(Duration::ZERO);
    actor.ask(Count(0)).wait_timeout(SOON).unwrap();
    // Over by now, as the later call is.
    assert_eq!(reply.wait().unwrap(), 1);
}

///
#[test]
fn a_reply_dropped_before_its_handler_began_takes_the_call_back() {
    let actor = ON.spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let (alive, message_dropped) = std::sync::mpsc::channel::<()>();
    drop(actor.ask(act(move |_, _| drop(alive))));
    assert_eq!(
        message_dropped.recv_timeout(SOON),
        Err(RecvTimeoutError::Disconnected),
        "the message is dropped with its reply"
    );
    assert_eq!(actor.pending(), 1, "only the gate is left");
    drop(actor.ask(Count(0)));
    wait_until_arrived(&actor);
    drop(gate);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}

///
#[test]
fn a_reply_dropped_after_its_handler_began_leaves_the_handler_running() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    let (send, future) = response();
    let (gate, hold) = Gate::new();
    let running = actor.ask(InContext::new(future));
    let held = actor.ask(hold);
    gate.wait_until_entered();
    drop((running, held));
    drop(gate);
    send.send(5).expect("the response is still awaited");
    eventually("both calls end", || actor.pending() == 0);
    eventually("the response is logged", || {
        log.entries() == ["started", "response 5"]
    });
}

///
#[test]
fn wait_works_on_plain_threads_and_inside_of_event_loops() {
    let actor = ON.spawn(Probe::default);
    let other = actor.clone();
    let thread = std::thread::spawn(move || other.ask(Count(0)).wait_timeout(SOON).unwrap());
    assert_eq!(thread.join().unwrap(), 1);
    let inside = ps_runtime::actor::run(async { actor.ask(Count(0)).wait_timeout(SOON) });
    assert_eq!(inside.unwrap(), 2);
    assert_eq!(await_without_event_loop(actor.ask(Count(0))), 3);
}

/// Awaits a reply with a timeout where there is no event loop of any kind.
fn await_without_event_loop(reply: ps_runtime::Reply<u64>) -> u64 {
    struct Unpark(std::thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: std::sync::Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
    let mut cx = std::task::Context::from_waker(&waker);
    let mut reply = std::pin::pin!(reply.timeout(SOON));
    loop {
        match reply.as_mut().poll(&mut cx) {
            std::task::Poll::Ready(result) => return result.unwrap(),
            std::task::Poll::Pending => std::thread::park(),
        }
    }
}
