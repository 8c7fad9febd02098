//! The arithmetic of a convolution and of its two gradients, on slices, one thread.
//!
//! Everything stays in burn's layout, `[batch, channels, height, width]`, and one image at a time in
//! the cache. A filter tap is an offset into the image seen as one long row: the output at `p` is the
//! sum over taps of `weight * image[p + offset]`. That makes vectors run along whole images, needs no
//! im2col, and computes a few columns too many, those where the window hangs over the right edge.
//! [`Arch::new`] finds the widest vectors of the machine.

use pulp::{Arch, Simd, WithSimd};

/// Up to this number of output channels, blocks have three rows and three columns. Larger convolutions use
/// blocks of six rows and two columns. With three channels, half of such a block would be superfluous.
/// Also, a filter of 3 × 3 has nine taps, a multiple of three.
///
/// `ROWS` is the number of output channels that are computed together. `COLUMNS` is the number of vectors
/// along the image, or of filter taps in the gradient of the weights. `ROWS * COLUMNS` sums, one vector per
/// column, and one more vector fit into the 16 registers of AVX2. Larger blocks would go through memory,
/// which takes three times as long.
const FEW: usize = 3;
/// The largest number of `f32` in a vector on any machine. The length of rows is a multiple of it.
const MAX_LANES: usize = 16;

/// The sizes of a convolution with stride 1 and without padding.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    /// `[channels, height, width]`
    pub(super) input: [usize; 3],
    pub(super) outputs: usize,
    /// `[height, width]`
    pub(super) kernel: [usize; 2],
}

impl Sizes {
    /// `[channels, height, width]`
    pub(super) fn output(&self) -> [usize; 3] {
        let [_, height, width] = self.input;
        let [kernel_height, kernel_width] = self.kernel;
        [
            self.outputs,
            height + 1 - kernel_height,
            width + 1 - kernel_width,
        ]
    }

    /// The weights of one output channel.
    const fn num_taps(&self) -> usize {
        self.input[0] * self.kernel[0] * self.kernel[1]
    }
}

/// Computes `[batch, outputs, ..]` from `x: [batch, channels, height, width]`,
/// `weight: [outputs, channels, kernel height, kernel width]` and `bias: [outputs]`.
pub(super) fn forward(
    arch: Arch,
    sizes: &Sizes,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    if sizes.outputs <= FEW {
        forward_in::<3, 3>(arch, sizes, x, weight, bias)
    } else {
        forward_in::<6, 2>(arch, sizes, x, weight, bias)
    }
}

fn forward_in<const ROWS: usize, const COLUMNS: usize>(
    arch: Arch,
    sizes: &Sizes,
    x: &[f32],
    weight: &[f32],
    bias: &[f32],
) -> Vec<f32> {
    let correlation = Correlation::<ROWS, COLUMNS>::new(
        sizes.input,
        sizes.outputs,
        sizes.kernel,
        |output, tap| weight[output * sizes.num_taps() + tap],
    );
    let [_, height, width] = sizes.output();
    let mut y = Vec::with_capacity(sizes.batch * sizes.outputs * height * width);
    let mut padded = vec![0.0; correlation.padded_input()];
    let mut wide = vec![0.0; correlation.wide_output()];
    for image in x.chunks_exact(sizes.input.iter().product()) {
        padded[..image.len()].copy_from_slice(image);
        correlation.run(arch, &padded, bias, &mut wide);
        correlation.narrow(&wide, &mut y);
    }
    y
}

/// Computes the gradient of `x` from that of the output. It is a convolution of the padded gradient of the
/// output, with turned filters and swapped channels.
pub(super) fn input_gradient(arch: Arch, sizes: &Sizes, weight: &[f32], dy: &[f32]) -> Vec<f32> {
    if sizes.input[0] <= FEW {
        input_gradient_in::<3, 3>(arch, sizes, weight, dy)
    } else {
        input_gradient_in::<6, 2>(arch, sizes, weight, dy)
    }
}

