//! Nodes that are lost, replaced, leave, and come back.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use ps_runtime::CallError;
use ps_runtime::actor::{NotDelivered, UnknownOutcome};
use ps_runtime::cluster::{ClusterConfig, ClusterError, Node, NodeExit, Transport};
use ps_runtime::net::memory::{Faults, MemoryNetwork, Outage};

use super::hostile::{head_of, status_of};
use super::world::{self, Greet, Mortal, Never, SOON, World, hosts};
use crate::actor::probe::{Census, eventually};

const LEASE: Duration = Duration::from_secs(1);

fn config(transport: Transport) -> ClusterConfig {
    let mut config = world::config(transport);
    config.net.heartbeat = Duration::from_millis(100);
    config.net.process_lease = LEASE;
    config.net.handshake = LEASE;
    config
}

fn incarnation_of(world: &World, rank: u32) -> Option<u64> {
    let nodes = world.cluster.nodes().into_iter();
    let mut of_rank = nodes.map(|info| info.node).filter(|node| node.rank == rank);
    of_rank.next().map(|node| node.incarnation)
}

fn assert_not_delivered(error: CallError) {
    assert!(matches!(error, CallError::NotDelivered { .. }), "{error:?}");
    assert_eq!(error.into_message::<Greet>().unwrap(), Greet);
}

///
#[test]
fn a_lost_node_ends_its_calls_within_the_lease_and_comes_back_in_another_incarnation() {
    thread::scope(|scope| {
        for outage in [Outage::Silent, Outage::Refused] {
            scope.spawn(move || lose_a_node(outage));
        }
    });
}

fn lose_a_node(outage: Outage) {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let world = World::new(config(Transport::Memory(network.clone())), 1);
    let census = Census::default();
    let mortal = Mortal::on_node(&world, 1, &census);
    let never = mortal.ask(Never);
    mortal.ask(Greet).wait_timeout(SOON).unwrap();

    network.set_outage(Some(outage));
    let begin = Instant::now();
    let error = never.wait_timeout(SOON).unwrap_err();
    let lost = matches!(
        error,
        CallError::Unknown {
            reason: UnknownOutcome::ConnectionLost { .. },
            ..
        }
    );
    assert!(lost, "{outage:?}: {error:?}");
    // A lease, and what a busy machine adds.
    assert!(begin.elapsed() < 5 * LEASE, "{:?}", begin.elapsed());
    // Whatever is called now does not leave this process.
    let unsent = mortal.ask(Greet);
    assert_not_delivered(unsent.wait_timeout(SOON).unwrap_err());
    eventually("the driver gives the node up", || {
        incarnation_of(&world, 1).is_none()
    });
    eventually("the node ends what it made for the driver", || {
        census.count() == 0
    });

    network.set_outage(None);
    eventually("the node is back", || incarnation_of(&world, 1) == Some(2));
    let error = mortal.ask(Greet).wait_timeout(SOON).unwrap_err();
    let stopped = matches!(
        error,
        CallError::NotDelivered {
            reason: NotDelivered::Stopped { .. },
            ..
        }
    );
    assert!(stopped, "{error:?}");
    ps_runtime::actor::run(mortal.stopped());
    let another = Mortal::on_node(&world, 1, &census);
    another.ask(Greet).wait_timeout(SOON).unwrap();
    assert_eq!(census.count(), 1);
}

