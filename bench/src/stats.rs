//! Medians, spreads, and ratios of runs that were made side by side.

use serde::Serialize;

/// The middle of some numbers, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) count: usize,
}

/// `None` of no numbers.
pub(crate) fn summary(numbers: impl IntoIterator<Item = f64>) -> Option<Summary> {
    let mut sorted: Vec<f64> = numbers.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let (count, middle) = (sorted.len(), sorted.len() / 2);
    let median = match count {
        0 => return None,
        _ if count % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    };
    Some(Summary {
        median,
        min: sorted[0],
        max: sorted[count - 1],
        count,
    })
}

/// Whether more is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    Higher,
    Lower,
}

/// How many times better the first is than the second, from rounds in which both have a number. Each
/// round is a ratio of its own, so that a slow hour of the machine slows both sides of it.
pub(crate) fn times_better(
    ours: &[Option<f64>],
    theirs: &[Option<f64>],
    better: Better,
) -> Option<Summary> {
    let rounds = ours.iter().zip(theirs);
    summary(rounds.filter_map(|(&ours, &theirs)| match better {
        Better::Higher => Some(ours? / theirs?),
        Better::Lower => Some(theirs? / ours?),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_lies_between_the_two_in_the_middle() {
        let expected = Summary {
            median: 2.5,
            min: 1.0,
            max: 9.0,
            count: 4,
        };
        assert_eq!(summary([9.0, 1.0, 3.0, 2.0]), Some(expected));
        assert_eq!(summary([3.0, 1.0, 2.0]).map(|s| s.median), Some(2.0));
        assert_eq!(summary([]), None);
    }

    #[test]
    fn ratios_pair_the_rounds_and_leave_out_those_that_failed() {
        let (ours, theirs) = (
            [Some(10.0), None, Some(30.0), Some(8.0)],
            [Some(5.0), Some(1.0), Some(10.0), Some(2.0)],
        );
        let ratio = times_better(&ours, &theirs, Better::Higher).unwrap();
        assert_eq!(
            (ratio.median, ratio.min, ratio.max, ratio.count),
            (3.0, 2.0, 4.0, 3)
        );
        let ratio = times_better(&theirs, &ours, Better::Lower).unwrap();
        assert_eq!(ratio.median, 3.0);
        assert_eq!(times_better(&[None], &[Some(1.0)], Better::Lower), None);
    }
}
