//! A map that forgets what came first when it is full.

use std::collections::{BTreeMap, VecDeque};

/// The latest values, by their keys.
#[derive(Debug)]
pub(crate) struct Latest<K, V> {
    values: BTreeMap<K, V>,
    /// The keys in the order in which they came.
    order: VecDeque<K>,
    max_len: usize,
}

impl<K: Copy + Ord, V> Latest<K, V> {
    /// Makes an empty map. `max_len` is how many values it remembers.
    pub(crate) fn new(max_len: usize) -> Self {
        Self {
            values: BTreeMap::new(),
            order: VecDeque::new(),
            max_len,
        }
    }

    /// Remembers a value, in the place of an earlier one with this key.
    pub(crate) fn insert(&mut self, key: K, value: V) {
        if self.values.insert(key, value).is_some() {
            return;
        }
        self.order.push_back(key);
        while self.order.len() > self.max_len {
            if let Some(first) = self.order.pop_front() {
                self.values.remove(&first);
            }
        }
    }

    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.values.get(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_values_are_remembered() {
        let mut latest = Latest::new(3);
        for number in [5, 4, 3, 4, 2] {
            latest.insert(number, 10 * number);
        }
        assert_eq!(
            [5, 4, 3, 2].map(|key| latest.get(&key).copied()),
            [None, Some(40), Some(30), Some(20)]
        );
        assert_eq!((latest.values.len(), latest.order.len()), (3, 3));
    }
}
