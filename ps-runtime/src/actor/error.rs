//! What can go wrong with a call, a spawn, a look-up and a shutdown.
//!
//! The variants of [`CallError`] answer the question that a caller must ask before it tries again:
//! can the handler have run?
//!
//! A [`CallError`] can be sent to another process, for example as part of an actor's answer. Only the
//! message that it hands back is not sent.

use std::any::{Any, type_name};
use std::borrow::Cow;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use thiserror::Error;

/// Why a call has no result.
///
/// ```
/// # use actix::{Actor, Context, Handler, Message};
/// # struct Counter(u64);
/// # impl Actor for Counter { type Context = Context<Self>; }
/// # #[derive(Debug, PartialEq, Message)]
/// # #[rtype(result = "u64")]
/// # struct Add(u64);
/// # impl Handler<Add> for Counter {
/// #     type Result = u64;
/// #     fn handle(&mut self, Add(n): Add, _: &mut Context<Self>) -> u64 { self.0 += n; self.0 }
/// # }
/// # fn main() {
/// let counter = ps_runtime::spawn(|| Counter(0));
/// counter.kill();
///
/// let error = counter.ask(Add(1)).wait().expect_err("nobody is there");
/// // The handler has not begun, so the call can be made again, here or elsewhere.
/// assert!(!error.may_have_run());
/// let message: Add = error.into_message().expect("it comes back");
/// assert_eq!(message, Add(1));
/// # }
/// ```
#[derive(Debug, Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum CallError {
    /// The handler has not begun and never will. The message is handed back.
    #[error("call was not delivered to actor {actor}: {reason}")]
    NotDelivered {
        /// Name of the actor that was called.
        actor: Arc<str>,
        /// What kept the call from its handler.
        reason: NotDelivered,
        /// The message; see [`CallError::into_message`].
        message: Undelivered,
    },
    /// The handler began, or may have begun. It is not known whether it finished.
    #[error("outcome of the call to actor {actor} is unknown: {reason}")]
    Unknown {
        /// Name of the actor that was called.
        actor: Arc<str>,
        /// Why the caller does not know the outcome.
        reason: UnknownOutcome,
    },
    /// The actor panicked while the handler (or its asynchronous response) was running.
    ///
    /// The actor's state is lost, with everything that the handler had changed in it. What the handler
    /// had sent or written elsewhere is not undone.
    #[error("actor {actor} panicked during the call: {panic}")]
    Failed {
        /// Name of the actor that was called.
        actor: Arc<str>,
        /// The panic's message.
        panic: Arc<str>,
    },
}

/// Why a call never reached its handler.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NotDelivered {
    /// All of the actor's `max_pending` calls were taken.
    #[error("all {limit} pending calls are taken (use ask_when_ready, or raise max_pending)")]
    QueueFull {
        /// The actor's `max_pending`.
        limit: usize,
    },
    /// The actor has stopped, or is stopping.
    #[error("it has stopped{}", after_panic(.panic.as_deref()))]
    Stopped {
        /// Message of the panic that exceeded the restart budget, if such a panic ended the actor.
        panic: Option<Arc<str>>,
    },
    /// The caller's timeout passed while the call was still queued.
    #[error("timed out after {after:?} before its handler began")]
    TimedOut {
        /// The limit that the caller gave.
        after: Duration,
    },
    /// The caller would have blocked the thread that the handler needs.
    #[error("a blocking wait on the actor's own thread would never end (await the reply instead)")]
    WouldDeadlock,
    /// The actor's process cannot be reached; trying again later may help.
    #[error("its process cannot be reached: {reason}")]
    Unreachable {
        /// What was tried, and what happened.
        reason: String,
    },
    /// The actor takes this message only from its own process.
    #[error(
        "{message} is not among the messages that {actor_type} takes from other processes (add it to the actor's `Remote::messages`)"
    )]
    NotRegistered {
        /// The message's type.
        message: String,
        /// The actor's type.
        actor_type: String,
    },
    /// The message is larger than the actor's process accepts.
    #[error("the message is too large to be sent: {reason}")]
    TooLarge {
        /// What is too large, the limit, and the setting of the limit.
        reason: String,
    },
    /// The message cannot be written as bytes.
    #[error("the message cannot be sent as bytes: {reason}")]
    Encode {
        /// What is wrong with the message.
        reason: String,
    },
    /// The other process could not read the message, or does not know the actor.
    #[error("its process refused the call: {reason}")]
    Refused {
        /// What the other process said.
        reason: String,
    },
}

