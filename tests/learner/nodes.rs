//! burn's `Learner` on a driver and nodes, of which each has its own learner and data loader, as a process has.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use burn::optim::AdamConfig;
use burn::train::Learner;
use ps::actors::cluster::{ClusterError, Node, NodeExit, Task, Transport};
use ps::actors::net::NetConfig;
use ps::actors::net::memory::MemoryNetwork;
use ps::learner::ClusterStrategy;
use ps::prelude::*;
use tokio::sync::Notify;

use super::net::{Loader, Net, OnStep, assert_close, device, learner, loader, train, weights_of};
use super::{NUM_EPOCHS, SOON, joined};

const NUM_EXAMPLES: usize = 300;
const BATCH_SIZE: usize = 5;
const NUM_WORKERS: usize = 3;
/// Of a worker.
const STEPS_PER_EPOCH: usize = NUM_EXAMPLES / (BATCH_SIZE * NUM_WORKERS);

/// How often each example was in a step of one process.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<BTreeMap<usize, usize>>>);

impl Seen {
    fn count(&self, ids: &[usize]) {
        let mut counts = self.0.lock().unwrap();
        ids.iter()
            .for_each(|&id| *counts.entry(id).or_default() += 1);
    }

    fn on_step(&self) -> OnStep {
        let seen = self.clone();
        OnStep(Arc::new(move |ids| seen.count(ids)))
    }

    fn take(&self) -> BTreeMap<usize, usize> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

/// Each of these examples, as often as there are epochs.
fn all(ids: Range<usize>) -> BTreeMap<usize, usize> {
    ids.map(|id| (id, NUM_EPOCHS)).collect()
}

/// What one process has, with these examples.
fn process_with(
    ids: Range<usize>,
    on_step: &OnStep,
) -> (Learner<Net>, Loader, ClusterStrategy<Net>) {
    let learner = learner(AdamConfig::new().init(), NUM_EPOCHS * STEPS_PER_EPOCH);
    let loads = loader(ids, BATCH_SIZE, None, on_step);
    let strategy = ClusterStrategy::new(&learner, &loads, &device()).unwrap();
    (learner, loads, strategy.heed_signals(false))
}

/// What one process has.
fn process(on_step: &OnStep) -> (Learner<Net>, Loader, ClusterStrategy<Net>) {
    process_with(0..NUM_EXAMPLES, on_step)
}

/// The processes of a cluster, in this process.
struct Processes {
    config: ClusterConfig,
    cluster: Cluster,
}

impl Processes {
    /// Starts a driver.
    fn listen(hosts: Hosts) -> Self {
        let config = ClusterConfig {
            transport: Transport::Memory(MemoryNetwork::new()),
            net: NetConfig {
                // The machine that tests run on may be busy.
                process_lease: Duration::from_secs(30),
                handshake: Duration::from_secs(30),
                ..NetConfig::default()
            },
            ..ClusterConfig::default()
        };
        let local = ([127, 0, 0, 1], 0).into();
        let cluster = Cluster::listen(config.clone(), local, hosts).unwrap();
        Self { config, cluster }
    }

    /// Starts a node, which leaves when `leaves` is ready.
    fn node(
        &self,
        rank: u32,
        hosts: Hosts,
        leaves: impl Future<Output = ()> + Send + 'static,
    ) -> Task<Result<NodeExit, ClusterError>> {
        let driver = self.cluster.addresses()[0].to_string();
        Node::new(self.config.clone(), rank, 0, driver, hosts).serve_until(leaves)
    }

    fn wait_for_nodes(&self, num: usize) {
        self.cluster.wait_for_nodes(num, SOON).wait().unwrap();
    }

