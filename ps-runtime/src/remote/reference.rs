//! Sends and receives an [`ActorRef`] as the process that has the actor and the actor's number there.

use std::any::type_name;
use std::cell::RefCell;
use std::sync::Arc;

use actix::Actor;
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Remote;
use super::caller::RemoteActor;
use super::process::{NodeId, Process};
use super::table::Table;
use crate::actor::ActorRef;
use crate::actor::actor_ref::Target;
use crate::net::NetConfig;
use crate::schema::is_tracing;

/// A reference as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wire {
    pub(crate) node: NodeId,
    /// The actor's number in its process.
    pub(crate) actor: u64,
    pub(crate) name: Arc<str>,
    pub(crate) max_pending: u32,
    pub(crate) schema: u64,
}

thread_local! {
    /// The process on whose behalf this thread writes or reads a message.
    static CURRENT: RefCell<Option<Arc<Process>>> = const { RefCell::new(None) };
}

/// Writes or reads a message on behalf of a process.
pub(crate) fn on_behalf_of<T>(process: &Arc<Process>, work: impl FnOnce() -> T) -> T {
    struct Restore(Option<Arc<Process>>);
    impl Drop for Restore {
        fn drop(&mut self) {
            CURRENT.set(self.0.take());
        }
    }
    let _restore = Restore(CURRENT.replace(Some(Arc::clone(process))));
    work()
}

pub(crate) fn current() -> Option<Arc<Process>> {
    CURRENT.with_borrow(Clone::clone)
}

pub(crate) const NOT_IN_A_CALL: &str =
    "an ActorRef or kept value can be sent to and read by actors of a cluster only";

/// A reference can be sent to other processes of its cluster, inside any message.
///
/// The actor lives while any process holds a reference to it.
impl<A: Remote> Serialize for ActorRef<A> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let process = current().ok_or_else(|| S::Error::custom(NOT_IN_A_CALL))?;
        match self.target() {
            Target::Here(_) => process.export(self),
            Target::There(remote) => remote.actor.wire().clone(),
        }
        .serialize(serializer)
    }
}

impl<'de, A: Remote> Deserialize<'de> for ActorRef<A> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        if is_tracing() {
            return Ok(nowhere(wire));
        }
        let process = current().ok_or_else(|| D::Error::custom(NOT_IN_A_CALL))?;
        reference(&process, wire).map_err(D::Error::custom)
    }
}

/// Makes a reference for a made-up message. It can send nothing.
fn nowhere<A: Remote>(wire: Wire) -> ActorRef<A> {
    let process = Process::new(NetConfig::default(), None, None, None);
    let actor = RemoteActor::new(process, wire);
    actor.claim();
    ActorRef::there(actor, Table::empty())
}

/// Makes a reference to the actor that `wire` names.
pub(crate) fn reference<A: Remote>(
    process: &Arc<Process>,
    wire: Wire,
) -> Result<ActorRef<A>, String> {
    let table = Table::<A>::get();
    if table.schema() != wire.schema {
        let name = &wire.name;
        return Err(format!(
            "{name} is not a {} of this version of the program",
            type_name::<A>()
        ));
    }
    if wire.node == process.id() {
        return process.exported(wire.actor).ok_or_else(|| {
            let name = &wire.name;
            format!("{name} has ended, or is not a {}", type_name::<A>())
        });
    }
    Ok(ActorRef::there(process.remote(wire), table))
}

/// The data of a reference to an actor of another process.
pub(crate) struct Remotely<A: Actor> {
    pub(crate) actor: Arc<RemoteActor>,
    pub(crate) table: Arc<Table<A>>,
}
