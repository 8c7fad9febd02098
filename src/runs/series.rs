//! Points for curves: as many as a picture can show. Pure.

/// A number over another one, such as a loss over updates, cut into equal ranges of x.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Bins {
    bins: Vec<Bin>,
}

/// What lies in one range.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Bin {
    /// The mean x of its points.
    pub(super) x: f64,
    /// The mean y, and the smallest and the largest one.
    pub(super) mean: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    num: u64,
}

impl Bins {
    /// Cuts the range of x into at most `num_bins`. Points that are not finite are left out.
    pub(super) fn of(points: impl Iterator<Item = (f64, f64)> + Clone, num_bins: usize) -> Self {
        let points = points.filter(|(x, y)| x.is_finite() && y.is_finite());
        let range = points.clone().map(|(x, _)| (x, x));
        let range = range.reduce(|(min, max), (x, _)| (min.min(x), max.max(x)));
        let Some((from, to)) = range else {
            return Self::default();
        };
        let mut bins: Vec<Option<Bin>> = vec![None; num_bins.max(1)];
        let last = bins.len() - 1;
        for (x, y) in points {
            let place = match to > from {
                true => (x - from) / (to - from) * bins.len() as f64,
                false => 0.0,
            };
            let bin = &mut bins[(place as usize).min(last)];
            let one = Bin {
                x,
                mean: y,
                min: y,
                max: y,
                num: 1,
            };
            *bin = Some(bin.map_or(one, |bin| bin.and(one)));
        }
        Self {
            bins: bins.into_iter().flatten().collect(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Bin> + Clone {
        self.bins.iter()
    }

    /// Returns the mean curve, as points.
    pub(super) fn means(&self) -> impl Iterator<Item = (f64, f64)> + Clone + '_ {
        self.bins.iter().map(|bin| (bin.x, bin.mean))
    }
}

impl Bin {
    fn and(self, one: Self) -> Self {
        let num = self.num + one.num;
        let mean = |a: f64, b: f64| (a * self.num as f64 + b * one.num as f64) / num as f64;
        Self {
            x: mean(self.x, one.x),
            mean: mean(self.mean, one.mean),
            min: self.min.min(one.min),
            max: self.max.max(one.max),
            num,
        }
    }
}

/// Returns the smallest and the largest of some numbers, with some room around them. `None` if there is none.
pub(super) fn range(numbers: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let numbers = numbers.filter(|number| number.is_finite());
    let range = numbers.map(|number| (number, number));
    let (from, to) = range.reduce(|(min, max), (number, _)| (min.min(number), max.max(number)))?;
    let room = match to > from {
        true => 0.05 * (to - from),
        false => 0.5 * from.abs().max(1e-9),
    };
    Some((from - room, to + room))
}

/// How the time of one worker was spent, in equal ranges of time: each number is a part of the range, from 0
/// to 1.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Spent {
    pub(super) data: Vec<f64>,
    pub(super) compute: Vec<f64>,
    pub(super) wire: Vec<f64>,
    pub(super) waiting: Vec<f64>,
    pub(super) apply: Vec<f64>,
}

/// One step: when it ended, and the lengths of its parts, in seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timed {
    pub(super) end: f64,
    pub(super) data: f64,
    pub(super) compute: f64,
    pub(super) wire: f64,
    pub(super) waiting: f64,
    pub(super) apply: f64,
}

impl Spent {
    /// Spreads steps over the ranges between 0 and `seconds`. `every` says that only one of so many steps is
    /// there.
    pub(super) fn of(
        steps: impl Iterator<Item = Timed>,
        seconds: f64,
        num_bins: usize,
        every: u64,
    ) -> Self {
        let none = vec![0.0; num_bins];
        let mut spent = Self {
            data: none.clone(),
            compute: none.clone(),
            wire: none.clone(),
            waiting: none.clone(),
            apply: none,
        };
        if seconds <= 0.0 {
            return spent;
        }
        let width = seconds / num_bins as f64;
        let weight = every as f64 / width;
        for step in steps {
            let mut end = step.end;
            // What comes last first. The wire is before and after the waiting; it is drawn after it. The update
            // is at the end of the waiting, unless the worker then waits for slower ones.
            for (part, bins) in [
                (step.wire, &mut spent.wire),
                (step.apply, &mut spent.apply),
                (step.waiting, &mut spent.waiting),
                (step.compute, &mut spent.compute),
                (step.data, &mut spent.data),
            ] {
                let start = end - part;
                spread(bins, start, end, width, weight);
                end = start;
            }
        }
        // Steps that are left out make the others wider than their range.
        for bin in 0..num_bins {
            let mut parts = [
                &mut spent.data[bin],
                &mut spent.compute[bin],
                &mut spent.wire[bin],
                &mut spent.waiting[bin],
                &mut spent.apply[bin],
            ];
            let total: f64 = parts.iter().map(|part| **part).sum();
            if total > 1.0 {
                parts.iter_mut().for_each(|part| **part /= total);
            }
        }
        spent
    }
}

