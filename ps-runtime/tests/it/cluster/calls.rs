//! Calls to actors of other processes. Callers have the same guarantees as in one process.

use std::time::Duration;

use ps_runtime::actor::{NotDelivered, UnknownOutcome};
use ps_runtime::cluster::{Cluster, Hosts, Node, Placement, SpawnOn, Transport};
use ps_runtime::codec::Bulk;
use ps_runtime::net::memory::{Faults, MemoryNetwork, Outage};
use ps_runtime::{ActorRef, CallError, Spawn};

use super::incarnations::listen_in;
use super::world::{
    Add, Ask, Counter, Echo, Fail, LOCAL, Myself, Never, SOON, Unlisted, World, config,
    driver_address, hosts, transports,
};
use crate::actor::probe::{Count, Gate, Log, Probe, act, wait_until_arrived};

fn on_node(world: &World, rank: u32, start: i64) -> ActorRef<Counter> {
    let options = SpawnOn::new().place(Placement::Rank(rank));
    world.cluster.spawn_with(options, start).wait().unwrap()
}

#[test]
fn a_call_to_an_actor_elsewhere_is_written_as_any_other() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let counter = on_node(&world, 1, 40);
        assert!(!counter.is_local());
        assert_eq!(counter.ask(Add(2)).wait_timeout(SOON).unwrap(), 42);
        counter.tell(Add(1)).unwrap();
        assert_eq!(counter.ask(Add(0)).wait_timeout(SOON).unwrap(), 43);
    }
}

///
#[test]
fn calls_arrive_in_the_order_sent() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let counter = on_node(&world, 1, 0);
        let replies: Vec<_> = (0..500).map(|_| counter.ask(Add(1))).collect();
        for (index, reply) in (1..).zip(replies) {
            assert_eq!(reply.wait_timeout(SOON).unwrap(), index);
        }
    }
}

#[test]
fn numbers_of_any_size_come_back_bit_for_bit() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let counter = on_node(&world, 1, 0);
        for len in [0, 1, 1000, 1_000_003] {
            let sent: Vec<f32> = (0..len).map(|i| (i as f32).sqrt()).collect();
            let reply = counter.ask(Echo(Bulk::from(sent.clone())));
            let got = reply.wait_timeout(SOON).unwrap();
            assert!(got[..] == sent, "{len} numbers");
        }
    }
}

/// A-10, for an actor of another process.
#[test]
fn a_panic_elsewhere_fails_the_call_and_the_actor_starts_again() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let counter = on_node(&world, 1, 5);
        let failed = counter
            .ask(Fail("out of luck".to_owned()))
            .wait_timeout(SOON);
        let Err(CallError::Failed { panic, actor }) = failed else {
            panic!("{failed:?}");
        };
        assert_eq!(&*panic, "out of luck");
        assert_eq!(&*actor, counter.name());
        assert_eq!(counter.ask(Add(0)).wait_timeout(SOON).unwrap(), 5);
    }
}

#[test]
fn references_travel_and_lead_straight_to_their_actor() {
    for transport in transports() {
        let world = World::new(config(transport), 2);
        let (first, second) = (on_node(&world, 1, 10), on_node(&world, 2, 20));
        let ask = |asked: &ActorRef<Counter>, other: &ActorRef<Counter>, amount| {
            asked
                .ask(Ask(other.clone(), Add(amount)))
                .wait_timeout(SOON)
                .unwrap()
                .unwrap()
        };
        assert_eq!(ask(&first, &second, 1), 21);
        assert_eq!(ask(&second, &first, 2), 12);
        // An actor that is given a reference to itself sees that it is here.
        let own = first.ask(Myself).wait_timeout(SOON).unwrap().unwrap();
        assert_eq!(own.ask(Add(0)).wait_timeout(SOON).unwrap(), 12);
        assert_eq!(own.id(), first.id(), "it is the same actor");
        // One of the driver's own can be called from elsewhere, too.
        let here = on_node(&world, 0, 30);
        assert!(here.is_local());
        assert_eq!(ask(&first, &here, 3), 33);
        assert_eq!(here.ask(Add(0)).wait_timeout(SOON).unwrap(), 33);
    }
}

