//! What benchmarks share that compare runs in turn.

use anyhow::{Context as _, Result};

/// The processor time of this process, in seconds.
pub(crate) fn processor_seconds() -> Result<f64> {
    // See proc_pid_stat(5): user and system time, in ticks of 10 ms, are the 12th and 13th words behind the name.
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, behind) = stat.rsplit_once(')').context("no name")?;
    let ticks = behind.split_whitespace().skip(11).take(2);
    let ticks = ticks.map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / 100.0)
}

/// The median of ratios, its confidence interval, and their range, as text.
///
/// The interval contains the true median with a probability of at least 95 %, whatever the distribution of the ratios
/// (if they are independent of each other): it goes from one of the sorted ratios to another, by the binomial distribution.
pub(crate) fn spread(ratios: &mut [f64]) -> String {
    ratios.sort_by(f64::total_cmp);
    let num = ratios.len();
    let median = (ratios[(num - 1) / 2] + ratios[num / 2]) / 2.0;
    let (least, most) = (ratios[0], ratios[num - 1]);
    let outside = num_outside(num);
    let (low, high) = (ratios[outside], ratios[num - 1 - outside]);
    format!(
        "{median:.4} in the middle (95 % sure: {low:.4} to {high:.4}), from {least:.4} to {most:.4}"
    )
}

/// How many of `num` sorted values may be left out at each end, if the rest is to enclose the true median with a
/// probability of at least 95 %. With fewer than 6 values none may, and the probability is lower.
fn num_outside(num: usize) -> usize {
    // The probability that exactly `below` values are below the median, and then that at most so many are.
    let mut exactly = 0.5_f64.powi(num as i32);
    let mut at_most = exactly;
    let mut outside = 0;
    loop {
        exactly *= (num - outside) as f64 / (outside + 1) as f64;
        at_most += exactly;
        if at_most > 0.025 {
            return outside;
        }
        outside += 1;
    }
}
