//! Training over nodes: the same bits as in one process. The nodes share this process and differ
//! from others in nothing else; real processes are in `tests/processes/`.

use ps::actors::cluster::Transport;
use ps::prelude::*;

use crate::nodes::{transports, with_two_nodes};

fn trainer(num_servers: usize, on_nodes: bool) -> Trainer<ConvNet, ImageDataset> {
    let device = select_device(default_device_name()).unwrap();
    Trainer::new(ConvNet::init(3, &device), Mnist::bundled_sample().train)
        .device(&device)
        .workers(2)
        .servers(num_servers)
        .servers_on_nodes(on_nodes)
        .batch_size(16)
        .iterations(12)
}

fn run_over(transport: Transport, trainer: Trainer<ConvNet, ImageDataset>) -> Report {
    let hosts = trainer.hosts(Hosts::new()).unwrap();
    with_two_nodes(transport, hosts, |cluster| trainer.run_on(cluster).unwrap())
}

/// PS-3.
#[test]
fn nodes_compute_the_bits_of_one_process() {
    let alone = trainer(1, false).run().unwrap();
    for transport in transports() {
        for (num_servers, on_nodes) in [(1, false), (3, false), (1, true), (3, true)] {
            let report = run_over(transport.clone(), trainer(num_servers, on_nodes));
            let what = format!("{transport:?}, {num_servers} servers, on nodes: {on_nodes}");
            assert!(report.weights.to_vec() == alone.weights.to_vec(), "{what}");
            assert_eq!(report.losses, alone.losses, "{what}");
            assert_eq!(report.num_applied, 24, "{what}");
        }
    }
}

#[test]
fn every_consistency_mode_trains_over_nodes() {
    for transport in transports() {
        for consistency in [
            Consistency::Asp,
            Consistency::Ssp { bound: 2 },
            Consistency::KofN { k: 1 },
        ] {
            let trainer = trainer(2, true).consistency(consistency);
            let report = run_over(transport.clone(), trainer);
            let settled = report.num_applied + report.num_dropped_late;
            assert_eq!(settled, 24, "{transport:?}, {consistency:?}");
            assert_eq!(
                report.num_worker_restarts, 0,
                "{transport:?}, {consistency:?}"
            );
        }
    }
}

/// Without flags or variables, which say otherwise, a launch is a run in this process.
#[test]
fn a_launch_of_one_process_is_a_run() {
    let report = trainer(1, false).launch(&LaunchOptions::default(), ClusterConfig::default());
    let report = report.unwrap().expect("it is the driver");
    let alone = trainer(1, false).run().unwrap();
    assert!(report.weights.to_vec() == alone.weights.to_vec());
    let wrong = LaunchOptions {
        rank: Some(1),
        ..LaunchOptions::default()
    };
    let error = trainer(1, false).launch(&wrong, ClusterConfig::default());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("--world-size"), "{error}");
}
