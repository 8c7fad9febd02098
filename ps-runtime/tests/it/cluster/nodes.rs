//! Nodes: joining, leaving, spawning.

use std::time::Duration;

use ps_runtime::ActorRef;
use ps_runtime::cluster::{Cluster, Node, NodeExit, Placement, SpawnOn};

use super::world::{
    Add, AskNamed, Counter, Greet, LOCAL, Mortal, SOON, World, config, driver_address, hosts,
    transports,
};
use crate::actor::probe::{Census, eventually};

#[test]
fn actors_go_to_the_nodes_in_turn() {
    for transport in transports() {
        let world = World::new(config(transport), 2);
        let counters: Vec<ActorRef<Counter>> = (0..4)
            .map(|start| world.cluster.spawn(start).wait().unwrap())
            .collect();
        for (start, counter) in (0..).zip(&counters) {
            assert!(!counter.is_local());
            assert_eq!(counter.ask(Add(1)).wait_timeout(SOON).unwrap(), start + 1);
        }
    }
}

#[test]
fn a_driver_alone_is_a_cluster_too() {
    let world = World::new(config(transports()[0].clone()), 0);
    let counter = world.cluster.spawn::<Counter>(1).wait().unwrap();
    assert!(counter.is_local());
    assert_eq!(counter.ask(Add(1)).wait_timeout(SOON).unwrap(), 2);
}

#[test]
fn a_constructor_that_fails_says_why() {
    for transport in transports() {
        let world = World::new(config(transport), 1);
        let error = world.cluster.spawn::<Counter>(-3).wait().unwrap_err();
        let text = format!("{:#}", anyhow_chain(&error));
        assert!(
            text.contains("cannot count from -3") && text.contains("node 1"),
            "{text}"
        );
    }
}

fn anyhow_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[test]
fn actors_are_found_by_name_wherever_they_are() {
    for transport in transports() {
        let world = World::new(config(transport), 2);
        let name = format!("counter of {:p}", &world);
        let options = SpawnOn::new().place(Placement::Rank(2)).name(&name);
        let counter = world
            .cluster
            .spawn_with::<Counter>(options, 1)
            .wait()
            .unwrap();
        assert_eq!(counter.ask(Add(1)).wait_timeout(SOON).unwrap(), 2);
        let found = world.cluster.lookup::<Counter>(&name).wait().unwrap();
        assert_eq!(found.ask(Add(1)).wait_timeout(SOON).unwrap(), 3);
        assert!(world.cluster.lookup::<Counter>("nobody").wait().is_none());
        // From inside actors, wherever they are.
        for rank in 0..=2 {
            let options = SpawnOn::new().place(Placement::Rank(rank));
            let asking = world
                .cluster
                .spawn_with::<Counter>(options, 0)
                .wait()
                .unwrap();
            let ask = |name: &str| {
                asking
                    .ask(AskNamed(name.to_owned(), Add(0)))
                    .wait_timeout(SOON)
            };
            assert_eq!(ask(&name).unwrap(), Some(3), "from rank {rank}");
            assert_eq!(ask("nobody").unwrap(), None);
        }
        found.kill();
    }
}

#[test]
fn nodes_end_when_the_driver_lets_them_go() {
    for transport in transports() {
        let mut world = World::new(config(transport), 2);
        world.cluster.release().wait();
        for node in world.nodes.drain(..) {
            assert_eq!(node.wait().unwrap(), NodeExit::Released);
        }
        // And when it is dropped.
        let world = World::new(world.config, 1);
        let World { cluster, nodes, .. } = world;
        drop(cluster);
        for node in nodes {
            assert_eq!(node.wait().unwrap(), NodeExit::Released);
        }
    }
}

///
#[test]
fn an_actor_elsewhere_ends_with_its_last_reference() {
    let census = Census::default();
    let worlds = transports().map(|transport| {
        let mut config = config(transport);
        // Twice their sum has to pass.
        config.net.process_lease = Duration::from_secs(1);
        config.net.handshake = Duration::from_millis(250);
        World::new(config, 1)
    });
    let actors: Vec<_> = worlds
        .iter()
        .map(|world| {
            let actor = Mortal::on_node(world, 1, &census);
            let clone = actor.clone();
            drop(actor);
            clone.ask(Greet).wait_timeout(SOON).unwrap();
            clone
        })
        .collect();
    assert_eq!(census.count(), actors.len());
    drop(actors);
    eventually("all actors are dropped", || census.count() == 0);
}

#[test]
fn actors_go_where_there_is_what_they_need() {
    for transport in transports() {
        let mut world = World::new(config(transport), 0);
        for (rank, resources) in [(1, "cpus=1"), (2, "cpus=2,big")] {
            world.config.resources = resources.parse().unwrap();
            world.nodes.push(world.node(rank, 0).serve());
        }
        world.cluster.wait_for_nodes(2, SOON).wait().unwrap();
        let spawn = |needs: &str| {
            let place = Placement::Needs(needs.parse().unwrap());
            let counter = world
                .cluster
                .spawn_with::<Counter>(SpawnOn::new().place(place), 0);
            counter.wait()
        };
        let big = spawn("big,cpus=2").unwrap();
        assert_eq!(big.ask(Add(1)).wait_timeout(SOON).unwrap(), 1);
        let small = spawn("cpus=1").unwrap();
        assert!(!small.is_local());
        let error = spawn("big,cpus=1").unwrap_err().to_string();
        assert!(
            error.contains("big,cpus=1") || error.contains("cpus=1,big"),
            "{error}"
        );
        assert!(
            error.contains("node 2 with cpus=2,big"),
            "what there is: {error}"
        );
        // What an actor had is free again when it has ended.
        big.kill();
        eventually("the node has room again", || spawn("big,cpus=1").is_ok());
    }
}

///
#[test]
fn a_node_with_other_data_is_not_let_in() {
    for transport in transports() {
        let config = config(transport);
        let hosts = |examples: u32| hosts().must_agree("the number of examples", examples);
        let cluster = Cluster::listen(config.clone(), LOCAL, hosts(60_000)).unwrap();
        let driver = driver_address(&cluster);
        let node = |rank, hosts| Node::new(config.clone(), rank, 0, driver.clone(), hosts).serve();
        for other in [hosts(4_000), super::world::hosts()] {
            let error = node(1, other).wait().unwrap_err();
            assert!(error.is_permanent(), "{error}");
            let text = error.to_string();
            assert!(
                text.contains("the number of examples is") && text.contains("60000"),
                "{text}"
            );
        }
        let same = node(1, hosts(60_000));
        cluster.wait_for_nodes(1, SOON).wait().unwrap();
        drop(cluster);
        same.wait().unwrap();
    }
}