/// Why the outcome of a call is not known. The handler began, or may have begun.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum UnknownOutcome {
    /// The caller's timeout passed while the handler was running; the handler goes on.
    #[error("timed out after {after:?} while its handler was running")]
    TimedOut {
        /// The limit that the caller gave.
        after: Duration,
    },
    /// The actor ended while the handler was running.
    #[error("the actor ended while the handler was running")]
    Stopped,
    /// The handler dropped its reply channel without a result.
    #[error(
        "the handler ended without a reply (its response future panicked, see stderr, or was cancelled)"
    )]
    NoReply,
    /// The caller would have blocked the thread that the handler needs to finish.
    #[error("a blocking wait on the actor's own thread would never end (await the reply instead)")]
    WouldDeadlock,
    /// The connection was lost before the reply arrived. It is not known whether the handler ran, or
    /// still runs. Trying again later may help, and may do the work twice.
    #[error("the connection was lost while the call was under way: {reason}")]
    ConnectionLost {
        /// How the loss of the connection was noticed.
        reason: String,
    },
    /// A reply arrived, so the handler ran, but the reply could not be read.
    #[error("the reply cannot be read: {reason}")]
    BadReply {
        /// What is wrong with the reply.
        reason: String,
    },
}

fn after_panic(panic: Option<&str>) -> String {
    panic.map_or_else(String::new, |text| {
        format!(" after too many panics, the last: {text}")
    })
}

impl CallError {
    /// Whether the handler can have run, in whole or in part.
    ///
    /// If `false`, trying again cannot do the work twice.
    pub fn may_have_run(&self) -> bool {
        !matches!(self, Self::NotDelivered { .. })
    }

    /// Whether the actor's process could not be reached, so that trying again later may help.
    ///
    /// If the call [may have run](Self::may_have_run), another try can do the work twice.
    pub fn is_connection_lost(&self) -> bool {
        matches!(
            self,
            Self::NotDelivered {
                reason: NotDelivered::Unreachable { .. },
                ..
            } | Self::Unknown {
                reason: UnknownOutcome::ConnectionLost { .. },
                ..
            }
        )
    }

    /// The name of the actor that was called.
    pub fn actor(&self) -> &str {
        match self {
            Self::NotDelivered { actor, .. }
            | Self::Unknown { actor, .. }
            | Self::Failed { actor, .. } => actor,
        }
    }

    /// Takes the message out of an error that hands it back.
    ///
    /// # Errors
    /// Returns the error itself when it holds no message (the handler may have run, or the error
    /// came from another process), or when the message is not an `M`.
    pub fn into_message<M: 'static>(self) -> Result<M, Self> {
        match self {
            Self::NotDelivered {
                actor,
                reason,
                message,
            } => message
                .into_message()
                .map_err(|message| Self::NotDelivered {
                    actor,
                    reason,
                    message,
                }),
            other => Err(other),
        }
    }
}

/// A message that was not delivered, of any type.
///
/// Its `Debug` shows the type only, so that payloads stay out of logs. The message is never sent to
/// another process: only the name of its type is, and there the error holds no message to take out.
/// The caller has the message, and only the caller could call again with it.
pub struct Undelivered {
    // In a box, because it makes every `CallError` larger.
    parts: Box<Parts>,
}

struct Parts {
    type_name: Cow<'static, str>,
    // Messages are `Send`, not `Sync`; the mutex makes the error both, which error reporters want.
    // `None` in an error that came from another process.
    message: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Undelivered {
    /// Wraps a message, for tests that need such an error.
    pub fn new<M: Send + 'static>(message: M) -> Self {
        Self::with(Cow::Borrowed(type_name::<M>()), Some(Box::new(message)))
    }

    /// A message that stayed in another process.
    pub(crate) fn elsewhere(type_name: &'static str) -> Self {
        Self::with(Cow::Borrowed(type_name), None)
    }

    fn with(type_name: Cow<'static, str>, message: Option<Box<dyn Any + Send>>) -> Self {
        let message = Mutex::new(message);
        Self {
            parts: Box::new(Parts { type_name, message }),
        }
    }

