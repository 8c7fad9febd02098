//! Logs whom the server waits for, if pushes wait and no update is made.

use std::time::Duration;

use actix::Context;

use super::actor::{ParameterServer, Role};
use crate::ids::Version;

/// How long pushes wait without an update before the server logs it.
pub(super) const STALL: Duration = Duration::from_secs(5);

/// Detects that pushes wait and no update is made.
#[derive(Debug, Default)]
pub(super) struct Stall {
    held_up_at: Option<Version>,
    /// How many looks in a row found no progress.
    num_looks: u32,
}

impl Stall {
    /// Returns how many looks in a row found no progress, if this number is a power of two. So a long step
    /// does not fill the log.
    fn look(&mut self, num_held_up: usize, version: Version) -> Option<u32> {
        let held_up_at = (num_held_up > 0).then_some(version);
        let is_same = held_up_at.is_some() && held_up_at == self.held_up_at;
        self.held_up_at = held_up_at;
        self.num_looks = match is_same {
            true => self.num_looks.saturating_add(1),
            false => 0,
        };
        self.num_looks.is_power_of_two().then_some(self.num_looks)
    }
}

impl ParameterServer {
    /// Logs which workers the server waits for, if a round does not close.
    pub(super) fn look_for_stall(&mut self, _: &mut Context<Self>) {
        if let Role::First(first) = &self.role {
            let coordinator = &first.coordinator;
            if coordinator.is_paused() {
                self.stall = Stall::default();
                return;
            }
            let (version, num_held_up) = (coordinator.version(), coordinator.num_held_up());
            if let Some(num_looks) = self.stall.look(num_held_up, version) {
                let awaited = coordinator.awaited();
                let lease = first.leases.lease();
                let since = STALL * num_looks;
                tracing::warn!(%version, num_held_up, %awaited, ?lease, "no update for {since:?}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PS-9.
    #[test]
    fn a_stall_is_named_at_once_and_then_ever_more_rarely() {
        let mut stall = Stall::default();
        let mut looks = |num_held_up, version, num_looks: usize| -> Vec<_> {
            let looks = (0..num_looks).map(|_| stall.look(num_held_up, Version(version)));
            looks.collect()
        };
        // Nobody waits, or updates are made.
        assert_eq!(looks(0, 1, 3), [None; 3]);
        assert_eq!(looks(1, 2, 1), [None]);
        assert_eq!(looks(1, 3, 1), [None]);
        let named = [Some(1), Some(2), None, Some(4), None];
        assert_eq!(looks(2, 3, 5), named);
        assert_eq!(looks(2, 4, 2), [None, Some(1)]);
    }
}
