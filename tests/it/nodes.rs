//! A cluster whose two nodes share the test's process.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use ps::actors::cluster::{Node, Transport};
use ps::actors::net::memory::MemoryNetwork;
use ps::actors::net::{Address, NetConfig};
use ps::prelude::*;

pub(crate) const SOON: Duration = Duration::from_secs(60);

pub(crate) fn transports() -> [Transport; 3] {
    [
        Transport::Memory(MemoryNetwork::new()),
        Transport::Tcp,
        Transport::Sockets,
    ]
}

pub(crate) fn config(transport: Transport) -> ClusterConfig {
    ClusterConfig {
        transport,
        net: NetConfig {
            // The machine that tests run on may be busy.
            process_lease: Duration::from_secs(30),
            handshake: Duration::from_secs(30),
            ..NetConfig::default()
        },
        ..ClusterConfig::default()
    }
}

/// Why a driver with one `Hosts` does not let a node with another one in.
pub(crate) fn refusal(driver: Hosts, node: Hosts) -> String {
    let config = config(Transport::Memory(MemoryNetwork::new()));
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let cluster = Cluster::listen(config.clone(), address, driver).unwrap();
    let joined = cluster.wait_for_nodes(1, SOON);
    let node = Node::new(config, 1, 0, cluster.addresses()[0].to_string(), node);
    let served = node.serve_until(async { drop(joined.await) }).wait();
    served.expect_err("it was let in").to_string()
}

/// Does something in a cluster of a driver and two nodes.
pub(crate) fn with_two_nodes<T>(
    transport: Transport,
    hosts: Hosts,
    work: impl FnOnce(&Cluster) -> T,
) -> T {
    let config = config(transport);
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
