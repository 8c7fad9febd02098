//! Decides how the caller of a test reaches the actor: in this process, or through a network.
//!
//! In both cases the actor is in this process, because its factory and messages are closures. For the second
//! case its reference was sent through a cluster, so every call goes through a pipe or a socket.

use std::sync::LazyLock;
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, MessageResult};
use ps_runtime::cluster::{
    Cluster, ClusterConfig, ClusterError, Hosted, Hosts, Node, NodeExit, Placement, SpawnOn, Task,
    Transport,
};
use ps_runtime::net::NetConfig;
use ps_runtime::net::memory::MemoryNetwork;
use ps_runtime::remote::{Messages, Remote};
use ps_runtime::{ActorRef, Spawn, SpawnError};
use serde::{Deserialize, Serialize};

use super::probe::{Parked, Probe, SOON};
use crate::cluster::world::LOCAL;

/// How the caller reaches the actor.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    InProcess,
    /// Through pipes in memory.
    Memory,
    /// Through sockets.
    Tcp,
}

impl Place {
    pub(crate) fn spawn(self, make: impl FnMut() -> Probe + Send + 'static) -> ActorRef<Probe> {
        self.start(Spawn::new(), make)
            .expect("the options are sound")
    }

    pub(crate) fn start(
        self,
        options: Spawn,
        make: impl FnMut() -> Probe + Send + 'static,
    ) -> Result<ActorRef<Probe>, SpawnError> {
        static MEMORY: LazyLock<World> =
            LazyLock::new(|| World::new(Transport::Memory(MemoryNetwork::new())));
        static TCP: LazyLock<World> = LazyLock::new(|| World::new(Transport::Tcp));

        let actor = options.start(make)?;
        Ok(match self {
            Self::InProcess => actor,
            Self::Memory => MEMORY.elsewhere(actor),
            Self::Tcp => TCP.elsewhere(actor),
        })
    }
}

/// A driver and a node, for all tests of a transport.
struct World {
    mirror: ActorRef<Mirror>,
    _cluster: Cluster,
    _node: Task<Result<NodeExit, ClusterError>>,
}

impl World {
    fn new(transport: Transport) -> Self {
        let config = ClusterConfig {
            transport,
            net: NetConfig {
                heartbeat: Duration::from_millis(250),
                // Twice their sum has to pass before an actor without references ends.
                process_lease: Duration::from_millis(1500),
                handshake: Duration::from_millis(500),
                ..NetConfig::default()
            },
            ..ClusterConfig::default()
        };
        let hosts = || Hosts::new().host(|()| Ok(Mirror));
        let cluster = Cluster::listen(config.clone(), LOCAL, hosts()).unwrap();
        let driver = cluster.addresses()[0].to_string();
        let node = Node::new(config, 1, 0, driver, hosts()).serve();
        cluster.wait_for_nodes(1, SOON).wait().unwrap();
        let options = SpawnOn::new().place(Placement::Rank(1));
        let mirror = cluster.spawn_with(options, ()).wait().unwrap();
        Self {
            mirror,
            _cluster: cluster,
            _node: node,
        }
    }

    /// Exchanges the reference to an actor of this process for one that leads through the network.
    fn elsewhere(&self, actor: ActorRef<Probe>) -> ActorRef<Probe> {
        let reply = self.mirror.ask(HandOut(Parked::new(actor)));
        let actor = reply.wait_timeout(SOON).unwrap();
        assert!(!actor.is_local());
        actor
    }
}

/// Lives on the node, and shows the driver actors of this process as the node's.
struct Mirror;

impl Actor for Mirror {
    type Context = Context<Self>;
}

impl Remote for Mirror {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<HandOut>();
    }
}

impl Hosted for Mirror {
    type Args = ();
}

#[derive(Serialize, Deserialize)]
struct HandOut(Parked<ActorRef<Probe>>);

impl Message for HandOut {
    type Result = ActorRef<Probe>;
}

impl Handler<HandOut> for Mirror {
    type Result = MessageResult<HandOut>;

    fn handle(&mut self, HandOut(actor): HandOut, _: &mut Context<Self>) -> Self::Result {
        MessageResult(actor.take())
    }
}
