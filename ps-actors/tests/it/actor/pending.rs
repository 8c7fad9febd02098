//! Sets of replies.

use std::time::Duration;

use ps_actors::actor::NotDelivered;
use ps_actors::{ActorRef, CallError, Pending, Spawn, spawn};

use super::probe::{Count, Gate, InContext, Probe, SOON, act, response};

///
#[actix::test]
async fn replies_come_in_the_order_in_which_they_get_ready() {
    let actor = spawn(Probe::default);
    let mut pending = Pending::new();
    let mut senders = Vec::new();
    for key in 0..10_u64 {
        let (send, future) = response();
        senders.push(Some(send));
        pending.insert(key, actor.ask(InContext(future)).timeout(SOON));
    }
    assert_eq!(pending.len(), 10);
    for key in [7, 0, 9, 3, 1, 8, 2, 6, 5, 4] {
        let send = senders[key as usize].take().unwrap();
        send.send(key * 10).unwrap();
        let (ready, result) = pending.next().await.unwrap();
        assert_eq!((ready, result.unwrap()), (key, key * 10));
        assert!(!pending.keys().any(|left| *left == key));
    }
    assert!(pending.is_empty());
    assert!(pending.next().await.is_none());
}

///
#[test]
fn five_thousand_replies_come_each_once_awaited_or_waited_for() {
    let actors: Vec<_> = (0..2)
        .map(|_| {
            Spawn::new()
                .max_pending(5000)
                .start(Probe::default)
                .unwrap()
        })
        .collect();
    let ask_all = || -> Pending<u64, u64> {
        (0..5000)
            .map(|key| (key, actors[key as usize % 2].ask(Count(key)).timeout(SOON)))
            .collect()
    };
    let mut pending = ask_all();
    let mut waited = Vec::new();
    while let Some((key, result)) = pending.wait_next() {
        // Each actor answers in order: its n-th call gets n.
        assert_eq!(result.unwrap(), key / 2 + 1);
        waited.push(key);
    }
    let mut pending = ask_all();
    let mut awaited = Vec::new();
    ps_actors::actor::run(async {
        while let Some((key, result)) = pending.next().await {
            assert_eq!(result.unwrap(), 2500 + key / 2 + 1);
            awaited.push(key);
        }
    });
    for mut keys in [waited, awaited] {
        keys.sort_unstable();
        assert!(keys.into_iter().eq(0..5000));
    }
}

///
#[test]
fn dropping_the_set_takes_back_the_calls_that_have_not_begun() {
    let actor = spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let pending: Pending<_, _> = (0..100).map(|key| (key, actor.ask(Count(key)))).collect();
    assert_eq!(actor.pending(), 101);
    drop(pending);
    assert_eq!(actor.pending(), 1);
    drop(gate);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}

///
#[test]
fn timeouts_hold_inside_a_set() {
    let actor = spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let mut pending = Pending::new();
    pending.insert("slow", actor.ask(Count(0)).timeout(SOON));
    pending.insert(
        "fast",
        actor.ask(Count(0)).timeout(Duration::from_millis(1)),
    );
    let (key, result) = pending.wait_next().unwrap();
    assert_eq!(key, "fast");
    assert!(!result.unwrap_err().may_have_run());
    drop(gate);
    assert_eq!(pending.wait_next().unwrap().1.unwrap(), 1);
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