///
#[test]
fn a_higher_attempt_replaces_a_node_and_a_lower_one_is_refused() {
    for transport in [Transport::Memory(MemoryNetwork::new()), Transport::Tcp] {
        let mut world = World::new(config(transport), 1);
        let census = Census::default();
        let mortal = Mortal::on_node(&world, 1, &census);
        let second = world.node(1, 1).serve();
        eventually("the second has joined", || {
            incarnation_of(&world, 1) == Some(2)
        });
        // The first finds out by itself, ends its actors, and is not taken again.
        let Err(ClusterError::Refused { reason, .. }) = world.nodes.remove(0).wait() else {
            panic!("two nodes have the same rank");
        };
        assert!(reason.contains("attempt 0 of rank 1 is over"), "{reason}");
        eventually("its actors have ended", || census.count() == 0);
        // Until then, a call may have been written to a connection that nobody reads any more.
        ps_runtime::actor::run(mortal.stopped());
        assert_not_delivered(mortal.ask(Greet).wait_timeout(SOON).unwrap_err());
        let refused = world.node(1, 0).serve().wait();
        assert!(matches!(refused, Err(ClusterError::Refused { .. })));
        let another = Mortal::on_node(&world, 1, &census);
        another.ask(Greet).wait_timeout(SOON).unwrap();
        world.cluster.release().wait();
        assert_eq!(second.wait().unwrap(), NodeExit::Released);
    }
}

///
#[test]
fn a_node_that_leaves_ends_its_actors_and_their_callers_are_told() {
    for transport in world::transports() {
        let world = World::new(config(transport), 0);
        let (leave, told_to_leave) = tokio::sync::oneshot::channel::<()>();
        let node = world.node(1, 0).serve_until(async move {
            let _ = told_to_leave.await;
        });
        world.cluster.wait_for_nodes(1, SOON).wait().unwrap();
        let census = Census::default();
        let mortal = Mortal::on_node(&world, 1, &census);
        let never = mortal.ask(Never);
        mortal.ask(Greet).wait_timeout(SOON).unwrap();
        leave.send(()).unwrap();
        let error = never.wait_timeout(SOON).unwrap_err();
        assert!(matches!(error, CallError::Unknown { .. }), "{error:?}");
        assert_eq!(node.wait().unwrap(), NodeExit::Left);
        eventually("the driver knows", || world.cluster.nodes().is_empty());
        eventually("its actors have ended", || census.count() == 0);
        // Until then, a call may have been written to a connection that nobody reads any more.
        ps_runtime::actor::run(mortal.stopped());
        assert_not_delivered(mortal.ask(Greet).wait_timeout(SOON).unwrap_err());
    }
}

/// nothing else keeps the actor or the connection by then.
#[test]
fn a_shutdown_kills_an_actor_that_nobody_refers_to_any_more() {
    // Longer than an actor without references is kept, and with a connection that is lost.
    thread::scope(|scope| {
        scope.spawn(|| shut_down(config, 6 * LEASE, None));
        let soon = Duration::from_millis(50);
        scope.spawn(move || shut_down(world::config, soon, Some(Outage::Refused)));
    });
}

fn shut_down(config: fn(Transport) -> ClusterConfig, after: Duration, outage: Option<Outage>) {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let world = World::new(config(Transport::Memory(network.clone())), 1);
    let census = Census::default();
    let mortal = Mortal::on_node(&world, 1, &census);
    let never = mortal.ask(Never);
    mortal.ask(Greet).wait_timeout(SOON).unwrap();
    // Its handler goes on, and keeps the actor from stopping.
    drop(never);
    let name = mortal.name().to_owned();
    let shutdown = mortal.shutdown(after);
    drop(mortal);
    network.set_outage(outage);
    assert_eq!(shutdown.wait().unwrap_err().actors, [name]);
    network.set_outage(None);
    eventually("the kill ends it", || census.count() == 0);
}

/// Passes connections on, and records the beginning of each.
pub(super) fn listen_in(driver: String) -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let heads: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = Arc::clone(&heads);
    thread::spawn(move || {
        for client in listener.incoming() {
            let (mut client, noted) = (client.unwrap(), Arc::clone(&noted));
            let mut server = TcpStream::connect(&driver).unwrap();
            thread::spawn(move || {
                let head = head_of(&mut client);
                let _ = server.write_all(head.as_bytes());
                noted.lock().unwrap().push(head);
                let mut back = (server.try_clone().unwrap(), client.try_clone().unwrap());
                thread::spawn(move || copy(&mut back.0, &mut back.1));
                copy(&mut client, &mut server);
            });
        }
    });
    (address, heads)
}

