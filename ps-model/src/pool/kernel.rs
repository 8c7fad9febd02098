//! The arithmetic of max-pooling and of its gradient, on slices, one thread.
//!
//! The largest number of a window is computed for every position of a row, even if no window begins there.
//! So vectors run along whole rows. The superfluous results are dropped at the end. There are no branches
//! that depend on the numbers, because the processor could not predict them.

use pulp::{Arch, Simd, WithSimd};

/// Planes that are cut into windows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Windows {
    pub(super) planes: usize,
    pub(super) height: usize,
    pub(super) width: usize,
    /// The side of a window: from 1 to 16, so that a position in a window fits a byte, and not above height
    /// or width.
    pub(super) size: usize,
}

impl Windows {
    /// Returns the number of windows in a plane, `[rows, columns]`.
    pub(super) const fn output(&self) -> [usize; 2] {
        [self.height / self.size, self.width / self.size]
    }

    /// Returns the largest number of each window, and its position in the window: row by row, from 0.
    pub(super) fn largest(&self, arch: Arch, x: &[f32]) -> (Vec<f32>, Vec<u8>) {
        let windows = *self;
        arch.dispatch(Largest { windows, x })
    }

    /// Puts each number at the position where the largest number of its window was, and zeros elsewhere.
    pub(super) fn spread(&self, dy: &[f32], places: &[u8]) -> Vec<f32> {
        let [rows, columns] = self.output();
        let (size, width) = (self.size, self.width);
        // The offsets are looked up, because a division for each number would take longer than the rest.
        let offsets: [usize; 256] =
            std::array::from_fn(|place| place / size * width + place % size);
        let mut dx = vec![0.0; self.planes * self.height * width];
        let planes = dx.chunks_exact_mut(self.height * width);
        let per_plane = rows * columns;
        let numbers = dy.chunks_exact(per_plane);
        for (plane, (dy, places)) in planes.zip(numbers.zip(places.chunks_exact(per_plane))) {
            let bands = plane.chunks_exact_mut(size * width);
            let rows = dy.chunks_exact(columns).zip(places.chunks_exact(columns));
            for (band, (dy, places)) in bands.zip(rows) {
                for (column, (dy, place)) in dy.iter().zip(places).enumerate() {
                    band[column * size + offsets[usize::from(*place)]] = *dy;
                }
            }
        }
        dx
    }
}

/// See [`Windows::largest`].
struct Largest<'a> {
    windows: Windows,
    x: &'a [f32],
}

impl WithSimd for Largest<'_> {
    type Output = (Vec<f32>, Vec<u8>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let Self { windows, x } = self;
        let Windows {
            planes,
            height,
            width,
            size,
        } = windows;
        let [rows, columns] = windows.output();
        let mut largest = Vec::with_capacity(planes * rows * columns);
        let mut places = Vec::with_capacity(planes * rows * columns);
        // This is the length of the part of a row that is in windows, in whole vectors. Numbers that these
        // read beyond the row do not get into the result.
        let wide = (columns * size).next_multiple_of(S::F32_LANES);
        let reach = (rows * size - 1) * width + wide;
        let mut last = vec![0.0; reach.max(height * width)];
        // The length includes one more window, for vectors that begin inside the last window.
        let length = rows * wide + size;
        let (mut best, mut place) = (vec![0.0; length], vec![0; length]);
        for plane in 0..planes {
            let start = plane * height * width;
            let input = match x.get(start..start + reach) {
                Some(input) => input,
                None => {
                    last[..height * width].copy_from_slice(&x[start..][..height * width]);
                    &last
                }
            };
            for row in 0..rows {
                let band = &input[row * size * width..];
                let to = row * wide..(row + 1) * wide;
                let (best, place) = (&mut best[to.clone()], &mut place[to]);
                columns_of_band(simd, band, width, size, best, place);
            }
            windows_of_columns(simd, size, &mut best, &mut place);
            for row in 0..rows {
                let best = best[row * wide..][..columns * size].chunks_exact(size);
                let place = place[row * wide..][..columns * size].chunks_exact(size);
                largest.extend(best.map(|window| window[0]));
                places.extend(place.map(|window| window[0] as u8));
            }
        }
        (largest, places)
    }
}

/// Finds the largest number of each column of a row of windows.
#[inline(always)]
fn columns_of_band<S: Simd>(
    simd: S,
    band: &[f32],
    width: usize,
    size: usize,
    best: &mut [f32],
    place: &mut [u32],
) {
    let (bests, _) = S::as_mut_simd_f32s(best);
    let (places, _) = S::as_mut_simd_u32s(place);
    for (vector, (best, place)) in bests.iter_mut().zip(places).enumerate() {
        let at = vector * S::F32_LANES;
        let (mut so_far, mut rows) = (load(simd, &band[at..]), simd.splat_u32s(0));
        for row in 1..size {
            let x = load(simd, &band[row * width + at..]);
            let is_larger = is_larger(simd, x, so_far);
            so_far = simd.select_f32s(is_larger, x, so_far);
            rows = simd.select_u32s(is_larger, simd.splat_u32s((row * size) as u32), rows);
        }
        (*best, *place) = (so_far, rows);
    }
}

