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
