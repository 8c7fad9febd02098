//! Looks up actors by name from inside an actor, in whichever process that actor was started.

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use super::agent::{DriverAgent, Find, agent_wire, hosted_name};
use super::task::Task;
use crate::actor::{self, ActorRef};
use crate::remote::Remote;
use crate::remote::process::{NodeId, Process};
use crate::remote::reference::reference;

thread_local! {
    /// The process, in its current incarnation, that made the actor of this thread.
    static HOME: RefCell<Weak<Process>> = const { RefCell::new(Weak::new()) };
}

/// Records the process that made the actor of this thread.
pub(crate) fn enter(process: &Arc<Process>) {
    HOME.set(Arc::downgrade(process));
}

/// Looks for an actor by its name in the driver, then on all nodes.
///
/// This works in the code of an actor that a [`Cluster`](super::Cluster) has started. Elsewhere it looks
/// in this process only, like [`actor::lookup`](crate::actor::lookup). In a driver program, use
/// [`Cluster::lookup`](super::Cluster::lookup).
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # use ps_runtime::cluster::Hosted;
/// # use ps_runtime::remote::{Messages, Remote};
/// # use serde::{Deserialize, Serialize};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # #[derive(Message, Serialize, Deserialize)]
/// # #[rtype(result = "u64")]
/// # struct Add(u64);
/// # impl Handler<Add> for Counter {
/// #     type Result = u64;
/// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
/// # }
/// # impl Remote for Counter {
/// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Add>(); }
/// # }
/// # impl Hosted for Counter { type Args = u64; }
/// use actix::ResponseFuture;
/// use ps_runtime::cluster::{Cluster, Hosts, SpawnOn, lookup};
///
/// /// Adds to a counter that it knows by name only.
/// struct Visitor;
/// # impl Actor for Visitor { type Context = Context<Self>; }
/// # #[derive(Message, Serialize, Deserialize)]
/// # #[rtype(result = "Option<u64>")]
/// # struct Visit;
/// # impl Remote for Visitor {
/// #     fn messages(messages: &mut Messages<Self>) { messages.add::<Visit>(); }
/// # }
/// # impl Hosted for Visitor { type Args = (); }
///
/// impl Handler<Visit> for Visitor {
///     type Result = ResponseFuture<Option<u64>>;
///
///     fn handle(&mut self, _: Visit, _: &mut Context<Self>) -> Self::Result {
///         let visits = lookup::<Counter>("visits of this example");
///         Box::pin(async { visits.await?.ask(Add(1)).await.ok() })
///     }
/// }
///
/// let hosts = Hosts::new()
///     .host(|start: u64| Ok(Counter(start)))
///     .host(|()| Ok(Visitor));
/// let cluster = Cluster::alone(hosts);
/// let named = SpawnOn::new().name("visits of this example");
/// let _visits = cluster.spawn_with::<Counter>(named, 41).wait()?;
/// let visitor = cluster.spawn::<Visitor>(()).wait()?;
/// assert_eq!(visitor.ask(Visit).wait()?, Some(42));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn lookup<A: Remote>(name: impl Into<String>) -> Task<Option<ActorRef<A>>> {
    let name = name.into();
    let home = HOME.with_borrow(Weak::upgrade);
    let Some(process) = home else {
        return Task::ready(actor::lookup(&name).ok());
    };
    Task::start(async move {
        let driver = agent_wire::<DriverAgent>(NodeId::DRIVER);
        let Ok(driver) = reference::<DriverAgent>(&process, driver) else {
            // This process is alone: there is no driver and no other process to ask.
            return actor::lookup(&name).ok();
        };
        let type_name = hosted_name::<A>();
        let found = driver.ask(Find { type_name, name }).await.ok()??;
        reference(&process, found).ok()
    })
}
