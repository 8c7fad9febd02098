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

fn ratios(text: &mut String, results: &Results) {
    if results.rivals().next().is_none() || results.ours().next().is_none() {
        return;
    }
    for metric in results.work.metrics() {
        let mut pairs = results.ours().flat_map(|ours| {
            let rivals = results.rivals();
            rivals.map(move |rival| ours.times_better(rival, metric))
        });
        if !metric.has_ratios || !pairs.any(|ratio| ratio.is_some()) {
            continue;
        }
        let _ = writeln!(text, "Times better in {}, by rival:\n", metric.title);
        header(text, results.ours().map(|runs| runs.contender.what.clone()));
        for rival in results.rivals() {
            let ours = results.ours();
            let cells = ours.map(|ours| cell(ours.times_better(rival, metric), " ×"));
            row(text, &rival.contender.what, cells);
        }
        text.push('\n');
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
    fn tables_show_medians_ratios_targets_and_failures() {
        let results = Results {
            work: Work::Convnet,
            runs: vec![
                runs(
                    "ps-sync@flex",
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
        for line in [
            "| **ps-sync@flex** | 600 (500–700) |",
            "| ray-sync | 150 (100–200) |",
            "| ray-sync | 4.8 × (3.5–6.0) |",
            "| gradients/s: ps-sync@flex beside ray-sync | at least 5.00 × | 4.8 (3.5–6.0) | **missed** |",
            "ray-sync: 1 of 3 runs failed.",
            "it fell over",
        ] {
            assert!(text.contains(line), "no `{line}` in\n{text}");
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
