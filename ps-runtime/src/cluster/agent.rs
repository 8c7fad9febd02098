//! The agents: actors through which the processes of a cluster join, spawn actors and leave.
//!
//! The driver's agent keeps the list of nodes. Each node's agent starts actors. Both are ordinary
//! actors, so joining and spawning are ordinary calls.

use std::any::type_name;
use std::collections::BTreeMap;
use std::sync::Arc;

use actix::{Actor, Context, Handler, Message, ResponseFuture};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::door::Door;
use super::host::Args;
use super::incarnations::KnownIncarnations;
use super::members::Members;
use super::resources::Resources;
use super::task_scope::TaskScope;
use crate::actor::ActorRef;
use crate::net::Address;
use crate::remote::process::{AGENT, NodeId, Process};
use crate::remote::reference::{Wire, reference};
use crate::remote::table::Table;
use crate::remote::{Messages, Remote};

/// Asks the driver for a place in the cluster.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Joined, JoinRefused>")]
pub(crate) struct Join {
    pub(crate) rank: u32,
    /// How often the launcher has started this rank before.
    pub(crate) attempt: u64,
    /// A random number that identifies the process. The same process may join again; another one must not
    /// take its rank.
    pub(crate) process: u64,
    /// The run that it was started for, if it was told.
    pub(crate) run_id: Option<String>,
    /// The user of the process, if it has never joined before.
    pub(crate) user: Option<u32>,
    pub(crate) addresses: Vec<Address>,
    pub(crate) resources: Resources,
    pub(crate) host: String,
    pub(crate) pid: u32,
    /// The facts that must be the same as in the driver.
    pub(crate) facts: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Joined {
    pub(crate) node: NodeId,
    pub(crate) session: u64,
    /// Where nodes on the driver's host reach the driver faster than at the address that they were given.
    pub(crate) sockets: Vec<Address>,
    /// The driver's clock, in seconds since 1970.
    pub(crate) clock: f64,
}

/// Why the driver refuses a node.
#[derive(Clone, Debug, Serialize, Deserialize, thiserror::Error)]
pub(crate) enum JoinRefused {
    #[error("rank {0} is the driver's own")]
    Driver(u32),
    #[error("attempt {attempt} of rank {rank} is over: attempt {current} has joined")]
    Superseded {
        rank: u32,
        attempt: u64,
        current: u64,
    },
    #[error(
        "process {pid} on {host} has rank {rank} since {since_secs} s, as attempt {attempt}: give each \
         process its own --rank, and each run its own --master-port (a --run-id keeps runs apart)"
    )]
    Taken {
        rank: u32,
        attempt: u64,
        host: String,
        pid: u32,
        since_secs: u64,
    },
    #[error("it was started for run {wanted:?}, and this is the driver of run {here:?}")]
    OtherRun { wanted: String, here: String },
    #[error("a cluster without a token takes nodes of its own host only, not {0}")]
    NotLocal(Address),
    #[error(
        "{name} is {} here, but {} in the driver: start all processes with the same settings and data",
        .here.as_deref().unwrap_or("not stated"),
        .driver.as_deref().unwrap_or("not stated")
    )]
    Differs {
        name: String,
        here: Option<String>,
        driver: Option<String>,
    },
    #[error("the run is over")]
    Over,
}

impl JoinRefused {
    /// Whether the same rank is refused again unless it is started in another way. The other reasons
    /// depend on the process that has the rank, and on other runs.
    pub(crate) fn is_about_its_start(&self) -> bool {
        matches!(self, Self::NotLocal(_) | Self::Differs { .. })
    }
}

/// Asks a node whether it still runs. Any answer means that it does.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct AreYouThere;

/// Says that a node is about to leave. No more actors are started there.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct PrepareToLeave(pub(crate) NodeId);

/// Says that a node leaves in an orderly way.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Leave(pub(crate) NodeId);

