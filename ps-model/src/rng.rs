//! The random numbers of this crate, from a small seeded generator with the same bits on every machine.
//!
//! burn's own stream is one for the whole process, so two workers in one process would disturb each other.
//! All random numbers here (initial weights, dropout masks) come from an [`Rng`] that its user owns.

/// A stream of random numbers that depends only on its seed.
///
/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014,
/// figure 17, with the constants of java.util.SplittableRandom). Fast and statistically sound
/// for masks and initial weights; not for secrets.
///
/// ```
/// use ps_model::Rng;
///
/// let mut rng = Rng::from_parts(&[42, 0]);
/// let first = rng.uniform();
/// assert!((0.0..1.0).contains(&first));
/// // The same parts give the same bits on every machine.
/// assert_eq!(Rng::from_parts(&[42, 0]).uniform(), first);
/// assert_ne!(Rng::from_parts(&[0, 42]).uniform(), first);
/// ```
#[derive(Clone, Debug)]
pub struct Rng {
    state: u64,
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl Rng {
    /// Starts the stream of `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// Starts the stream of several numbers in order, such as (seed, worker, clock).
    #[must_use]
    pub fn from_parts(parts: &[u64]) -> Self {
        // Each part is hashed together with all before it, so that (1, 0) and (0, 1) differ and
        // neighbouring parts start far apart.
        let state = parts.iter().fold(0, |state: u64, part| {
            mix(state.wrapping_add(GOLDEN_GAMMA) ^ mix(part.wrapping_add(GOLDEN_GAMMA)))
        });
        Self { state }
    }

    /// Returns 64 random bits.
    pub const fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN_GAMMA);
        mix(self.state)
    }

    /// Returns a number in `0.0..1.0`, a multiple of 2⁻²⁴.
    pub const fn uniform(&mut self) -> f32 {
        // 24 bits are the precision of f32, so the conversion and the product are exact.
        (self.next_u64() >> 40) as f32 * (1.0 / (1_u32 << 24) as f32)
    }

    /// Returns `count` numbers in `-bound..bound`.
    pub fn uniform_within(&mut self, bound: f32, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| (2.0 * self.uniform() - 1.0) * bound)
            .collect()
    }
}

/// A bijection of 64-bit numbers in which each bit depends on all others.
const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference: `new java.util.SplittableRandom(1234567).nextLong()`, also the test vector
    /// of <https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64>.
    #[test]
    fn the_stream_is_that_of_splitmix64() {
        let mut rng = Rng::new(1_234_567);
        let drawn: Vec<u64> = (0..5).map(|_| rng.next_u64()).collect();
        assert_eq!(
            drawn,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423,
                4_593_380_528_125_082_431,
                16_408_922_859_458_223_821,
            ]
        );
    }

    #[test]
    fn parts_are_told_apart_by_value_and_by_place() {
        let first = |parts: &[u64]| Rng::from_parts(parts).next_u64();
        let mut seen: Vec<u64> = Vec::new();
        for seed in 0..8 {
            for worker in 0..8 {
                for clock in 0..8 {
                    seen.push(first(&[seed, worker, clock]));
                }
            }
        }
        seen.extend([first(&[]), first(&[0]), first(&[0, 0])]);
        let count = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), count);
    }

    #[test]
    fn uniform_numbers_fill_their_range() {
        let mut rng = Rng::new(3);
        let drawn = rng.uniform_within(0.5, 10_000);
        assert!(drawn.iter().all(|x| (-0.5..0.5).contains(x)));
        let mean = drawn.iter().sum::<f32>() / 10_000.0;
        // The standard deviation of the mean is 1 / (sqrt(12) * 100), about 0.003.
        assert!(mean.abs() < 0.015, "mean {mean}");
        assert!(drawn.iter().any(|x| *x < -0.49) && drawn.iter().any(|x| *x > 0.49));
    }
}
