//! What a reference needs of an actor that is not in this process.
//!
//! This module's side knows no network: `remote` implements [`Port`] over connections.

use std::any::{Any, TypeId};
use std::sync::Arc;

use actix::{Actor, Message};
use futures_util::future::BoxFuture;

use super::book::Book;
use super::call::ReplySlot;
use super::error::CallError;
use super::registry::AnyMailbox;
use crate::deadline::Deadline;

/// An actor elsewhere, shared by all references to it in this process.
pub(crate) trait Port<A: Actor>: Send + Sync {
    /// What this process knows of the actor, and the slots for its calls to it.
    fn book(&self) -> &Book;

    /// Whether this process has not heard of its end.
    fn is_alive(&self) -> bool;

    fn stop(&self);

    fn kill(&self);

    /// Waits until the actor has ended, or could not be reached for the length of the lease.
    fn ended(&self) -> BoxFuture<'_, ()>;

    /// The last reference is dropped.
    fn release(&self);

    /// The actor as a shutdown sees it.
    fn mailbox(&self) -> Arc<dyn AnyMailbox>;

    /// Begins a call with a message of type `M`, named by its id. `message` is an `Option<M>` with the
    /// message, which is taken out; what is returned is a [`Begun<M>`]. `None`, with the message left where it
    /// is, if the actor takes no such message.
    fn begin(&self, id: TypeId, message: &mut dyn Any, how: How) -> Option<Box<dyn Any>>;

    /// The implementation, for the module that it is from.
    fn as_any(&self) -> &dyn Any;
}

/// A call that was begun, or an error that hands its message back.
pub(crate) type Begun<M> = Result<Arc<dyn ReplySlot<<M as Message>::Result>>, CallError>;

/// How a call is made.
#[derive(Clone, Copy, Debug)]
pub(crate) enum How {
    /// If a slot is free. Its handler is to begin before the deadline.
    Ask(Option<Deadline>),
    /// If a slot is free, without a reply.
    Tell,
    /// In the slot that was taken for it.
    InSlot,
}
