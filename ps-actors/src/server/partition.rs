//! Splits the weights over servers.
//!
//! Ranges are contiguous, disjoint, cover `0..len`, and differ by at most one cache line of
//! weights in length (PS-1).

use std::ops::Range;

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
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
