//! Kept results: they stay in the process that computed them, and go directly to the process that takes them.

use ps_runtime::actor::{UnknownOutcome, run};
use ps_runtime::cluster::{Placement, SpawnOn, Transport};
use ps_runtime::codec::Bulk;
use ps_runtime::remote::Kept;
use ps_runtime::{ActorRef, CallError};

use super::world::{Add, Counter, Echo, Fail, GiveBack, SOON, TakeIt, World, config, transports};

fn on_node(world: &World, rank: u32) -> ActorRef<Counter> {
    let options = SpawnOn::new().place(Placement::Rank(rank));
    world.cluster.spawn_with(options, 0).wait().unwrap()
}

///
#[test]
fn a_kept_result_is_taken_once_wherever_it_is() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        for rank in [0, 1] {
            let counter = on_node(&world, rank);
            let numbers = vec![0.5; 70_000];
            let kept = counter.ask_kept(Echo(Bulk::from(numbers.clone())));
            let kept: Kept<Bulk> = kept.wait_timeout(SOON).unwrap();
            assert!(run(kept.take()).unwrap()[..] == numbers);
            let kept = counter.ask_kept(Add(3)).wait_timeout(SOON).unwrap();
            assert_eq!(run(kept.take()).unwrap(), 3);
            // A call that fails keeps nothing: it says why.
            let error = counter
                .ask_kept(Fail("no luck".to_owned()))
                .wait_timeout(SOON);
            assert!(matches!(error, Err(CallError::Failed { .. })), "{error:?}");
            counter.kill();
        }
    }
}

///
#[test]
fn a_ticket_can_be_sent_on_and_sent_back() {
    for transport in transports() {
        let world = World::new(config(transport), 2);
        for (maker, taker) in [(0, 1), (1, 0), (1, 1), (1, 2)] {
            let (maker, taker) = (on_node(&world, maker), on_node(&world, taker));
            let keep = || maker.ask_kept(Add(1)).wait_timeout(SOON).unwrap();
            let taken = taker.ask(TakeIt(keep())).wait_timeout(SOON).unwrap();
            assert_eq!(taken, Ok(1));
            let returned = taker.ask(GiveBack(keep())).wait_timeout(SOON).unwrap();
            assert_eq!(run(returned.take()).unwrap(), 2);
        }
    }
}

///
#[test]
fn a_ticket_that_is_dropped_frees_the_value() {
    let world = World::new(config(Transport::Tcp), 1);
    let counter = on_node(&world, 1);
    for round in 0..2 * ps_runtime::remote::MAX_KEPT {
        let kept = counter.ask_kept(Add(1)).wait_timeout(SOON);
        // If nothing were freed, the node would soon have no room for another one.
        assert!(kept.is_ok(), "round {round}: {kept:?}");
    }
}

///
#[test]
fn a_node_keeps_so_many_values_and_no_more() {
    let world = World::new(config(Transport::Tcp), 1);
    let counter = on_node(&world, 1);
    let kept: Vec<_> = (0..ps_runtime::remote::MAX_KEPT)
        .map(|_| counter.ask_kept(Add(1)).wait_timeout(SOON).unwrap())
        .collect();
    let error = counter.ask_kept(Add(1)).wait_timeout(SOON).unwrap_err();
    let CallError::Unknown {
        reason: UnknownOutcome::BadReply { reason },
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(reason.contains("kept already"), "{reason}");
    drop(kept);
}
