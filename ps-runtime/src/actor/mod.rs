//! Spawns ordinary actix actors on threads of their own and calls them through typed references.
//!
//! [`spawn`] builds the actor on its own thread and returns an [`ActorRef`]. [`ActorRef::ask`] starts
//! a call immediately and returns a [`Reply`]. You can await the reply, block on it
//! ([`Reply::wait`], Ray's `get`), or put it into a [`Pending`] set (Ray's `wait`).
//!
//! This module adds what actix lacks:
//!
//! - a real bound on the calls in flight,
//! - errors that say whether the handler can have run, and that hand the message back if it cannot,
//! - restarts after a panic; references stay valid,
//! - names,
//! - a shutdown that always ends.
//!
//! Messages do not pass through actix's mailbox. A reference puts a call into a queue of this module.
//! A future inside the actor's context (the pump) takes the call out and runs the actix
//! [`Handler`](actix::Handler). The queue and the running calls belong to the supervisor around that
//! context. Therefore they outlive an actor that panics. `docs/semantics.md` numbers the guarantees;
//! tests quote the numbers.
//!
//! | module | what it holds |
//! |---|---|
//! | `actor_ref` | the reference that callers hold |
//! | `call` | one call, to an actor here or elsewhere: waiting, running, settled |
//! | `queued` | a call through the queue of an actor of this process |
//! | `port` | what a reference needs of an actor in another process |
//! | `caller_gone` | tells a handler that its caller no longer waits |
//! | `reply`, `pending` | the caller's side of one call, of many calls |
//! | `book` | what a caller's process knows of an actor: its id and name, the calls under way |
//! | `mailbox` | the queue of an actor of this process, and the actor's phase |
//! | `pump`, `supervisor` | the actor's side: runs calls, catches panics, restarts |
//! | `spawn`, `thread`, `registry` | options; an actor's thread; names and all actors of the process |
//! | `shutdown` | ends actors within a bound |
//! | `background` | the helper thread for timers; blocking waits |
//!
//! ```
//! use actix::{Actor, Context, Handler, Message};
//! use ps_runtime::actor;
//!
//! struct Counter(u64);
//!
//! impl Actor for Counter {
//!     type Context = Context<Self>;
//! }
//!
//! #[derive(Message)]
//! #[rtype(result = "u64")]
//! struct Add(u64);
//!
//! impl Handler<Add> for Counter {
//!     type Result = u64;
//!
//!     fn handle(&mut self, Add(amount): Add, _: &mut Context<Self>) -> u64 {
//!         self.0 += amount;
//!         self.0
//!     }
//! }
//!
//! let counter = actor::spawn(|| Counter(0));
//! let first = counter.ask(Add(2));
//! let second = counter.ask(Add(3));
//! assert_eq!(first.wait()?, 2);
//! assert_eq!(second.wait()?, 5);
//! # Ok::<(), actor::CallError>(())
//! ```

pub(crate) mod actor_ref;
pub(crate) mod background;
pub(crate) mod book;
pub(crate) mod call;
mod caller_gone;
pub(crate) mod error;
pub(crate) mod mailbox;
mod pending;
pub(crate) mod port;
mod pump;
mod queued;
pub(crate) mod registry;
mod reply;
mod shutdown;
mod spawn;
pub(crate) mod supervisor;
#[cfg(test)]
mod tests;
mod thread;

pub use actor_ref::ActorRef;
pub use background::{Background, in_background, run, sleep, try_run};
pub use book::{ActorId, dead_letters};
pub use caller_gone::{CallerGone, caller_gone};
pub use error::{
    AskError, CallError, LookupError, NoReply, NotDelivered, SpawnError, StillRunning, Undelivered,
    UnknownOutcome, error_chain,
};
pub use pending::Pending;
pub use registry::lookup;
pub use reply::{FlatReply, Reply};
pub use shutdown::{Shutdown, shutdown_all};
pub use spawn::{RestartPolicy, Spawn, get_or_spawn, spawn};
