//! Checkpoints of servers on nodes.

use ps_actors::actor::run;
use ps_actors::checkpoint::{Checkpoint, Start};
use ps_actors::cluster::{Cluster, Hosts, Node, Placement};
use ps_actors::group::{ServerArgs, ServerGroup};
use ps_actors::ids::{Version, WorkerId};
use ps_actors::rule::Sgd;
use ps_actors::server::{PullVersion, ServerConfig};
use ps_actors::session::Session;
use ps_actors::weights::{Gradient, GradientUpdate, Layout, Weights};
use ps_runtime::test_util::{LOCAL, SOON, config, driver_address, transports};

const LEN: usize = 3_000;

fn initial() -> Weights {
    let values = (0..LEN).map(|i| (i % 13) as f32);
    Weights::initial(Layout::flat(LEN), values.collect())
}

/// Takes steps with gradients that depend on the weights.
async fn train(servers: &ServerGroup, num_steps: usize) {
    let session = Session::join(servers, WorkerId(3)).await.unwrap();
    let mut weights = servers.pull(PullVersion::Latest).await.unwrap();
    let mut clock = session.next_clock();
    for _ in 0..num_steps {
        let values: Vec<f32> = weights.to_vec().iter().map(|weight| weight - 1.5).collect();
        let update = GradientUpdate {
            id: session.gradient_id(clock),
            computed_on: weights.version(),
            loss: 0.0,
            num_examples: 1,
            gradient: Gradient::new(values),
        };
        (_, weights) = servers.push_pull(update).await.unwrap();
        clock = clock.next();
    }
    session.leave().await.unwrap();
}

/// S-13: the slots of the update rule and the record of gradients travel to the driver and back.
#[test]
fn servers_on_nodes_go_on_from_a_checkpoint_of_servers_on_nodes() {
    let here = ServerGroup::spawn(&initial(), 1, ServerConfig::default(), |_| {
        Box::new(Sgd::with_momentum(0.9))
    });
    let here = here.unwrap();
    run(train(&here, 12));
    let expected = run(here.pull(PullVersion::Latest)).unwrap().to_vec();

    for transport in transports() {
        let hosts = || {
            let rule = || Box::new(Sgd::with_momentum(0.9));
            Hosts::new().host(move |args: ServerArgs| Ok(args.into_server(rule())?))
        };
        let config = config(transport);
        let cluster = Cluster::listen(config.clone(), LOCAL, hosts()).unwrap();
        let driver = driver_address(&cluster);
        let nodes =
            [1, 2].map(|rank| Node::new(config.clone(), rank, 0, driver.clone(), hosts()).serve());
        cluster.wait_for_nodes(2, SOON).wait().unwrap();

        let spawn = |ranks: &[u32], start: Start<'_>| {
            let places = ranks.iter().map(|&rank| Placement::Rank(rank));
            let places: Vec<Placement> = places.collect();
            run(ServerGroup::spawn_on(
                &cluster,
                places,
                start,
                ServerConfig::default(),
            ))
            .unwrap()
        };
        let servers = spawn(&[1, 2], Start::from(&initial()));
        run(train(&servers, 5));
        let checkpoint: Checkpoint = run(servers.checkpoint()).unwrap();
        assert_eq!(checkpoint.version(), Version(5));
        drop(servers);
        let servers = spawn(&[2, 1, 2], Start::from(&checkpoint));
        run(train(&servers, 7));
        let weights = run(servers.pull(PullVersion::Latest)).unwrap();
        assert_eq!(weights.version(), Version(12));
        assert!(weights.to_vec() == expected);
        drop((servers, cluster));
        for node in nodes {
            node.wait().unwrap();
        }
    }
}
