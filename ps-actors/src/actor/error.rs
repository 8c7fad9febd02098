//! What can go wrong with a call, a spawn, a look-up and a shutdown.
//!
//! The variants of [`CallError`] answer the one question a caller must ask before it tries again:
//! can the handler have run?

use std::any::{Any, type_name};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;

/// Why a call has no result.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CallError {
    /// The handler never began and never will; the message is handed back.
    #[error("call was not delivered to actor {actor}: {reason}")]
    NotDelivered {
        /// Name of the actor that was called.
        actor: Arc<str>,
        /// What kept the call from its handler.
        reason: NotDelivered,
        /// The message; see [`CallError::into_message`].
        message: Undelivered,
    },
    /// The handler began, and whether it finished is not known.
    #[error("outcome of the call to actor {actor} is unknown: {reason}")]
    Unknown {
        /// Name of the actor that was called.
        actor: Arc<str>,
        /// What cut the caller off from the handler.
        reason: UnknownOutcome,
    },
    /// The actor panicked while the handler (or its asynchronous response) was running.
    ///
    /// What the handler had changed in the actor is gone with the actor's state; what it had sent
    /// or written elsewhere is not.
    #[error("actor {actor} panicked during the call: {panic}")]
    Failed {
        /// Name of the actor that was called.
        actor: Arc<str>,
        /// The panic's message.
        panic: Arc<str>,
    },
}

/// Why a call never reached its handler.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
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
        /// Message of the panic that used up the restart budget, if that is what ended the actor.
        panic: Option<Arc<str>>,
    },
    /// The caller's timeout passed while the call was still queued.
    #[error("timed out after {after:?} before its handler began")]
    TimedOut {
        /// The timeout.
        after: Duration,
    },
    /// The caller would have blocked the very thread that the handler needs.
    #[error("a blocking wait on the actor's own thread would never end (await the reply instead)")]
    WouldDeadlock,
}

/// Why the outcome of a call that began is not known.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum UnknownOutcome {
    /// The caller's timeout passed while the handler was running; the handler goes on.
    #[error("timed out after {after:?} while its handler was running")]
    TimedOut {
        /// The timeout.
        after: Duration,
    },
    /// The actor ended while the handler was running.
    #[error("the actor ended while the handler was running")]
    Stopped,
    /// The handler let go of its reply channel.
    #[error(
        "the handler ended without a reply (its response future panicked, see stderr, or was cancelled)"
    )]
    NoReply,
    /// The caller would have blocked the very thread that the handler needs to finish.
    #[error("a blocking wait on the actor's own thread would never end (await the reply instead)")]
    WouldDeadlock,
}

fn after_panic(panic: Option<&str>) -> String {
    panic.map_or_else(String::new, |text| {
        format!(" after too many panics, the last: {text}")
    })
}

impl CallError {
    /// Whether the handler can have run, in whole or in part.
    ///
    /// `false` means that trying again cannot do the work twice.
    pub fn may_have_run(&self) -> bool {
        !matches!(self, Self::NotDelivered { .. })
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
    /// Returns the error itself when it holds no message (the handler may have run), or when the
    /// message is not an `M`.
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
/// Its `Debug` shows the type only, so that payloads stay out of logs.
pub struct Undelivered {
    type_name: &'static str,
    // Messages are `Send`, not `Sync`; the mutex makes the error both, which error reporters want.
    message: Mutex<Box<dyn Any + Send>>,
}

impl Undelivered {
    pub(crate) fn new<M: Send + 'static>(message: M) -> Self {
        Self {
            type_name: type_name::<M>(),
            message: Mutex::new(Box::new(message)),
        }
    }

    /// The name of the message's type.
    pub fn type_name(&self) -> &'static str {
        self.type_name
    }

    /// Takes the message out.
    ///
    /// # Errors
    /// Returns itself when the message is not an `M`.
    pub fn into_message<M: 'static>(self) -> Result<M, Self> {
        let type_name = self.type_name;
        let message = self
            .message
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        message
            .downcast()
            .map(|message| *message)
            .map_err(|message| Self {
                type_name,
                message: Mutex::new(message),
            })
    }
}

impl fmt::Debug for Undelivered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Undelivered({})", self.type_name)
    }
}

/// Why an actor could not be spawned.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SpawnError {
    /// The name is empty, or has control characters in it.
    #[error("{name:?} cannot name an actor or its thread: {problem}")]
    InvalidName {
        /// The name as given.
        name: String,
        /// What is wrong with it.
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
    /// `get_or_spawn` found an actor of another type under the name.
    #[error("the named actor cannot be used")]
    Lookup(#[source] LookupError),
    /// `max_pending` is zero, so that no call could ever be made.
    #[error("max_pending must be at least 1")]
    NoPendingCalls,
    /// The restart window is zero, so that no restart would ever count.
    #[error("the restart window must be longer than zero")]
    NoRestartWindow,
    /// The system gave no thread, or no event loop for it.
    #[error("could not start a thread for actor {actor}")]
    Thread {
        /// Name of the actor.
        actor: Arc<str>,
        /// What the system said.
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
/// Their pending calls have failed and their names are free. Each ends as soon as its running
/// handler returns; the thread of a handler that never returns is left behind.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("still running after {after:?}, left behind: {}", .actors.join(", "))]
pub struct StillRunning {
    /// Names of the actors left behind.
    pub actors: Vec<String>,
    /// The time that was allowed.
    pub after: Duration,
}
