//! Numbers of 16 bits on their way to another process.
//!
//! In memory, all numbers are `f32`. Between processes, a gradient that has the numbers of 16-bit floats takes half as many
//! bytes, and so do weights for a worker that would round them anyway. [`Packed`] has both forms.

use std::sync::{LazyLock, OnceLock};

use half::slice::{HalfBitsSliceExt as _, HalfFloatSliceExt as _};
use half::{bf16, f16};
use ps_runtime::buffer::BufferPool;
use ps_runtime::codec::Bulk;
use ps_runtime::parallel::{PART_LEN, for_each, norm_squared};
use serde::{Deserialize, Serialize};

/// The type of the numbers with which a model computes.
///
/// Servers always have `f32`, and all updates are made on `f32`. This says with how many bits weights travel to a worker in
/// another process. If the model rounds its weights to this type, it computes the same as on the servers' own numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Precision {
    /// 32 bits: the numbers as they are.
    #[default]
    F32,
    /// 16 bits: the exponents of `f32`, and 8 bits of precision.
    Bf16,
    /// 16 bits: smaller exponents, and 11 bits of precision. Larger numbers than 65,504 become infinite.
    F16,
}

/// Numbers that travel. Those of 16 bits are in pairs, each in the place of one `f32`, and there may be one behind the
/// last.
#[derive(Serialize, Deserialize)]
pub(super) enum Packed {
    F32(Bulk),
    Bf16(usize, Bulk),
    F16(usize, Bulk),
}

/// For packed numbers.
static PACKED: LazyLock<BufferPool> = LazyLock::new(|| BufferPool::new(4));

/// For numbers that were unpacked. A server has the gradients of a round, and a worker its weights.
static UNPACKED: LazyLock<BufferPool> = LazyLock::new(|| BufferPool::new(8));

/// How many numbers are looked at before it is decided whether to look at more.
const FEW: usize = 4096;

impl Packed {
    /// Packs numbers if nothing is lost by it.
    pub(super) fn exactly(numbers: Bulk) -> Self {
        let fits = |fits: fn(&[f32]) -> bool| numbers.chunks(FEW).all(fits);
        let precision = match numbers.is_empty() {
            false if fits(fit_bf16) => Precision::Bf16,
            false if fits(fit_f16) => Precision::F16,
            _ => Precision::F32,
        };
        let words = pack(&numbers, precision);
        Self::new(numbers, precision, words)
    }

    /// Without words, the numbers travel as they are.
    fn new(numbers: Bulk, precision: Precision, words: Option<Bulk>) -> Self {
        match (precision, words) {
            (Precision::Bf16, Some(words)) => Self::Bf16(numbers.len(), words),
            (Precision::F16, Some(words)) => Self::F16(numbers.len(), words),
            _ => Self::F32(numbers),
        }
    }

    /// Returns the numbers. Any process may have sent them.
    pub(super) fn unpack(self) -> Result<Bulk, String> {
        match self {
            Self::F32(numbers) => Ok(numbers),
            Self::Bf16(len, words) => unpack(len, &words, |halves, numbers| {
                let halves = halves.reinterpret_cast::<bf16>();
                halves.convert_to_f32_slice(numbers);
            }),
            Self::F16(len, words) => unpack(len, &words, |halves, numbers| {
                let halves = halves.reinterpret_cast::<f16>();
                halves.convert_to_f32_slice(numbers);
            }),
        }
    }
}

/// A snapshot's numbers, packed for the first worker that wants them so, and for all others.
#[derive(Clone, Debug, Default)]
pub(crate) struct PackedOnce {
    bf16: OnceLock<Option<Bulk>>,
    f16: OnceLock<Option<Bulk>>,
}

impl PackedOnce {
    /// Rounds the numbers of the snapshot to the nearest ones that this type has.
    pub(super) fn rounded(&self, numbers: Bulk, precision: Precision) -> Packed {
        let once = match precision {
            Precision::F32 => return Packed::F32(numbers),
            Precision::Bf16 => &self.bf16,
            Precision::F16 => &self.f16,
        };
        let words = once.get_or_init(|| pack(&numbers, precision)).clone();
        Packed::new(numbers, precision, words)
    }
}

/// Whether the lower halves of all numbers are 0.
fn fit_bf16(numbers: &[f32]) -> bool {
    let bits = numbers.iter().fold(0, |all, number| all | number.to_bits());
    bits & 0xffff == 0
}

/// Whether all numbers keep their bits as `f16`.
fn fit_f16(numbers: &[f32]) -> bool {
    let (mut halves, mut again) = ([f16::ZERO; FEW], [0.0_f32; FEW]);
    let (halves, again) = (&mut halves[..numbers.len()], &mut again[..numbers.len()]);
    halves.convert_from_f32_slice(numbers);
    halves.convert_to_f32_slice(again);
    let mut pairs = numbers.iter().zip(again);
    pairs.all(|(one, other)| one.to_bits() == other.to_bits())
}

/// Returns `None` if the numbers need 32 bits, or if there is no memory.
fn pack(numbers: &[f32], precision: Precision) -> Option<Bulk> {
    if precision == Precision::F32 {
        return None;
    }
    let mut words = PACKED.try_take(numbers.len().div_ceil(2)).ok()?;
    let halves: &mut [u16] = bytemuck::cast_slice_mut(&mut words);
    // It may be behind the last number. No old number leaves this process.
    if let Some(last) = halves.last_mut() {
        *last = 0;
    }
    let parts = numbers.chunks(PART_LEN).zip(halves.chunks_mut(PART_LEN));
    for_each(size_of_val(numbers), parts, |(numbers, halves)| {
        let halves = &mut halves[..numbers.len()];
        match precision {
            Precision::F16 => {
                let halves = halves.reinterpret_cast_mut::<f16>();
                halves.convert_from_f32_slice(numbers);
            }
            Precision::Bf16 | Precision::F32 => {
                let halves = halves.reinterpret_cast_mut::<bf16>();
                halves.convert_from_f32_slice(numbers);
            }
        }
    });
    Some(Bulk::from(words))
}

