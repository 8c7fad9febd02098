//! The ends of actors: graceful, killed, out of references, within a bound.

use std::time::Duration;

use ps_runtime::actor::{LookupError, NotDelivered, UnknownOutcome};
use ps_runtime::{ActorRef, CallError, Spawn, lookup};

use super::ON;
use crate::actor::probe::{
    Atomic, Census, Count, Gate, InContext, Log, OnTask, Probe, SOON, act, eventually, response,
};

fn with_census(census: &Census, log: &Log) -> ActorRef<Probe> {
    let (census, log) = (census.clone(), log.clone());
    ON.spawn(move || Probe {
        _citizen: Some(census.citizen()),
        ..Probe::with_log(&log)
    })
}

///
#[test]
fn queued_messages_and_responses_are_finished_before_a_graceful_stop() {
    let (census, log) = (Census::default(), Log::default());
    let actor = with_census(&census, &log);
    let gate = Gate::hold(&actor);
    let (send, future) = response();
    let (send_on_task, on_task) = response();
    let in_context = actor.ask(InContext::new(future));
    let on_task = actor.ask(OnTask::new(on_task));
    let queued = actor.ask(Count(1));
    actor.tell(Count(2)).unwrap();
    actor.stop();
    actor.stop();
    // What another process was told, it is known to have heard at its end.
    assert_eq!(actor.is_alive(), !actor.is_local());
    let refused = actor.ask(Count(3)).wait_timeout(SOON).unwrap_err();
    assert_eq!(refused.into_message::<Count>().unwrap(), Count(3));
    drop(gate);
    assert_eq!(queued.wait_timeout(SOON).unwrap(), 1);
    assert_eq!(census.count(), 1, "responses are under way");
    send.send(8).unwrap();
    assert_eq!(in_context.wait_timeout(SOON).unwrap(), 8);
    send_on_task.send(9).unwrap();
    assert_eq!(on_task.wait_timeout(SOON).unwrap(), 9);
    actor.shutdown(SOON).wait().unwrap();
    assert_eq!(census.count(), 0);
    assert_eq!(
        log.entries(),
        ["started", "1", "2", "response 8", "stopping", "stopped"]
    );
    assert_eq!(actor.dead_letters(), 0);
}

///
#[test]
fn a_kill_hands_queued_messages_back_at_once_and_lets_the_running_handler_finish() {
    let (census, log) = (Census::default(), Log::default());
    let actor = with_census(&census, &log);
    let (_send, future) = response();
    let in_context = actor.ask(InContext::new(future));
    let (gate, hold) = Gate::new();
    let running = actor.ask(hold);
    gate.wait_until_entered();
    let queued = actor.ask(Count(1));
    actor.tell(Count(2)).unwrap();
    actor.kill();
    // The handler is still at the gate.
    let error = queued.wait_timeout(SOON).unwrap_err();
    assert_eq!(error.into_message::<Count>().unwrap(), Count(1));
    eventually("the told message is counted", || actor.dead_letters() == 1);
    drop(gate);
    running.wait_timeout(SOON).unwrap();
    assert!(matches!(
        in_context.wait_timeout(SOON).unwrap_err(),
        CallError::Unknown {
            reason: UnknownOutcome::Stopped,
            ..
        }
    ));
    ps_runtime::actor::run(actor.stopped());
    assert_eq!(census.count(), 0);
    assert_eq!(log.entries(), ["started"], "no hooks after a kill");
}

///
#[test]
fn a_kill_ends_an_actor_that_waits_for_something_that_never_comes() {
    let actor = ON.spawn(Probe::default);
    let (_send, future) = response();
    let atomic = actor.ask(Atomic::new(future));
    actor.stop();
    actor.kill();
    ps_runtime::actor::run(actor.stopped());
    // Whether it had begun depends on how far the actor got.
    assert!(atomic.wait_timeout(SOON).is_err());
}

///
#[test]
fn an_actor_without_a_name_ends_after_its_last_reference_is_dropped() {
    let (census, log) = (Census::default(), Log::default());
    let actor = with_census(&census, &log);
    let gate = Gate::hold(&actor);
    let clone = actor.clone();
    drop(actor);
    let reply = clone.ask(Count(1));
    clone.tell(Count(2)).unwrap();
    drop(clone);
    drop(gate);
    // Calls made before are still served.
    assert_eq!(reply.wait_timeout(SOON).unwrap(), 1);
    eventually("the actor is dropped", || census.count() == 0);
    assert_eq!(log.entries(), ["started", "1", "2", "stopping", "stopped"]);
}

