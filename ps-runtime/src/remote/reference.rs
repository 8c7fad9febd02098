//! Sends and receives an [`ActorRef`] as the process that has the actor and the actor's number there.

use std::any::{Any, TypeId, type_name};
use std::cell::RefCell;
use std::sync::Arc;

use actix::Actor;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Remote;
use super::caller::RemoteActor;
use super::process::{NodeId, Process};
use super::table::Table;
use crate::actor::ActorRef;
use crate::actor::actor_ref::Target;
use crate::actor::book::Book;
use crate::actor::port::{How, Port};
use crate::actor::registry::AnyMailbox;
use crate::net::NetConfig;
use crate::net::frame::Kind;
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
            Target::There(port) => Remotely::of(&**port).actor.wire().clone(),
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
    Remotely::reference(actor, Table::empty())
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
    Ok(Remotely::reference(process.remote(wire), table))
}

/// The data of a reference to an actor of another process.
pub(crate) struct Remotely<A: Actor> {
    pub(super) actor: Arc<RemoteActor>,
    pub(super) table: Arc<Table<A>>,
}

impl<A: Actor> Remotely<A> {
    /// `actor` counts the reference as a holder already.
    fn reference(actor: Arc<RemoteActor>, table: Arc<Table<A>>) -> ActorRef<A> {
        ActorRef::there(Box::new(Self { actor, table }))
    }

    pub(super) fn of(port: &dyn Port<A>) -> &Self {
        let remotely = port.as_any().downcast_ref();
        remotely.expect("this module has the only port")
    }
}

impl<A: Actor> ActorRef<A> {
    /// The process that the actor runs in, or `None` if it is this process.
    pub fn node(&self) -> Option<NodeId> {
        match self.target() {
            Target::Here(_) => None,
            Target::There(port) => Some(Remotely::of(&**port).actor.wire().node),
        }
    }

    /// Cuts the connection of this process to the actor, as a network does that fails: calls under way end as
    /// `Unknown(ConnectionLost)`, and a new connection is opened at once. Returns `false` if there is no
    /// connection, because the actor is in this process or the last connection is being replaced.
    #[cfg(feature = "chaos")]
    pub fn cut_connection(&self) -> bool {
        match self.target() {
            Target::Here(_) => false,
            Target::There(port) => {
                let actor = &Remotely::of(&**port).actor;
                actor.sever(&"cut on purpose".into())
            }
        }
    }
}

impl<A: Actor> Port<A> for Remotely<A> {
    fn book(&self) -> &Book {
        self.actor.book()
    }

    fn is_alive(&self) -> bool {
        !self.actor.has_ended()
    }

    fn stop(&self) {
        self.actor.signal(Kind::Stop);
    }

    fn kill(&self) {
        self.actor.signal(Kind::Kill);
    }

    fn ended(&self) -> BoxFuture<'_, ()> {
        self.actor.gone().boxed()
    }

    fn release(&self) {
        self.actor.release();
    }

    fn mailbox(&self) -> Arc<dyn AnyMailbox> {
        Arc::clone(&self.actor) as _
    }

    fn begin(&self, id: TypeId, message: &mut dyn Any, how: How) -> Option<Box<dyn Any>> {
        let begun = self.table.begin(self, id, message, how);
        if let (None, How::InSlot) = (&begun, how) {
            self.actor.book().release_slot();
        }
        begun
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