    /// Lets the nodes go.
    fn end(self, nodes: impl IntoIterator<Item = Task<Result<NodeExit, ClusterError>>>) {
        drop(self.cluster);
        for node in nodes {
            node.wait().unwrap();
        }
    }
}

/// Trains on a driver and two nodes. Returns the weights, and what each process has seen. The last node leaves before
/// the driver's worker takes this step.
fn train_on_nodes(
    consistency: Consistency,
    leaves_at: Option<usize>,
) -> (Vec<f32>, [BTreeMap<usize, usize>; 3]) {
    let seen: [Seen; 3] = Default::default();
    let leave = Arc::new(Notify::new());
    let running = Arc::new(Mutex::new(None::<Cluster>));
    let on_step = {
        let (seen, leave, running) = (seen[0].clone(), Arc::clone(&leave), Arc::clone(&running));
        let num_steps = AtomicUsize::new(0);
        OnStep(Arc::new(move |ids| {
            seen.count(ids);
            if Some(num_steps.fetch_add(1, Ordering::Relaxed)) == leaves_at {
                leave.notify_one();
                let cluster = running.lock().unwrap().clone().unwrap();
                let deadline = Instant::now() + SOON;
                let stays = |cluster: &Cluster| {
                    let nodes = cluster.nodes();
                    nodes
                        .iter()
                        .any(|node| node.node.rank == 2 && !node.is_leaving)
                };
                while stays(&cluster) {
                    assert!(Instant::now() < deadline, "the node does not leave");
                    thread::yield_now();
                }
            }
        }))
    };
    let (learner, loads, strategy) = process(&on_step);
    let strategy = strategy.consistency(consistency);
    let processes = Processes::listen(strategy.hosts(Hosts::new()));
    *running.lock().unwrap() = Some(processes.cluster.clone());
    let nodes = [1, 2].map(|rank| {
        let (_, _, strategy) = process(&seen[rank].on_step());
        let leave = Arc::clone(&leave);
        let leaves = async move {
            match rank {
                2 => leave.notified().await,
                _ => std::future::pending().await,
            }
        };
        processes.node(rank as u32, strategy.hosts(Hosts::new()), leaves)
    });
    processes.wait_for_nodes(2);
    let strategy = strategy.on(&processes.cluster);
    let result = train(learner, loads, NUM_EPOCHS, Some(strategy));
    *running.lock().unwrap() = None;
    processes.end(nodes);
    (weights_of(&result), seen.map(|seen| seen.take()))
}

fn expected() -> Vec<f32> {
    let order = joined(NUM_EXAMPLES, NUM_WORKERS, BATCH_SIZE);
    let loads = loader(order, BATCH_SIZE * NUM_WORKERS, None, &OnStep::nothing());
    let learner = learner(AdamConfig::new().init(), NUM_EPOCHS * STEPS_PER_EPOCH);
    weights_of(&train(learner, loads, NUM_EPOCHS, None))
}

#[test]
fn processes_end_with_the_weights_of_one() {
    let (got, seen) = train_on_nodes(Consistency::Bsp, None);
    assert_close(&got, &expected(), "nodes");
    assert_eq!(seen, [all(0..100), all(100..200), all(200..300)]);
}

/// The worker begins again on another node, in the middle of an epoch, with the batches that it had not done.
#[test]
fn a_node_that_leaves_changes_nothing() {
    // In the second epoch.
    let (got, seen) = train_on_nodes(Consistency::Bsp, Some(STEPS_PER_EPOCH + 3));
    assert_close(&got, &expected(), "a node that left");
    let [_, other, left] = &seen;
    assert!(
        left.values().sum::<usize>() >= NUM_EXAMPLES / NUM_WORKERS,
        "{left:?}"
    );
    // The rest of the epoch. In the next one, the worker has a place of its own, with the driver.
    let moved = other.range(200..).count();
    assert!((1..100).contains(&moved), "{seen:?}");
    let mut sum = BTreeMap::new();
    for (id, num) in seen.into_iter().flatten() {
        *sum.entry(id).or_default() += num;
    }
    assert_eq!(sum, all(0..NUM_EXAMPLES));
}

/// Every process has its part of the examples.
#[test]
fn each_epoch_covers_every_example_once_over_nodes() {
    let (_, seen) = train_on_nodes(Consistency::Ssp { bound: 2 }, None);
    assert_eq!(seen, [all(0..100), all(100..200), all(200..300)]);
}

/// Its data loader has given all batches of the first training.
#[test]
fn a_node_that_outlives_its_driver_trains_with_the_next_one() {
    let seen = Seen::default();
    let (_, _, on_node) = process(&seen.on_step());
    for driver in 1..=2 {
        let (learner, loads, strategy) = process(&OnStep::nothing());
        let processes = Processes::listen(strategy.hosts(Hosts::new()));
        let node = processes.node(1, on_node.hosts(Hosts::new()), std::future::pending());
        processes.wait_for_nodes(1);
        let strategy = strategy.on(&processes.cluster);
        let result = train(learner, loads, NUM_EPOCHS, Some(strategy));
        processes.end([node]);
        weights_of(&result);
        assert_eq!(seen.take(), all(150..300), "driver {driver}");
    }
}

/// For example because the learner has loaded a checkpoint.
#[test]
fn values_of_what_is_not_trained_that_nodes_do_not_have_are_an_error() {
    let with_factor = |factor| {
        let net = Net::with_frozen_layer(factor, &device());
        Learner::new(net, AdamConfig::new().init(), 0.01)
    };
    let nothing = OnStep::nothing();
    let loads = loader(0..NUM_EXAMPLES, BATCH_SIZE, None, &nothing);
    let strategy = || ClusterStrategy::new(&with_factor(1.0), &loads, &device()).unwrap();
    let processes = Processes::listen(strategy().hosts(Hosts::new()));
    let node = processes.node(1, strategy().hosts(Hosts::new()), std::future::pending());
    processes.wait_for_nodes(1);
    let strategy = strategy().heed_signals(false).on(&processes.cluster);
    let result = train(with_factor(3.0), Arc::clone(&loads), 1, Some(strategy));
    processes.end([node]);
    let error = result.error.expect("the node has other values").to_string();
    assert!(error.contains("load them in all processes"), "{error}");
}

/// They have the same model, and the same number of examples.
#[test]
fn trainings_with_names_share_a_cluster() {
    let data = [0..40, 1_000..1_040];
    let both = |on_step: &OnStep| {
        [0, 1].map(|number| {
            let (learner, loads, strategy) = process_with(data[number].clone(), on_step);
            (learner, loads, strategy.name(format!("training {number}")))
        })
    };
    let seen = Seen::default();
    let (in_driver, on_node) = (both(&OnStep::nothing()), both(&seen.on_step()));
    let hosts = |both: &[(Learner<Net>, Loader, ClusterStrategy<Net>)]| {
        let strategies = both.iter().map(|(_, _, strategy)| strategy);
        strategies.fold(Hosts::new(), |hosts, strategy| strategy.hosts(hosts))
    };
    let processes = Processes::listen(hosts(&in_driver));
    let node = processes.node(1, hosts(&on_node), std::future::pending());
    processes.wait_for_nodes(1);
    for (number, (learner, loads, strategy)) in in_driver.into_iter().enumerate() {
        let strategy = strategy.on(&processes.cluster);
        weights_of(&train(learner, loads, NUM_EPOCHS, Some(strategy)));
        let Range { start, end } = data[number];
        assert_eq!(seen.take(), all(start + 20..end), "training {number}");
    }
    processes.end([node]);
}
