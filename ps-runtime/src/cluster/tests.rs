//! Tests that need private parts of the crate: which processes may send to nodes, that nothing of an
//! incarnation stays in memory, and which messages are too large to be sent.

mod fuzz;
mod refusals;

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use actix::{Actor, Context, Handler, Message, MessageResult};
use futures_util::FutureExt;
use serde::{Deserialize, Serialize};

use super::agent::{DriverAgent, Find, Join, Make, NodeAgent, agent_of, hosted_name};
use super::host::Args;
use super::members::Claim;
use super::task_scope::TaskScope;
use super::*;
use crate::actor::{ActorRef, CallError, NotDelivered, UnknownOutcome};
use crate::codec::Bulk;
use crate::net::NetConfig;
use crate::net::memory::{Faults, MemoryNetwork, Outage};
use crate::remote::kept::KeptResults;
use crate::remote::process::tests::num_living;
use crate::remote::process::{NodeId, Process};
use crate::remote::reference::reference;
use crate::remote::{Messages, Remote, untraced};

const SOON: Duration = Duration::from_secs(60);

const LOCAL: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let begin = Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < SOON, "not so in {SOON:?}: {what}");
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// Each test has its own lease, by which its processes are told from those of other tests.
fn config(network: &MemoryNetwork, lease: Duration) -> ClusterConfig {
    ClusterConfig {
        transport: Transport::Memory(network.clone()),
        net: NetConfig::default().with_process_lease(lease),
        join_timeout: Duration::from_millis(1),
        ..ClusterConfig::default()
    }
}

/// Long, so that no process is lost on a busy machine.
fn patient(micros: u64) -> Duration {
    Duration::from_secs(20) + Duration::from_micros(micros)
}

fn listen(config: &ClusterConfig, hosts: &Hosts) -> (Cluster, String) {
    let cluster = Cluster::listen(config.clone(), LOCAL, hosts.clone()).unwrap();
    let address = cluster.addresses()[0].to_string();
    (cluster, address)
}

/// An actor that is counted, and sends back what it is told to.
struct Porter {
    alive: Arc<AtomicUsize>,
}

impl Porter {
    fn new(alive: &Arc<AtomicUsize>) -> Self {
        alive.fetch_add(1, Ordering::SeqCst);
        let alive = Arc::clone(alive);
        Self { alive }
    }
}

