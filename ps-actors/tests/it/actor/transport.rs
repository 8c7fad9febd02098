//! Where the actor of a test is: in this process, or elsewhere as far as its caller can tell.
//!
//! An actor elsewhere is one of this process, too, since its factory and messages are closures; but
//! its reference has gone through a cluster, and every call goes through a pipe or a socket.

use std::any::Any;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, Weak};
use std::time::Duration;

use actix::{Actor, Context, Handler, Message, MessageResult};
use ps_actors::cluster::{
    Cluster, ClusterConfig, ClusterError, Hosted, Hosts, Node, NodeExit, Placement, SpawnOn, Task,
    Transport,
};
use ps_actors::net::NetConfig;
use ps_actors::net::memory::MemoryNetwork;
use ps_actors::remote::{Messages, Remote};
use ps_actors::{ActorRef, Spawn, SpawnError};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::probe::{Probe, SOON};
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
                lease: Duration::from_millis(1500),
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

/// What has no bytes, such as a closure. It is sent as the number of its place in a table of this
/// process, for which the sender keeps it: a message that was taken back cannot be read any more.
pub(crate) struct Parked<T>(Arc<Mutex<Option<T>>>);

type Table = Mutex<HashMap<u64, Weak<dyn Any + Send + Sync>>>;

static TABLE: LazyLock<Table> = LazyLock::new(Mutex::default);

impl<T> Parked<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Arc::new(Mutex::new(Some(value))))
    }

    /// Takes it out, for this process and, as it were, for the sender.
    pub(crate) fn take(self) -> T {
        let value = self.0.lock().unwrap().take();
        value.expect("a message begins at most once")
    }
}

impl<T: Send + 'static> Serialize for Parked<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // Others are made up to see what a message looks like, which must not find anything.
        static NEXT: AtomicU64 = AtomicU64::new(1000);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let parked: Arc<dyn Any + Send + Sync> = Arc::clone(&self.0) as _;
        TABLE
            .lock()
            .unwrap()
            .insert(number, Arc::downgrade(&parked));
        number.serialize(serializer)
    }
}

impl<'de, T: Send + 'static> Deserialize<'de> for Parked<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = u64::deserialize(deserializer)?;
        let parked = TABLE.lock().unwrap().remove(&number);
        let parked = parked.and_then(|parked| parked.upgrade());
        let parked = parked.and_then(|parked| parked.downcast().ok());
        parked
            .map(Self)
            .ok_or_else(|| serde::de::Error::custom("its sender has taken it back"))
    }
}
