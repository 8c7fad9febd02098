//! Names: one living actor each, free again after its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use actix::{Actor, Context};
use ps_runtime::actor::LookupError;
use ps_runtime::{RestartPolicy, Spawn, SpawnError, get_or_spawn, lookup};

use super::probe::{Census, Count, Gate, Probe, SOON};

struct Other;

impl Actor for Other {
    type Context = Context<Self>;
}

///
#[test]
fn a_name_finds_its_actor_until_the_actor_has_ended() {
    let name = "names-a";
    assert_eq!(
        lookup::<Probe>(name).unwrap_err(),
        LookupError::UnknownName { name: name.into() }
    );
    let actor = Spawn::new().name(name).start(Probe::default).unwrap();
    assert_eq!(actor.name(), name);
    let found = lookup::<Probe>(name).unwrap();
    assert_eq!(found.id(), actor.id());
    let error = lookup::<Other>(name).unwrap_err().to_string();
    assert!(
        error.contains("Probe, not a") && error.contains("Other"),
        "{error}"
    );

    let gate = Gate::hold(&actor);
    let taken = Spawn::new().name(name).start(Probe::default).unwrap_err();
    assert_eq!(
        taken.to_string(),
        "an actor named \"names-a\" is running already"
    );
    actor.stop();
    let stopping = get_or_spawn(name, Probe::default).unwrap_err();
    assert_eq!(
        stopping.to_string(),
        "an actor named \"names-a\" is still stopping"
    );
    drop(gate);
    actor.shutdown(SOON).wait().unwrap();
    let successor = Spawn::new().name(name).start(Probe::default).unwrap();
    assert_ne!(successor.id(), actor.id());
    successor.shutdown(SOON).wait().unwrap();
    assert!(lookup::<Probe>(name).is_err());
}

///
#[test]
fn a_named_actor_lives_without_references_and_keeps_its_state() {
    let actor = get_or_spawn("names-b", Probe::default).unwrap();
    actor.ask(Count(0)).wait_timeout(SOON).unwrap();
    drop(actor);
    let again = get_or_spawn("names-b", Probe::default).unwrap();
    assert_eq!(again.ask(Count(0)).wait_timeout(SOON).unwrap(), 2);
    again.shutdown(SOON).wait().unwrap();
}

///
#[test]
fn of_many_threads_that_get_or_spawn_a_name_one_spawns() {
    for round in 0..20 {
        let name = format!("names-race-{round}");
        let built = Arc::new(AtomicU32::new(0));
        let barrier = std::sync::Barrier::new(8);
        let ids: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        barrier.wait();
                        let built = Arc::clone(&built);
                        let actor = get_or_spawn(&name, move || {
                            built.fetch_add(1, Ordering::SeqCst);
                            Probe::default()
                        })
                        .unwrap();
                        actor.ask(Count(0)).wait_timeout(SOON).unwrap();
                        actor.id()
                    })
                })
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]));
        assert_eq!(built.load(Ordering::SeqCst), 1);
        let actor = lookup::<Probe>(&name).unwrap();
        assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 9);
        actor.shutdown(SOON).wait().unwrap();
    }
}

///
#[test]
fn get_or_spawn_refuses_an_actor_of_another_type() {
    let actor = Spawn::new().name("names-c").start(|| Other).unwrap();
    let error = get_or_spawn("names-c", Probe::default).unwrap_err();
    assert!(matches!(
        error,
        SpawnError::Lookup(LookupError::WrongType { .. })
    ));
    actor.shutdown(SOON).wait().unwrap();
}

///
#[test]
fn an_actor_that_ends_by_panics_frees_its_name_and_leaves_nothing() {
    let census = Census::default();
    for _ in 0..10 {
        let citizen = census.citizen();
        let actor = Spawn::new()
            .name("names-d")
            .restart(RestartPolicy::NEVER)
            .start(move || -> Probe {
                let _held_by_the_factory = &citizen;
                panic!("never starts")
            })
            .unwrap();
        ps_runtime::actor::run(actor.stopped());
    }
    super::probe::eventually("the factories are dropped", || census.count() == 0);
}

#[test]
fn options_that_cannot_work_are_refused_with_a_reason() {
    let check = |spawn: Spawn, expected: &str| {
        let error = spawn.start(Probe::default).unwrap_err().to_string();
        assert!(
            error.contains(expected),
            "{error:?} should contain {expected:?}"
        );
    };
    check(Spawn::new().name(""), "it is empty");
    check(Spawn::new().name("a\0b"), "control character");
    check(Spawn::new().thread_name("a\nb"), "control character");
    check(
        Spawn::new().max_pending(0),
        "max_pending must be at least 1",
    );
    let restart = RestartPolicy {
        max_restarts: 1,
        within: Duration::ZERO,
    };
    check(Spawn::new().restart(restart), "longer than zero");
}
