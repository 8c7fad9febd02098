//! A curve in bounded memory: when it has too many points, each two become one. Pure.

use serde::ser::{Serialize, SerializeTuple as _, Serializer};

/// How many points a curve has at most. A screen shows no more.
const MAX_POINTS: usize = 600;

/// A number that changes during a training.
#[derive(Clone, Debug, Default)]
pub(super) struct Curve {
    points: Vec<Point>,
    /// The point that is not complete yet.
    open: Option<Point>,
    /// How many numbers make a point: 0 stands for 1.
    per_point: u64,
    /// Changes when points change that were complete before.
    generation: u64,
}

/// The mean of some numbers that came one after the other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    /// The latest version of the weights.
    version: u64,
    /// The latest time, in seconds since the run started.
    time: f64,
    mean: f64,
    min: f64,
    max: f64,
    num: u64,
}

/// How many points of a curve somebody has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) generation: u64,
    pub(super) num_points: usize,
}

impl Curve {
    /// Adds a number. One that is not finite is left out.
    pub(super) fn add(&mut self, version: u64, time: f64, value: f64) {
        if !value.is_finite() {
            return;
        }
        let one = Point {
            version,
            time,
            mean: value,
            min: value,
            max: value,
            num: 1,
        };
        let open = self.open.take().map_or(one, |open| open.and(one));
        if open.num < self.per_point.max(1) {
            self.open = Some(open);
            return;
        }
        self.points.push(open);
        if self.points.len() >= MAX_POINTS {
            self.per_point = 2 * self.per_point.max(1);
            let pairs = self.points.chunks(2);
            self.points = pairs
                .map(|pair| pair[1..].iter().fold(pair[0], |sum, &one| sum.and(one)))
                .collect();
            self.generation += 1;
        }
    }

    /// Forgets everything after this version, because the training goes on from there.
    pub(super) fn go_back_to(&mut self, version: u64) {
        let before = self.points.len();
        self.points.retain(|point| point.version <= version);
        self.open = None;
        self.generation += u64::from(self.points.len() != before);
    }

    /// Returns the points that somebody with this mark does not have, whether they replace those that he
    /// has, and the new mark.
    pub(super) fn since(&self, mark: Mark) -> (&[Point], bool, Mark) {
        let is_same = mark.generation == self.generation && mark.num_points <= self.points.len();
        let from = if is_same { mark.num_points } else { 0 };
        let now = Mark {
            generation: self.generation,
            num_points: self.points.len(),
        };
        (&self.points[from..], !is_same || from == 0, now)
    }
}

impl Point {
    fn and(self, later: Self) -> Self {
        let num = self.num + later.num;
        let sum = self.mean * self.num as f64 + later.mean * later.num as f64;
        Self {
            version: self.version.max(later.version),
            time: self.time.max(later.time),
            mean: sum / num as f64,
            min: self.min.min(later.min),
            max: self.max.max(later.max),
            num,
        }
    }
}

/// As `[version, time, mean, min, max]`, with as many digits as a screen shows.
impl Serialize for Point {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut tuple = serializer.serialize_tuple(5)?;
        tuple.serialize_element(&self.version)?;
        tuple.serialize_element(&((self.time * 1e3).round() / 1e3))?;
        for number in [self.mean, self.min, self.max] {
            tuple.serialize_element(&(number as f32))?;
        }
        tuple.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_shape_in_a_bounded_number_of_points() {
        let mut curve = Curve::default();
        let num = 1_000_000;
        for version in 0..num {
            let value = version as f64 + if version % 2 == 0 { 5.0 } else { -5.0 };
            curve.add(version, version as f64 / 100.0, value);
            assert!(curve.points.len() < MAX_POINTS);
        }
        assert!(curve.points.len() >= MAX_POINTS / 2 - 1);
        for point in &curve.points[..curve.points.len() - 1] {
            let width = curve.per_point as f64;
            let middle = point.version as f64 - (width - 1.0) / 2.0;
            assert!((point.mean - middle).abs() < 1e-6, "{point:?}");
            assert!(
                (point.max - point.min - (width - 1.0)).abs() <= 10.0,
                "{point:?}"
            );
        }
        let last = curve.points.last().unwrap();
        assert!(last.version > num - 2 * curve.per_point - 1);
    }

    #[test]
    fn whoever_has_a_mark_gets_only_what_is_new() {
        let mut curve = Curve::default();
        let mut got: Vec<Point> = Vec::new();
        let mut mark = Mark::default();
        for version in 0..5_000 {
            curve.add(version, version as f64, 1.0);
            if version % 7 == 0 {
                let (new, replaces, next) = curve.since(mark);
                if replaces {
                    got.clear();
                }
                got.extend(new);
                mark = next;
                assert_eq!(got, curve.points);
            }
        }
        // The servers are lost, and the training goes back.
        curve.go_back_to(2_000);
        let (new, replaces, _) = curve.since(mark);
        assert!(replaces && new.iter().all(|point| point.version <= 2_000));
    }

    #[test]
    fn numbers_that_are_not_finite_are_left_out() {
        let mut curve = Curve::default();
        curve.add(1, 1.0, f64::NAN);
        curve.add(2, 2.0, 0.5);
        curve.add(3, 3.0, f64::INFINITY);
        let (points, _, _) = curve.since(Mark::default());
        assert_eq!(
            serde_json::to_string(points).unwrap(),
            "[[2,2.0,0.5,0.5,0.5]]"
        );
    }
}
