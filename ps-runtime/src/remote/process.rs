//! This process as others see it: its id, the actors that it exports, and how it reaches the others.
//!
//! An actor whose reference was sent to another process is kept while a connection to it is open. It is
//! also kept for a grace period before the first and after the last connection, because a reference may
//! be on its way.

use std::collections::HashMap;
use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use actix::Actor;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Remote;
use super::callee::{Callee, Exported, Keep};
use super::caller::RemoteActor;
use super::guests::Guests;
use super::kept::{ObjectStore, Ticket};
use super::reference::Wire;
use super::table::Table;
use crate::actor::ActorRef;
use crate::actor::actor_ref::Handle;
use crate::buffer::BufferPool;
use crate::codec::Encoded;
use crate::net::admission::Admission;
use crate::net::memory::MemoryNetwork;
use crate::net::{Address, NetConfig, Tls, Token};
use crate::remote::dial::{self, DialError, Dialled};
use crate::schema::Schema;

/// A process of a cluster, in one of its incarnations.
///
/// A process that was lost and joins again is another node. Whatever its earlier incarnation sends, or is
/// sent, is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId {
    /// The number of the process among the copies of the program. The driver has rank 0.
    pub rank: u32,
    /// How often this rank had joined before. The driver's incarnation is 0.
    pub incarnation: u64,
}

impl NodeId {
    /// The driver: the process that the others join.
    pub const DRIVER: Self = Self {
        rank: 0,
        incarnation: 0,
    };
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            &Self::DRIVER => f.write_str("driver"),
            Self {
                rank,
                incarnation: 1,
            } => write!(f, "node {rank}"),
            Self { rank, incarnation } => write!(f, "node {rank} (incarnation {incarnation})"),
        }
    }
}

/// The number under which each process exports its agent.
pub(crate) const AGENT: u64 = 0;

/// How many idle receive buffers are kept: one for each of a few workers.
const NUM_IDLE_BUFFERS: usize = 8;

/// Finds the addresses of a node, or says that its incarnation is over.
pub(crate) type Resolve =
    Box<dyn Fn(NodeId) -> BoxFuture<'static, Result<Vec<Address>, DialError>> + Send + Sync>;

/// The rank that a process asks for before it has joined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Joining {
    pub(crate) rank: u32,
    /// The mark of the run that it was started for, if it was told.
    pub(crate) run: Option<u64>,
    /// The user of the process. `None` if it had joined before: then it was started for an earlier driver.
    pub(crate) user: Option<u32>,
}

impl Joining {
    pub(crate) fn new(rank: u32, run_id: Option<&str>, user: Option<u32>) -> Self {
        let run = run_id.map(|run_id| {
            let mut mark = Schema::new();
            mark.write(run_id);
            mark.finish()
        });
        Self { rank, run, user }
    }
}

/// Writes the form that the header of a handshake contains.
impl fmt::Display for Joining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.rank)?;
        if let Some(run) = self.run {
            write!(f, ".{run:016x}")?;
        }
        if let Some(user) = self.user {
            write!(f, "@{user}")?;
        }
        Ok(())
    }
}

impl FromStr for Joining {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (text, user) = match text.split_once('@') {
            Some((text, user)) => (text, Some(user.parse()?)),
            None => (text, None),
        };
        let (rank, run) = match text.split_once('.') {
            Some((rank, run)) => (rank, Some(u64::from_str_radix(run, 16)?)),
            None => (text, None),
        };
        let rank = rank.parse()?;
        Ok(Self { rank, run, user })
    }
}

pub(crate) struct Process {
    id: OnceLock<NodeId>,
    joining: OnceLock<Joining>,
    /// Tells runs of a program apart, so that a node never joins the cluster of another run.
    session: OnceLock<u64>,
    config: NetConfig,
    token: Option<Token>,
    tls: Option<Tls>,
    /// The buffers for weights and gradients that arrive.
    buffers: BufferPool,
    memory: Option<MemoryNetwork>,
    resolve: OnceLock<Resolve>,
    object_store: ObjectStore,
    /// Processes that ask this one, the driver, to join.
    guests: Guests,
    is_closed: AtomicBool,
    num_exported: AtomicU64,
    exports: Mutex<HashMap<u64, Export>>,
    /// For each connection to an exported actor, whether that has ended.
    connections: watch::Sender<HashMap<u64, watch::Receiver<bool>>>,
    num_connected: AtomicU64,
    remotes: Mutex<HashMap<(NodeId, u64), Weak<RemoteActor>>>,
}

