//! The product's files, and what stands in for those around them.

#[path = "background.rs"]
pub(crate) mod background;
#[path = "../../src/actor/book.rs"]
pub(crate) mod book;
#[path = "../../src/actor/call.rs"]
pub(crate) mod call;
#[path = "../../src/actor/caller_gone.rs"]
pub(crate) mod caller_gone;
#[path = "../../src/actor/error.rs"]
pub(crate) mod error;
#[path = "../../src/actor/mailbox.rs"]
pub(crate) mod mailbox;
#[path = "../../src/actor/queued.rs"]
pub(crate) mod queued;
#[path = "../../src/actor/reply.rs"]
pub(crate) mod reply;

pub(crate) use book::ActorId;
pub(crate) use error::{CallError, NotDelivered, UnknownOutcome};
pub(crate) use reply::Reply;
