//! The table of all living actors of the process, and of their names.
//!
//! An actor enters itself at its start and removes itself at its end, so nothing of an ended actor
//! stays. The entry of a named actor holds a reference to the actor, which keeps it alive.

use std::any::{Any, type_name};
use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use actix::Actor;
use tokio::sync::watch;

use super::actor_ref::{ActorRef, Handle};
use super::book::ActorId;
use super::error::LookupError;
use super::mailbox::{Mailbox, Phase};

/// Finds a living actor of this process by its name.
///
/// An actor that is stopping is found, too. Calls to it fail.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # #[derive(Message)]
/// # #[rtype(result = "u64")]
/// # struct Add(u64);
/// # impl Handler<Add> for Counter {
/// #     type Result = u64;
/// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
/// # }
/// # use ps_runtime::Spawn;
/// # use ps_runtime::actor::LookupError;
/// let counter = Spawn::new().name("visits").start(|| Counter(0))?;
/// let found = ps_runtime::lookup::<Counter>("visits")?;
/// found.ask(Add(1)).wait()?;
/// assert_eq!(counter.ask(Add(1)).wait()?, 2);
///
/// let nobody = ps_runtime::lookup::<Counter>("visitors");
/// assert!(matches!(nobody, Err(LookupError::UnknownName { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// When no living actor has the name, or when the actor that has it is not an `A`.
pub fn lookup<A: Actor>(name: &str) -> Result<ActorRef<A>, LookupError> {
    match lock().named(name) {
        Some(entry) => entry.actor_ref(name),
        None => Err(LookupError::UnknownName {
            name: name.to_owned(),
        }),
    }
}

/// An actor of any type, as the registry and the shutdown see it.
pub(crate) trait AnyMailbox: Send + Sync {
    fn id(&self) -> ActorId;
    fn name(&self) -> &str;
    fn phase(&self) -> Phase;
    fn request_stop(self: Arc<Self>);
    fn leave_behind(self: Arc<Self>);
    fn has_ended(&self) -> bool;
    fn ended(&self) -> watch::Receiver<bool>;
}

impl<A: Actor> AnyMailbox for Mailbox<A> {
    fn id(&self) -> ActorId {
        self.id()
    }

    fn name(&self) -> &str {
        self.name()
    }

    fn phase(&self) -> Phase {
        self.phase()
    }

    fn request_stop(self: Arc<Self>) {
        Self::close(&self);
    }

    fn leave_behind(self: Arc<Self>) {
        Self::abandon(&self);
    }

    fn has_ended(&self) -> bool {
        self.has_ended()
    }

    fn ended(&self) -> watch::Receiver<bool> {
        self.ended()
    }
}

pub(crate) struct Entry {
    mailbox: Arc<dyn AnyMailbox>,
    type_name: &'static str,
    /// The name and an `Arc<Handle<A>>`, for actors that were given a name.
    named: Option<(String, Arc<dyn Any + Send + Sync>)>,
}

impl Entry {
    pub(crate) fn new(
        mailbox: Arc<dyn AnyMailbox>,
        type_name: &'static str,
        named: Option<(String, Arc<dyn Any + Send + Sync>)>,
    ) -> Self {
        Self {
            mailbox,
            type_name,
            named,
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        self.mailbox.phase()
    }

    pub(crate) fn actor_ref<A: Actor>(&self, name: &str) -> Result<ActorRef<A>, LookupError> {
        let handle = self.named.as_ref().map(|(_, handle)| Arc::clone(handle));
        match handle.and_then(|handle| handle.downcast::<Handle<A>>().ok()) {
            Some(handle) => Ok(ActorRef::new(handle)),
            None => Err(LookupError::WrongType {
                name: name.to_owned(),
                expected: type_name::<A>(),
                found: self.type_name,
            }),
        }
    }
}

#[derive(Default)]
pub(crate) struct Registry {
    actors: HashMap<ActorId, Entry>,
    names: HashMap<String, ActorId>,
}

impl Registry {
    pub(crate) fn named(&self, name: &str) -> Option<&Entry> {
        self.actors.get(self.names.get(name)?)
    }

    pub(crate) fn insert(&mut self, entry: Entry) {
        let id = entry.mailbox.id();
        if let Some((name, _)) = &entry.named {
            self.names.insert(name.clone(), id);
        }
        self.actors.insert(id, entry);
    }
}

pub(crate) fn lock() -> MutexGuard<'static, Registry> {
    static REGISTRY: LazyLock<Mutex<Registry>> = LazyLock::new(Mutex::default);
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All actors that have not ended.
pub(crate) fn living() -> Vec<Arc<dyn AnyMailbox>> {
    let registry = lock();
    let living = registry.actors.values();
    living.map(|entry| Arc::clone(&entry.mailbox)).collect()
}

/// Removes an actor that is ending.
pub(crate) fn remove(id: ActorId) {
    free_name(id);
    let entry = lock().actors.remove(&id);
    drop(entry);
}

/// Frees the name of an actor that will take no more calls.
pub(crate) fn free_name(id: ActorId) {
    let mut registry = lock();
    let Some(entry) = registry.actors.get_mut(&id) else {
        return;
    };
    let Some((name, handle)) = mem::take(&mut entry.named) else {
        return;
    };
    registry.names.remove(&name);
    drop(registry);
    // Outside the lock: the drop of the last reference closes the actor's queue.
    drop(handle);
}
