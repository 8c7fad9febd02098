//! The table at the end of a training: how each worker spent its time. Pure.

use std::fmt::Write as _;

use ps_actors::ids::WorkerId;

use crate::observe::{Tally, WorkerTally};

/// How many workers have a line of their own.
const MAX_LINES: usize = 16;

/// Describes how each worker spent its time, and names the straggler with its cause if there is one. With more
/// than 16 workers, those that compute the fewest gradients are listed. `None` if no step was taken.
///
/// ```
/// use ps::cli::closing_table;
/// use ps::observe::Tally;
///
/// assert_eq!(closing_table(&Tally::default(), false), None);
/// ```
#[must_use]
pub fn closing_table(tally: &Tally, is_coloured: bool) -> Option<String> {
    if tally.num_steps() == 0 {
        return None;
    }
    let mut workers: Vec<(WorkerId, &WorkerTally)> = tally
        .workers
        .iter()
        .map(|(&worker, tally)| (worker, tally))
        .collect();
    let num_more = workers.len().saturating_sub(MAX_LINES);
    if num_more > 0 {
        workers.sort_by_key(|(worker, tally)| (tally.num_steps(), *worker));
        workers.truncate(MAX_LINES);
        workers.sort_by_key(|(worker, _)| *worker);
    }
    let mut rows = vec![
        [
            "",
            "steps",
            "gradients/s",
            "staleness",
            "data",
            "compute",
            "wire",
            "waiting",
            "apply",
        ]
        .map(str::to_owned),
    ];
    for (worker, tally) in workers {
        let [data, compute, wire, waiting, apply] = match tally.shares() {
            Some(shares) => shares
                .parts()
                .map(|share| format!("{:.0} %", 100.0 * share)),
            None => ["-"; 5].map(str::to_owned),
        };
        let staleness = &tally.staleness;
        rows.push([
            worker.to_string(),
            tally.num_steps().to_string(),
            format!("{:.1}", tally.gradients_per_second()),
            format!("{:.2}, max {}", staleness.mean(), staleness.max()),
            data,
            compute,
            wire,
            waiting,
            apply,
        ]);
    }
    let mut table = aligned(&rows);
    if num_more > 0 {
        let _ = writeln!(table, "and {num_more} more workers, which took more steps");
    }
    if let Some(straggler) = tally.straggler() {
        let _ = match is_coloured {
            true => writeln!(table, "\x1b[33m{straggler}\x1b[0m"),
            false => writeln!(table, "{straggler}"),
        };
    }
    Some(table)
}

/// Puts the first column to the left, and the others to the right.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = format!("{:<width$}", row[0], width = widths[0]);
        for (cell, width) in row.iter().zip(widths).skip(1) {
            let _ = write!(line, "  {cell:>width$}");
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text
}
