//! A cluster whose two nodes share the test's process.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use ps::actors::cluster::{Node, Transport};
use ps::actors::net::memory::MemoryNetwork;
use ps::actors::net::{Address, NetConfig};
use ps::prelude::*;

const SOON: Duration = Duration::from_secs(60);

pub(crate) fn transports() -> [Transport; 3] {
    [
        Transport::Memory(MemoryNetwork::new()),
        Transport::Tcp,
        Transport::Sockets,
    ]
}

/// Does something in a cluster of a driver and two nodes.
pub(crate) fn with_two_nodes<T>(
    transport: Transport,
    hosts: Hosts,
    work: impl FnOnce(&Cluster) -> T,
) -> T {
    let config = ClusterConfig {
        transport,
        net: NetConfig {
            // The machine that tests run on may be busy.
            lease: Duration::from_secs(30),
            handshake: Duration::from_secs(30),
            ..NetConfig::default()
        },
        ..ClusterConfig::default()
    };
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let cluster = Cluster::listen(config.clone(), address, hosts.clone()).unwrap();
    let addresses = cluster.addresses().iter();
    let mut driver = addresses.filter(|address| !matches!(address, Address::Unix(_)));
    let driver = driver.next().unwrap().to_string();
    let nodes = [1, 2]
        .map(|rank| Node::new(config.clone(), rank, 0, driver.clone(), hosts.clone()).serve());
    cluster.wait_for_nodes(2, SOON).wait().unwrap();
    let result = work(&cluster);
    drop(cluster);
    for node in nodes {
        node.wait().unwrap();
    }
    result
}