/// Replaces the largest number of each column by that of the window that begins at this column.
#[inline(always)]
fn windows_of_columns<S: Simd>(simd: S, size: usize, best: &mut [f32], place: &mut [u32]) {
    // A vector is written when it is no longer read: later vectors begin behind it.
    for at in (0..best.len() - size).step_by(S::F32_LANES) {
        let (mut so_far, mut places) = (load(simd, &best[at..]), load_places(simd, &place[at..]));
        for column in 1..size {
            let x = load(simd, &best[at + column..]);
            let rows = load_places(simd, &place[at + column..]);
            let at = simd.add_u32s(rows, simd.splat_u32s(column as u32));
            // Of equal numbers, the one in the higher row comes first.
            let is_equal = simd.equal_f32s(x, so_far);
            let is_first = simd.and_m32s(is_equal, simd.less_than_u32s(at, places));
            let is_better = simd.or_m32s(is_larger(simd, x, so_far), is_first);
            so_far = simd.select_f32s(is_better, x, so_far);
            places = simd.select_u32s(is_better, at, places);
        }
        S::as_mut_simd_f32s(&mut best[at..]).0[0] = so_far;
        S::as_mut_simd_u32s(&mut place[at..]).0[0] = places;
    }
}

#[inline(always)]
fn load<S: Simd>(_: S, numbers: &[f32]) -> S::f32s {
    S::as_simd_f32s(numbers).0[0]
}

#[inline(always)]
fn load_places<S: Simd>(_: S, places: &[u32]) -> S::u32s {
    S::as_simd_u32s(places).0[0]
}

/// NaN counts as larger than all numbers, and the first NaN stays.
#[inline(always)]
fn is_larger<S: Simd>(simd: S, x: S::f32s, best: S::f32s) -> S::m32s {
    let is_number = simd.equal_f32s(best, best);
    // This is not `greater_than`, because that is false for NaN.
    let is_smaller_or_equal = simd.less_than_or_equal_f32s(x, best);
    simd.and_m32s(is_number, simd.not_m32s(is_smaller_or_equal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conv::architectures;
    use crate::rng::Rng;

    /// As the definition says, one number after the other.
    fn expected(windows: &Windows, x: &[f32]) -> (Vec<u32>, Vec<u8>) {
        let Windows {
            planes,
            height,
            width,
            size,
        } = *windows;
        let [rows, columns] = windows.output();
        let (mut largest, mut places) = (Vec::new(), Vec::new());
        for window in 0..planes * rows * columns {
            let (plane, row) = (window / columns / rows, window / columns % rows);
            let corner = (plane * height + row * size) * width + window % columns * size;
            let number = |place: usize| x[corner + place / size * width + place % size];
            let mut best = 0;
            for place in 1..size * size {
                if number(place) > number(best) || number(place).is_nan() && !number(best).is_nan()
                {
                    best = place;
                }
            }
            largest.push(number(best).to_bits());
            places.push(best as u8);
        }
        (largest, places)
    }

    #[test]
    fn every_kind_of_vectors_finds_the_first_of_the_largest() {
        for (planes, height, width, size) in [
            (3, 26, 26, 3),
            (2, 24, 24, 2),
            (2, 8, 11, 3),
            (3, 1, 1, 1),
            (2, 5, 5, 5),
            (1, 16, 33, 16),
            (1, 40, 70, 4),
            (0, 4, 4, 2),
        ] {
            let windows = Windows {
                planes,
                height,
                width,
                size,
            };
            // Few different numbers, so that many are equal; some infinite, and rarely one that is none.
            let numbers = Rng::new(5).uniform_within(1.0, planes * height * width);
            let x: Vec<f32> = numbers
                .iter()
                .map(|number| match (number * 200.0).round() {
                    200.0 => f32::NAN,
                    199.0 => f32::INFINITY,
                    number if number < 0.0 => f32::NEG_INFINITY,
                    number => (number / 60.0).round(),
                })
                .collect();
            let (numbers, places) = expected(&windows, &x);
            for arch in architectures() {
                let found = windows.largest(arch, &x);
                let bits: Vec<u32> = found.0.iter().map(|number| number.to_bits()).collect();
                assert_eq!(bits, numbers, "{arch:?}, {windows:?}");
                // Among several that are none, any may be named.
                let named = found.1.iter().zip(&places).zip(&found.0);
                for (place, expected) in
                    named.filter(|(_, x)| !x.is_nan()).map(|(places, _)| places)
                {
                    assert_eq!(place, expected, "{arch:?}, {windows:?}");
                }
            }
            let dy: Vec<f32> = (1..=places.len()).map(|number| number as f32).collect();
            let dx = windows.spread(&dy, &places);
            let [rows, columns] = windows.output();
            for (window, (dy, place)) in dy.iter().zip(&places).enumerate() {
                let (place, plane) = (usize::from(*place), window / columns / rows);
                let row = window / columns % rows * size + place / size;
                let column = window % columns * size + place % size;
                assert_eq!(dx[(plane * height + row) * width + column], *dy);
            }
            let others = dx.iter().filter(|number| **number != 0.0).count();
            assert_eq!(others, dy.len(), "{windows:?}");
        }
    }
}
