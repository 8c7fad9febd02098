//! What a node knows about the incarnations of other nodes: which of them are over.
//!
//! The driver decides. A node always has a question to the driver under way, which is answered when
//! something has changed. If a node meets an incarnation that it has not heard of, it asks at once. What
//! is known only grows: a higher incarnation ends the ones before it, and an incarnation that is over
//! stays over. A node that cannot ask loses its driver within two process leases, and then ends its
//! actors.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::agent::{DriverAgent, GetIncarnations, agent_of};
use crate::actor::ActorRef;
use crate::remote::listen::Incarnations;
use crate::remote::process::{NodeId, Process};

/// The state of the latest incarnation of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Standing {
    /// It is in the cluster.
    Live,
    /// It has left in an orderly way. What it sent before may still arrive.
    Left,
    /// It was lost.
    Lost,
}

/// The latest incarnation of each rank.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct KnownIncarnations {
    pub(super) version: u64,
    pub(super) by_rank: BTreeMap<u32, (u64, Standing)>,
    /// The run is over: nothing more will change.
    pub(super) is_over: bool,
}

impl KnownIncarnations {
    fn may_speak(&self, node: NodeId) -> Option<bool> {
        if node == NodeId::DRIVER {
            return Some(true);
        }
        let &(incarnation, standing) = self.by_rank.get(&node.rank)?;
        match node.incarnation.cmp(&incarnation) {
            std::cmp::Ordering::Less => Some(false),
            std::cmp::Ordering::Equal => Some(standing == Standing::Live),
            std::cmp::Ordering::Greater => None,
        }
    }

    /// Adds what is new, and returns the incarnations that were lost.
    fn learn(&mut self, news: Self) -> Vec<NodeId> {
        let mut lost = Vec::new();
        self.version = self.version.max(news.version);
        for (rank, (incarnation, standing)) in news.by_rank {
            let known = self
                .by_rank
                .entry(rank)
                .or_insert((incarnation, Standing::Live));
            let before = *known;
            *known = before.max((incarnation, standing));
            if before.0 < known.0 {
                lost.extend((before.0..known.0).map(|incarnation| NodeId { rank, incarnation }));
            }
            if *known != before && known.1 == Standing::Lost {
                let incarnation = known.0;
                lost.push(NodeId { rank, incarnation });
            }
        }
        lost
    }
}

/// What a node knows about the incarnations of all nodes.
pub(crate) struct NodeIncarnations {
    process: Weak<Process>,
    known: Mutex<KnownIncarnations>,
}

impl NodeIncarnations {
    pub(crate) fn new(process: &Arc<Process>) -> Arc<Self> {
        Arc::new(Self {
            process: Arc::downgrade(process),
            known: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, KnownIncarnations> {
        // No code of the user runs under the lock, so a poisoned value is whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Follows the driver's news for as long as it is polled, or until the run is over.
    pub(crate) async fn follow(self: Arc<Self>, driver: ActorRef<DriverAgent>) {
        let mut newer_than = None;
        while let Some(process) = self.process.upgrade() {
            match driver.ask(GetIncarnations { newer_than }).await {
                Ok(news) if news.is_over => return,
                Ok(news) => {
                    newer_than = Some(news.version);
                    let lost = self.lock().learn(news);
                    lost.into_iter().for_each(|node| process.sever(node));
                }
                Err(_lost) => {
                    let pause = process.config().heartbeat;
                    drop(process);
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    async fn find_out(&self, node: NodeId) -> Option<bool> {
        let process = self.process.upgrade()?;
        let driver = agent_of::<DriverAgent>(&process, NodeId::DRIVER);
        let ask = GetIncarnations { newer_than: None };
        let news = driver
            .ask_within(ask, process.config().process_lease)
            .await
            .ok()?;
        let mut known = self.lock();
        known.learn(news);
        // A node that the driver does not know may not speak.
        Some(known.may_speak(node).unwrap_or(false))
    }
}

/// Answers the questions of a listener with what a node knows.
pub(crate) struct AsNode(pub(crate) Arc<NodeIncarnations>);

impl Incarnations for AsNode {
    fn may_speak(&self, node: NodeId) -> Option<bool> {
        self.0.lock().may_speak(node)
    }

    fn ask(&self, node: NodeId) -> BoxFuture<'static, Option<bool>> {
        let incarnations = Arc::clone(&self.0);
        async move { incarnations.find_out(node).await }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(rank: u32, incarnation: u64) -> NodeId {
        NodeId { rank, incarnation }
    }

    fn news(version: u64, ranks: &[(u32, u64, Standing)]) -> KnownIncarnations {
        let ranks = ranks
            .iter()
            .map(|&(rank, incarnation, standing)| (rank, (incarnation, standing)));
        KnownIncarnations {
            version,
            by_rank: ranks.collect(),
            is_over: false,
        }
    }

    /// R-11, in whatever order the driver's answers come.
    #[test]
    fn a_life_that_is_over_stays_so() {
        let mut known = KnownIncarnations::default();
        assert_eq!(known.may_speak(NodeId::DRIVER), Some(true));
        assert_eq!(
            known.may_speak(node(1, 1)),
            None,
            "it may have joined just now"
        );
        assert_eq!(known.learn(news(3, &[(1, 1, Standing::Live)])), []);
        assert_eq!(known.may_speak(node(1, 1)), Some(true));
        assert_eq!(known.may_speak(node(1, 2)), None);
        let lost = known.learn(news(5, &[(1, 2, Standing::Live)]));
        assert_eq!(lost, [node(1, 1)]);
        assert_eq!(known.may_speak(node(1, 1)), Some(false));
        known.learn(news(4, &[(1, 1, Standing::Live)]));
        assert_eq!(known.may_speak(node(1, 1)), Some(false), "old news");
        assert_eq!(known.learn(news(6, &[(1, 2, Standing::Left)])), []);
        assert_eq!(known.may_speak(node(1, 2)), Some(false));
        assert_eq!(
            known.learn(news(7, &[(1, 3, Standing::Lost)])),
            [node(1, 2), node(1, 3)]
        );
        assert_eq!(known.version, 7);
    }
}