///
#[test]
fn a_message_may_hold_the_last_reference_to_its_own_receiver() {
    let census = Census::default();
    let actor = with_census(&census, &Log::default());
    let gate = Gate::hold(&actor);
    let itself = actor.clone();
    let reply = actor.ask(act(move |_, _| drop(itself)));
    drop(actor);
    // Takes the call back, and with it the last reference, from inside the reply's destructor.
    drop(reply);
    drop(gate);
    eventually("the actor is dropped", || census.count() == 0);
}

///
#[test]
fn an_actor_may_refuse_to_stop_until_it_is_killed() {
    let census = Census::default();
    let actor = ON.spawn({
        let census = census.clone();
        move || Probe {
            refuse_to_stop: true,
            _citizen: Some(census.citizen()),
            ..Probe::default()
        }
    });
    let error = actor
        .shutdown(Duration::from_millis(20))
        .wait()
        .unwrap_err();
    assert_eq!(error.actors, [actor.name()]);
    eventually("the kill ends it", || census.count() == 0);
}

///
#[test]
fn a_shutdown_ends_in_time_when_a_handler_is_stuck() {
    let census = Census::default();
    let name = format!("shutdown-stuck {ON:?}");
    let options = Spawn::new().name(&name);
    let make = {
        let census = census.clone();
        move || Probe {
            _citizen: Some(census.citizen()),
            ..Probe::default()
        }
    };
    let stuck = ON.start(options, make).unwrap();
    let (gate, hold) = Gate::new();
    let running = stuck.ask(hold);
    gate.wait_until_entered();
    let queued = stuck.ask(Count(1));
    let after = Duration::from_millis(20);
    let error = stuck.shutdown(after).wait().unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("still running after 20ms, left behind: {name}")
    );
    // All its callers are told, though the handler has not returned.
    assert!(matches!(
        running.wait_timeout(SOON).unwrap_err(),
        CallError::Unknown {
            reason: UnknownOutcome::Stopped,
            ..
        }
    ));
    let queued = queued.wait_timeout(SOON).unwrap_err();
    if stuck.is_local() {
        assert!(matches!(
            queued,
            CallError::NotDelivered {
                reason: NotDelivered::Stopped { .. },
                ..
            }
        ));
        assert!(!stuck.is_alive());
        let free = LookupError::UnknownName { name: name.clone() };
        assert_eq!(lookup::<Probe>(&name).unwrap_err(), free);
    } else {
        // Nobody waits for the answer of the process where it is; it may have come before.
        let is_stopped = matches!(
            queued,
            CallError::Unknown {
                reason: UnknownOutcome::Stopped,
                ..
            } | CallError::NotDelivered {
                reason: NotDelivered::Stopped { .. },
                ..
            }
        );
        assert!(is_stopped, "{queued:?}");
    }
    assert_eq!(census.count(), 1, "the thread is left behind");
    drop(gate);
    ps_runtime::actor::run(stuck.stopped());
    assert_eq!(census.count(), 0, "it ends when its handler returns");
}

///
#[actix::test]
async fn a_shutdown_can_be_awaited() {
    let census = Census::default();
    let actor = with_census(&census, &Log::default());
    let reply = actor.ask(Count(0));
    actor.shutdown(SOON).await.unwrap();
    assert_eq!(reply.await.unwrap(), 1);
    assert_eq!(census.count(), 0);
    let stuck = ON.spawn(Probe::default);
    let gate = Gate::hold(&stuck);
    assert!(stuck.shutdown(Duration::from_millis(5)).await.is_err());
    drop(gate);
    stuck.shutdown(Duration::MAX).await.unwrap();
}

///
#[test]
fn many_actors_come_and_go_without_leaving_anything() {
    let (census, log) = (Census::default(), Log::default());
    for _ in 0..10 {
        let actors: Vec<_> = (0..20).map(|_| with_census(&census, &log)).collect();
        for actor in &actors {
            actor.ask(Count(0)).wait_timeout(SOON).unwrap();
        }
    }
    eventually("all actors are dropped", || census.count() == 0);
    #[cfg(target_os = "linux")]
    eventually("all threads have ended", || {
        let threads = std::fs::read_dir("/proc/self/task").unwrap();
        threads.count() < 150
    });
}
