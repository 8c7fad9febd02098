//! Splits the weights over servers.
//!
//! Ranges are contiguous, disjoint and cover `0..len`. They differ by at most one cache line of weights in length,
//! unless parameters must stay whole (PS-1).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::weights::Layout;

/// Weights per cache line. Ranges begin at a multiple of it, so no two servers write into the same line.
const LINE: usize = 16;

/// Splits `0..len` into one range per server, in order. If there are more servers than cache lines of
/// weights, the last ranges are empty.
///
/// # Panics
/// If `num_servers` is 0.
#[must_use]
pub fn partition(len: usize, num_servers: usize) -> Vec<Range<usize>> {
    assert!(num_servers > 0, "weights need at least one server");
    let lines = len.div_ceil(LINE);
    let (each, more) = (lines / num_servers, lines % num_servers);
    let mut start = 0;
    (0..num_servers)
        .map(|server| {
            let lines = each + usize::from(server < more);
            let end = (start + lines * LINE).min(len);
            let range = start..end;
            start = end;
            range
        })
        .collect()
}

/// Where the weights may be cut.
///
/// ```
/// use ps_actors::actor::run;
/// use ps_actors::group::ServerGroup;
/// use ps_actors::rule::Sgd;
/// use ps_actors::server::{Cut, ServerConfig};
/// use ps_actors::weights::{Layout, Parameter, Weights};
///
/// let parameter = |name: &str, range: std::ops::Range<usize>| Parameter {
///     name: name.to_owned(),
///     shape: vec![range.len()],
///     range,
/// };
/// let layout = Layout::new(vec![parameter("first", 0..10), parameter("second", 10..32)])?;
/// let initial = Weights::initial(layout, vec![0.0; 32]);
/// for (cut, expected) in [(Cut::Anywhere, 16), (Cut::BetweenParameters, 10)] {
///     let config = ServerConfig { cut, ..ServerConfig::default() };
///     let servers = ServerGroup::spawn(&initial, 2, config, |_| Box::new(Sgd::new()))?;
///     let status = run(servers.status())?;
///     assert_eq!(status[0].range, 0..expected);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cut {
    /// Anywhere, so that all servers have equally many weights, up to a cache line.
    #[default]
    Anywhere,
    /// Only between two parameters, for update rules that need whole ones. Each cut is the one that is nearest to an
    /// even split. A server without a parameter has no weights.
    BetweenParameters,
}

/// Splits the weights of a model over servers.
pub(crate) fn split(layout: &Layout, num_servers: usize, cut: Cut) -> Vec<Range<usize>> {
    let len = layout.num_weights();
    if cut == Cut::Anywhere {
        return partition(len, num_servers);
    }
    let parameters = layout.parameters();
    let largest = parameters.iter().max_by_key(|one| one.range.len());
    if let Some(largest) = largest
        && num_servers > 1
        && largest.range.len() > len.div_ceil(num_servers)
    {
        tracing::warn!(
            parameter = largest.name,
            num_weights = largest.range.len(),
            even_share = len.div_ceil(num_servers),
            "the update rule needs whole parameters, and this one is larger than an even share of a server; so one \
             server has more to do than the others"
        );
    }
    let mut start = 0;
    (1..=num_servers)
        .map(|server| {
            // Exact also for 2⁶⁴ weights.
            let even = (len as u128 * server as u128 / num_servers as u128) as usize;
            let after = parameters.partition_point(|one| one.range.end <= even);
            let below = after
                .checked_sub(1)
                .map_or(0, |last| parameters[last].range.end);
            let above = parameters.get(after).map_or(len, |next| next.range.end);
            let end = if even - below <= above - even {
                below
            } else {
                above
            };
            let range = start..end.max(start);
            start = range.end;
            range
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::weights::Parameter;

    fn layout(lens: &[usize]) -> Layout {
        let mut start = 0;
        let parameters = lens.iter().enumerate().map(|(index, &len)| {
            let range = start..start + len;
            start = range.end;
            Parameter {
                name: format!("p{index}"),
                shape: vec![len],
                range,
            }
        });
        Layout::new(parameters.collect()).unwrap()
    }

    #[test]
    fn cuts_between_parameters_are_the_nearest_ones_to_an_even_split() {
        let split =
            |lens: &[usize], num_servers| split(&layout(lens), num_servers, Cut::BetweenParameters);
        assert_eq!(split(&[10, 10, 10, 10], 2), [0..20, 20..40]);
        assert_eq!(split(&[10, 3, 10, 10], 2), [0..13, 13..33]);
        // A parameter that is larger than a share.
        assert_eq!(split(&[2, 90, 8], 3), [0..2, 2..92, 92..100]);
        assert_eq!(split(&[90, 5, 5], 3), [0..0, 0..90, 90..100]);
        // More servers than parameters.
        assert_eq!(split(&[7], 3), [0..0, 0..7, 7..7]);
        assert_eq!(split(&[], 2), [0..0, 0..0]);
    }

    proptest! {
        /// PS-1.
        #[test]
        fn cuts_between_parameters_cover_everything_and_cut_none(
            lens in prop::collection::vec(0usize..200, 0..30), num_servers in 1usize..12,
        ) {
            let layout = layout(&lens);
            let ranges = split(&layout, num_servers, Cut::BetweenParameters);
            prop_assert_eq!(ranges.len(), num_servers);
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges[num_servers - 1].end, layout.num_weights());
            for pair in ranges.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
            }
            for parameter in layout.parameters() {
                let parts = ranges.iter().filter(|range| {
                    range.start < parameter.range.end && parameter.range.start < range.end
                });
                prop_assert!(parts.count() <= 1, "{:?} of {:?}", parameter, ranges);
            }
        }

        /// PS-1.
        #[test]
        fn ranges_are_contiguous_cover_everything_and_are_balanced(
            len in 0usize..5_000, num_servers in 1usize..40,
        ) {
            let ranges = partition(len, num_servers);
            prop_assert_eq!(ranges.len(), num_servers);
            prop_assert_eq!(ranges[0].start, 0);
            prop_assert_eq!(ranges[num_servers - 1].end, len);
            for pair in ranges.windows(2) {
                prop_assert_eq!(pair[0].end, pair[1].start);
            }
            let longest = ranges.iter().map(Range::len).max().unwrap_or(0);
            let shortest = ranges.iter().map(Range::len).min().unwrap_or(0);
            prop_assert!(longest - shortest <= 2 * LINE);
        }
    }
}
