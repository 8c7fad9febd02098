//! Several runs side by side.

use std::fmt;
use std::path::{Path, PathBuf};

use super::picture::draw_comparison;
use super::record::{RunError, RunRecord};

/// Several runs in one table. Its `Display` is the table.
#[derive(Clone, Debug)]
pub struct Comparison {
    rows: Vec<[String; 9]>,
}

/// Reads the directories of some runs, and puts them into one table. If `pictures` names a directory, also
/// draws them there into `compare.svg` and `compare.png`.
///
/// ```
/// use ps::prelude::*;
///
/// # let device = select_device(default_device_name())?;
/// # let temporary = tempfile::tempdir()?;
/// # let (one, two) = (temporary.path().join("one"), temporary.path().join("two"));
/// # for directory in [&one, &two] {
/// #     Trainer::new(ConvNet::init(1, &device), Mnist::bundled_sample().train)
/// #         .device(&device).iterations(3).run_dir(directory).run()?;
/// # }
/// let comparison = ps::runs::compare([&one, &two], None)?;
/// assert!(comparison.to_string().contains("bsp"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// If a directory is not that of a run, a file is damaged, or a picture cannot be written.
pub fn compare(
    directories: impl IntoIterator<Item = impl Into<PathBuf>>,
    pictures: Option<&Path>,
) -> Result<Comparison, RunError> {
    let runs = directories.into_iter().map(RunRecord::read);
    let runs = runs.collect::<Result<Vec<_>, _>>()?;
    if runs.is_empty() {
        return Err(RunError::NoRuns);
    }
    if let Some(directory) = pictures {
        std::fs::create_dir_all(directory).map_err(|source| RunError::Write {
            path: directory.to_owned(),
            source,
        })?;
        draw_comparison(&runs, directory)?;
    }
    Ok(Comparison {
        rows: runs.iter().map(row).collect(),
    })
}

/// The names of the columns.
const HEAD: [&str; 9] = [
    "run",
    "mode",
    "workers",
    "updates",
    "gradients/s",
    "staleness",
    "loss",
    "accuracy",
    "seconds",
];

fn row(run: &RunRecord) -> [String; 9] {
    let settings = &run.started.settings;
    let tally = run.tally();
    let end = run.report.as_ref();
    let report = end.and_then(|end| end.report.as_ref());
    // That of the report is the time of the last process alone. Its end may be missing in the events.
    let seconds = end.map_or(0.0, |end| end.seconds).max(run.seconds());
    let per_second = report.map_or_else(
        || tally.num_applied() as f64 * run.kept_every() as f64 / run.seconds().max(1e-9),
        |report| report.gradients_per_second,
    );
    let staleness = report.map_or_else(|| tally.staleness.mean(), |report| report.mean_staleness);
    let evaluation = report.and_then(|report| report.final_evaluation.as_ref());
    let accuracy = evaluation.map_or_else(
        || tally.evaluation.and_then(|(_, _, accuracy)| accuracy),
        |evaluation| evaluation.accuracy,
    );
    let loss = evaluation
        .map(|evaluation| evaluation.loss)
        .or(tally.loss());
    let name = match end {
        None => format!("{} (has not ended)", run.name()),
        Some(end) if end.error.is_some() => format!("{} (failed)", run.name()),
        Some(_) => run.name(),
    };
    let updates = report.map_or(tally.version.0, |report| report.num_updates);
    [
        name,
        settings.consistency.clone(),
        settings.num_workers.to_string(),
        updates.to_string(),
        format!("{per_second:.1}"),
        format!("{staleness:.2}"),
        loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}")),
        accuracy.map_or_else(|| "-".to_owned(), |part| format!("{:.1} %", 100.0 * part)),
        format!("{seconds:.1}"),
    ]
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = HEAD.map(str::to_owned);
        let rows: Vec<&[String; 9]> = std::iter::once(&head).chain(&self.rows).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
        for (number, row) in rows.iter().enumerate() {
            for (column, cell) in row.iter().enumerate() {
                let width = width(column).unwrap_or(0);
                match column {
                    0 => write!(f, "{cell:<width$}")?,
                    _ => write!(f, "  {cell:>width$}")?,
                }
            }
            if number + 1 < rows.len() {
                writeln!(f)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ps_actors::ids::Version;

    use super::super::RunDir;
    use super::*;
    use crate::observe::{Event, Observer, RunEnded, RunStarted, Settings, Versions};

    #[test]
    fn the_seconds_of_a_run_that_went_on_are_those_of_all_its_processes() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("one");
        for (first_version, seconds) in [(0, 40.0), (10, 2.5)] {
            let mut observer = RunDir::new(&directory);
            observer.observe(&Event::RunStarted(Box::new(RunStarted {
                time: 0.0,
                unix_time: 1.7e9,
                settings: Settings::default(),
                versions: Versions::here(),
                first_version: Version(first_version),
            })));
            let end = RunEnded::new(seconds, None);
            observer.observe(&Event::RunEnded(Box::new(end)));
        }
        let comparison = compare([&directory], None).unwrap();
        assert_eq!(comparison.rows.len(), 1);
        assert_eq!(comparison.rows[0][8], "42.5");
    }
}
