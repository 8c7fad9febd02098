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

/// The median and the range of ratios, as text.
pub(crate) fn spread(ratios: &mut [f64]) -> String {
    ratios.sort_by(f64::total_cmp);
    let middle = ratios.len() / 2;
    let median = (ratios[middle - 1] + ratios[middle]) / 2.0;
    let (least, most) = (ratios[0], ratios[ratios.len() - 1]);
    format!("{median:.4} in the middle, from {least:.4} to {most:.4}")
}
