//! A driver and nodes in one process, and an actor to put on them.

use actix::{Actor, Context, Handler, Message, ResponseActFuture, WrapFuture};
use ps_runtime::ActorRef;
use ps_runtime::cluster::{
    Cluster, ClusterConfig, ClusterError, Hosted, Hosts, Node, NodeExit, Placement, SpawnOn, Task,
};
use ps_runtime::codec::Bulk;
use ps_runtime::remote::{Kept, Messages, Remote};
pub(crate) use ps_runtime::test_util::{LOCAL, Parked, SOON, config, driver_address, transports};
use serde::{Deserialize, Serialize};

use super::values::{Holder, Tally};
use crate::actor::probe::{Census, Citizen};

/// A driver with nodes 1..=n.
pub(crate) struct World {
    pub(crate) cluster: Cluster,
    pub(crate) config: ClusterConfig,
    pub(crate) nodes: Vec<Task<Result<NodeExit, ClusterError>>>,
}

pub(crate) fn hosts() -> Hosts {
    Hosts::new()
        .host(|start: i64| match start {
            0.. => Ok(Counter { count: start }),
            _ => Err(format!("cannot count from {start}").into()),
        })
        .host(|citizen: Parked<Citizen>| {
            Ok(Mortal {
                _citizen: citizen.take(),
            })
        })
        .host(|()| Ok(Holder::default()))
        .values::<Tally>()
}

impl World {
    pub(crate) fn new(config: ClusterConfig, num_nodes: u32) -> Self {
        let cluster = Cluster::listen(config.clone(), LOCAL, hosts()).unwrap();
        let mut world = Self {
            cluster,
            config,
            nodes: Vec::new(),
        };
        for rank in 1..=num_nodes {
            let node = world.node(rank, 0).serve();
            world.nodes.push(node);
        }
        let all = world.cluster.wait_for_nodes(num_nodes as usize, SOON);
        all.wait().unwrap();
        world
    }

    /// Where nodes find the driver.
    pub(crate) fn driver(&self) -> String {
        driver_address(&self.cluster)
    }

    pub(crate) fn node(&self, rank: u32, attempt: u64) -> Node {
        Node::new(self.config.clone(), rank, attempt, self.driver(), hosts())
    }
}

#[derive(Debug)]
pub(crate) struct Counter {
    count: i64,
}

impl Actor for Counter {
    type Context = Context<Self>;
}

impl Remote for Counter {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Add>()
            .add::<Fail>()
            .add::<TakeIt>()
            .add::<AskNamed>()
            .add::<GiveBack>()
            .add::<Echo>()
            .add::<Ask>()
            .add::<Myself>()
            .add::<Never>();
    }
}

impl Hosted for Counter {
    type Args = i64;
}

#[derive(Clone, Debug, PartialEq, Message, Serialize, Deserialize)]
#[rtype(result = "i64")]
pub(crate) struct Add(pub(crate) i64);

impl Handler<Add> for Counter {
    type Result = i64;

    fn handle(&mut self, Add(amount): Add, _: &mut Context<Self>) -> i64 {
        self.count += amount;
        self.count
    }
}

#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Fail(pub(crate) String);

impl Handler<Fail> for Counter {
    type Result = ();

    fn handle(&mut self, Fail(why): Fail, _: &mut Context<Self>) {
        panic!("{why}");
    }
}

/// Sends numbers back as they came.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Bulk")]
pub(crate) struct Echo(pub(crate) Bulk);

impl Handler<Echo> for Counter {
    type Result = actix::MessageResult<Echo>;

    fn handle(&mut self, Echo(numbers): Echo, _: &mut Context<Self>) -> Self::Result {
        actix::MessageResult(numbers)
    }
}

/// Asks another counter.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<i64, ps_runtime::CallError>")]
pub(crate) struct Ask(pub(crate) ActorRef<Counter>, pub(crate) Add);

