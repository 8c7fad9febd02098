//! Waiting, for a thread of a schedule. There is no time in a schedule.

use std::time::Instant;

use super::book::ActorId;

pub(crate) fn block_on<T>(future: impl Future<Output = T>, deadline: Option<Instant>) -> Option<T> {
    assert!(deadline.is_none(), "a schedule has no time");
    Some(shuttle::future::block_on(future))
}

/// No thread of a scenario belongs to an actor that makes calls.
pub(crate) fn current_actor() -> Option<ActorId> {
    None
}

pub(crate) fn sleep_until(_: Instant) -> tokio::time::Sleep {
    unreachable!("a schedule has no time")
}
