//! What the servers that follow the first one tell of their parts of gradients, until the observers get it. Pure.
//!
//! An observer gets the step of a gradient before the parts of the gradient. But the record of a step comes from a worker, and
//! those of the parts from servers, in any order. So parts wait here until the step is known, or is missed.

use std::collections::VecDeque;

use ps_actors::cluster::NodeId;
use ps_actors::server::{AppliedParts, MAX_PARTS};

use super::event::PartApplied;

/// How many parts wait for their steps. If there are more, the earliest ones wait no longer.
const MAX_EARLY: usize = 2 * MAX_PARTS;

/// The parts of a group's servers.
#[derive(Debug, Default)]
pub(super) struct Parts {
    servers: Vec<Server>,
    /// Parts whose steps are not known yet.
    early: VecDeque<PartApplied>,
}

/// What is known of a server.
#[derive(Clone, Debug, Default)]
struct Server {
    /// The number of the first record that is not known.
    next: u64,
    /// When its latest known part was applied, in seconds since the run started.
    latest: f64,
}

impl Parts {
    pub(super) fn of(num_servers: usize) -> Self {
        Self {
            servers: vec![Server::default(); num_servers],
            early: VecDeque::new(),
        }
    }

    /// Returns the number of the first record that is not known of this server.
    pub(super) fn next(&self, server: usize) -> u64 {
        self.servers.get(server).map_or(0, |server| server.next)
    }

    /// Takes an answer of a server, which arrived at `now`. The same records may come twice.
    pub(super) fn take(&mut self, index: usize, node: NodeId, parts: AppliedParts, now: f64) {
        let first = parts.first;
        let records = match parts.read() {
            Ok(records) => records,
            Err(error) => {
                tracing::warn!(server = index, %error, "the records of its parts cannot be read");
                return;
            }
        };
        let Some(server) = self.servers.get_mut(index) else {
            return;
        };
        // A server keeps no more, but this comes from a peer.
        for (place, record) in records.iter().take(MAX_PARTS).enumerate() {
            let number = first.saturating_add(place as u64);
            if number < server.next {
                continue;
            }
            // The answer took a while, so it may seem to be earlier than the part before.
            let time = (now - record.ago.as_secs_f64()).max(server.latest).min(now);
            (server.next, server.latest) = (number.saturating_add(1), time);
            self.early
                .push_back(PartApplied::of(index, node, record, time));
        }
    }

    /// Returns the parts that need not wait any more.
    pub(super) fn take_ready(
        &mut self,
        is_step_known: impl Fn(&PartApplied) -> bool,
    ) -> Vec<PartApplied> {
        let num_too_many = self.early.len().saturating_sub(MAX_EARLY);
        let mut ready: Vec<PartApplied> = self.early.drain(..num_too_many).collect();
        self.early.retain(|part| {
            let is_ready = is_step_known(part);
            if is_ready {
                ready.push(part.clone());
            }
            !is_ready
        });
        ready
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use ps_actors::ids::{Clock, GradientId, Incarnation, Version, WorkerId};
    use ps_actors::server::AppliedPart;

    use super::*;

    fn answer(first: u64, clocks: std::ops::Range<u64>, ago: Duration) -> AppliedParts {
        let parts = clocks.map(|clock| AppliedPart {
            id: GradientId {
                worker: WorkerId(0),
                incarnation: Incarnation(1),
                clock: Clock(clock),
            },
            version: Version(clock + 1),
            held: Duration::from_millis(500),
            took: Duration::from_millis(250),
            ago,
        });
        AppliedParts::new(first, parts.collect())
    }

    fn clocks(parts: &[PartApplied]) -> Vec<u64> {
        parts.iter().map(|part| part.clock.0).collect()
    }

    #[test]
    fn parts_wait_for_their_steps_and_come_once() {
        let mut parts = Parts::of(3);
        let second = Duration::from_secs(1);
        parts.take(1, NodeId::DRIVER, answer(0, 0..3, second), 10.0);
        // One record comes again.
        parts.take(1, NodeId::DRIVER, answer(2, 2..4, second), 9.5);
        assert_eq!(parts.next(1), 4);
        parts.take(2, NodeId::DRIVER, answer(7, 0..1, second), 12.0);
        assert_eq!((parts.next(2), parts.next(0), parts.next(9)), (8, 0, 0));
        let ready = parts.take_ready(|part| part.clock < Clock(2));
        assert_eq!(clocks(&ready), [0, 1, 0]);
        let times = ready
            .iter()
            .map(|part| (part.server, part.time, part.held, part.took));
        let expected = [
            (1, 9.0, 0.5, 0.25),
            (1, 9.0, 0.5, 0.25),
            (2, 11.0, 0.5, 0.25),
        ];
        assert_eq!(times.collect::<Vec<_>>(), expected);
        let ready = parts.take_ready(|_| true);
        assert_eq!(clocks(&ready), [2, 3]);
        // Its times do not go back.
        assert_eq!(ready[1].time, 9.0);
        assert!(parts.take_ready(|_| true).is_empty());
    }

    #[test]
    fn what_a_server_says_is_cut_to_what_can_be() {
        let mut parts = Parts::of(2);
        let node = NodeId::DRIVER;
        // A server that is none of the group's.
        parts.take(2, node, answer(0, 0..1, Duration::ZERO), 1.0);
        assert!(parts.take_ready(|_| true).is_empty());
        parts.take(1, node, answer(0, 0..1, Duration::MAX), 0.1);
        let [part] = &parts.take_ready(|_| true)[..] else {
            panic!("one was sent");
        };
        assert_eq!((part.time, part.took, part.held), (0.0, 0.0, 0.0));
        // More than a server keeps, of which no step is ever known.
        for round in 0..4 {
            let len = MAX_PARTS as u64 + 1;
            let first = 1 + round * len;
            parts.take(1, node, answer(first, 0..len, Duration::ZERO), 2.0);
            parts.take_ready(|_| false);
            assert!(parts.early.len() <= MAX_EARLY);
        }
        parts.take(1, node, answer(u64::MAX, 0..2, Duration::ZERO), 2.0);
        assert_eq!(parts.next(1), u64::MAX);
    }
}
