//! Which lives of nodes are over, as a node knows it.
//!
//! The driver decides. A node asks it all the time for what has changed, and gets an answer when
//! something has; of a life that it has not heard of it asks at once. What is known only grows: a
//! higher life ends the ones before, and a life that is over stays so. A node that cannot ask loses its
//! driver within two leases, and ends then itself.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::agent::{DriverAgent, GetLives, agent_of};
use crate::actor::ActorRef;
use crate::net::listen::Lives;
use crate::remote::process::{NodeId, Process};

/// What has become of the latest life of a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Standing {
    /// It takes part.
    Live,
    /// It has left in order: what it said before may still be on its way.
    Left,
    /// It was lost.
    Lost,
}

/// The latest life of each rank.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct KnownLives {
    pub(super) version: u64,
    pub(super) by_rank: BTreeMap<u32, (u64, Standing)>,
    /// The run is over: no more news will come.
    pub(super) is_over: bool,
}

impl KnownLives {
    fn may_speak(&self, node: NodeId) -> Option<bool> {
        if node == NodeId::DRIVER {
            return Some(true);
        }
        let &(life, standing) = self.by_rank.get(&node.rank)?;
        match node.life.cmp(&life) {
            std::cmp::Ordering::Less => Some(false),
            std::cmp::Ordering::Equal => Some(standing == Standing::Live),
            std::cmp::Ordering::Greater => None,
        }
    }

    /// Adds what is news, and returns the lives that were lost.
    fn learn(&mut self, news: Self) -> Vec<NodeId> {
        let mut lost = Vec::new();
        self.version = self.version.max(news.version);
        for (rank, (life, standing)) in news.by_rank {
            let known = self.by_rank.entry(rank).or_insert((life, Standing::Live));
            let before = *known;
            *known = before.max((life, standing));
            if before.0 < known.0 {
                lost.extend((before.0..known.0).map(|life| NodeId { rank, life }));
            }
            if *known != before && known.1 == Standing::Lost {
                let life = known.0;
                lost.push(NodeId { rank, life });
            }
        }
        lost
    }
}

/// What a node knows.
pub(crate) struct NodeLives {
    process: Weak<Process>,
    known: Mutex<KnownLives>,
}

impl NodeLives {
    pub(crate) fn new(process: &Arc<Process>) -> Arc<Self> {
        Arc::new(Self {
            process: Arc::downgrade(process),
            known: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, KnownLives> {
        // No code of the user runs under the lock, so poisoned knowledge is whole.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hears from the driver for as long as it is polled, or until the run is over.
    pub(crate) async fn follow(self: Arc<Self>, driver: ActorRef<DriverAgent>) {
        let mut newer_than = None;
        while let Some(process) = self.process.upgrade() {
            match driver.ask(GetLives { newer_than }).await {
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
        let ask = GetLives { newer_than: None };
        let news = driver.ask_within(ask, process.config().lease).await.ok()?;
        let mut known = self.lock();
        known.learn(news);
        // Of whom the driver knows nothing is nobody.
        Some(known.may_speak(node).unwrap_or(false))
    }
}

/// As a listener asks.
pub(crate) struct AsNode(pub(crate) Arc<NodeLives>);

impl Lives for AsNode {
    fn may_speak(&self, node: NodeId) -> Option<bool> {
        self.0.lock().may_speak(node)
    }

    fn ask(&self, node: NodeId) -> BoxFuture<'static, Option<bool>> {
        let lives = Arc::clone(&self.0);
        async move { lives.find_out(node).await }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(rank: u32, life: u64) -> NodeId {
        NodeId { rank, life }
    }

    fn news(version: u64, ranks: &[(u32, u64, Standing)]) -> KnownLives {
        let ranks = ranks
            .iter()
            .map(|&(rank, life, standing)| (rank, (life, standing)));
        KnownLives {
            version,
            by_rank: ranks.collect(),
            is_over: false,
        }
    }

    /// R-11, in whatever order the driver's answers come.
    #[test]
    fn a_life_that_is_over_stays_so() {
        let mut known = KnownLives::default();
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
