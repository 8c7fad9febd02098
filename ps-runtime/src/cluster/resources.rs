//! The resources that a node offers and that an actor needs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Quantities such as `cpus=4` or `gpus=0.5`, and labels such as `big`.
///
/// The text form is a list, such as `cpus=4,gpus=1,big`. Resources only decide where an actor is placed:
/// nothing prevents an actor from using more.
///
/// ```
/// use ps_runtime::cluster::Resources;
///
/// let node: Resources = "cpus=4,gpus=1,big".parse()?;
/// assert!(node.include(&Resources::none().cpus(2.0).label("big")));
/// assert!(!node.include(&Resources::none().gpus(2.0)));
/// # Ok::<(), ps_runtime::cluster::ResourcesError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Resources {
    quantities: BTreeMap<String, f64>,
    labels: BTreeSet<String>,
}

/// A part of a text is neither a quantity nor a label.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("`{0}` is neither a quantity such as cpus=4 nor a label")]
pub struct ResourcesError(String);

impl Resources {
    /// Returns an empty list of resources.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Sets a quantity. It must be at least 0.
    ///
    /// # Panics
    /// When the amount is negative or NaN.
    #[must_use]
    pub fn quantity(mut self, name: impl Into<String>, amount: f64) -> Self {
        assert!(amount >= 0.0, "a quantity of {amount} cannot be had");
        self.quantities.insert(name.into(), amount);
        self
    }

    /// Sets the number of processor cores.
    #[must_use]
    pub fn cpus(self, amount: f64) -> Self {
        self.quantity("cpus", amount)
    }

    /// Sets the number of graphics processors.
    #[must_use]
    pub fn gpus(self, amount: f64) -> Self {
        self.quantity("gpus", amount)
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.labels.insert(label.into());
        self
    }

    /// Whether these resources include all of `needed`.
    #[must_use]
    pub fn include(&self, needed: &Self) -> bool {
        let has = |(name, amount): (&String, &f64)| {
            self.quantities.get(name).copied().unwrap_or(0.0) >= *amount
        };
        needed.quantities.iter().all(has) && needed.labels.is_subset(&self.labels)
    }

    /// Subtracts quantities if all of them are available. Returns whether they were.
    pub(crate) fn reserve(&mut self, needed: &Self) -> bool {
        let fits = self.include(needed);
        if fits {
            for (name, amount) in &needed.quantities {
                if let Some(free) = self.quantities.get_mut(name) {
                    *free -= amount;
                }
            }
        }
        fits
    }

    /// Adds quantities that were reserved.
    pub(crate) fn give_back(&mut self, used: &Self) {
        for (name, amount) in &used.quantities {
            if let Some(free) = self.quantities.get_mut(name) {
                *free += amount;
            }
        }
    }
}

impl FromStr for Resources {
    type Err = ResourcesError;

    fn from_str(text: &str) -> Result<Self, ResourcesError> {
        let mut resources = Self::none();
        for item in text
            .split(',')
            .map(str::trim)
            .filter(|item| !item.is_empty())
        {
            let wrong = || ResourcesError(item.to_owned());
            match item.split_once('=') {
                Some((name, amount)) => {
                    let amount: f64 = amount.trim().parse().map_err(|_| wrong())?;
                    if !amount.is_finite() || amount < 0.0 || name.trim().is_empty() {
                        return Err(wrong());
                    }
                    resources = resources.quantity(name.trim(), amount);
                }
                None => resources = resources.label(item),
            }
        }
        Ok(resources)
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quantities = self
            .quantities
            .iter()
            .map(|(name, amount)| format!("{name}={amount}"));
        let items: Vec<String> = quantities.chain(self.labels.iter().cloned()).collect();
        match items.is_empty() {
            true => f.write_str("nothing"),
            false => f.write_str(&items.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_written() {
        let resources: Resources = "gpus=1, big,cpus=4".parse().unwrap();
        assert_eq!(
            resources,
            Resources::none().cpus(4.0).gpus(1.0).label("big")
        );
        assert_eq!(resources.to_string(), "cpus=4,gpus=1,big");
        for wrong in ["cpus=many", "cpus=-1", "=4", "cpus=inf"] {
            assert!(wrong.parse::<Resources>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_reserved_is_gone_until_it_is_given_back() {
        let mut free: Resources = "cpus=2,big".parse().unwrap();
        let needed: Resources = "cpus=2,big".parse().unwrap();
        assert!(free.reserve(&needed));
        assert!(!free.reserve(&"cpus=0.5".parse().unwrap()));
        assert!(
            free.reserve(&"big".parse().unwrap()),
            "a label is not used up"
        );
        free.give_back(&needed);
        assert!(free.include(&needed));
        assert!(!free.include(&"gpus=1".parse().unwrap()));
    }
}
