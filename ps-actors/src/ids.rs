//! Names of the things that a parameter server counts.
//!
//! Each is a newtype, so that a clock cannot be passed where a version is meant. All are
//! plain integers on the wire.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($int:ty), $prefix:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        pub struct $name(pub $int);

        impl $name {
            /// Returns the value that follows this one. The last value follows itself, so that a number
            /// from a peer neither panics nor starts again at 0 (PS-6).
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.saturating_add(1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id! {
    /// A worker's rank, from 0. It stays the same when the worker is restarted.
    WorkerId(u32), "worker "
}
id! {
    /// Counts how often a worker has joined: a later incarnation has a higher number. The servers assign
    /// the incarnations of members. The incarnation of a worker that never joined is the time at which it
    /// was made, in microseconds since 1970.
    Incarnation(u64), "incarnation "
}
id! {
    /// A random number that names one request to join. If the same request arrives again, no new
    /// incarnation begins.
    JoinRequest(u64), "join request "
}
id! {
    /// The index of a worker's step, from 0. The gradient of step n has clock n.
    Clock(u64), "clock "
}
id! {
    /// How many updates have been applied to the weights. The initial weights are version 0.
    Version(u64), "version "
}
id! {
    /// Counts changes of the membership: it rises whenever a worker joins, leaves or is lost.
    Epoch(u64), "epoch "
}

/// Identifies one gradient: the worker that computed it, the worker's incarnation, and the step.
///
/// Two pushes with the same id carry the same gradient. The second one is never applied.
///
/// ```
/// use ps_actors::ids::{Clock, GradientId, Incarnation, WorkerId};
///
/// let first = GradientId { worker: WorkerId(2), incarnation: Incarnation(1), clock: Clock(0) };
/// // The next step of the same worker. A push of it is never taken for a repeat of the first one.
/// let second = GradientId { clock: first.clock.next(), ..first };
/// assert_ne!(first, second);
/// println!("{second}");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct GradientId {
    /// The worker that computed the gradient.
    pub worker: WorkerId,
    /// The worker's incarnation when it computed the gradient.
    pub incarnation: Incarnation,
    /// The step whose gradient it is.
    pub clock: Clock,
}

impl fmt::Display for GradientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}, {}", self.worker, self.incarnation, self.clock)
    }
}
