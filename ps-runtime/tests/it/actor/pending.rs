//! Sets of replies.

use std::time::Duration;

use ps_runtime::actor::NoReply;
use ps_runtime::{Pending, Spawn};

use super::ON;
use crate::actor::probe::{
    Count, Gate, InContext, Probe, SOON, assert_gave_up_before_it_began, response,
    wait_until_arrived,
};

///
#[actix::test]
async fn replies_come_in_the_order_in_which_they_get_ready() {
    let actor = ON.spawn(Probe::default);
    let mut pending = Pending::new();
    let mut senders = Vec::new();
    for key in 0..10_u64 {
        let (send, future) = response();
        senders.push(Some(send));
        pending.insert(key, actor.ask(InContext::new(future)).timeout(SOON));
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
            let options = Spawn::new().max_pending(5000);
            ON.start(options, Probe::default).unwrap()
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
    ps_runtime::actor::run(async {
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
    let actor = ON.spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let pending: Pending<_, _> = (0..100).map(|key| (key, actor.ask(Count(key)))).collect();
    assert_eq!(actor.pending(), 101);
    drop(pending);
    assert_eq!(actor.pending(), 1);
    wait_until_arrived(&actor);
    drop(gate);
    assert_eq!(actor.ask(Count(0)).wait_timeout(SOON).unwrap(), 1);
}

///
#[test]
fn timeouts_hold_inside_a_set() {
    let actor = ON.spawn(Probe::default);
    let gate = Gate::hold(&actor);
    let mut pending = Pending::new();
    pending.insert("slow", actor.ask(Count(0)).timeout(SOON));
    let fast = actor.ask(Count(0));
    wait_until_arrived(&actor);
    let after = Duration::from_millis(1);
    pending.insert("fast", fast.timeout(after));
    let (key, result) = pending.wait_next().unwrap();
    assert_eq!(key, "fast");
    assert_gave_up_before_it_began(&actor, after, result.unwrap_err());
    drop(gate);
    assert_eq!(pending.wait_next().unwrap().1.unwrap(), 1);
}

///
#[test]
fn a_wait_for_the_next_reply_that_ends_in_time_loses_nothing() {
    let actor = ON.spawn(Probe::default);
    let mut pending = Pending::new();
    let (send, future) = response();
    pending.insert("late", actor.ask(InContext::new(future)));
    let after = Duration::from_millis(1);
    let NoReply { num_out, .. } = pending.wait_next_timeout(after).unwrap_err();
    assert_eq!((num_out, pending.len()), (1, 1));
    send.send(5).unwrap();
    let (key, result) = pending.wait_next_timeout(SOON).unwrap().unwrap();
    assert_eq!((key, result.unwrap()), ("late", 5));
    assert!(pending.wait_next_timeout(Duration::MAX).unwrap().is_none());
}