fn input_gradient_in<const ROWS: usize, const COLUMNS: usize>(
    arch: Arch,
    sizes: &Sizes,
    weight: &[f32],
    dy: &[f32],
) -> Vec<f32> {
    let [inputs, ..] = sizes.input;
    let [outputs, height, width] = sizes.output();
    let [kernel_height, kernel_width] = sizes.kernel;
    let area = kernel_height * kernel_width;
    let wide_width = width + 2 * (kernel_width - 1);
    let padded_sizes = [outputs, height + 2 * (kernel_height - 1), wide_width];
    let correlation =
        Correlation::<ROWS, COLUMNS>::new(padded_sizes, inputs, sizes.kernel, |input, tap| {
            let (output, place) = (tap / area, tap % area);
            weight[(output * inputs + input) * area + area - 1 - place]
        });
    let bias = vec![0.0; inputs];
    let mut dx = Vec::with_capacity(sizes.batch * sizes.input.iter().product::<usize>());
    let mut padded = vec![0.0; correlation.padded_input()];
    let mut wide = vec![0.0; correlation.wide_output()];
    for image in dy.chunks_exact(outputs * height * width) {
        let planes = padded.chunks_exact_mut(padded_sizes[1] * wide_width);
        for (to, from) in planes.zip(image.chunks_exact(height * width)) {
            let rows = to.chunks_exact_mut(wide_width).skip(kernel_height - 1);
            for (to, from) in rows.zip(from.chunks_exact(width)) {
                to[kernel_width - 1..][..width].copy_from_slice(from);
            }
        }
        correlation.run(arch, &padded, &bias, &mut wide);
        correlation.narrow(&wide, &mut dx);
    }
    dx
}

/// Computes the gradients of the weights and of the biases.
pub(super) fn weight_gradient(
    arch: Arch,
    sizes: &Sizes,
    x: &[f32],
    dy: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    if sizes.outputs <= FEW {
        weight_gradient_in::<3, 3>(arch, sizes, x, dy)
    } else {
        weight_gradient_in::<6, 2>(arch, sizes, x, dy)
    }
}

fn weight_gradient_in<const ROWS: usize, const COLUMNS: usize>(
    arch: Arch,
    sizes: &Sizes,
    x: &[f32],
    dy: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let [_, _, wide_width] = sizes.input;
    let [outputs, height, width] = sizes.output();
    let offsets = offsets(sizes.input, sizes.kernel);
    let length = (height * wide_width).next_multiple_of(MAX_LANES);
    let last = offsets.last().copied().unwrap_or(0);
    // These are zero where there is no output, so the image does not count there. (An infinity in the image
    // would count. But every pixel lies under some tap, so an infinity makes the gradient NaN anyway.)
    let mut wide = vec![0.0; outputs.next_multiple_of(ROWS) * length];
    let mut padded = vec![0.0; last + length];
    let mut dw = vec![0.0; outputs.next_multiple_of(ROWS) * offsets.len()];
    let mut db = vec![0.0; outputs];
    let images = x.chunks_exact(sizes.input.iter().product());
    for (image, gradient) in images.zip(dy.chunks_exact(outputs * height * width)) {
        padded[..image.len()].copy_from_slice(image);
        let planes = wide.chunks_exact_mut(length);
        for ((to, from), db) in planes
            .zip(gradient.chunks_exact(height * width))
            .zip(&mut db)
        {
            let rows = to.chunks_exact_mut(wide_width);
            for (to, from) in rows.zip(from.chunks_exact(width)) {
                to[..width].copy_from_slice(from);
            }
            *db += sum(to);
        }
        arch.dispatch(WeightGradient::<ROWS, COLUMNS> {
            offsets: &offsets,
            length,
            image: &padded,
            wide: &wide,
            dw: &mut dw,
        });
    }
    dw.truncate(outputs * offsets.len());
    (dw, db)
}