impl Handler<Ask> for Counter {
    type Result = ResponseActFuture<Self, Result<i64, ps_runtime::CallError>>;

    fn handle(&mut self, Ask(other, add): Ask, _: &mut Context<Self>) -> Self::Result {
        Box::pin(other.ask(add).into_actor(self))
    }
}

/// Returns a reference to the counter itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Myself;

impl Message for Myself {
    type Result = Option<ActorRef<Counter>>;
}

impl Handler<Myself> for Counter {
    type Result = actix::MessageResult<Myself>;

    fn handle(&mut self, _: Myself, _: &mut Context<Self>) -> Self::Result {
        actix::MessageResult(ActorRef::current())
    }
}

/// Is never answered.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Never;

impl Handler<Never> for Counter {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: Never, _: &mut Context<Self>) -> Self::Result {
        Box::pin(std::future::pending::<()>().into_actor(self))
    }
}

/// Not among the messages that others may send.
#[derive(Clone, Debug, PartialEq, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Unlisted(pub(crate) u8);

impl Handler<Unlisted> for Counter {
    type Result = ();

    fn handle(&mut self, _: Unlisted, _: &mut Context<Self>) {}
}

/// Is counted as long as it lives.
pub(crate) struct Mortal {
    _citizen: Citizen,
}

impl Mortal {
    pub(crate) fn on_node(world: &World, rank: u32, census: &Census) -> ActorRef<Self> {
        let options = SpawnOn::new().place(Placement::Rank(rank));
        let citizen = Parked::new(census.citizen());
        world.cluster.spawn_with(options, citizen).wait().unwrap()
    }
}

impl Actor for Mortal {
    type Context = Context<Self>;
}

impl Remote for Mortal {
    fn messages(messages: &mut Messages<Self>) {
        messages.add::<Greet>().add::<Never>();
    }
}

impl Hosted for Mortal {
    type Args = Parked<Citizen>;
}

#[derive(Clone, Debug, PartialEq, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Greet;

impl Handler<Greet> for Mortal {
    type Result = ();

    fn handle(&mut self, _: Greet, _: &mut Context<Self>) {}
}

impl Handler<Never> for Mortal {
    type Result = ResponseActFuture<Self, ()>;

    fn handle(&mut self, _: Never, _: &mut Context<Self>) -> Self::Result {
        Box::pin(std::future::pending::<()>().into_actor(self))
    }
}

/// Takes a value that is kept somewhere.
#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<i64, String>")]
pub(crate) struct TakeIt(pub(crate) Kept<i64>);

impl Handler<TakeIt> for Counter {
    type Result = ResponseActFuture<Self, Result<i64, String>>;

    fn handle(&mut self, TakeIt(kept): TakeIt, _: &mut Context<Self>) -> Self::Result {
        let taken = async move { kept.take().await.map_err(|error| error.to_string()) };
        Box::pin(taken.into_actor(self))
    }
}

/// Returns the ticket.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct GiveBack(pub(crate) Kept<i64>);

impl Message for GiveBack {
    type Result = Kept<i64>;
}

impl Handler<GiveBack> for Counter {
    type Result = actix::MessageResult<GiveBack>;

    fn handle(&mut self, GiveBack(kept): GiveBack, _: &mut Context<Self>) -> Self::Result {
        actix::MessageResult(kept)
    }
}

/// Looks another counter up by its name, and adds to it.
#[derive(Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Option<i64>")]
pub(crate) struct AskNamed(pub(crate) String, pub(crate) Add);

impl Handler<AskNamed> for Counter {
    type Result = ResponseActFuture<Self, Option<i64>>;

    fn handle(&mut self, AskNamed(name, add): AskNamed, _: &mut Context<Self>) -> Self::Result {
        let found = ps_runtime::cluster::lookup::<Self>(name);
        let asked = async move { found.await?.ask(add).await.ok() };
        Box::pin(asked.into_actor(self))
    }
}
