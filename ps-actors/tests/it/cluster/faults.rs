//! PS-2 over a network that loses, repeats, delays and cuts: each gradient counts exactly once.

use std::thread;
use std::time::Duration;

use ps_actors::cluster::{Cluster, ClusterConfig, Hosts, Node, Transport};
use ps_actors::ids::{Clock, GradientId, JoinRequest, Version, WorkerId};
use ps_actors::net::NetConfig;
use ps_actors::net::memory::{Faults, MemoryNetwork};
use ps_actors::rule::Sgd;
use ps_actors::server::{
    Consistency, GetWeights, Join, Outcome, ParameterServer, Push, PushPull, Reduction,
    ServerConfig,
};
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
use ps_actors::{ActorRef, CallError, Reply, Spawn};

use ps_runtime::test_util::{LOCAL, SOON};

const LEN: usize = 32;

/// Far more than any fault lasts; a call that a fault has eaten is waited for this long.
const PATIENCE: Duration = Duration::from_millis(30);

/// Each gradient differs from all others; sums of integers this small are exact in `f32`.
fn gradient(worker: u32, clock: u64) -> Vec<f32> {
    let mut values = vec![0.0; LEN];
    values[clock as usize % LEN] = 1.0 + (clock / LEN as u64 % 16) as f32;
    values[(clock / 7) as usize % LEN] += worker as f32;
    values
}

/// Calls until a reply comes; returns how many calls there were.
fn insist<R>(call: impl Fn() -> Reply<R>) -> (R, u64) {
    for tries in 1..10_000 {
        match call().wait_timeout(PATIENCE) {
            Ok(reply) => return (reply, tries),
            Err(CallError::Failed { panic, .. }) => panic!("the server panicked: {panic}"),
            Err(CallError::NotDelivered { .. } | CallError::Unknown { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    panic!("no reply to 10,000 calls");
}

fn work(server: &ActorRef<ParameterServer>, worker: u32, num_steps: u64) -> u64 {
    let (worker, request) = (WorkerId(worker), JoinRequest(1));
    let (joined, mut num_calls) = insist(|| server.ask(Join { worker, request }));
    let incarnation = joined.unwrap().incarnation;
    for clock in 0..num_steps {
        let gradients = || GradientUpdate {
            id: GradientId {
                worker,
                incarnation,
                clock: Clock(clock),
            },
            computed_on: Version(0),
            loss: 0.0,
            num_examples: 1,
            gradient: Gradient::new(gradient(worker.0, clock)),
        };
        let (outcome, tries) = if clock % 2 == 0 {
            insist(|| server.ask(Push(gradients())))
        } else {
            let (pushed, tries) = insist(|| server.ask(PushPull::new(gradients())));
            (pushed.map(|pushed| pushed.outcome), tries)
        };
        assert!(
            matches!(outcome, Ok(Outcome::Applied { .. })),
            "{worker}, clock {clock}: {outcome:?}"
        );
        num_calls += tries;
    }
    num_calls
}

/// Says with which seed a test has failed.
struct Seed(u64);

impl Drop for Seed {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("failed with seed {}", self.0);
        }
    }
}

fn check(seed: u64, num_workers: u32, num_steps: u64) {
    let seed = Seed(seed);
    let network = MemoryNetwork::with_faults(
        seed.0,
        Faults {
            lose_request: 0.06,
            lose_reply: 0.06,
            duplicate_request: 0.1,
            delay: 0.1,
            max_delay: Duration::from_millis(3),
            cut: 0.03,
        },
    );
    let config = ClusterConfig {
        transport: Transport::Memory(network.clone()),
        net: NetConfig {
            process_lease: Duration::from_secs(20),
            ..NetConfig::default()
        },
        ..ClusterConfig::default()
    };
    // The server is one of the node's: the driver hosts none, so it looks there.
    let cluster = Cluster::listen(config.clone(), LOCAL, Hosts::new()).unwrap();
    let driver = cluster.addresses()[0].to_string();
    let hosts = Hosts::new().find::<ParameterServer>();
    let _node = Node::new(config, 1, 0, driver, hosts).serve();
    cluster.wait_for_nodes(1, SOON).wait().unwrap();
    let name = format!("server with faults, seed {}", seed.0);
    let here = Spawn::new()
        .name(&name)
        .start(|| {
            let initial = Weights::initial(Layout::flat(LEN), vec![0.0; LEN]);
            let config = ServerConfig {
                consistency: Consistency::Asp,
                reduction: Reduction::Sum,
                learning_rate: 1.0,
                ..ServerConfig::default()
            };
            ParameterServer::new(&initial, Sgd::new(), config).unwrap()
        })
        .unwrap();
    let server = cluster.lookup::<ParameterServer>(&name).wait().unwrap();
    assert!(!server.is_local());

    let num_calls: u64 = thread::scope(|scope| {
        let workers: Vec<_> = (0..num_workers)
            .map(|worker| {
                scope.spawn({
                    let server = &server;
                    move || work(server, worker, num_steps)
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().unwrap())
            .sum()
    });

    let weights = here.ask(GetWeights).wait_timeout(SOON).unwrap();
    let mut expected = vec![0.0; LEN];
    for worker in 0..num_workers {
        for clock in 0..num_steps {
            let gradient = gradient(worker, clock);
            let sum = expected.iter_mut().zip(gradient);
            sum.for_each(|(weight, value)| *weight -= value);
        }
    }
    assert_eq!(weights.to_vec(), expected);
    assert_eq!(weights.version().0, u64::from(num_workers) * num_steps);
    let counts = network.fault_counts();
    // Half of what is to be expected.
    let num_pushes = f64::from(num_workers) * num_steps as f64;
    let least = |probability: f64| (num_pushes * probability / 2.0) as u64;
    assert!(counts.lost_requests >= least(0.06), "{counts:?}");
    assert!(counts.lost_replies >= least(0.06), "{counts:?}");
    assert!(counts.duplicated_requests >= least(0.1), "{counts:?}");
    assert!(counts.delays >= least(0.1), "{counts:?}");
    assert!(counts.cuts >= least(0.03), "{counts:?}");
    assert!(
        num_calls > u64::from(num_workers) * num_steps,
        "{num_calls}"
    );
    here.shutdown(SOON).wait().unwrap();
}

/// PS-2, R-2, R-3. `PS_SOAK=1` does it a hundred times as long, from other seeds each time.
#[test]
fn every_gradient_counts_once_whatever_the_network_does() {
    if std::env::var_os("PS_SOAK").is_none() {
        return check(20_140, 4, 100);
    }
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    (0..20).for_each(|round| check(now.wrapping_add(round), 4, 500));
}