/// Sums in as many lanes as the widest vectors have. So no addition waits for the one before, and the order
/// is the same on every machine. The length is a multiple of [`MAX_LANES`].
fn sum(numbers: &[f32]) -> f32 {
    let mut sums = [0.0; MAX_LANES];
    for numbers in numbers.chunks_exact(MAX_LANES) {
        for (sum, number) in sums.iter_mut().zip(numbers) {
            *sum += number;
        }
    }
    sums.iter().sum()
}

/// The offsets of a filter's taps from the position of the output.
fn offsets([channels, height, width]: [usize; 3], kernel: [usize; 2]) -> Vec<usize> {
    let mut offsets = Vec::with_capacity(channels * kernel[0] * kernel[1]);
    for channel in 0..channels {
        for row in 0..kernel[0] {
            for column in 0..kernel[1] {
                offsets.push((channel * height + row) * width + column);
            }
        }
    }
    offsets
}

/// Sums of shifted planes. The output and the gradient of the input are both computed in this way.
struct Correlation<const ROWS: usize, const COLUMNS: usize> {
    offsets: Vec<usize>,
    /// For each group of `ROWS` output channels and each tap: one weight per output channel of the group.
    panels: Vec<[f32; ROWS]>,
    outputs: usize,
    /// `[height, width]` of the output.
    size: [usize; 2],
    /// The width of the input. It is also that of the output with its superfluous columns.
    wide_width: usize,
    /// The length of a plane of that output, rounded up to whole tiles.
    length: usize,
}

impl<const ROWS: usize, const COLUMNS: usize> Correlation<ROWS, COLUMNS> {
    fn new(
        input: [usize; 3],
        outputs: usize,
        kernel: [usize; 2],
        weight: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let offsets = offsets(input, kernel);
        let [_, height, wide_width] = input;
        let size = [height + 1 - kernel[0], wide_width + 1 - kernel[1]];
        let mut panels = Vec::with_capacity(outputs.div_ceil(ROWS) * offsets.len());
        for first in (0..outputs).step_by(ROWS) {
            for tap in 0..offsets.len() {
                panels.push(std::array::from_fn(|row| {
                    let output = first + row;
                    if output < outputs {
                        weight(output, tap)
                    } else {
                        0.0
                    }
                }));
            }
        }
        Self {
            offsets,
            panels,
            outputs,
            size,
            wide_width,
            length: (size[0] * wide_width).next_multiple_of(COLUMNS * MAX_LANES),
        }
    }

    /// The length of an image, together with the numbers behind it that the last vectors read.
    fn padded_input(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0) + self.length
    }

    const fn wide_output(&self) -> usize {
        self.outputs.next_multiple_of(ROWS) * self.length
    }

    fn run(&self, arch: Arch, input: &[f32], bias: &[f32], output: &mut [f32]) {
        arch.dispatch(Correlate {
            correlation: self,
            input,
            bias,
            output,
        });
    }

    /// Appends the output without its superfluous columns.
    fn narrow(&self, wide: &[f32], out: &mut Vec<f32>) {
        let [height, width] = self.size;
        for plane in wide.chunks_exact(self.length).take(self.outputs) {
            for row in plane.chunks_exact(self.wide_width).take(height) {
                out.extend_from_slice(&row[..width]);
            }
        }
    }
}

struct Correlate<'a, const ROWS: usize, const COLUMNS: usize> {
    correlation: &'a Correlation<ROWS, COLUMNS>,
    input: &'a [f32],
    bias: &'a [f32],
    output: &'a mut [f32],
}

