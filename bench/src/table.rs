//! The results as Markdown.

use std::fmt::Write;

use crate::contenders::Metric;
use crate::results::{Results, Runs};
use crate::stats::Summary;

/// Returns the tables of a work: the numbers, the ratios, and the targets.
pub(crate) fn markdown(results: &Results) -> String {
    let mut text = format!("## {}\n\n", results.work.title());
    numbers(&mut text, results);
    ratios(&mut text, results);
    verdicts(&mut text, results);
    failures(&mut text, results);
    text
}

fn numbers(text: &mut String, results: &Results) {
    let is_known = |metric: &&Metric| {
        let mut runs = results.runs.iter();
        runs.any(|runs| runs.summary(metric.key).is_some())
    };
    let metrics: Vec<_> = results.work.metrics().iter().filter(is_known).collect();
    let titles = metrics.iter().map(|metric| metric.title.to_owned());
    header(text, titles);
    for runs in &results.runs {
        let cells = metrics
            .iter()
            .map(|metric| cell(runs.summary(metric.key), ""));
        row(text, &name(runs), cells);
    }
    text.push('\n');
}

/// A table of ratios for each metric and device: to the rivals, and to the same on the first device.
fn ratios(text: &mut String, results: &Results) {
    let devices = results.devices();
    for metric in results
        .work
        .metrics()
        .iter()
        .filter(|metric| metric.has_ratios)
    {
        let mut tables = String::new();
        for device in &devices {
            let is_here = |runs: &&Runs| runs.contender.device() == *device;
            let ours: Vec<_> = results.ours().filter(is_here).collect();
            let mut rows: Vec<(String, Vec<Option<Summary>>)> = Vec::new();
            for rival in results.rivals() {
                let cells = ours.iter().map(|ours| ours.times_better(rival, metric));
                rows.push((rival.contender.what.clone(), cells.collect()));
            }
            if let (Some(first), true) = (devices[0], *device != devices[0]) {
                let cells = ours.iter().map(|ours| {
                    let is_same = |runs: &&Runs| {
                        let runs = &runs.contender;
                        runs.device() == Some(first) && runs.kind() == ours.contender.kind()
                    };
                    ours.times_better(results.ours().find(is_same)?, metric)
                });
                rows.push((format!("the same with {first}"), cells.collect()));
            }
            rows.retain(|(_, cells)| cells.iter().any(Option::is_some));
            if rows.is_empty() {
                continue;
            }
            header(
                &mut tables,
                ours.iter().map(|runs| runs.contender.what.clone()),
            );
            for (name, cells) in rows {
                row(
                    &mut tables,
                    &name,
                    cells.into_iter().map(|ratio| cell(ratio, " ×")),
                );
            }
            tables.push('\n');
        }
        if !tables.is_empty() {
            let _ = write!(text, "Times better in {}, than:\n\n{tables}", metric.title);
        }
    }
}

fn verdicts(text: &mut String, results: &Results) {
    let verdicts = results.verdicts();
    if verdicts.is_empty() {
        return;
    }
    text.push_str("| target | wanted | measured | |\n|---|---|---|---|\n");
    for verdict in verdicts {
        let word = match verdict.is_met {
            Some(true) => "met",
            Some(false) => "**missed**",
            None => "not measured",
        };
        let cells = [verdict.wanted, cell(verdict.measured, ""), word.to_owned()];
        row(text, &verdict.what, cells.into_iter());
    }
    text.push('\n');
}

fn failures(text: &mut String, results: &Results) {
    for runs in &results.runs {
        let mut errors = runs.rounds.iter().filter_map(|round| round.as_ref().err());
        if let Some(error) = errors.next_back() {
            let (what, failed, all) = (&runs.contender.what, runs.num_failed(), runs.rounds.len());
            let _ = writeln!(text, "{what}: {failed} of {all} runs failed.\n");
            let _ = writeln!(text, "```text\n{error}\n```\n");
        }
    }
}

fn name(runs: &Runs) -> String {
    let what = &runs.contender.what;
    if runs.contender.is_ours() {
        format!("**{what}**")
    } else {
        what.clone()
    }
}