/// Adds the part of each range that lies between `start` and `end`.
fn spread(bins: &mut [f64], start: f64, end: f64, width: f64, weight: f64) {
    let start = start.max(0.0);
    let first = (start / width) as usize;
    for (index, bin) in bins.iter_mut().enumerate().skip(first) {
        let (from, to) = (index as f64 * width, (index + 1) as f64 * width);
        if from >= end {
            break;
        }
        *bin += (end.min(to) - start.max(from)).max(0.0) * weight;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_have_the_means_and_the_extremes_of_their_points() {
        let points = (0..1000).map(|n| (f64::from(n), f64::from(n % 10)));
        let bins = Bins::of(points, 10);
        assert_eq!(bins.iter().count(), 10);
        for (index, bin) in bins.iter().enumerate() {
            assert!((bin.mean - 4.5).abs() < 0.1, "{bin:?}");
            assert_eq!((bin.min, bin.max), (0.0, 9.0));
            assert!(
                (bin.x - (100.0 * index as f64 + 50.0)).abs() < 1.0,
                "{bin:?}"
            );
        }
        // What is not finite is left out, and so are empty ranges.
        let points = [
            (0.0, 1.0),
            (1.0, f64::NAN),
            (f64::INFINITY, 1.0),
            (10.0, 3.0),
        ];
        let bins = Bins::of(points.into_iter(), 100);
        assert_eq!(bins.means().collect::<Vec<_>>(), [(0.0, 1.0), (10.0, 3.0)]);
        assert_eq!(Bins::of(std::iter::empty(), 5), Bins::default());
        let one = Bins::of([(2.0, 7.0), (2.0, 9.0)].into_iter(), 5);
        assert_eq!(one.means().collect::<Vec<_>>(), [(2.0, 8.0)]);
    }

    #[test]
    fn a_range_has_room_on_both_sides() {
        assert_eq!(
            range([0.0, 100.0, f64::NAN].into_iter()),
            Some((-5.0, 105.0))
        );
        assert_eq!(range([4.0].into_iter()), Some((2.0, 6.0)));
        assert_eq!(range(std::iter::empty()), None);
    }

    #[test]
    fn the_time_of_steps_is_spread_over_the_ranges() {
        let step = |end| Timed {
            end,
            data: 0.1,
            compute: 0.5,
            wire: 0.1,
            waiting: 0.2,
            apply: 0.1,
        };
        // Ten steps of 1 s without a pause: each range of 1 s has the same parts.
        let spent = Spent::of((1..=10).map(|n| step(f64::from(n))), 10.0, 10, 1);
        for bin in 0..10 {
            assert!((spent.data[bin] - 0.1).abs() < 1e-9);
            assert!((spent.compute[bin] - 0.5).abs() < 1e-9);
            assert!((spent.wire[bin] - 0.1).abs() < 1e-9);
            assert!((spent.waiting[bin] - 0.2).abs() < 1e-9);
            assert!((spent.apply[bin] - 0.1).abs() < 1e-9);
        }
        // One step alone, in ranges of 0.1 s: data, five times compute, twice waiting, apply, wire.
        let spent = Spent::of([step(1.0)].into_iter(), 2.0, 20, 1);
        assert!((spent.data[0] - 1.0).abs() < 1e-9);
        assert!((1..6).all(|bin| (spent.compute[bin] - 1.0).abs() < 1e-9));
        assert!((6..8).all(|bin| (spent.waiting[bin] - 1.0).abs() < 1e-9));
        assert!((spent.apply[8] - 1.0).abs() < 1e-9);
        assert!((spent.wire[9] - 1.0).abs() < 1e-9);
        assert!(spent.compute[10..].iter().all(|&part| part == 0.0));
        // Every second step is there: each counts twice.
        let half = Spent::of((1..=5).map(|n| step(2.0 * f64::from(n))), 10.0, 5, 2);
        assert!(
            (0..5).all(|bin| (half.compute[bin] - 0.5).abs() < 1e-9),
            "{half:?}"
        );
    }
}
