//! Results that stay where they were computed, and go straight to whoever takes them.

use ps_actors::actor::{UnknownOutcome, run};
use ps_actors::cluster::{Cluster, ClusterConfig, Hosts, Node, Placement, SpawnOn, Transport};
use ps_actors::group::{ServerArgs, ServerGroup};
use ps_actors::ids::{Clock, WorkerId};
use ps_actors::net::NetConfig;
use ps_actors::remote::Kept;
use ps_actors::rule::Sgd;
use ps_actors::server::{ApplyKept, PullVersion, ServerConfig};
use ps_actors::weights::{Gradient, Layout, Weights};
use ps_actors::worker::{
    ComputeGradients, DataWorker, GradientSource, HostedSource, LocalGradient, SourceError,
};
use ps_actors::{ActorRef, CallError};

use super::world::{
    Add, Counter, Echo, Fail, GiveBack, LOCAL, SOON, TakeIt, World, config, driver_address,
    transports,
};

fn on_node(world: &World, rank: u32) -> ActorRef<Counter> {
    let options = SpawnOn::new().place(Placement::Rank(rank));
    world.cluster.spawn_with(options, 0).wait().unwrap()
}

#[test]
fn a_kept_result_is_taken_once_wherever_it_is() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        for rank in [0, 1] {
            let counter = on_node(&world, rank);
            let numbers = vec![0.5; 70_000];
            let kept = counter.ask_kept(Echo(Gradient::new(numbers.clone())));
            let kept: Kept<Gradient> = kept.wait_timeout(SOON).unwrap();
            assert!(run(kept.take()).unwrap().values() == numbers);
            let kept = counter.ask_kept(Add(3)).wait_timeout(SOON).unwrap();
            assert_eq!(run(kept.take()).unwrap(), 3);
            // A call that fails keeps nothing: it says why.
            let error = counter
                .ask_kept(Fail("no luck".to_owned()))
                .wait_timeout(SOON);
            assert!(matches!(error, Err(CallError::Failed { .. })), "{error:?}");
            counter.kill();
        }
    }
}

#[test]
fn a_ticket_can_be_sent_on_and_sent_back() {
    for transport in transports() {
        let world = World::new(config(transport), 2);
        for (maker, taker) in [(0, 1), (1, 0), (1, 1), (1, 2)] {
            let (maker, taker) = (on_node(&world, maker), on_node(&world, taker));
            let keep = || maker.ask_kept(Add(1)).wait_timeout(SOON).unwrap();
            let taken = taker.ask(TakeIt(keep())).wait_timeout(SOON).unwrap();
            assert_eq!(taken, Ok(1));
            let returned = taker.ask(GiveBack(keep())).wait_timeout(SOON).unwrap();
            assert_eq!(run(returned.take()).unwrap(), 2);
        }
    }
}

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

/// The driver takes no message of this size at all, so nothing can pass through it.
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

#[test]
fn a_ticket_that_is_dropped_frees_the_value() {
    let world = World::new(config(Transport::Tcp), 1);
    let counter = on_node(&world, 1);
    for round in 0..2 * ps_actors::remote::MAX_KEPT {
        let kept = counter.ask_kept(Add(1)).wait_timeout(SOON);
        // If nothing were freed, the node would soon have no room for another one.
        assert!(kept.is_ok(), "round {round}: {kept:?}");
    }
}

#[test]
fn a_node_keeps_so_many_values_and_no_more() {
    let world = World::new(config(Transport::Tcp), 1);
    let counter = on_node(&world, 1);
    let kept: Vec<_> = (0..ps_actors::remote::MAX_KEPT)
        .map(|_| counter.ask_kept(Add(1)).wait_timeout(SOON).unwrap())
        .collect();
    let error = counter.ask_kept(Add(1)).wait_timeout(SOON).unwrap_err();
    let CallError::Unknown {
        reason: UnknownOutcome::BadReply { reason },
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(reason.contains("kept already"), "{reason}");
    drop(kept);
}
