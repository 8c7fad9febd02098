//! Gradients that stay where they were computed, and go straight to the server that takes them.

use ps_actors::actor::run;
use ps_actors::cluster::{Cluster, ClusterConfig, Hosts, Node, Placement, SpawnOn};
use ps_actors::group::{ServerArgs, ServerGroup};
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::net::NetConfig;
use ps_actors::rule::Sgd;
use ps_actors::server::{ApplyKept, PullVersion, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{
    ComputeGradients, DataWorker, GradientSource, HostedSource, LocalGradient, SourceError,
};
use ps_runtime::test_util::{LOCAL, SOON, config, driver_address, transports};

/// Computes minus one for each weight, so that each update adds the learning rate.
struct MinusOne;

impl GradientSource for MinusOne {
    fn gradient(&mut self, _: Clock, weights: &Weights) -> Result<LocalGradient, SourceError> {
        Ok(LocalGradient {
            gradient: Gradient::new(vec![-1.0; weights.len()]),
            loss: 1.0,
            num_examples: 1,
        })
    }
}

impl HostedSource for MinusOne {
    type Args = u32;
}

/// the driver takes no message of this size at all, so nothing can pass through it.
#[test]
fn a_gradient_goes_from_worker_to_server_without_the_driver() {
    const NUM_WEIGHTS: usize = 10_000;
    for transport in transports() {
        let hosts = || {
            Hosts::new()
                .host(|rank| Ok(DataWorker::new(WorkerId(rank), MinusOne)))
                .host(|args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?))
        };
        let wide = config(transport);
        let narrow = ClusterConfig {
            net: NetConfig {
                max_numbers: NUM_WEIGHTS as u64 / 2,
                ..wide.net
            },
            ..wide.clone()
        };
        let cluster = Cluster::listen(narrow, LOCAL, hosts()).unwrap();
        let driver = driver_address(&cluster);
        let nodes: Vec<_> = (1..=3)
            .map(|rank| Node::new(wide.clone(), rank, 0, driver.clone(), hosts()).serve())
            .collect();
        cluster.wait_for_nodes(3, SOON).wait().unwrap();

        let initial = Weights::initial(Layout::flat(NUM_WEIGHTS), vec![0.0; NUM_WEIGHTS]);
        let config = ServerConfig {
            learning_rate: 1.0,
            ..ServerConfig::default()
        };
        let places = [Placement::Rank(1)];
        let group = run(ServerGroup::spawn_on(&cluster, places, &initial, config)).unwrap();
        let server = group.servers().next().unwrap();
        let workers = [2, 3].map(|rank| {
            let options = SpawnOn::new().place(Placement::Rank(rank));
            let worker = cluster.spawn_with::<DataWorker<MinusOne>>(options, rank);
            worker.wait().unwrap()
        });
        let kept = workers.map(|worker| {
            let kept = worker.ask_kept(ComputeGradients(initial.clone()));
            kept.wait_timeout(SOON).unwrap()
        });
        // The new weights stay where they are, too.
        let updated = server.ask_kept(ApplyKept::sum(kept)).wait_timeout(SOON);
        drop(updated.unwrap());
        let status = run(group.status()).unwrap();
        assert_eq!(status[0].version.0, 1);
        assert_eq!(status[0].coordinator.as_ref().unwrap().workers.len(), 2);
        // The numbers themselves do not fit through the driver's door: this is what it refuses.
        let refused = run(group.pull(PullVersion::Latest));
        assert!(refused.is_err(), "{refused:?}");
        drop(cluster);
        for node in nodes {
            node.wait().unwrap();
        }
    }
}