fn header(text: &mut String, titles: impl Iterator<Item = String>) {
    let titles: Vec<_> = titles.collect();
    let rule = "---|".repeat(titles.len() + 1);
    row(text, "", titles.into_iter());
    let _ = writeln!(text, "|{rule}");
}

fn row(text: &mut String, first: &str, cells: impl Iterator<Item = String>) {
    let cells: Vec<_> = cells.collect();
    let _ = writeln!(text, "| {first} | {} |", cells.join(" | "));
}

/// `median (least–most)`.
fn cell(summary: Option<Summary>, unit: &str) -> String {
    match summary {
        None => "–".to_owned(),
        Some(Summary {
            median, count: 1, ..
        }) => format!("{}{unit}", short(median)),
        Some(Summary {
            median, min, max, ..
        }) => format!("{}{unit} ({}–{})", short(median), short(min), short(max)),
    }
}

/// Two or three digits that matter.
fn short(number: f64) -> String {
    match number.abs() {
        size if size >= 20.0 => format!("{number:.0}"),
        size if size >= 2.0 => format!("{number:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use ps::prelude::default_device_name;

    use super::*;
    use crate::contenders::{Contender, Program, Work};
    use crate::measure::Metrics;

    fn runs(name: &str, program: Program, rates: [Option<f64>; 3]) -> Runs {
        let round = |rate: Option<f64>| {
            let rate = rate.ok_or("it fell over".to_owned())?;
            Ok(Metrics::from([("gradients_per_second".into(), rate)]))
        };
        Runs {
            contender: Contender {
                name: name.into(),
                what: name.into(),
                program,
                arguments: Vec::new(),
            },
            rounds: rates.map(round).into(),
        }
    }

    #[test]
    fn each_device_has_a_table_of_ratios_and_the_default_one_is_judged() {
        let default = default_device_name();
        let ours = |device: &str, rate: f64| {
            let name = format!("ps-sync@{device}");
            runs(&name, Program::Ours("train"), [Some(rate); 3])
        };
        let ray = runs("ray-sync", Program::Rival("ray_ps.py"), [Some(100.0); 3]);
        let results = Results {
            work: Work::Convnet,
            runs: vec![ours(default, 600.0), ours("another", 300.0), ray],
        };
        let text = markdown(&results);
        let tables = format!(
            "|  | ps-sync@{default} |\n|---|---|\n| ray-sync | 6.0 × (6.0–6.0) |\n\n\
             |  | ps-sync@another |\n|---|---|\n| ray-sync | 3.0 × (3.0–3.0) |\n\
             | the same with {default} | 0.50 × (0.50–0.50) |\n"
        );
        assert!(text.contains(&tables), "no `{tables}` in\n{text}");
        assert!(!text.contains("ps-sync@another beside"), "{text}");
    }

    #[test]
    fn tables_show_medians_ratios_targets_and_failures() {
        let results = Results {
            work: Work::Convnet,
            runs: vec![
                runs(
                    &format!("ps-sync@{}", default_device_name()),
                    Program::Ours("train"),
                    [Some(600.0), Some(500.0), Some(700.0)],
                ),
                runs(
                    "ray-sync",
                    Program::Rival("ray_ps.py"),
                    [Some(100.0), None, Some(200.0)],
                ),
            ],
        };
        let text = markdown(&results);
        let device = default_device_name();
        for line in [
            "| **ps-sync@DEVICE** | 600 (500–700) |",
            "| ray-sync | 150 (100–200) |",
            "| ray-sync | 4.8 × (3.5–6.0) |",
            "| gradients/s: ps-sync@DEVICE beside ray-sync | at least 5.00 × | 4.8 (3.5–6.0) | **missed** |",
            "ray-sync: 1 of 3 runs failed.",
            "it fell over",
        ] {
            let line = line.replace("DEVICE", device);
            assert!(text.contains(&line), "no `{line}` in\n{text}");
        }
    }

    #[test]
    fn numbers_have_the_digits_that_matter() {
        assert_eq!(
            [123.4, 12.34, 1.234, 0.01234, 0.0].map(short),
            ["123", "12.3", "1.23", "0.012", "0.00"]
        );
    }
}