    /// The name of the message's type.
    pub fn type_name(&self) -> &str {
        &self.parts.type_name
    }

    /// Takes the message out.
    ///
    /// # Errors
    /// Returns itself when the message is not an `M`, or stayed in another process.
    pub fn into_message<M: 'static>(self) -> Result<M, Self> {
        let Parts { type_name, message } = *self.parts;
        let message = message.into_inner().unwrap_or_else(PoisonError::into_inner);
        let kept = match message.map(<Box<dyn Any + Send>>::downcast) {
            Some(Ok(message)) => return Ok(*message),
            Some(Err(of_other_type)) => Some(of_other_type),
            None => None,
        };
        Err(Self::with(type_name, kept))
    }
}

impl Serialize for Undelivered {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.type_name())
    }
}

/// The value that is read holds no message.
impl<'de> Deserialize<'de> for Undelivered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self::with(String::deserialize(deserializer)?.into(), None))
    }
}

impl fmt::Debug for Undelivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Undelivered({})", self.type_name())
    }
}

/// Why an actor could not be spawned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The name is empty, or contains control characters.
    #[error("{name:?} cannot name an actor or its thread: {problem}")]
    InvalidName {
        /// The name as given.
        name: String,
        /// What is wrong with the name.
        problem: &'static str,
    },
    /// Another actor has the name. It is free again once that actor has ended.
    #[error("an actor named {name:?} is {state}")]
    NameTaken {
        /// The name asked for.
        name: String,
        /// "running already", or "still stopping".
        state: &'static str,
    },
    /// `get_or_spawn` found an actor of another type with this name.
    #[error("the named actor cannot be used")]
    Lookup(#[source] LookupError),
    /// `max_pending` is zero, so no call could ever be made.
    #[error("max_pending must be at least 1")]
    NoPendingCalls,
    /// The restart window is zero, so no restart would ever count.
    #[error("the restart window must be longer than zero")]
    NoRestartWindow,
    /// The operating system gave no thread, or no event loop for the thread.
    #[error(
        "could not start a thread for actor {actor}: raise the limits on open files (ulimit -n) and \
         threads (ulimit -u), or use fewer actors (Spawn::without_io saves files)"
    )]
    Thread {
        /// Name of the actor.
        actor: Arc<str>,
        /// The error of the operating system.
        #[source]
        source: io::Error,
    },
}

/// Why a name could not be looked up.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LookupError {
    /// No living actor has the name.
    #[error("no actor is named {name:?}")]
    UnknownName {
        /// The name asked for.
        name: String,
    },
    /// The actor with the name is of another type.
    #[error("actor {name:?} is a {found}, not a {expected}")]
    WrongType {
        /// The name asked for.
        name: String,
        /// The type asked for.
        expected: &'static str,
        /// The actor's type.
        found: &'static str,
    },
}

/// Actors that had not ended when the time for their shutdown was over.
///
/// Their pending calls have failed and their names are free. Each of them ends as soon as its running
/// handler returns. If a handler never returns, its thread stays.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("still running after {after:?}, left behind: {}", .actors.join(", "))]
pub struct StillRunning {
    /// Names of the actors that had not ended.
    pub actors: Vec<String>,
    /// The time that was allowed.
    pub after: Duration,
}

/// Why a call to an actor that answers with a `Result` failed; see
/// [`Reply::flatten`](super::Reply::flatten).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError<E> {
    /// The call failed.
    #[error(transparent)]
    Call(CallError),
    /// The actor answered with this error.
    #[error(transparent)]
    Actor(E),
}

/// No reply arrived in time; see [`Pending::wait_next_timeout`](super::Pending::wait_next_timeout).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no reply within {after:?}; {num_out} are still out")]
pub struct NoReply {
    /// The time that was allowed.
    pub after: Duration,
    /// How many replies are still awaited.
    pub num_out: usize,
}

/// Returns the text of an error and of all its causes, in one line.
///
/// ```
/// use ps_runtime::actor::error_chain;
/// use ps_runtime::net::Token;
///
/// let error = Token::from_file("no/such/file".as_ref()).expect_err("there is none");
/// let text = error_chain(&error);
/// assert!(text.starts_with("could not read the token from no/such/file: "));
/// ```
#[must_use]
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