impl<const ROWS: usize, const COLUMNS: usize> WithSimd for Correlate<'_, ROWS, COLUMNS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Correlation {
            offsets,
            panels,
            length,
            ..
        } = self.correlation;
        let tile = COLUMNS * S::F32_LANES;
        for first in (0..*length).step_by(tile) {
            // All filters pass over one piece of the image, which stays in the nearest cache.
            let input = &self.input[first..];
            let blocks = self.output.chunks_exact_mut(ROWS * length);
            let panels = panels.chunks_exact(offsets.len());
            for ((block, panel), bias) in blocks.zip(panels).zip(self.bias.chunks(ROWS)) {
                let sums = sum_over_taps::<S, ROWS, COLUMNS>(simd, input, offsets, panel, bias);
                for (plane, sums) in block.chunks_exact_mut(*length).zip(sums) {
                    let (vectors, _) = S::as_mut_simd_f32s(&mut plane[first..][..tile]);
                    vectors.copy_from_slice(&sums);
                }
            }
        }
    }
}

/// The innermost loop; a function of its own, returning by value, so that the sums stay in registers.
#[inline(always)]
fn sum_over_taps<S: Simd, const ROWS: usize, const COLUMNS: usize>(
    simd: S,
    input: &[f32],
    offsets: &[usize],
    panel: &[[f32; ROWS]],
    bias: &[f32],
) -> [[S::f32s; COLUMNS]; ROWS] {
    let mut sums: [_; ROWS] = std::array::from_fn(|row| {
        let bias = bias.get(row).copied().unwrap_or(0.0);
        [simd.splat_f32s(bias); COLUMNS]
    });
    for (weights, offset) in panel.iter().zip(offsets) {
        let (vectors, _) = S::as_simd_f32s(&input[*offset..][..COLUMNS * S::F32_LANES]);
        let vectors: [S::f32s; COLUMNS] = std::array::from_fn(|column| vectors[column]);
        for row in 0..ROWS {
            let weight = simd.splat_f32s(weights[row]);
            for column in 0..COLUMNS {
                sums[row][column] = simd.mul_add_e_f32s(weight, vectors[column], sums[row][column]);
            }
        }
    }
    sums
}

/// Adds one image's part to the gradient of the weights.
struct WeightGradient<'a, const ROWS: usize, const COLUMNS: usize> {
    offsets: &'a [usize],
    length: usize,
    image: &'a [f32],
    /// The gradient of the output, with zeros in its superfluous columns.
    wide: &'a [f32],
    dw: &'a mut [f32],
}

impl<const ROWS: usize, const COLUMNS: usize> WithSimd for WeightGradient<'_, ROWS, COLUMNS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let count = self.length / S::F32_LANES;
        let vectors = |numbers| &S::as_simd_f32s(numbers).0[..count];
        let blocks = self.wide.chunks_exact(ROWS * self.length);
        let taps = self.offsets.len();
        for (block, dw) in blocks.zip(self.dw.chunks_exact_mut(ROWS * taps)) {
            let rows: [_; ROWS] = std::array::from_fn(|row| vectors(&block[row * self.length..]));
            for (group, offsets) in self.offsets.chunks(COLUMNS).enumerate() {
                // If the last group is not full, its first tap takes the place of the missing ones.
                let columns: [_; COLUMNS] = std::array::from_fn(|column| {
                    let offset = offsets.get(column).unwrap_or(&offsets[0]);
                    vectors(&self.image[*offset..])
                });
                let sums = sum_of_products(simd, rows, columns);
                for (dw, sums) in dw.chunks_exact_mut(taps).zip(sums) {
                    let dw = &mut dw[group * COLUMNS..];
                    for (dw, sum) in dw.iter_mut().zip(sums) {
                        *dw += simd.reduce_sum_f32s(sum);
                    }
                }
            }
        }
    }
}

