//! Bounds the connections of strangers: those that are in their handshake.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::{Resource, getrlimit};
use tokio::task::AbortHandle;

use crate::net::quiet::Quiet;

static TOO_MANY: Quiet = Quiet::new();

/// A connection that may be in its handshake: whether it is.
#[derive(Clone)]
pub(super) struct Stranger(Arc<AtomicBool>);

impl Stranger {
    /// A connection that was just accepted.
    pub(super) fn new() -> Self {
        Self(Arc::new(AtomicBool::new(true)))
    }

    /// Ends its time as a stranger. Returns `false` if that has ended before.
    pub(super) fn end(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }

    fn is_in_handshake(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The connections of one listener that are in their handshake. Anybody can open them, so they must not take
/// all places and all file descriptors of the process.
///
/// If there are too many, the oldest one is closed, and not the new one refused. An honest caller shows its
/// token within milliseconds. So it gets in, however many silent strangers there are.
pub(super) struct Strangers {
    /// In the order in which they came. Some of them may be over.
    handshakes: VecDeque<(Stranger, AbortHandle)>,
    limit: usize,
}

impl Strangers {
    /// The limit is a quarter of `max_connections`, and of the open files that the system allows now.
    pub(super) fn new(max_connections: usize) -> Self {
        let max_files = getrlimit(Resource::Nofile).current;
        let max_files = max_files.map_or(usize::MAX, |files| {
            usize::try_from(files).unwrap_or(usize::MAX)
        });
        Self {
            handshakes: VecDeque::new(),
            limit: (max_connections.min(max_files) / 4).max(1),
        }
    }

    /// Adds a connection, which `task` serves. Closes the oldest one if there are now too many.
    pub(super) fn add(&mut self, stranger: Stranger, task: AbortHandle) {
        self.handshakes.push_back((stranger, task));
        if self.handshakes.len() <= self.limit {
            return;
        }
        let is_under_way = |stranger: &Stranger, task: &AbortHandle| {
            stranger.is_in_handshake() && !task.is_finished()
        };
        self.handshakes
            .retain(|(stranger, task)| is_under_way(stranger, task));
        while self.handshakes.len() > self.limit {
            let Some((oldest, task)) = self.handshakes.pop_front() else {
                return;
            };
            if !oldest.end() {
                continue;
            }
            task.abort();
            if let Some(num_suppressed) = TOO_MANY.may_speak() {
                tracing::warn!(
                    limit = self.limit,
                    num_suppressed,
                    "closed a connection that has not finished its handshake, because too many others \
                     have not either: the limit is a quarter of NetConfig::max_connections and of the \
                     open files that the system allows (ulimit -n)"
                );
            }
        }
    }
}