/// R-19 needs it: memory can be lent over a Unix socket only.
#[test]
fn a_node_on_the_drivers_host_calls_the_drivers_actors_over_its_unix_socket() {
    for (transport, is_by_tcp) in [(Transport::Tcp, true), (Transport::Sockets, false)] {
        let world = World::new(config(transport), 0);
        let (proxy, heads) = listen_in(world.driver());
        let _node = Node::new(world.config.clone(), 1, 0, proxy, hosts()).serve();
        world.cluster.wait_for_nodes(1, SOON).wait().unwrap();
        let (here, there) = (on_node(&world, 0, 40), on_node(&world, 1, 0));
        let asked = there.ask(Ask(here, Add(2))).wait_timeout(SOON).unwrap();
        assert_eq!(asked.unwrap(), 42);
        let heads = heads.lock().unwrap();
        let is_of_node = |head: &String| head.contains("ps-node: 1.1");
        assert_eq!(heads.iter().any(is_of_node), is_by_tcp, "{heads:#?}");
    }
}

#[test]
fn a_message_that_is_not_listed_comes_back_with_advice() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let counter = on_node(&world, 1, 0);
        let error = counter.ask(Unlisted(7)).wait_timeout(SOON).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("Unlisted") && text.contains("Remote::messages"),
            "{text}"
        );
        assert!(!error.may_have_run());
        assert_eq!(error.into_message::<Unlisted>().unwrap(), Unlisted(7));
    }
}

/// a handler that has begun goes on, and its caller is told that it may have.
#[test]
fn a_timeout_ends_the_wait_and_frees_the_slot() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let counter = on_node(&world, 1, 0);
        let short = Duration::from_millis(20);
        let never = counter.ask(Never);
        // It is there before the time begins: until then it could be taken back.
        counter.ask(Add(0)).wait_timeout(SOON).unwrap();
        let error = never.wait_timeout(short).unwrap_err();
        let Err(CallError::Unknown { reason, .. }) = Err::<(), _>(error) else {
            panic!("it may have run");
        };
        assert_eq!(reason, UnknownOutcome::TimedOut { after: short });
        assert_eq!(counter.pending(), 0);
        assert_eq!(counter.ask(Add(1)).wait_timeout(SOON).unwrap(), 1);
    }
}

/// An actor of this process, and a reference to it that leads through the network and a node.
fn behind_the_network(
    network: &MemoryNetwork,
    name: &str,
    log: &Log,
) -> (Cluster, ActorRef<Probe>, ActorRef<Probe>) {
    let config = config(Transport::Memory(network.clone()));
    let cluster = Cluster::listen(config.clone(), LOCAL, Hosts::new()).unwrap();
    let driver = driver_address(&cluster);
    drop(Node::new(config, 1, 0, driver, Hosts::new().find::<Probe>()).serve());
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
    let make = {
        let log = log.clone();
        move || Probe::with_log(&log)
    };
    let here = Spawn::new().name(name).start(make).unwrap();
    let there = cluster.lookup::<Probe>(name).wait().unwrap();
    assert!(!there.is_local());
    (cluster, here, there)
}

/// the connection is lost again and again. Calls are made while it is there, while it is not,
/// and while a new one is made.
#[test]
fn calls_arrive_in_the_order_sent_when_the_connection_is_lost_and_opened_again() {
    const CUT_OFF: u64 = u64::MAX;
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let log = Log::default();
    let (_cluster, here, there) = behind_the_network(&network, "reconnected", &log);
    let mut expected = vec!["started".to_owned()];
    for round in 0..10 {
        let tag = |index: u64| round * 100 + index;
        let gate = Gate::hold(&here);
        let cut_off = there.ask(Count(CUT_OFF));
        wait_until_arrived(&there);
        network.set_outage(Some(Outage::Refused));
        let error = cut_off.wait_timeout(SOON).unwrap_err();
        assert!(error.is_connection_lost(), "{error}");
        for index in 0..50 {
            there.tell(Count(tag(index))).unwrap();
        }
        network.set_outage(None);
        let asked: Vec<_> = (50..99).map(|index| there.ask(Count(tag(index)))).collect();
        drop(gate);
        for reply in asked {
            reply.wait_timeout(SOON).unwrap();
        }
        there.ask(Count(tag(99))).wait_timeout(SOON).unwrap();
        expected.extend((0..100).map(|index| tag(index).to_string()));
    }
    // A `stop` keeps its place, too. What is written before the loss is noticed may be lost, so that is waited for.
    let gate = Gate::hold(&here);
    let cut_off = there.ask(Count(CUT_OFF));
    wait_until_arrived(&there);
    network.set_outage(Some(Outage::Refused));
    let error = cut_off.wait_timeout(SOON).unwrap_err();
    assert!(error.is_connection_lost(), "{error}");
    there.tell(Count(1_000)).unwrap();
    there.stop();
    network.set_outage(None);
    drop(gate);
    ps_runtime::actor::run(here.stopped());
    expected.extend(["1000", "stopping", "stopped"].map(str::to_owned));
    let mut entries = log.entries();
    // It is taken back as soon as the loss is noticed there, too. That may be after the gate has opened.
    entries.retain(|entry| *entry != CUT_OFF.to_string());
    for (got, expected) in entries.iter().zip(&expected) {
        assert_eq!(got, expected);
    }
    assert_eq!(entries.len(), expected.len());
}

