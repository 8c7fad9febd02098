//! Panics: what they cost, whom they don't reach, and when an actor is given up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use actix::AsyncContext;
use ps_runtime::actor::{NotDelivered, UnknownOutcome};
use ps_runtime::{ActorRef, CallError, RestartPolicy, Spawn};

use super::ON;
use crate::actor::probe::{
    Atomic, Census, Count, Gate, InContext, Log, OnTask, Probe, SOON, act, eventually, panic_of,
    response, wait_until_arrived,
};

fn budget(max_restarts: u32) -> Spawn {
    Spawn::new().restart(RestartPolicy {
        max_restarts,
        within: Duration::MAX,
    })
}

/// the caller of an actor of another process sees 0.
fn assert_restarts(actor: &ActorRef<Probe>, expected: u32) {
    let expected = if actor.is_local() { expected } else { 0 };
    assert_eq!(actor.restarts(), expected);
}

///
#[test]
fn a_panicking_handler_fails_its_call_and_the_same_reference_works_again() {
    let name = format!("panics-a {ON:?}");
    let options = Spawn::new().name(&name);
    let actor = ON.start(options, Probe::default).unwrap();
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
    let error = actor
        .ask(act::<()>(|_, _| panic!("bad batch {}", 17)))
        .wait_timeout(SOON)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("actor {name} panicked during the call: bad batch 17")
    );
    assert!(error.may_have_run());
    assert_restarts(&actor, 1);
    // State starts anew.
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
    actor.shutdown(SOON).wait().unwrap();
}

///
#[test]
fn a_panic_in_a_response_inside_the_context_fails_that_call_and_restarts_the_actor() {
    let actor = ON.spawn(Probe::default);
    for _ in 0..2 {
        let inside = actor.ask(InContext::new(async { panic!("in context") }));
        assert_eq!(panic_of(inside.wait_timeout(SOON)), "in context");
    }
    let atomic = actor.ask(Atomic::new(async { panic!("in atomic") }));
    assert_eq!(panic_of(atomic.wait_timeout(SOON)), "in atomic");
    assert_restarts(&actor, 3);
    assert_eq!(actor.pending(), 0);
}

///
#[test]
fn a_panic_in_a_response_on_its_own_task_leaves_the_actor_alone() {
    let actor = ON.spawn(Probe::default);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
    let error = actor
        .ask(OnTask::new(async { panic!("on a task") }))
        .wait_timeout(SOON)
        .unwrap_err();
    assert!(matches!(
        error,
        CallError::Unknown {
            reason: UnknownOutcome::NoReply,
            ..
        }
    ));
    assert_restarts(&actor, 0);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 2);
}

///
#[test]
fn a_panic_fails_the_responses_that_lived_in_the_context_and_spares_those_on_tasks() {
    let actor = ON.spawn(Probe::default);
    let (_in_context_sender, in_context) = response();
    let (on_task_sender, on_task) = response();
    let in_context = actor.ask(InContext::new(in_context));
    let on_task = actor.ask(OnTask::new(on_task));
    let panicking = actor.ask(act::<()>(|_, _| panic!("neighbour")));
    assert_eq!(panic_of(panicking.wait_timeout(SOON)), "neighbour");
    assert_eq!(panic_of(in_context.wait_timeout(SOON)), "neighbour");
    on_task_sender.send(4).unwrap();
    assert_eq!(on_task.wait_timeout(SOON).unwrap(), 4);
    assert_eq!(actor.pending(), 0);
}

///
#[test]
fn a_panic_in_a_timer_restarts_the_actor() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    actor
        .ask(act(|_, ctx| {
            ctx.run_later(Duration::ZERO, |_, _| panic!("timer"));
        }))
        .wait_timeout(SOON)
        .unwrap();
    eventually("the restart", || log.entries() == ["started", "started"]);
    assert_restarts(&actor, 1);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}

///
#[test]
fn a_panic_in_the_started_hook_counts_against_the_budget() {
    let starts = Arc::new(AtomicU32::new(0));
    let make = {
        let starts = Arc::clone(&starts);
        move || {
            let start = starts.fetch_add(1, Ordering::SeqCst);
            Probe {
                on_started: (start < 2)
                    .then(|| Box::new(|_: &mut _| -> () { panic!("no start") }) as _),
                ..Probe::default()
            }
        }
    };
    let actor = ON.start(budget(2), make).unwrap();
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
    assert_restarts(&actor, 2);
    assert_eq!(starts.load(Ordering::SeqCst), 3);
}

