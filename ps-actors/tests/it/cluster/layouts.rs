//! Models with very many parameters.

use std::sync::Arc;

use ps_actors::actor::run;
use ps_actors::cluster::{Cluster, Hosts, Node, Placement, SpawnOn};
use ps_actors::group::{ServerArgs, ServerGroup};
use ps_actors::ids::{Clock, Version, WorkerId};
use ps_actors::rule::Sgd;
use ps_actors::server::{GetWeights, PullVersion, ServerConfig};
use ps_actors::session::Session;
use ps_actors::weights::{Gradient, Layout, Parameter, Weights};
use ps_actors::worker::{
    ComputeGradients, DataWorker, GradientSource, HostedSource, LocalGradient, SourceError,
};
use ps_runtime::test_util::{LOCAL, SOON, config, driver_address, transports};

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

/// A layout of many small parameters, as adapters of a large model have.
fn layout(num_parameters: usize) -> Layout {
    let parameters = (0..num_parameters).map(|index| Parameter {
        name: format!("encoder.layers.{index}.attention.adapter.weight"),
        shape: vec![1, 1],
        range: index..index + 1,
    });
    Layout::new(parameters.collect()).unwrap()
}

/// No message that has weights in it is limited by the number of their names.
#[test]
fn a_model_with_very_many_parameters_is_trained_between_processes() {
    for (transport, len) in transports().into_iter().zip([100_000, 20_000, 20_000]) {
        let hosts = || {
            Hosts::new()
                .host(|rank| Ok(DataWorker::new(WorkerId(rank), MinusOne)))
                .host(|args: ServerArgs| Ok(args.into_server(Box::new(Sgd::new()))?))
        };
        let wide = config(transport);
        let cluster = Cluster::listen(wide.clone(), LOCAL, hosts()).unwrap();
        let driver = driver_address(&cluster);
        let nodes =
            [1, 2].map(|rank| Node::new(wide.clone(), rank, 0, driver.clone(), hosts()).serve());
        cluster.wait_for_nodes(2, SOON).wait().unwrap();

        let initial = Weights::initial(layout(len), vec![0.0; len]);
        let config = ServerConfig {
            learning_rate: 1.0,
            ..ServerConfig::default()
        };
        let places = [1, 2].map(Placement::Rank);
        let servers = run(ServerGroup::spawn_on(&cluster, places, &initial, config)).unwrap();
        let options = SpawnOn::new().place(Placement::Rank(1));
        let worker = cluster.spawn_with::<DataWorker<MinusOne>>(options, 0);
        let worker = worker.wait().unwrap();
        run(async {
            let session = Session::join(&servers, WorkerId(0)).await.unwrap();
            let weights = servers.pull(PullVersion::Latest).await.unwrap();
            assert_eq!(weights.layout(), initial.layout());
            let computed = worker.ask(ComputeGradients(weights.clone())).await;
            let mut update = computed.unwrap().unwrap();
            update.id = session.gradient_id(Clock(0));
            let (_, next) = servers.push_pull(update).await.unwrap();
            assert_eq!(next.version(), Version(1));
            assert!(next.to_vec().iter().all(|weight| *weight == 1.0));
            // What came from two servers, at two times, is known to be of one model without a comparison.
            assert!(Arc::ptr_eq(weights.layout(), next.layout()));
            let first = servers.servers().next().unwrap();
            let part = first.ask(GetWeights).await.unwrap();
            assert!(Arc::ptr_eq(part.layout(), next.layout()));
            session.leave().await.unwrap();
        });
        drop((worker, servers, cluster));
        for node in nodes {
            node.wait().unwrap();
        }
    }
}