struct Export {
    callee: Arc<dyn Callee>,
    /// Tells this export from an earlier export of the same number.
    born: u64,
    num_connections: usize,
    /// When its reference was last sent, or its last connection ended.
    last_wanted: Instant,
    is_permanent: bool,
}

impl Process {
    pub(crate) fn new(
        config: NetConfig,
        token: Option<Token>,
        tls: Option<Tls>,
        memory: Option<MemoryNetwork>,
    ) -> Arc<Self> {
        let process = Arc::new(Self {
            id: OnceLock::new(),
            joining: OnceLock::new(),
            session: OnceLock::new(),
            config,
            token,
            tls,
            buffers: BufferPool::new(NUM_IDLE_BUFFERS),
            memory,
            resolve: OnceLock::new(),
            object_store: ObjectStore::default(),
            guests: Guests::new(),
            is_closed: AtomicBool::new(false),
            num_exported: AtomicU64::new(0),
            exports: Mutex::default(),
            connections: watch::Sender::default(),
            num_connected: AtomicU64::new(0),
            remotes: Mutex::default(),
        });
        #[cfg(test)]
        tests::note(&process);
        process
    }

    /// Sets the rank that this process asks for, so that a driver that refuses it can name the rank. Only the
    /// first call counts.
    pub(crate) fn wants(&self, place: Joining) {
        let _ = self.joining.set(place);
    }

    pub(crate) fn guests(&self) -> &Guests {
        &self.guests
    }

    /// Returns the rank that this process asks for, until it has joined.
    pub(crate) fn joining(&self) -> Option<Joining> {
        let wanted = self.joining.get().copied();
        wanted.filter(|_| self.id.get().is_none())
    }

    /// Takes the place in the cluster that the driver has assigned. Only the first call counts.
    pub(crate) fn enter(&self, id: NodeId, session: u64) {
        let _ = self.id.set(id);
        let _ = self.session.set(session);
    }

    /// Sets the function that finds other nodes. Only the first call counts.
    pub(crate) fn resolve_with(&self, resolve: Resolve) {
        let _ = self.resolve.set(resolve);
    }

    /// Returns the id of this process. Before it has joined, that is an id that no process has.
    pub(crate) fn id(&self) -> NodeId {
        const NOBODY: NodeId = NodeId {
            rank: u32::MAX,
            incarnation: 0,
        };
        self.id.get().copied().unwrap_or(NOBODY)
    }

    /// Returns the session, or 0 before this process has joined.
    pub(crate) fn session(&self) -> u64 {
        self.session.get().copied().unwrap_or(0)
    }

    pub(crate) fn config(&self) -> &NetConfig {
        &self.config
    }

    pub(crate) fn buffers(&self) -> &BufferPool {
        &self.buffers
    }

    pub(crate) fn token(&self) -> Option<&Token> {
        self.token.as_ref()
    }

    pub(crate) fn tls(&self) -> Option<&Tls> {
        self.tls.as_ref()
    }

    pub(crate) fn memory(&self) -> Option<&MemoryNetwork> {
        self.memory.as_ref()
    }

    fn exports(&self) -> MutexGuard<'_, HashMap<u64, Export>> {
        // No code of the user runs under the lock, so a poisoned map is whole.
        self.exports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allows other processes to call an actor of this process.
    ///
    /// # Panics
    /// When the actor is in another process.
    pub(crate) fn export<A: Remote>(&self, actor: &ActorRef<A>) -> Wire {
        let number = actor.id().number();
        self.export_as(number, actor, false)
    }

    /// Exports the agent of this process. The export does not keep the agent alive, because the agent keeps
    /// the process alive.
    pub(crate) fn export_agent<A: Remote>(&self, actor: &ActorRef<A>) {
        self.export_as(AGENT, actor, true);
    }