fn unpack(
    len: usize,
    words: &[f32],
    convert: impl Fn(&[u16], &mut [f32]) + Sync,
) -> Result<Bulk, String> {
    if len.div_ceil(2) != words.len() {
        let got = words.len();
        return Err(format!("{got} pairs are not {len} numbers of 16 bits"));
    }
    let taken = UNPACKED.try_take(len);
    let mut numbers = taken.map_err(|error| error.to_string())?;
    let halves: &[u16] = &bytemuck::cast_slice(words)[..len];
    let num_bytes = size_of_val(&numbers[..]);
    let mut sums = vec![0.0; len.div_ceil(PART_LEN)];
    let parts = halves.chunks(PART_LEN).zip(numbers.chunks_mut(PART_LEN));
    for_each(
        num_bytes,
        parts.zip(&mut sums),
        |((halves, numbers), sum)| {
            convert(halves, numbers);
            // While the numbers are in the cache.
            *sum = norm_squared(numbers);
        },
    );
    numbers.set_norm_squared(sums.iter().sum());
    Ok(Bulk::from(numbers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bits(numbers: &[f32]) -> Vec<u32> {
        numbers.iter().map(|number| number.to_bits()).collect()
    }

    fn packed(numbers: &[f32]) -> (&'static str, usize) {
        let packed = Packed::exactly(Bulk::from(numbers.to_vec()));
        let (kind, num_words) = match &packed {
            Packed::F32(words) => ("f32", words.len()),
            Packed::Bf16(_, words) => ("bf16", words.len()),
            Packed::F16(_, words) => ("f16", words.len()),
        };
        assert_eq!(bits(&packed.unpack().unwrap()), bits(numbers), "{kind}");
        (kind, num_words)
    }

    #[test]
    fn numbers_are_packed_if_none_of_them_changes() {
        let infinities = [f32::INFINITY, f32::NEG_INFINITY, -0.0];
        for (numbers, expected) in [
            (&[][..], ("f32", 0)),
            (&[1.0], ("bf16", 1)),
            (&[1.0, -2.5, 3e38_f32.round()], ("f32", 3)),
            (&infinities, ("bf16", 2)),
            // The largest and the smallest `f16`.
            (&[65504.0, 5.960_464_5e-8, 1.0009766], ("f16", 2)),
            (&[65505.0, 1.0], ("f32", 2)),
            (&[0.1, 0.2], ("f32", 2)),
            // A NaN keeps its bits.
            (&[f32::from_bits(0x7fc1_0000), 1.0], ("bf16", 1)),
            (&[f32::from_bits(0x7fc0_0001), 1.0], ("f32", 2)),
        ] {
            assert_eq!(packed(numbers), expected, "{numbers:?}");
        }
        // The one that does not fit is far behind.
        let mut many = vec![0.5; 3 * PART_LEN + 1];
        assert_eq!(packed(&many), ("bf16", many.len() / 2 + 1));
        many[3 * PART_LEN] = 1.0 + f32::EPSILON;
        assert_eq!(packed(&many), ("f32", many.len()));
    }

    #[test]
    fn weights_are_rounded_to_the_nearest() {
        for (precision, number, nearest) in [
            (Precision::F32, 0.1, 0.1),
            (Precision::Bf16, 1.003_906_3, 1.0), // half-way: to the even one
            (Precision::Bf16, 1.003_91, 1.007_812_5),
            (Precision::Bf16, f32::MAX, f32::INFINITY),
            (Precision::F16, 1.000_5, 1.000_976_6),
            (Precision::F16, 70_000.0, f32::INFINITY),
            (Precision::F16, 1e-9, 0.0),
        ] {
            let exact = Bulk::from(vec![number; 3]);
            let once = PackedOnce::default();
            for _ in 0..2 {
                let packed = once.rounded(exact.clone(), precision);
                let numbers = packed.unpack().unwrap();
                assert_eq!(&numbers[..], &[nearest; 3], "{precision:?} {number}");
                assert_eq!(numbers.norm_squared(), norm_squared(&[nearest; 3]));
            }
        }
    }

    #[test]
    fn a_snapshot_is_packed_once_for_all_workers() {
        let (once, exact) = (PackedOnce::default(), Bulk::from(vec![0.1; 100]));
        for precision in [Precision::Bf16, Precision::F16] {
            let words = [(); 2].map(|()| match once.rounded(exact.clone(), precision) {
                Packed::Bf16(_, words) | Packed::F16(_, words) => words.as_ptr(),
                Packed::F32(_) => panic!("{precision:?}"),
            });
            assert_eq!(words[0], words[1]);
        }
    }

    #[test]
    fn a_wrong_number_of_numbers_is_refused() {
        for (len, num_words) in [(0, 1), (1, 0), (3, 1), (5, 2), (2, 2), (usize::MAX, 1)] {
            let words = Bulk::from(vec![0.0; num_words]);
            assert!(Packed::Bf16(len, words.clone()).unpack().is_err(), "{len}");
            assert!(Packed::F16(len, words).unpack().is_err(), "{len}");
        }
    }
}