impl Drop for Porter {
    fn drop(&mut self) {
        self.alive.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Actor for Porter {
    type Context = Context<Self>;
}

/// Carries buffers there, and buffers of one number back.
#[derive(Debug, Serialize, Deserialize)]
struct Carry {
    there: Vec<Bulk>,
    text: String,
    num_back: usize,
}

impl Message for Carry {
    type Result = Vec<Bulk>;
}

impl Handler<Carry> for Porter {
    type Result = MessageResult<Carry>;

    fn handle(&mut self, carry: Carry, _: &mut Context<Self>) -> Self::Result {
        let back = (0..carry.num_back).map(|_| Bulk::from(vec![0.0]));
        MessageResult(back.collect())
    }
}

impl Remote for Porter {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Carry>();
    }
}

impl Hosted for Porter {
    type Args = ();
}

fn hosts(alive: &Arc<AtomicUsize>) -> Hosts {
    let alive = Arc::clone(alive);
    Hosts::new().host(move |()| Ok(Porter::new(&alive)))
}

fn carry(lengths: &[usize], num_back: usize) -> Carry {
    Carry {
        there: lengths
            .iter()
            .map(|len| Bulk::from(vec![0.5; *len]))
            .collect(),
        text: String::new(),
        num_back,
    }
}

/// an incarnation that is over is refused everywhere, also by other nodes.
#[test]
fn an_incarnation_that_is_over_is_refused_by_other_nodes() {
    let (network, alive) = (MemoryNetwork::new(), Arc::default());
    let config = config(&network, patient(1));
    let (cluster, address) = listen(&config, &hosts(&alive));
    let node = |rank, attempt| Node::new(config.clone(), rank, attempt, &address, hosts(&alive));
    let _first = node(1, 0).serve();
    let _other = node(2, 0).serve();
    cluster.wait_for_nodes(2, SOON).wait().unwrap();
    let (incarnation, other) = (
        NodeId {
            rank: 1,
            incarnation: 1,
        },
        NodeId {
            rank: 2,
            incarnation: 1,
        },
    );
    let inner = cluster.inside();
    // As the first node, which does not know yet that it is over.
    let zombie = || {
        let zombie = config.process();
        zombie.enter(incarnation, inner.0.session());
        let addresses = inner.1.addresses(other).unwrap();
        zombie.resolve_with(Box::new(move |_| {
            std::future::ready(Ok(addresses.clone())).boxed()
        }));
        zombie
    };
    let find = || Find {
        type_name: hosted_name::<Porter>(),
        name: "nobody".to_owned(),
    };
    let connected = zombie();
    let agent = agent_of::<NodeAgent>(&connected, other);
    assert!(agent.ask(find()).wait_timeout(SOON).unwrap().is_none());
    let _second = node(1, 1).serve();
    eventually("the second incarnation", || {
        inner.1.is_member(NodeId {
            rank: 1,
            incarnation: 2,
        })
    });
    eventually("its connection is closed with its next frame", || {
        agent.ask(find()).wait_timeout(SOON).is_err()
    });
    let late = zombie();
    let refused = agent_of::<NodeAgent>(&late, other)
        .ask(find())
        .wait_timeout(SOON);
    let Err(CallError::NotDelivered {
        reason: NotDelivered::Stopped { .. },
        ..
    }) = refused
    else {
        panic!("{refused:?}");
    };
    // The other node cannot have heard of this incarnation, because there is none.
    let made_up = config.process();
    made_up.enter(
        NodeId {
            rank: 1,
            incarnation: 7,
        },
        inner.0.session(),
    );
    let addresses = inner.1.addresses(other).unwrap();
    made_up.resolve_with(Box::new(move |_| {
        std::future::ready(Ok(addresses.clone())).boxed()
    }));
    let refused = agent_of::<NodeAgent>(&made_up, other)
        .ask(find())
        .wait_timeout(SOON);
    assert!(
        matches!(refused, Err(CallError::NotDelivered { .. })),
        "{refused:?}"
    );
}

/// without any call.
#[test]
fn a_reference_that_was_given_up_connects_again() {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let config = config(&network, Duration::from_millis(200));
    let (cluster, _) = listen(&config, &hosts(&Arc::default()));
    let (process, members) = cluster.inside();
    let join = Join {
        rank: 1,
        attempt: 0,
        process: 1,
        run_id: None,
        user: None,
        addresses: Vec::new(),
        resources: Resources::none(),
        host: String::new(),
        pid: 0,
        facts: Default::default(),
    };
    let Claim::Admitted(node) = members.admit(&join).unwrap() else {
        panic!("nobody else has the rank");
    };
    let here = cluster.spawn::<Porter>(()).wait().unwrap();
    let wire = process.export(&here);
    let number = wire.actor;
    let caller = config.process();
    caller.enter(node, process.session());
    let addresses = cluster.addresses().to_vec();
    caller.resolve_with(Box::new(move |_| {
        std::future::ready(Ok(addresses.clone())).boxed()
    }));
    let there: ActorRef<Porter> = reference(&caller, wire).unwrap();
    let is_connected = || process.num_connections(number) == Some(1);
    eventually("it connects", is_connected);
    network.set_outage(Some(Outage::Refused));
    crate::actor::run(there.stopped());
    eventually("nobody is connected", || !is_connected());
    network.set_outage(None);
    eventually("it connects again", is_connected);
    there.ask(carry(&[1], 1)).wait_timeout(SOON).unwrap();
    // It does not connect again once the last reference was dropped.
    drop(there);
    eventually("the connection is closed", || !is_connected());
}

#[test]
fn nothing_of_a_cluster_stays_when_it_is_dropped() {
    let (network, alive) = (MemoryNetwork::new(), Arc::default());
    let config = config(&network, patient(2));
    for _ in 0..3 {
        let (cluster, address) = listen(&config, &hosts(&alive));
        let node = Node::new(config.clone(), 1, 0, address, hosts(&alive)).serve();
        cluster.wait_for_nodes(1, SOON).wait().unwrap();
        let there = cluster.spawn::<Porter>(()).wait().unwrap();
        let here = SpawnOn::new().place(Placement::Driver);
        let here: ActorRef<Porter> = cluster.spawn_with(here, ()).wait().unwrap();
        for porter in [&there, &here] {
            porter.ask(carry(&[5], 1)).wait_timeout(SOON).unwrap();
        }
        drop((there, here, cluster));
        assert_eq!(node.wait().unwrap(), NodeExit::Released);
    }
    eventually("all processes are gone", || {
        num_living(config.net.process_lease) == 0
    });
    eventually("all actors are gone", || alive.load(Ordering::SeqCst) == 0);
}

#[test]
fn an_actor_that_is_being_made_does_not_hold_a_cluster() {
    let network = MemoryNetwork::new();
    let config = config(&network, patient(5));
    let gate = Gate::default();
    let (cluster, address) = listen(&config, &Hosts::new());
    let hosts = {
        let (alive, gate) = (Arc::default(), gate.clone());
        Hosts::new().host(move |()| {
            gate.pass();
            Ok(Porter::new(&alive))
        })
    };
    let node = Node::new(config.clone(), 1, 0, address, hosts).serve();
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
    let making = cluster.spawn::<Porter>(());
    eventually("it is being made", || gate.num_waiting() == 1);
    drop(cluster);
    let released = thread::spawn(move || node.wait());
    eventually("the node is released", || released.is_finished());
    assert_eq!(released.join().unwrap().unwrap(), NodeExit::Released);
    gate.open();
    assert!(making.wait().is_err());
    eventually("all processes are gone", || {
        num_living(config.net.process_lease) == 0
    });
}

#[test]
fn nothing_of_a_failed_join_stays() {
    let (network, alive) = (MemoryNetwork::new(), Arc::default());
    let config = config(&network, patient(3));
    let (cluster, address) = listen(&config, &hosts(&alive));
    for _ in 0..3 {
        let hosts = hosts(&alive).must_agree("numbers", 7);
        let joined = Node::new(config.clone(), 1, 0, &address, hosts)
            .serve()
            .wait();
        assert!(
            matches!(joined, Err(ClusterError::Refused { .. })),
            "{joined:?}"
        );
        let nowhere = Node::new(config.clone(), 1, 0, "memory:1000", Hosts::new());
        assert!(nowhere.serve().wait().is_err());
    }
    eventually("only the driver is left", || {
        num_living(config.net.process_lease) == 1
    });
    drop(cluster);
    eventually("nobody is left", || {
        num_living(config.net.process_lease) == 0
    });
}

/// Opened once, and seen from many threads.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<(usize, bool)>, Condvar)>);

impl Gate {
    fn pass(&self) {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap();
        state.0 += 1;
        drop(changed.wait_while(state, |state| !state.1).unwrap());
    }

