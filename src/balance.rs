//! On which node each worker of a training is, and which workers move when nodes join. Pure.

use std::cell::RefCell;
use std::collections::BTreeMap;

use ps_actors::cluster::NodeId;

/// Where the workers of a training are, by their ranks.
#[derive(Debug)]
pub(crate) struct Places {
    nodes: RefCell<Vec<NodeId>>,
}

impl Places {
    pub(crate) fn new(nodes: Vec<NodeId>) -> Self {
        Self {
            nodes: RefCell::new(nodes),
        }
    }

    pub(crate) fn set(&self, worker: usize, node: NodeId) {
        if let Some(place) = self.nodes.borrow_mut().get_mut(worker) {
            *place = node;
        }
    }

    /// Returns the one of these nodes with the fewest workers, not counting `except`.
    pub(crate) fn emptiest(&self, nodes: &[NodeId], except: usize) -> Option<NodeId> {
        let places = self.nodes.borrow();
        let others = places.iter().enumerate().filter(|&(at, _)| at != except);
        let others: Vec<NodeId> = others.map(|(_, &node)| node).collect();
        let num_on = |node: NodeId| others.iter().filter(|&&other| other == node).count();
        nodes
            .iter()
            .copied()
            .min_by_key(|&node| (num_on(node), node))
    }

    /// Returns the moves after which no node has two workers more than another one. A worker moves only to
    /// one of these nodes. It may come from anywhere, also from the driver.
    pub(crate) fn moves(&self, nodes: &[NodeId]) -> Vec<(usize, NodeId)> {
        let mut on: BTreeMap<NodeId, Vec<usize>> =
            nodes.iter().map(|&node| (node, Vec::new())).collect();
        for (worker, &node) in self.nodes.borrow().iter().enumerate() {
            on.entry(node).or_default().push(worker);
        }
        let mut moves = Vec::new();
        while let Some(to) = nodes
            .iter()
            .copied()
            .min_by_key(|node| (on[node].len(), *node))
        {
            let from = on.iter().max_by_key(|(_, workers)| workers.len());
            let Some((&from, workers)) = from.filter(|(_, w)| w.len() > on[&to].len() + 1) else {
                break;
            };
            let worker = *workers.last().expect("there are at least two");
            on.entry(from).or_default().pop();
            on.entry(to).or_default().push(worker);
            moves.push((worker, to));
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(rank: u32) -> NodeId {
        NodeId {
            rank,
            incarnation: 0,
        }
    }

    fn places(ranks: &[u32]) -> Places {
        Places::new(ranks.iter().map(|&rank| node(rank)).collect())
    }

    fn moved(ranks: &[u32], nodes: &[u32]) -> Vec<u32> {
        let places = places(ranks);
        let nodes: Vec<_> = nodes.iter().map(|&rank| node(rank)).collect();
        for (worker, node) in places.moves(&nodes) {
            places.set(worker, node);
        }
        assert_eq!(places.moves(&nodes), [], "it is balanced at once");
        let ranks = places.nodes.borrow();
        ranks.iter().map(|node| node.rank).collect()
    }

    #[test]
    fn as_few_workers_move_as_possible() {
        // Nobody moves without need.
        assert_eq!(moved(&[1, 2, 1], &[1, 2]), [1, 2, 1]);
        assert_eq!(moved(&[1, 2], &[1, 2, 3]), [1, 2]);
        // A new node gets its share.
        assert_eq!(moved(&[1, 2, 1, 2], &[1, 2, 3]), [1, 2, 1, 3]);
        assert_eq!(moved(&[1, 1, 1, 1], &[1, 2, 3]), [1, 1, 3, 2]);
        // The driver gives, and does not take.
        assert_eq!(moved(&[0, 0, 0, 0], &[1]), [0, 0, 1, 1]);
        assert_eq!(moved(&[0, 0, 0, 0], &[]), [0, 0, 0, 0]);
        assert_eq!(moved(&[1, 1, 1], &[1]), [1, 1, 1]);
    }

    #[test]
    fn a_worker_that_starts_again_goes_where_the_fewest_are() {
        let nodes = [node(1), node(2), node(3)];
        let places = places(&[1, 2, 1, 2, 3]);
        assert_eq!(places.emptiest(&nodes, 0), Some(node(1)));
        assert_eq!(places.emptiest(&nodes, 4), Some(node(3)));
        assert_eq!(places.emptiest(&nodes[..2], 4), Some(node(1)));
        assert_eq!(places.emptiest(&[], 0), None);
    }
}
