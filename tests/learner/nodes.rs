//! burn's `Learner` on a driver and nodes, of which each has its own learner and data loader, as a process has.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use burn::optim::AdamConfig;
use ps::actors::cluster::{Node, Transport};
use ps::actors::net::NetConfig;
use ps::actors::net::memory::MemoryNetwork;
use ps::learner::ClusterStrategy;
use ps::prelude::*;
use tokio::sync::Notify;

use super::net::{Net, OnStep, assert_close, device, learner, loader, train, weights_of};
use super::{NUM_EPOCHS, joined};

const SOON: Duration = Duration::from_secs(60);

const NUM_EXAMPLES: usize = 90;
const BATCH_SIZE: usize = 5;
const NUM_WORKERS: usize = 3;
const NUM_UPDATES: usize = NUM_EPOCHS * NUM_EXAMPLES / (BATCH_SIZE * NUM_WORKERS);

/// What one process has.
fn process(
    on_step: &OnStep,
) -> (
    burn::train::Learner<Net>,
    super::Loader,
    ClusterStrategy<Net>,
) {
    let learner = learner(AdamConfig::new().init(), NUM_UPDATES);
    let loads = loader(0..NUM_EXAMPLES, BATCH_SIZE, None, on_step);
    let strategy = ClusterStrategy::new(&learner, &loads, &device()).unwrap();
    (learner, loads, strategy.heed_signals(false))
}

/// Trains on a driver and two nodes. The last node leaves when `leave` is notified.
fn train_on_nodes(consistency: Consistency, leave: Arc<Notify>, on_step: &OnStep) -> Vec<f32> {
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
    let (learner, loads, strategy) = process(on_step);
    let strategy = strategy.consistency(consistency);
    let hosts = strategy.hosts(Hosts::new());
    let cluster = Cluster::listen(config.clone(), ([127, 0, 0, 1], 0).into(), hosts).unwrap();
    let driver = cluster.addresses()[0].to_string();
    let nodes = [1, 2].map(|rank| {
        let (_, _, strategy) = process(on_step);
        let hosts = strategy.hosts(Hosts::new());
        let node = Node::new(config.clone(), rank, 0, driver.clone(), hosts);
        let leave = Arc::clone(&leave);
        node.serve_until(async move {
            match rank {
                2 => leave.notified().await,
                _ => std::future::pending().await,
            }
        })
    });
    cluster.wait_for_nodes(2, SOON).wait().unwrap();
    let result = train(learner, loads, NUM_EPOCHS, Some(strategy.on(&cluster)));
    drop(cluster);
    let weights = weights_of(&result);
    for node in nodes {
        node.wait().unwrap();
    }
    weights
}

fn expected() -> Vec<f32> {
    let order = joined(NUM_EXAMPLES, NUM_WORKERS, BATCH_SIZE);
    let loads = loader(order, BATCH_SIZE * NUM_WORKERS, None, &OnStep::nothing());
    let learner = learner(AdamConfig::new().init(), NUM_UPDATES);
    weights_of(&train(learner, loads, NUM_EPOCHS, None))
}

#[test]
fn processes_end_with_the_weights_of_one() {
    let leave = Arc::new(Notify::new());
    let got = train_on_nodes(Consistency::Bsp, leave, &OnStep::nothing());
    assert_close(&got, &expected(), "nodes");
}

/// The worker begins again on another node, in the middle of an epoch, with the batches that it had not done.
#[test]
fn a_node_that_leaves_changes_nothing() {
    let leave = Arc::new(Notify::new());
    let (num_steps, leaves) = (AtomicUsize::new(0), Arc::clone(&leave));
    let on_step = OnStep(Arc::new(move |_| {
        // In the second epoch.
        if num_steps.fetch_add(1, Ordering::Relaxed) == NUM_EXAMPLES / BATCH_SIZE + 7 {
            leaves.notify_one();
        }
    }));
    let got = train_on_nodes(Consistency::Bsp, leave, &on_step);
    assert_close(&got, &expected(), "a node that left");
}

/// Every process has its part of the examples.
#[test]
fn each_epoch_covers_every_example_once_over_nodes() {
    let seen = Arc::new(Mutex::new(vec![0; NUM_EXAMPLES]));
    let counts = Arc::clone(&seen);
    let on_step = OnStep(Arc::new(move |ids| {
        ids.iter().for_each(|&id| counts.lock().unwrap()[id] += 1);
    }));
    train_on_nodes(
        Consistency::Ssp { bound: 2 },
        Arc::new(Notify::new()),
        &on_step,
    );
    assert_eq!(*seen.lock().unwrap(), [NUM_EPOCHS; NUM_EXAMPLES]);
}