/// Asks for the addresses of a node.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Option<Vec<Address>>")]
pub(crate) struct Resolve(pub(crate) NodeId);

/// Asks which incarnations of nodes there are. The answer comes as soon as it differs from what the asking
/// node already knows.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "KnownIncarnations")]
pub(crate) struct GetIncarnations {
    pub(crate) newer_than: Option<u64>,
}

/// Looks for an actor by its type and name. A node looks in its own process, the driver in all processes.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Option<Wire>")]
pub(crate) struct Find {
    pub(crate) type_name: String,
    pub(crate) name: String,
}

/// Makes an actor.
#[derive(Clone, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "Result<Wire, SpawnRefused>")]
pub(crate) struct Make {
    /// Identifies the order. If it is sent again because a connection was lost, the answer is the actor that
    /// was made the first time.
    pub(crate) order: u64,
    pub(crate) type_name: String,
    pub(crate) variant: Option<String>,
    pub(crate) args: Args,
    pub(crate) name: Option<String>,
    pub(crate) needs: Resources,
}

/// Why a process did not make an actor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[non_exhaustive]
pub enum SpawnRefused {
    /// The type is not in the [`Hosts`](super::Hosts) of that process.
    #[error("{type_name} is not hosted there (hosted: {hosted}): add it with Hosts::host")]
    NotHosted {
        /// The type asked for.
        type_name: String,
        /// The types that are hosted.
        hosted: String,
    },
    /// The type is hosted, but not in this variant.
    #[error(
        "{type_name} is hosted there for {hosted}, not for {variant}: all processes must add what \
         they host before the launch, such as each trainer's `hosts(..)`, with the same settings and data"
    )]
    OtherVariants {
        /// The type asked for.
        type_name: String,
        /// The variant asked for.
        variant: String,
        /// The variants that are hosted.
        hosted: String,
    },
    /// No variant was asked for, and several are hosted.
    #[error("{type_name} is hosted there for {hosted}: say which one with SpawnOn::variant")]
    Ambiguous {
        /// The type asked for.
        type_name: String,
        /// The variants that are hosted.
        hosted: String,
    },
    /// The resources that the actor needs are not free.
    #[error("{needs} is not free there")]
    NoRoom {
        /// The resources that were asked for.
        needs: Resources,
    },
    /// The process is about to leave.
    #[error("it is about to leave")]
    Leaving,
    /// The function that makes the actor failed.
    #[error("it could not be made: {0}")]
    Failed(String),
}

/// Ends a node: the run is over.
#[derive(Clone, Copy, Debug, Message, Serialize, Deserialize)]
#[rtype(result = "()")]
pub(crate) struct Release;

/// The agent of a node.
pub(crate) struct NodeAgent {
    pub(crate) scope: Arc<TaskScope>,
    pub(crate) released: watch::Sender<bool>,
}

impl Actor for NodeAgent {
    type Context = Context<Self>;
}

impl Remote for NodeAgent {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Make>()
            .add::<Find>()
            .add::<Release>()
            .add::<AreYouThere>();
    }
}

impl Handler<AreYouThere> for NodeAgent {
    type Result = ();

    fn handle(&mut self, _: AreYouThere, _: &mut Self::Context) {}
}

impl Handler<Make> for NodeAgent {
    type Result = ResponseFuture<Result<Wire, SpawnRefused>>;

    fn handle(&mut self, order: Make, _: &mut Self::Context) -> Self::Result {
        Box::pin(Arc::clone(&self.scope).make(order))
    }
}

impl Handler<Find> for NodeAgent {
    type Result = Option<Wire>;

    fn handle(&mut self, find: Find, _: &mut Self::Context) -> Self::Result {
        self.scope.find(&find)
    }
}

impl Handler<Release> for NodeAgent {
    type Result = ();

    fn handle(&mut self, _: Release, _: &mut Self::Context) {
        self.released.send_replace(true);
    }
}

