//! Servers and workers on hosts of their own, and links between two of them that fail.

use std::sync::{Arc, Condvar, Mutex};

use ps_actors::cluster::{Cluster, ClusterConfig, Hosts, Node, Placement, SpawnOn, Transport};
use ps_actors::group::ServerArgs;
use ps_actors::net::NetConfig;
use ps_actors::net::memory::{MemoryNetwork, Outage};
use ps_actors::server::Pull;
use ps_actors::worker::HostedSource;

use super::*;
use ps_runtime::test_util::{LOCAL, SOON, driver_address};

/// After it, a silent connection is lost.
const LEASE: Duration = Duration::from_secs(2);

/// The hosts of the two servers and of the worker.
const FIRST: u32 = 1;
const SECOND: u32 = 2;
const WORKER: u32 = 3;

/// A worker that waits before it goes on from version 6, until the test lets it.
struct TowardsTarget {
    id: u32,
    gate: Gate,
}

/// Whether the test lets the worker go on.
type Gate = Arc<(Mutex<bool>, Condvar)>;

fn open(gate: &Gate) {
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
}

impl GradientSource for TowardsTarget {
    fn gradient(&mut self, clock: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        if clock == Clock(6) {
            let is_open = self.gate.0.lock().unwrap();
            let waited = (self.gate.1).wait_timeout_while(is_open, SOON, |is_open| !*is_open);
            assert!(!waited.unwrap().1.timed_out(), "the test opens no gate");
        }
        Ok(towards_target(self.id, clock, weights))
    }
}

impl HostedSource for TowardsTarget {
    type Args = u32;
}

type Worker = DataWorker<TowardsTarget>;

fn hosts(gate: &Gate) -> Hosts {
    let rule = || Box::new(Sgd::with_momentum(0.5));
    let gate = Arc::clone(gate);
    Hosts::new()
        .host(move |args: ServerArgs| Ok(args.into_server(rule())?))
        .host(move |id| {
            let gate = Arc::clone(&gate);
            Ok(DataWorker::new(WorkerId(id), TowardsTarget { id, gate }))
        })
}

struct World {
    network: MemoryNetwork,
    gate: Gate,
    servers: ServerGroup,
    worker: ActorRef<Worker>,
    _nodes: Vec<Box<dyn std::any::Any>>,
    _cluster: Cluster,
}

impl World {
    /// Three nodes, of which the links between these two hosts may fail.
    fn new(pair: (u32, u32)) -> Self {
        let network = MemoryNetwork::new();
        let gate = Gate::default();
        network.set_outage_between(pair.0, pair.1, None);
        let config = |host| ClusterConfig {
            transport: Transport::Memory(network.of_host(host)),
            // As long as can be said.
            join_timeout: Duration::MAX,
            net: NetConfig {
                handshake: LEASE,
                ..NetConfig::default().with_process_lease(LEASE)
            },
            ..ClusterConfig::default()
        };
        let cluster = Cluster::listen(config(0), LOCAL, hosts(&gate)).unwrap();
        let mut nodes: Vec<Box<dyn std::any::Any>> = Vec::new();
        for rank in [FIRST, SECOND, WORKER] {
            let node = Node::new(
                config(rank),
                rank,
                0,
                driver_address(&cluster),
                hosts(&gate),
            );
            nodes.push(Box::new(node.serve()));
        }
        cluster.wait_for_nodes(3, SOON).wait().unwrap();
        let places = [FIRST, SECOND].map(Placement::Rank);
        let settings = super::config(Consistency::Bsp);
        let initial = initial();
        let servers = ServerGroup::spawn_on(&cluster, places, &initial, settings);
        let servers = actor::run(servers).unwrap();
        let options = SpawnOn::new().place(Placement::Rank(WORKER));
        let worker = cluster.spawn_with::<Worker>(options, 0).wait().unwrap();
        Self {
            network,
            gate,
            servers,
            worker,
            _nodes: nodes,
            _cluster: cluster,
        }
    }

    fn second(&self) -> &ActorRef<ParameterServer> {
        self.servers.servers().nth(1).unwrap()
    }

    /// Waits until the second server has made this version.
    fn wait_until_second_at(&self, version: Version) {
        let pull = self.second().ask(Pull::new(PullVersion::AtLeast(version)));
        pull.wait_timeout(SOON).unwrap().unwrap();
    }
}

const NUM_STEPS: u64 = 400;

/// PS-10: no process is lost with a link: whoever finds the other end silent for more than two leases goes on
/// when it is back, and each gradient counts once.
#[test]
fn a_link_that_is_silent_for_more_than_two_leases_ends_nothing() {
    for pair in [(FIRST, SECOND), (WORKER, SECOND)] {
        let world = World::new(pair);
        let run = RunSteps {
            servers: world.servers.clone(),
            num_steps: NUM_STEPS,
        };
        let run = world.worker.ask(run);
        world.wait_until_second_at(Version(5));
        let silence = |outage| world.network.set_outage_between(pair.0, pair.1, outage);
        silence(Some(Outage::Silent));
        open(&world.gate);
        // Nothing more gets there for as long as this takes.
        let far = Pull::new(PullVersion::AtLeast(Version(NUM_STEPS)));
        let waited = world.second().ask(far).wait_timeout(LEASE * 5 / 2);
        assert!(waited.is_err(), "{pair:?}: {waited:?}");
        silence(None);
        let report = run.wait_timeout(SOON).unwrap().unwrap();
        assert_eq!(report.num_applied, NUM_STEPS, "{pair:?}");
        let weights = final_weights(&world.servers).to_vec();
        assert_eq!(weights, expected_bsp(1, NUM_STEPS), "{pair:?}");
    }
}

/// PS-10.
#[test]
fn a_link_that_is_reset_again_and_again_ends_nothing() {
    for pair in [(FIRST, SECOND), (WORKER, SECOND)] {
        let world = World::new(pair);
        let run = RunSteps {
            servers: world.servers.clone(),
            num_steps: NUM_STEPS,
        };
        let run = world.worker.ask(run);
        open(&world.gate);
        for version in (1..=10).map(|reset| 3 * reset) {
            world.wait_until_second_at(Version(version));
            let set = |outage| world.network.set_outage_between(pair.0, pair.1, outage);
            set(Some(Outage::Refused));
            set(None);
        }
        let report = run.wait_timeout(SOON).unwrap().unwrap();
        assert_eq!(report.num_applied, NUM_STEPS, "{pair:?}");
        let weights = final_weights(&world.servers).to_vec();
        assert_eq!(weights, expected_bsp(1, NUM_STEPS), "{pair:?}");
    }
}

/// S-10: a question is asked again, too, and no server counts as lost for it.
#[test]
fn a_status_whose_connection_is_cut_is_asked_for_again() {
    const DRIVER: u32 = 0;
    let world = World::new((DRIVER, SECOND));
    let is_over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                let set = |outage| world.network.set_outage_between(DRIVER, SECOND, outage);
                set(Some(Outage::Refused));
                set(None);
                // Some questions get their answer in between.
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        let answers = (0..300).map(|_| actor::run(world.servers.status()));
        let failed = answers.filter_map(Result::err).next();
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(failed.is_none(), "{failed:?}");
    });
}