fn copy(from: &mut TcpStream, to: &mut TcpStream) {
    let mut bytes = [0; 4096];
    while let Ok(len @ 1..) = from.read(&mut bytes) {
        if to.write_all(&bytes[..len]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Both);
}

/// replays what a node has said when it connected, in its incarnation and after.
#[test]
fn connections_of_an_earlier_life_are_refused() {
    let world = World::new(config(Transport::Tcp), 0);
    let (proxy, heads) = listen_in(world.driver());
    let first = Node::new(world.config.clone(), 1, 0, proxy, hosts()).serve();
    world.cluster.wait_for_nodes(1, SOON).wait().unwrap();
    let find = || {
        let heads = heads.lock().unwrap();
        heads
            .iter()
            .find(|head| head.contains("ps-node: 1.1"))
            .cloned()
    };
    eventually("the node connects as itself", || find().is_some());
    let head = find().unwrap();
    let replay = || status_of(&world.driver(), head.as_bytes());
    assert_eq!(replay(), "101");
    let _second = world.node(1, 1).serve();
    eventually("the second has joined", || {
        incarnation_of(&world, 1) == Some(2)
    });
    assert_eq!(replay(), "410");
    assert!(matches!(first.wait(), Err(ClusterError::Refused { .. })));
}

/// two processes that were both told to be rank 1.
#[test]
fn a_rank_that_lives_is_not_given_to_another_process() {
    for transport in world::transports() {
        let world = World::new(config(transport), 1);
        let census = Census::default();
        let mortal = Mortal::on_node(&world, 1, &census);
        let error = world.node(1, 0).serve().wait().unwrap_err();
        assert!(error.is_permanent(), "{error}");
        let text = error.to_string();
        let holder = format!("process {} on", std::process::id());
        assert!(
            text.contains(&holder) && text.contains("has rank 1 since"),
            "{text}"
        );
        assert_eq!(incarnation_of(&world, 1), Some(1));
        mortal.ask(Greet).wait_timeout(SOON).unwrap();
    }
}

/// a killed process cannot leave in order. The next process gets its rank within two process leases.
#[test]
fn a_rank_whose_process_is_dead_is_given_to_the_next_one() {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let transport = Transport::Memory(network.clone());
    let world = World::new(config(transport), 0);
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let mut first = world.config.clone();
    first.leave_grace = Duration::ZERO;
    let first = Node::new(first, 1, 0, world.driver(), hosts()).serve_until(async move {
        let _ = ended.await;
    });
    world.cluster.wait_for_nodes(1, SOON).wait().unwrap();
    // It is told to leave while nothing of it reaches the driver, as if it had been killed.
    network.set_outage(Some(Outage::Silent));
    end.send(()).unwrap();
    assert_eq!(first.wait().unwrap(), NodeExit::Left);
    network.set_outage(None);
    let _second = world.node(1, 0).serve();
    eventually("the second has joined", || {
        incarnation_of(&world, 1) == Some(2)
    });
}

#[test]
fn a_node_of_another_run_is_not_let_in() {
    let mut world = World::new(config(Transport::Memory(MemoryNetwork::new())), 0);
    world.config.run_id = Some("first".to_owned());
    let cluster = ps_runtime::cluster::Cluster::listen(world.config.clone(), world::LOCAL, hosts());
    let cluster = cluster.unwrap();
    let node = |run_id: Option<&str>| {
        let mut config = world.config.clone();
        config.run_id = run_id.map(str::to_owned);
        let driver = world::driver_address(&cluster);
        Node::new(config, 1, 0, driver, hosts()).serve()
    };
    let error = node(Some("second")).wait().unwrap_err();
    assert!(error.is_permanent(), "{error}");
    assert!(error.to_string().contains("\"second\""), "{error}");
    let _not_told = node(None);
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
}