    fn num_waiting(&self) -> usize {
        self.0.0.lock().unwrap().0
    }

    fn open(&self) {
        self.0.0.lock().unwrap().1 = true;
        self.0.1.notify_all();
    }
}

#[test]
fn what_was_being_made_for_a_lost_driver_ends_and_nothing_of_that_incarnation_stays() {
    let network = MemoryNetwork::with_faults(0, Faults::default());
    let config = config(&network, Duration::from_millis(201));
    let (alive, gate) = (Arc::<AtomicUsize>::default(), Gate::default());
    let (cluster, address) = listen(&config, &Hosts::new());
    let hosts = {
        let (alive, gate) = (Arc::clone(&alive), gate.clone());
        Hosts::new().host(move |()| {
            let porter = Porter::new(&alive);
            gate.pass();
            Ok(porter)
        })
    };
    let node = Node::new(config.clone(), 1, 0, address, hosts).serve();
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
    let named = SpawnOn::new().name("made too late");
    let making = [SpawnOn::new(), named].map(|on| cluster.spawn_with::<Porter>(on, ()));
    eventually("both are being made", || gate.num_waiting() == 2);
    network.set_outage(Some(Outage::Refused));
    let ended = node.wait();
    assert!(
        matches!(ended, Err(ClusterError::NoDriver { .. })),
        "{ended:?}"
    );
    gate.open();
    eventually("both have ended", || alive.load(Ordering::SeqCst) == 0);
    for made in making {
        assert!(made.wait().is_err());
    }
    drop(cluster);
    eventually("all processes are gone", || {
        num_living(config.net.process_lease) == 0
    });
}

/// Listens, answers every request with this text, and returns its address.
fn answer_with(answer: &'static [u8]) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        use std::io::{Read, Write};
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            // A node's first connection only finds out its local address and sends nothing.
            if stream.read(&mut [0; 4096]).is_ok_and(|len| len > 0) {
                let _ = stream.write_all(answer);
            }
        }
    });
    address
}