/// The agent of the driver.
pub(crate) struct DriverAgent {
    pub(crate) process: Arc<Process>,
    pub(crate) scope: Arc<TaskScope>,
    pub(crate) members: Arc<Members>,
    /// Whether nodes on other hosts may join. If not, the driver connects only to addresses of its own host.
    pub(crate) takes_far_nodes: bool,
}

impl Actor for DriverAgent {
    type Context = Context<Self>;
}

impl Remote for DriverAgent {
    fn messages(messages: &mut Messages<Self>) {
        messages
            .add::<Join>()
            .add::<PrepareToLeave>()
            .add::<Leave>()
            .add::<Resolve>()
            .add::<Find>()
            .add::<GetIncarnations>();
    }
}

/// Returns the wire form of a reference to a node's agent.
pub(crate) fn agent_wire<A: Remote>(node: NodeId) -> Wire {
    Wire {
        node,
        actor: AGENT,
        name: format!("agent of {node}").into(),
        max_pending: 1024,
        schema: Table::<A>::get().schema(),
    }
}

/// Returns a reference to another node's agent.
pub(crate) fn agent_of<A: Remote>(process: &Arc<Process>, node: NodeId) -> ActorRef<A> {
    reference(process, agent_wire::<A>(node)).expect("the schema is this process's own")
}

impl Handler<Join> for DriverAgent {
    type Result = ResponseFuture<Result<Joined, JoinRefused>>;

    fn handle(&mut self, join: Join, _: &mut Self::Context) -> Self::Result {
        let door = Door {
            process: Arc::clone(&self.process),
            scope: Arc::clone(&self.scope),
            members: Arc::clone(&self.members),
            takes_far_nodes: self.takes_far_nodes,
        };
        Box::pin(async move { door.let_in(join).await })
    }
}

impl Handler<PrepareToLeave> for DriverAgent {
    type Result = ();

    fn handle(&mut self, PrepareToLeave(node): PrepareToLeave, _: &mut Self::Context) {
        tracing::info!(%node, "a node is about to leave");
        self.members.set_leaving(node);
    }
}

impl Handler<Leave> for DriverAgent {
    type Result = ();

    fn handle(&mut self, Leave(node): Leave, _: &mut Self::Context) {
        if self.members.remove(node, true) {
            tracing::info!(%node, "a node has left");
        }
    }
}

impl Handler<Resolve> for DriverAgent {
    type Result = Option<Vec<Address>>;

    fn handle(&mut self, Resolve(node): Resolve, _: &mut Self::Context) -> Self::Result {
        self.members.addresses(node)
    }
}

impl Handler<GetIncarnations> for DriverAgent {
    type Result = ResponseFuture<KnownIncarnations>;

    fn handle(
        &mut self,
        GetIncarnations { newer_than }: GetIncarnations,
        _: &mut Self::Context,
    ) -> Self::Result {
        let members = Arc::clone(&self.members);
        Box::pin(async move { members.incarnations(newer_than).await })
    }
}

impl Handler<Find> for DriverAgent {
    type Result = ResponseFuture<Option<Wire>>;

    fn handle(&mut self, find: Find, _: &mut Self::Context) -> Self::Result {
        let (scope, members) = (Arc::clone(&self.scope), Arc::clone(&self.members));
        Box::pin(async move { find_anywhere(&scope, &members, find).await })
    }
}

/// Looks in this process, then in all nodes at once.
pub(crate) async fn find_anywhere(
    scope: &TaskScope,
    members: &Members,
    find: Find,
) -> Option<Wire> {
    if let Some(found) = scope.find(&find) {
        return Some(found);
    }
    let asked: Vec<_> = members
        .list()
        .into_iter()
        .map(|member| member.agent.ask(find.clone()))
        .collect();
    let answers = futures_util::future::join_all(asked).await;
    answers.into_iter().find_map(|answer| answer.ok().flatten())
}

pub(crate) fn hosted_name<A>() -> String {
    type_name::<A>().to_owned()
}
