//! Actors that other processes can call.
//!
//! An actor type implements [`Remote`] to list the messages that may come from other processes. When two
//! processes connect, they compare these lists. An [`ActorRef`](crate::ActorRef) to such an actor can be
//! sent inside messages. The process that receives it calls the actor like one of its own.
//!
//! | module | what it holds |
//! |---|---|
//! | `table` | the messages of an actor type: how to write, read and run each of them |
//! | `caller`, `call` | an actor of another process, with its connection; one call to it |
//! | `dial`, `listen` | both sides of the handshake |
//! | `guests` | counts the connections of processes that ask to join |
//! | `strangers` | bounds the connections that are still in their handshake |
//! | `callee` | an actor of this process that other processes call |
//! | `kept` | kept results: they stay in the process that made them |
//! | `reference` | sends and receives an `ActorRef` |
//! | `process` | this process as others see it: its id, the actors it exports, the nodes it knows |

pub(crate) mod call;
pub(crate) mod callee;
pub(crate) mod caller;
pub(crate) mod dial;
pub(crate) mod guests;
pub(crate) mod kept;
pub(crate) mod listen;
pub(crate) mod process;
pub(crate) mod reference;
mod strangers;
pub(crate) mod table;

use actix::{Actor, Context};

pub use kept::{KEPT_FOR, Kept, KeptError, MAX_KEPT};
pub use process::NodeId;
pub use table::{Messages, untraced};

/// An actor type whose actors can be called from other processes.
///
/// ```
/// use actix::{Actor, Context, Handler, Message};
/// use ps_runtime::remote::{Messages, Remote};
/// use serde::{Deserialize, Serialize};
///
/// struct Counter(u64);
///
/// impl Actor for Counter {
///     type Context = Context<Self>;
/// }
///
/// #[derive(Message, Serialize, Deserialize)]
/// #[rtype(result = "u64")]
/// struct Add(u64);
///
/// impl Handler<Add> for Counter {
///     type Result = u64;
///
///     fn handle(&mut self, Add(amount): Add, _: &mut Context<Self>) -> u64 {
///         self.0 += amount;
///         self.0
///     }
/// }
///
/// impl Remote for Counter {
///     fn messages(messages: &mut Messages<Self>) {
///         messages.add::<Add>();
///     }
/// }
/// ```
pub trait Remote: Actor<Context = Context<Self>> {
    /// Adds each message that may come from another process.
    ///
    /// The order of the messages is part of the protocol, and so are the fields of the messages and of
    /// their results. To find the fields, each type is read from made-up values at the first use of the
    /// actor type; see [`untraced`].
    fn messages(messages: &mut Messages<Self>);
}