    fn export_as<A: Remote>(&self, number: u64, actor: &ActorRef<A>, is_permanent: bool) -> Wire {
        let mailbox = actor.mailbox_here();
        let table = Table::<A>::get();
        let wire = Wire {
            node: self.id(),
            actor: number,
            name: Arc::clone(mailbox.name()),
            max_pending: u32::try_from(mailbox.book().limit()).unwrap_or(u32::MAX),
            schema: table.schema(),
        };
        let mut exports = self.exports();
        if self.is_closed() {
            // No process can connect to it any more, and the export would stay for ever.
            return wire;
        }
        let export = exports.entry(number).or_insert_with(|| Export {
            callee: Arc::new(Exported {
                handle: match is_permanent {
                    true => Keep::Weak(Arc::downgrade(actor.handle())),
                    false => Keep::Strong(Arc::clone(actor.handle())),
                },
                mailbox: Arc::clone(mailbox),
                table,
                // TCP gives up a peer that takes nothing for one process lease.
                admission: Admission::new(self.config.process_lease / 2),
            }),
            born: self.num_exported.fetch_add(1, Ordering::Relaxed),
            num_connections: 0,
            last_wanted: Instant::now(),
            is_permanent,
        });
        export.last_wanted = Instant::now();
        wire
    }

    /// Returns a reference to an exported actor of this process.
    pub(crate) fn exported<A: Actor>(&self, number: u64) -> Option<ActorRef<A>> {
        let handle = self.exports().get(&number)?.callee.handle()?;
        let handle: Arc<Handle<A>> = handle.downcast().ok()?;
        Some(ActorRef::new(handle))
    }

    /// Opens a connection to an exported actor.
    pub(crate) fn open(self: &Arc<Self>, number: u64) -> Option<(Arc<dyn Callee>, Hold)> {
        let mut exports = self.exports();
        let export = exports.get_mut(&number)?;
        export.num_connections += 1;
        let connection = self.num_connected.fetch_add(1, Ordering::Relaxed);
        let hold = Hold {
            process: Arc::downgrade(self),
            number,
            born: export.born,
            connection,
        };
        let callee = Arc::clone(&export.callee);
        drop(exports);
        let ended = callee.ended();
        self.connections
            .send_modify(|all| _ = all.insert(connection, ended));
        Some((callee, hold))
    }

    /// Waits until all that actors of this process have answered before they ended is with their callers. The
    /// connection to an actor that has ended is closed when its caller has read everything.
    pub(crate) async fn answers_are_read(&self) {
        let mut connections = self.connections.subscribe();
        let is_read = |all: &HashMap<_, watch::Receiver<bool>>| {
            // An error means that the actor's mailbox is gone, and the actor with it.
            let has_ended =
                |ended: &watch::Receiver<bool>| *ended.borrow() || ended.has_changed().is_err();
            !all.values().any(has_ended)
        };
        // The sender is here, so it cannot fail.
        let _ = connections.wait_for(is_read).await;
    }

    /// Removes kept values that no process has taken for `KEPT_FOR`.
    pub(crate) fn sweep_kept(&self, now: Instant) {
        self.object_store.sweep(now);
    }

    /// Drops the exports of actors to which no other process has had a connection for the grace period.
    pub(crate) fn sweep(&self) {
        let both = self
            .config
            .process_lease
            .saturating_add(self.config.handshake);
        let grace = both.saturating_mul(2);
        let mut unwanted = Vec::new();
        let mut exports = self.exports();
        exports.retain(|_, export| {
            let is_wanted = export.is_permanent
                || export.num_connections > 0
                || export.last_wanted.elapsed() < grace;
            let is_kept = is_wanted && !*export.callee.ended().borrow();
            if !is_kept {
                unwanted.push(Arc::clone(&export.callee));
            }
            is_kept
        });
        drop(exports);
        // Dropped outside the lock, because the drop of the last reference ends the actor.
        drop(unwanted);
        let mut remotes = self.remotes();
        remotes.retain(|_, remote| remote.strong_count() > 0);
    }

    /// Whether this incarnation is over.
    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Ends the connections to the actors of a node that is lost, so that they count as ended.
    pub(crate) fn sever(&self, node: NodeId) {
        let remotes = self.remotes();
        let of_node = remotes.iter().filter(|((other, _), _)| *other == node);
        let of_node: Vec<_> = of_node.filter_map(|(_, remote)| remote.upgrade()).collect();
        drop(remotes);
        for remote in of_node {
            remote.sever(&format!("{node} was declared lost").into());
        }
    }

    /// Drops all exports except the agent's and makes no more, because this incarnation is over.
    pub(crate) fn withdraw_all(&self) {
        let mut withdrawn = Vec::new();
        self.is_closed.store(true, Ordering::Release);
        self.exports().retain(|_, export| {
            if !export.is_permanent {
                withdrawn.push(Arc::clone(&export.callee));
            }
            export.is_permanent
        });
        drop(withdrawn);
    }