/// Multiplies every row by every column, all of one length.
#[inline(always)]
fn sum_of_products<S: Simd, const ROWS: usize, const COLUMNS: usize>(
    simd: S,
    rows: [&[S::f32s]; ROWS],
    columns: [&[S::f32s]; COLUMNS],
) -> [[S::f32s; COLUMNS]; ROWS] {
    // The compiler removes bounds checks if it sees that all have the same length.
    let count = rows[0].len();
    let rows = rows.map(|row| &row[..count]);
    let columns = columns.map(|column| &column[..count]);
    let mut sums = [[simd.splat_f32s(0.0); COLUMNS]; ROWS];
    for i in 0..count {
        let columns: [S::f32s; COLUMNS] = std::array::from_fn(|column| columns[column][i]);
        for row in 0..ROWS {
            let factor = rows[row][i];
            for column in 0..COLUMNS {
                sums[row][column] = simd.mul_add_e_f32s(factor, columns[column], sums[row][column]);
            }
        }
    }
    sums
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::rng::Rng;

    /// Every kind of vectors that this machine has.
    pub(crate) fn architectures() -> Vec<Arch> {
        #[cfg(target_arch = "x86_64")]
        let narrower = pulp::x86::V3::try_new().map(Arch::V3);
        #[cfg(not(target_arch = "x86_64"))]
        let narrower = None;
        [Arch::Scalar, Arch::new()]
            .into_iter()
            .chain(narrower)
            .collect()
    }

    fn assert_close(what: &str, got: &[f32], expected: &[f64]) {
        assert_eq!(got.len(), expected.len(), "{what}");
        for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
            // Numbers up to 1 in sums of up to 500.
            let difference = (f64::from(*got) - expected).abs();
            assert!(difference < 1e-4, "{what}[{index}]: {got}, not {expected}");
        }
    }

    #[test]
    fn every_kind_of_vectors_computes_the_definition() {
        // Low and high blocks, for the output as for the gradient of the input; full, and not full.
        for [channels, outputs] in [[5, 7], [1, 3], [3, 2], [2, 6], [7, 1]] {
            check(Sizes {
                batch: 2,
                input: [channels, 9, 20],
                outputs,
                kernel: [3, 2],
            });
        }
    }

    fn check(sizes: Sizes) {
        let [channels, height, width] = sizes.input;
        let [outputs, out_height, out_width] = sizes.output();
        let [kernel_height, kernel_width] = sizes.kernel;
        let rng = &mut Rng::new(3);
        let mut random = |count| rng.uniform_within(1.0, count);
        let x = random(sizes.batch * channels * height * width);
        let weight = random(outputs * sizes.num_taps());
        let bias = random(outputs);
        let dy = random(sizes.batch * outputs * out_height * out_width);

        let zeros = |numbers: &[f32]| vec![0.0; numbers.len()];
        let (mut dx, mut dw, mut db) = (zeros(&x), zeros(&weight), zeros(&bias));
        let mut y = Vec::new();
        for (at, slope) in dy.iter().enumerate() {
            let (row, column) = (at / out_width % out_height, at % out_width);
            let output = at / (out_height * out_width) % outputs;
            let image = at / (out_height * out_width * outputs);
            let slope = f64::from(*slope);
            let mut sum = f64::from(bias[output]);
            db[output] += slope;
            for tap in 0..sizes.num_taps() {
                let channel = tap / (kernel_height * kernel_width);
                let row = row + tap / kernel_width % kernel_height;
                let column = column + tap % kernel_width;
                let from = ((image * channels + channel) * height + row) * width + column;
                let by = output * sizes.num_taps() + tap;
                sum += f64::from(x[from]) * f64::from(weight[by]);
                dx[from] += slope * f64::from(weight[by]);
                dw[by] += slope * f64::from(x[from]);
            }
            y.push(sum);
        }

        for arch in architectures() {
            let output = forward(arch, &sizes, &x, &weight, &bias);
            assert_close(&format!("{arch:?} y"), &output, &y);
            let gradient = input_gradient(arch, &sizes, &weight, &dy);
            assert_close(&format!("{arch:?} dx"), &gradient, &dx);
            let (weights, biases) = weight_gradient(arch, &sizes, &x, &dy);
            assert_close(&format!("{arch:?} dw"), &weights, &dw);
            assert_close(&format!("{arch:?} db"), &biases, &db);
        }
    }
}