/// the actor waits on its own thread for itself, in a ring through another process. In one process this
/// is an error at once.
#[test]
fn a_blocking_wait_in_a_ring_through_another_process_is_not_noticed() {
    let network = MemoryNetwork::new();
    let log = Log::default();
    let (_cluster, here, there) = behind_the_network(&network, "in a ring", &log);
    let after = Duration::from_millis(100);
    let waits = act(move |_, _| {
        let me = ActorRef::<Probe>::current().expect("called on the actor's thread");
        let noticed = me.ask(Count(1)).wait_timeout(after).unwrap_err();
        let not_noticed = there.ask(Count(2)).wait_timeout(after).unwrap_err();
        [noticed, not_noticed]
    });
    let [noticed, not_noticed] = here.ask(waits).wait_timeout(SOON).unwrap();
    let CallError::NotDelivered { reason, .. } = noticed else {
        panic!("{noticed}");
    };
    assert_eq!(reason, NotDelivered::WouldDeadlock);
    let CallError::Unknown { reason, .. } = not_noticed else {
        panic!("{not_noticed}");
    };
    assert_eq!(reason, UnknownOutcome::TimedOut { after });
    here.ask(Count(3)).wait_timeout(SOON).unwrap();
    here.shutdown(SOON).wait().unwrap();
}

/// two calls are given up, and no `Cancel` arrives. The call that was sent with its time limit does not
/// begin.
#[test]
fn a_call_whose_time_is_over_never_begins_though_its_connection_is_silent() {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let log = Log::default();
    let (_cluster, here, there) = behind_the_network(&network, "behind a silent connection", &log);

    let gate = Gate::hold(&here);
    let limit = Duration::from_millis(50);
    let with_limit = there.ask_within(Count(1), limit);
    let without = there.ask(Count(2));
    wait_until_arrived(&there);
    network.set_outage(Some(Outage::Silent));
    // The limit counts from the arrival there, which was before.
    for given_up in [without.wait_timeout(limit), with_limit.wait()] {
        let Err(CallError::Unknown { reason, .. }) = given_up else {
            panic!("nobody knows: {given_up:?}");
        };
        assert_eq!(reason, UnknownOutcome::TimedOut { after: limit });
    }
    drop(gate);
    here.ask(Count(3)).wait_timeout(SOON).unwrap();
    assert_eq!(log.entries(), ["started", "2", "3"]);
    network.set_outage(None);
    assert_eq!(there.ask(Count(4)).wait_timeout(SOON).unwrap(), 3);
    here.shutdown(SOON).wait().unwrap();
}

#[test]
fn an_actor_that_was_stopped_or_killed_says_so() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        for kill in [false, true] {
            let counter = on_node(&world, 1, 0);
            let never = counter.ask(Never);
            // It is there before the end is.
            counter.ask(Add(1)).wait_timeout(SOON).unwrap();
            match kill {
                true => counter.kill(),
                // With a call under way that never ends, only the bound ends it.
                false => drop(counter.shutdown(Duration::ZERO).wait()),
            }
            let error = never.wait_timeout(SOON).unwrap_err();
            assert!(matches!(error, CallError::Unknown { .. }), "{error}");
            ps_runtime::actor::run(counter.stopped());
            let error = counter.ask(Add(1)).wait_timeout(SOON).unwrap_err();
            let CallError::NotDelivered { reason, .. } = &error else {
                panic!("{error}");
            };
            assert!(matches!(reason, NotDelivered::Stopped { .. }), "{error}");
            assert_eq!(error.into_message::<Add>().unwrap(), Add(1));
            assert!(!counter.is_alive());
        }
    }
}
