//! What there is in one process only.
//!
//! - Blocking on one's own thread is noticed by the actor's id, which another process does not have.
//! - Actix systems, arbiters and threads belong to one process, as does the end of all its actors.
//! - Names (`names`) are kept per process; `cluster::nodes` tests looking them up in all.
//! - Restarts are counted where the actor is; `panics` checks the count there.

use std::time::Duration;

use actix::System;
use ps_runtime::actor::{NotDelivered, UnknownOutcome};
use ps_runtime::{ActorRef, CallError, Pending, Spawn, shutdown_all, spawn};

use super::probe::{Count, Gate, InContext, Probe, SOON, act, response};

fn assert_send_sync<T: Send + Sync>() {}

#[test]
fn references_replies_and_errors_may_cross_threads() {
    fn assert_send<T: Send + Unpin>() {}
    assert_send_sync::<ActorRef<Probe>>();
    assert_send_sync::<CallError>();
    assert_send::<ps_runtime::Reply<u64>>();
    assert_send::<ps_runtime::Pending<u64, u64>>();
}

///
#[test]
fn a_blocking_wait_on_the_actors_own_thread_is_refused() {
    let actor = spawn(Probe::default);
    let error = actor
        .ask(act(|_, _| {
            let me = ActorRef::<Probe>::current().expect("called on the actor's thread");
            me.ask(Count(9)).wait().unwrap_err()
        }))
        .wait_timeout(SOON)
        .unwrap();
    assert!(matches!(
        &error,
        CallError::NotDelivered {
            reason: NotDelivered::WouldDeadlock,
            ..
        }
    ));
    assert_eq!(error.into_message::<Count>().unwrap(), Count(9));
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}

///
#[test]
fn a_blocking_wait_for_the_actors_own_running_response_is_refused() {
    let actor = spawn(Probe::default);
    let (send, future) = response();
    let running = actor.ask(InContext::new(future));
    let error = actor
        .ask(act(move |_, _| running.wait().unwrap_err()))
        .wait_timeout(SOON)
        .unwrap();
    assert!(matches!(
        error,
        CallError::Unknown {
            reason: UnknownOutcome::WouldDeadlock,
            ..
        }
    ));
    send.send(0).unwrap();
}

///
#[test]
fn a_blocking_wait_on_the_own_thread_gets_a_result_that_is_there() {
    let actor = spawn(Probe::default);
    let reply = actor.ask(Count(0));
    actor.ask(act(|_, _| ())).wait_timeout(SOON).unwrap();
    let result = actor.ask(act(|_, _| reply.wait().unwrap()));
    assert_eq!(result.wait_timeout(SOON).unwrap(), 1);
}

///
#[test]
fn a_blocking_wait_on_the_own_thread_fails_the_own_replies_and_gets_the_others() {
    let (actor, other) = (spawn(Probe::default), spawn(Probe::default));
    let results = actor
        .ask(act(move |_, _| {
            let me = ActorRef::<Probe>::current().unwrap();
            let mut pending = Pending::new();
            pending.insert("other", other.ask(Count(0)));
            pending.insert("me", me.ask(Count(0)));
            [pending.wait_next().unwrap(), pending.wait_next().unwrap()]
        }))
        .wait_timeout(SOON)
        .unwrap();
    for (key, result) in results {
        match key {
            "other" => assert_eq!(result.unwrap(), 1),
            _ => assert!(matches!(
                result.unwrap_err(),
                CallError::NotDelivered {
                    reason: NotDelivered::WouldDeadlock,
                    ..
                }
            )),
        }
    }
}

///
#[test]
fn actors_spawned_without_an_actix_system_share_a_background_one() {
    assert!(!System::is_registered());
    let system_of = |actor: &ActorRef<Probe>| {
        actor
            .ask(act(|_, _| System::current().id()))
            .wait_timeout(SOON)
            .unwrap()
    };
    let (first, second) = (spawn(Probe::default), spawn(Probe::default));
    assert_eq!(system_of(&first), system_of(&second));
    // Stopping that system, which no program of the user runs, must not stop actors or timers.
    first
        .ask(act(|_, _| System::current().stop()))
        .wait_timeout(SOON)
        .unwrap();
    let gate = Gate::hold(&second);
    let reply = second.ask(Count(0)).timeout(Duration::from_millis(1));
    assert!(ps_runtime::actor::run(reply).is_err());
    drop(gate);
}

///
#[actix::test]
async fn actors_see_the_system_that_spawned_them_and_have_an_arbiter_of_their_own() {
    let actor = spawn(Probe::default);
    let (system, spawned) = actor
        .ask(act(|_, _| {
            let (done, is_done) = std::sync::mpsc::channel();
            let here = std::thread::current().id();
            // A task on the actor's arbiter runs on the actor's thread.
            actix::Arbiter::current().spawn_fn(move || {
                done.send(std::thread::current().id() == here).unwrap();
            });
            (System::current().id(), is_done)
        }))
        .timeout(SOON)
        .await
        .unwrap();
    assert_eq!(system, System::current().id());
    assert!(spawned.recv_timeout(SOON).unwrap());
}

///
#[test]
fn an_actor_outlives_the_system_that_spawned_it() {
    let actor = actix::System::new().block_on(async { spawn(Probe::default) });
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}

#[test]
fn threads_are_named_after_their_actors() {
    let thread_name = |actor: &ActorRef<Probe>| {
        actor
            .ask(act(|_, _| std::thread::current().name().map(str::to_owned)))
            .wait_timeout(SOON)
            .unwrap()
    };
    let plain = spawn(Probe::default);
    assert_eq!(thread_name(&plain).as_deref(), Some(plain.name()));
    assert_eq!(plain.name(), format!("Probe#{}", plain.id()));
    let named = Spawn::new()
        .thread_name("ps-thread")
        .start(Probe::default)
        .unwrap();
    assert_eq!(thread_name(&named).as_deref(), Some("ps-thread"));
}

/// Runs in a process of its own, where it ends no other test's actors.
#[test]
fn the_whole_process_shuts_down_within_its_bound() {
    const CHILD: &str = "PS_ACTORS_TEST_SHUTDOWN_ALL";
    if std::env::var_os(CHILD).is_none() {
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "actor::local::the_whole_process_shuts_down_within_its_bound",
            ])
            .env(CHILD, "1")
            .status()
            .unwrap();
        assert!(status.success(), "the child process failed");
        return;
    }
    shutdown_all(Duration::ZERO)
        .wait()
        .expect("there is no actor yet");
    let well: Vec<_> = (0..3).map(|_| spawn(Probe::default)).collect();
    let replies: Vec<_> = well.iter().map(|actor| actor.ask(Count(0))).collect();
    let stuck = Spawn::new().name("stuck").start(Probe::default).unwrap();
    let gate = Gate::hold(&stuck);
    let error = shutdown_all(Duration::from_secs(2)).wait().unwrap_err();
    assert_eq!(error.actors, ["stuck"]);
    for reply in replies {
        assert_eq!(reply.wait_timeout(SOON).unwrap(), 1);
    }
    assert!(well.iter().all(|actor| !actor.is_alive()));
    drop(gate);
    shutdown_all(SOON).wait().expect("all have ended");
}