    /// Keeps a value in the object store and returns its ticket.
    pub(crate) fn keep_result(&self, value: Encoded) -> Result<Ticket, String> {
        self.object_store.put(value)
    }

    fn remotes(&self) -> MutexGuard<'_, HashMap<(NodeId, u64), Weak<RemoteActor>>> {
        self.remotes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the actor of another process that `wire` names, and counts one more reference to it.
    pub(crate) fn remote(self: &Arc<Self>, wire: Wire) -> Arc<RemoteActor> {
        let key = (wire.node, wire.actor);
        let mut remotes = self.remotes();
        let known = remotes.get(&key).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.claim()) {
            return known;
        }
        let remote = RemoteActor::new(Arc::clone(self), wire);
        remote.claim();
        remotes.insert(key, Arc::downgrade(&remote));
        drop(remotes);
        remote.hold();
        remote
    }

    /// Connects to an actor of another process.
    pub(crate) async fn dial(self: &Arc<Self>, wire: &Wire) -> Result<Dialled, DialError> {
        let resolve = self.resolve.get().ok_or_else(|| {
            DialError::Refused("this process is not part of a cluster".to_owned())
        })?;
        let addresses = resolve(wire.node).await?;
        dial::dial(self, wire, &addresses).await
    }
}

/// Counts one connection to an exported actor, until it is dropped.
pub(crate) struct Hold {
    process: Weak<Process>,
    number: u64,
    born: u64,
    connection: u64,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let Some(process) = self.process.upgrade() else {
            return;
        };
        if let Some(export) = process.exports().get_mut(&self.number)
            // The actor may have been withdrawn and exported again.
            && export.born == self.born
        {
            export.num_connections -= 1;
            export.last_wanted = Instant::now();
        }
        process
            .connections
            .send_modify(|all| _ = all.remove(&self.connection));
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    static ALL: Mutex<Vec<Weak<Process>>> = Mutex::new(Vec::new());

    pub(super) fn note(process: &Arc<Process>) {
        let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|process| process.strong_count() > 0);
        all.push(Arc::downgrade(process));
    }

    /// Returns how many incarnations of processes with this lease still exist in memory.
    pub(crate) fn num_living(lease: std::time::Duration) -> usize {
        let all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
        let living = all.iter().filter_map(Weak::upgrade);
        let living = living.filter(|process| process.config().process_lease == lease);
        living.count()
    }

    impl Process {
        /// How many connections lead to an exported actor.
        pub(crate) fn num_connections(&self, number: u64) -> Option<usize> {
            Some(self.exports().get(&number)?.num_connections)
        }
    }

    #[test]
    fn a_connection_to_what_was_withdrawn_does_not_count_for_what_is_exported_later() {
        use crate::remote::kept::tests::store;

        let process = Process::new(NetConfig::default(), None, None, None);
        process.enter(NodeId::DRIVER, 1);
        let actor = store();
        let number = process.export(&actor).actor;
        let (_, before) = process.open(number).expect("it is exported");
        process.exports().clear();
        process.export(&actor);
        let (_, now) = process.open(number).expect("it is exported again");
        drop(before);
        assert_eq!(process.num_connections(number), Some(1));
        drop(now);
        assert_eq!(process.num_connections(number), Some(0));
    }

    /// what a node has answered arrives before the node closes its connections.
    #[test]
    fn an_actor_that_has_ended_is_waited_for_until_its_callers_have_read_everything() {
        use crate::remote::kept::tests::store;
        use futures_util::FutureExt;

        let process = Process::new(NetConfig::default(), None, None, None);
        process.enter(NodeId::DRIVER, 1);
        let (ends, stays) = (store(), store());
        let [connection, other] = [&ends, &stays].map(|actor| {
            let number = process.export(actor).actor;
            process.open(number).expect("it is exported").1
        });
        let is_read = || process.answers_are_read().now_or_never().is_some();
        assert!(is_read(), "both may be called for a long time yet");
        ends.stop();
        crate::actor::run(ends.stopped());
        assert!(!is_read());
        // The export may be gone before its last connection.
        process.withdraw_all();
        assert!(!is_read());
        drop(connection);
        assert!(is_read());
        drop(other);
        drop(stays);
    }
}