///
#[test]
fn a_factory_that_always_panics_ends_the_actor_and_hangs_nobody() {
    let make = || -> Probe { panic!("no data directory") };
    let actor = ON.start(budget(3), make).unwrap();
    let error = actor.ask(Count(3)).wait_timeout(SOON).unwrap_err();
    if actor.is_local() {
        assert!(
            error.to_string().ends_with("the last: no data directory"),
            "{error}"
        );
    }
    // From elsewhere the reason may be missing: the call may have met only the end.
    assert_eq!(error.into_message::<Count>().unwrap(), Count(3));
    actor.shutdown(SOON).wait().unwrap();
    assert_restarts(&actor, 3);
    assert!(!actor.is_alive());
}

///
#[test]
fn a_panic_beyond_the_budget_ends_the_actor_and_hands_queued_messages_back() {
    let census = Census::default();
    let make = {
        let census = census.clone();
        move || Probe {
            _citizen: Some(census.citizen()),
            ..Probe::default()
        }
    };
    let actor = ON.start(budget(1), make).unwrap();
    let gate = Gate::hold(&actor);
    let panics: Vec<_> = (0..2)
        .map(|index| actor.ask(act::<()>(move |_, _| panic!("panic {index}"))))
        .collect();
    let queued = actor.ask(Count(1));
    wait_until_arrived(&actor);
    drop(gate);
    for (index, reply) in panics.into_iter().enumerate() {
        assert_eq!(panic_of(reply.wait_timeout(SOON)), format!("panic {index}"));
    }
    let check = |error, panic: Option<&str>| {
        let CallError::NotDelivered {
            reason, message, ..
        } = error
        else {
            panic!("expected the message back, got {error:?}");
        };
        let panic = panic.map(Into::into);
        assert_eq!(reason, NotDelivered::Stopped { panic });
        assert_eq!(message.into_message::<Count>().unwrap(), Count(1));
    };
    check(queued.wait_timeout(SOON).unwrap_err(), Some("panic 1"));
    // The last failure is seen after the end of an actor of this process has begun. The news of
    // the end of one elsewhere comes a moment later, and does not say why.
    eventually("the end is known", || !actor.is_alive());
    let panic = actor.is_local().then_some("panic 1");
    check(actor.ask(Count(1)).wait_timeout(SOON).unwrap_err(), panic);
    check(actor.tell(Count(1)).unwrap_err(), panic);
    actor.shutdown(SOON).wait().unwrap();
    assert_eq!(census.count(), 0, "the state is dropped");
}

///
#[test]
fn queued_messages_survive_a_restart_in_order() {
    let log = Log::default();
    let actor = ON.spawn({
        let log = log.clone();
        move || Probe::with_log(&log)
    });
    let gate = Gate::hold(&actor);
    let before = actor.ask(Count(1));
    let panicking = actor.ask(act::<()>(|_, _| panic!("once")));
    let after: Vec<_> = (2..50).map(|tag| actor.ask(Count(tag))).collect();
    actor.tell(Count(50)).unwrap();
    drop(gate);
    assert_eq!(before.wait_timeout(SOON).unwrap(), 1);
    assert_eq!(panic_of(panicking.wait_timeout(SOON)), "once");
    for (index, reply) in after.into_iter().enumerate() {
        assert_eq!(reply.wait_timeout(SOON).unwrap(), index as u64 + 1);
    }
    actor.ask(Count(51)).wait_timeout(SOON).unwrap();
    let mut expected = vec!["started".to_owned(), "1".to_owned(), "started".to_owned()];
    expected.extend((2..=51).map(|tag| tag.to_string()));
    // No `stopping` or `stopped` either: the hooks do not run on a panicked actor.
    assert_eq!(log.entries(), expected);
}

///
#[test]
fn told_messages_that_are_lost_are_counted() {
    let before = ps_runtime::actor::dead_letters();
    let actor = ON.start(budget(0), Probe::default).unwrap();
    let gate = Gate::hold(&actor);
    actor.tell(act::<()>(|_, _| panic!("told"))).unwrap();
    actor.tell(Count(0)).unwrap();
    wait_until_arrived(&actor);
    drop(gate);
    actor.shutdown(SOON).wait().unwrap();
    assert_eq!(actor.dead_letters(), 2, "one panicked, one was queued");
    assert!(ps_runtime::actor::dead_letters() >= before + 2);
}

///
#[test]
fn a_panic_while_a_panicked_actor_is_dropped_does_not_end_its_thread() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("in drop");
        }
    }
    let actor = ON.spawn(Probe::default);
    let panicking = actor.ask(act::<()>(|_, ctx| {
        let bomb = Bomb;
        ctx.run_later(SOON, move |_, _| drop(bomb));
        panic!("first");
    }));
    assert_eq!(panic_of(panicking.wait_timeout(SOON)), "first");
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}
