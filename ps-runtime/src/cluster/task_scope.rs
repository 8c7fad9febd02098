//! The task scope: the actors that this process has made for others, and how they end.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};

use super::agent::{Find, JoinRefused, Make, SpawnRefused};
use super::host::{Host, Hosts, Made};
use super::resources::Resources;
use crate::net::threads;
use crate::remote::process::Process;
use crate::remote::reference::Wire;

/// The actors that this process has made for other processes in its current incarnation.
pub(crate) struct TaskScope {
    process: Arc<Process>,
    hosts: Hosts,
    free: Mutex<Resources>,
    made: Mutex<BTreeMap<u64, Arc<Made>>>,
    /// By the number of the order. An order whose actor has ended is removed.
    orders: Mutex<HashMap<u64, Making>>,
    is_leaving: AtomicBool,
    /// Whether this incarnation is over. It is set only under the lock of `made`.
    is_over: AtomicBool,
}

/// An actor that is being made, or has been made.
type Making = Shared<BoxFuture<'static, Result<Wire, SpawnRefused>>>;

impl TaskScope {
    pub(crate) fn new(process: Arc<Process>, hosts: Hosts, resources: Resources) -> Arc<Self> {
        Arc::new(Self {
            process,
            hosts,
            free: Mutex::new(resources),
            made: Mutex::default(),
            orders: Mutex::default(),
            is_over: AtomicBool::new(false),
            is_leaving: AtomicBool::new(false),
        })
    }

    /// Compares the facts of a node with those of this process.
    pub(crate) fn check_facts(&self, theirs: &BTreeMap<String, String>) -> Result<(), JoinRefused> {
        let ours = &self.hosts.facts();
        for name in ours.keys().chain(theirs.keys()) {
            let (driver, here) = (ours.get(name).cloned(), theirs.get(name).cloned());
            if driver != here {
                let name = name.clone();
                return Err(JoinRefused::Differs { name, here, driver });
            }
        }
        Ok(())
    }

    fn free(&self) -> MutexGuard<'_, Resources> {
        // Each operation on it is whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn made(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Made>>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn orders(&self) -> MutexGuard<'_, HashMap<u64, Making>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes an actor, once for each order.
    pub(crate) async fn make(self: Arc<Self>, order: Make) -> Result<Wire, SpawnRefused> {
        let host = self.hosts.get(&order.type_name, order.variant.as_deref())?;
        self.make_by(host, order).await
    }

    /// Like `make`, but with the given host instead of the hosts of this process.
    pub(crate) async fn make_by(
        self: Arc<Self>,
        host: Arc<dyn Host>,
        order: Make,
    ) -> Result<Wire, SpawnRefused> {
        let number = order.order;
        let making = {
            let scope = Arc::clone(&self);
            let mut orders = self.orders();
            if self.is_over.load(Ordering::Acquire) {
                return Err(SpawnRefused::Leaving);
            }
            let making = orders.entry(number);
            let making = making.or_insert_with(|| scope.make_once(host, order).boxed().shared());
            making.clone()
        };
        let made = making.await;
        if made.is_err() || self.is_over.load(Ordering::Acquire) {
            let forgotten = self.orders().remove(&number);
            drop(forgotten);
        }
        made
    }

    async fn make_once(
        self: Arc<Self>,
        host: Arc<dyn Host>,
        order: Make,
    ) -> Result<Wire, SpawnRefused> {
        let Make {
            order,
            args,
            name,
            needs,
            ..
        } = order;
        if self.is_leaving.load(Ordering::Acquire) {
            return Err(SpawnRefused::Leaving);
        }
        if !self.free().reserve(&needs) {
            return Err(SpawnRefused::NoRoom { needs });
        }
        let made = host.make(&self.process, args, name).await;
        let made = match made {
            Ok(made) => Arc::new(made),
            Err(why) => {
                self.free().give_back(&needs);
                return Err(SpawnRefused::Failed(why));
            }
        };
        let wire = made.wire.clone();
        let mut ended = made.ended.clone();
        let is_over = {
            let mut all = self.made();
            all.insert(wire.actor, Arc::clone(&made));
            self.is_over.load(Ordering::Acquire)
        };
        let (scope, actor) = (Arc::clone(&self), wire.actor);
        threads::next().spawn(async move {
            // An error means that the actor's mailbox is gone, and the actor with it.
            let _ = ended.wait_for(|ended| *ended).await;
            scope.made().remove(&actor);
            scope.orders().remove(&order);
            scope.free().give_back(&needs);
        });
        // The actor was not in the list yet when the others were told to finish, or were killed.
        if is_over || self.is_leaving.load(Ordering::Acquire) {
            (made.kill)();
            return Err(SpawnRefused::Leaving);
        }
        Ok(wire)
    }

    pub(crate) fn find(&self, find: &Find) -> Option<Wire> {
        self.hosts
            .find_actor(&self.process, &find.type_name, &find.name)
    }

    /// Whether there are no actors, and none is being made.
    pub(crate) fn is_idle(&self) -> bool {
        self.made().is_empty() && self.orders().is_empty()
    }

    /// Makes no more actors, and lets the actors that hand over finish their work. The others go on. The
    /// future is ready when all have ended, and their callers have read what they answered.
    ///
    /// The others are waited for because a launcher often asks all processes at once to end. The driver then
    /// still needs the servers, to save a checkpoint.
    pub(crate) async fn hand_over(&self) {
        self.is_leaving.store(true, Ordering::Release);
        let made: Vec<_> = self.made().values().cloned().collect();
        for actor in &made {
            if !(actor.hand_over)() && !*actor.ended.borrow() {
                tracing::warn!(actor = %actor.name, "it cannot hand over: it ends with its node");
            }
        }
        for actor in made {
            // An error means that the actor's mailbox is gone, and the actor with it.
            let _ = actor.ended.clone().wait_for(|ended| *ended).await;
        }
        self.process.answers_are_read().await;
    }

    /// Ends all actors that were made for others, and those that are being made.
    pub(crate) fn kill_all(&self) {
        let made = {
            let mut made = self.made();
            self.is_over.store(true, Ordering::Release);
            std::mem::take(&mut *made)
        };
        // Each of them holds this task scope.
        let unfinished = std::mem::take(&mut *self.orders());
        drop(unfinished);
        for actor in made.values() {
            (actor.kill)();
        }
        self.process.withdraw_all();
    }
}