#[test]
fn who_is_not_a_driver_is_named_at_once() {
    let not_found = b"HTTP/1.1 404 Not Found\r\ncontent-length: 11\r\n\r\nwrong house";
    let cases: [(&[u8], &str); 3] = [
        (not_found, "HTTP/1.1 404 Not Found wrong house"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not answer in HTTP"),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: ps/1\r\n\r\n",
            "upgrades to something else",
        ),
    ];
    for (answer, said) in cases {
        let address = answer_with(answer);
        let config = ClusterConfig {
            transport: Transport::Tcp,
            // The test does not wait for this timeout.
            join_timeout: SOON * 60,
            ..ClusterConfig::default()
        };
        let ended = Node::new(config, 1, 0, &address, Hosts::new())
            .serve()
            .wait();
        let Err(error @ ClusterError::Refused { .. }) = ended else {
            panic!("{ended:?}");
        };
        let text = error.to_string();
        assert!(
            text.contains(said) && text.contains("is not a process of ps"),
            "{text}"
        );
        assert!(error.is_permanent());
    }
}

/// The answer to the first order may have been lost with its connection.
#[test]
fn an_order_that_comes_again_gets_the_actor_that_was_made() {
    let alive = Arc::default();
    let process = Process::new(NetConfig::default(), None, None, None);
    process.enter(NodeId::DRIVER, 1);
    let scope = TaskScope::new(Arc::clone(&process), hosts(&alive), Resources::none());
    let order = |order| Make {
        order,
        variant: None,
        type_name: hosted_name::<Porter>(),
        args: Args::write(&process, &()).unwrap(),
        name: Some(format!("order {order}")),
        needs: Resources::none(),
    };
    let make = |number| Task::start(Arc::clone(&scope).make(order(number)));
    let twice = [make(1), make(1)].map(Task::wait);
    assert_eq!(twice[0], twice[1]);
    assert_eq!(make(1).wait(), twice[0]);
    assert!(twice[0].is_ok() && make(2).wait() != twice[0]);
    assert_eq!(alive.load(Ordering::SeqCst), 2);
    scope.kill_all();
    eventually("they have ended", || alive.load(Ordering::SeqCst) == 0);
    assert!(make(3).wait().is_err(), "this incarnation is over");
}

/// the sender's process refuses the message, its caller gets the error, and the connection goes on.
#[test]
fn what_is_too_large_to_be_sent_is_refused_with_the_limit_and_its_setting() {
    let (network, alive) = (MemoryNetwork::new(), Arc::default());
    let config = config(&network, patient(4));
    let (cluster, address) = listen(&config, &hosts(&alive));
    let mut little = config.clone();
    little.net.max_numbers = 10_000;
    let _node = Node::new(little, 1, 0, address, hosts(&alive)).serve();
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
    let porter = cluster.spawn::<Porter>(()).wait().unwrap();
    let check = |carry: Carry, said: &[&str]| {
        let num_there = carry.there.len();
        let error = porter.ask(carry).wait_timeout(SOON).unwrap_err();
        let text = error.to_string();
        assert!(said.iter().all(|said| text.contains(said)), "{text}");
        let CallError::NotDelivered {
            reason: NotDelivered::TooLarge { .. },
            ..
        } = &error
        else {
            panic!("{error:?}");
        };
        let back: Carry = error.into_message().unwrap();
        assert_eq!(back.there.len(), num_there);
        let served = porter
            .ask(self::carry(&[3; 9], 4096))
            .wait_timeout(SOON)
            .unwrap();
        assert_eq!(served.len(), 4096);
    };
    // Perhaps before the connection is there.
    check(
        carry(&[10_001], 0),
        &["10001 numbers", "10000", "NetConfig::max_numbers"],
    );
    check(
        carry(&[10_001], 0),
        &["10001 numbers", "10000", "NetConfig::max_numbers"],
    );
    check(carry(&[0; 4097], 0), &["4097 buffers", "4096"]);
    check(carry(&[0; 70_000], 0), &["70000 buffers", "4096"]);
    let mut long = carry(&[1], 0);
    long.text = "x".repeat(1 << 20);
    check(long, &["1048576", "split"]);
    // A reply that is too large is an error for its caller.
    for num_back in [4097, 70_000] {
        let error = porter
            .ask(carry(&[1], num_back))
            .wait_timeout(SOON)
            .unwrap_err();
        let CallError::Unknown {
            reason: UnknownOutcome::BadReply { reason },
            ..
        } = &error
        else {
            panic!("{error:?}");
        };
        assert!(reason.contains("4096"), "{reason}");
    }
}

impl Value for u64 {}

/// Two builds that differ in a field must not take each other's bytes for something else.
#[test]
fn the_fields_of_all_messages_are_compared() {
    let none: [&str; 0] = [];
    assert_eq!(untraced::<DriverAgent>(), none);
    assert_eq!(untraced::<NodeAgent>(), none);
    assert_eq!(untraced::<KeptResults>(), none);
    assert_eq!(untraced::<Owned<u64>>(), none);
}
