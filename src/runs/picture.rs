//! The pictures of a run, and of several runs side by side.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::{
    BLACK, ChartBuilder, Color as _, DrawingArea, DrawingBackend, IntoFont as _, LineSeries,
    Polygon, RGBColor, Rectangle, SeriesLabelPosition, Text, WHITE,
};
use plotters::style::TextStyle;

use super::raster::{Picture, undrawn, write};
use super::record::{RunError, RunRecord};
use super::series::{Bins, Spent, Timed, range};
use crate::observe::{Event, StepOutcome};

/// Colours that people with the usual kinds of colour blindness can tell apart (Okabe and Ito, 2008).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(90, 90, 90),
];
const GREY: RGBColor = RGBColor(200, 200, 200);

/// How many points a curve has at most.
const NUM_POINTS: usize = 400;

/// How many workers a timeline shows.
const MAX_ROWS: usize = 32;

/// Writes the pictures of one run into a directory.
pub(super) fn draw_run(run: &RunRecord, directory: &Path) -> Result<(), RunError> {
    write(&curves(std::slice::from_ref(run)), directory, "curves")?;
    write(&Timeline::of(run), directory, "timeline")
}

/// Writes one picture of several runs into a directory.
pub(super) fn draw_comparison(runs: &[RunRecord], directory: &Path) -> Result<(), RunError> {
    write(&curves(runs), directory, "compare")
}

/// Several panels, two in each row.
struct Curves {
    title: String,
    panels: Vec<Panel>,
}

struct Panel {
    title: &'static str,
    x: &'static str,
    y: &'static str,
    lines: Vec<Line>,
    /// Whether the lines are drawn as bars that begin at 0.
    is_histogram: bool,
}

struct Line {
    label: String,
    colour: RGBColor,
    points: Vec<(f64, f64)>,
    /// The smallest and the largest value near each point.
    band: Vec<(f64, f64, f64)>,
}

/// The points of a curve, and the ranges around them if there are any.
type Curve = (Vec<(f64, f64)>, Bins);

fn curves(runs: &[RunRecord]) -> Curves {
    let title = match runs {
        [run] => title(run),
        runs => format!("{} runs", runs.len()),
    };
    let panel = |title, x, y, line: &dyn Fn(&RunRecord) -> Curve| Panel {
        title,
        x,
        y,
        is_histogram: false,
        lines: runs
            .iter()
            .zip(COLOURS.iter().cycle())
            .map(|(run, &colour)| {
                let (points, bins) = line(run);
                let band = match runs.len() {
                    1 => bins.iter().map(|bin| (bin.x, bin.min, bin.max)).collect(),
                    _ => Vec::new(),
                };
                Line {
                    label: run.name(),
                    colour,
                    points,
                    band,
                }
            })
            .collect(),
    };
    let losses = |by_time: bool| {
        move |run: &RunRecord| {
            let points = run.steps().map(|step| match by_time {
                true => (step.time, f64::from(step.loss)),
                false => (step.version.0 as f64, f64::from(step.loss)),
            });
            let bins = Bins::of(points, NUM_POINTS);
            (bins.means().collect(), bins)
        }
    };
    let accuracies = |by_time: bool| {
        move |run: &RunRecord| {
            let points = run.evaluations().filter_map(|evaluated| {
                let x = match by_time {
                    true => evaluated.time,
                    false => evaluated.version.0 as f64,
                };
                Some((x, 100.0 * evaluated.accuracy?))
            });
            let mut points: Vec<_> = points.collect();
            points.sort_by(|(a, _), (b, _)| a.total_cmp(b));
            (points, Bins::default())
        }
    };
    let rates = |run: &RunRecord| (rate(run), Bins::default());
    let staleness = Panel {
        title: "Staleness of the applied gradients",
        x: "updates",
        y: "% of the gradients",
        is_histogram: true,
        lines: runs
            .iter()
            .zip(COLOURS.iter().cycle())
            .map(|(run, &colour)| Line {
                label: run.name(),
                colour,
                points: staleness(run),
                band: Vec::new(),
            })
            .collect(),
    };
    Curves {
        title,
        panels: vec![
            panel("Loss of the batches", "updates", "loss", &losses(false)),
            panel("Loss of the batches", "seconds", "loss", &losses(true)),
            panel(
                "Accuracy on the test data",
                "updates",
                "%",
                &accuracies(false),
            ),
            panel(
                "Accuracy on the test data",
                "seconds",
                "%",
                &accuracies(true),
            ),
            staleness,
            panel("Settled gradients", "seconds", "per second", &rates),
        ],
    }
}

/// Describes a run in one line.
fn title(run: &RunRecord) -> String {
    let settings = &run.started.settings;
    let counted = |number: usize, noun: &str| {
        format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
    };
    let model = settings.model.rsplit("::").next().unwrap_or_default();
    [
        run.name(),
        model.to_owned(),
        settings.consistency.clone(),
        counted(settings.num_workers, "worker"),
        counted(settings.num_servers, "server"),
        format!("learning rate {}", settings.learning_rate),
        match settings.schedule.is_empty() {
            true => String::new(),
            false => "with a schedule".to_owned(),
        },
    ]
    .into_iter()
    .filter(|part| !part.is_empty())
    .collect::<Vec<_>>()
    .join(", ")
}

/// Returns the number of settled gradients per second over the time.
fn rate(run: &RunRecord) -> Vec<(f64, f64)> {
    let seconds = run.seconds();
    let num_bins = 60;
    let width = seconds / num_bins as f64;
    if width <= 0.0 {
        return Vec::new();
    }
    let mut counts = vec![0_u64; num_bins];
    for step in run.steps() {
        counts[((step.time / width) as usize).min(num_bins - 1)] += run.kept_every();
    }
    let points = counts.into_iter().enumerate();
    let points = points.map(|(bin, count)| ((bin as f64 + 0.5) * width, count as f64 / width));
    points.collect()
}

/// Returns the percentage of the applied gradients by their staleness.
fn staleness(run: &RunRecord) -> Vec<(f64, f64)> {
    let mut counts: Vec<u64> = Vec::new();
    let applied = run
        .steps()
        .filter(|step| step.outcome == StepOutcome::Applied);
    for step in applied {
        // The number may come from a damaged file.
        let place = step.staleness.min(256) as usize;
        if counts.len() <= place {
            counts.resize(place + 1, 0);
        }
        counts[place] += 1;
    }
    let total = counts.iter().sum::<u64>().max(1);
    let points = counts.into_iter().enumerate();
    let points = points.map(|(place, count)| (place as f64, 100.0 * count as f64 / total as f64));
    points.collect()
}

impl Picture for Curves {
    fn size(&self) -> (u32, u32) {
        (1200, 60 + 330 * self.panels.len().div_ceil(2) as u32)
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Result<(), RunError> {
        let (head, body) = area.split_vertically(44);
        let style = TextStyle::from(("sans-serif", 20).into_font());
        head.draw_text(&self.title, &style, (20, 14))
            .map_err(undrawn)?;
        let cells = body.split_evenly((self.panels.len().div_ceil(2), 2));
        for (panel, cell) in self.panels.iter().zip(&cells) {
            panel.draw(cell)?;
        }
        Ok(())
    }
}

impl Panel {
    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Result<(), RunError> {
        let points = || self.lines.iter().flat_map(|line| line.points.iter());
        let bands = || self.lines.iter().flat_map(|line| line.band.iter());
        let xs = points().map(|(x, _)| *x);
        let ys = points().map(|(_, y)| *y);
        let ys = ys.chain(bands().flat_map(|(_, min, max)| [*min, *max]));
        let (Some(mut x), Some(mut y)) = (range(xs), range(ys)) else {
            let style = TextStyle::from(("sans-serif", 14).into_font());
            let text = format!("{}: nothing to show", self.title);
            return area.draw_text(&text, &style, (60, 60)).map_err(undrawn);
        };
        if self.is_histogram {
            (x, y.0) = ((-0.5, x.1.max(0.5)), 0.0);
        }
        y.1 = y.1.max(y.0 + 1e-9);
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .caption(self.title, ("sans-serif", 16))
            .x_label_area_size(40)
            .y_label_area_size(64)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)
            .map_err(undrawn)?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(GREY.mix(0.5))
            .axis_style(BLACK.mix(0.6))
            .label_style(("sans-serif", 12))
            .axis_desc_style(("sans-serif", 13))
            .x_desc(self.x)
            .y_desc(self.y)
            .x_labels(8)
            .y_labels(6)
            .x_label_formatter(&|number: &f64| short(*number))
            .y_label_formatter(&|number: &f64| short(*number))
            .draw()
            .map_err(undrawn)?;
        let num_lines = self.lines.len();
        for (index, line) in self.lines.iter().enumerate() {
            let colour = line.colour;
            if !line.band.is_empty() {
                let upper = line.band.iter().map(|&(x, _, max)| (x, max));
                let lower = line.band.iter().rev().map(|&(x, min, _)| (x, min));
                let band: Vec<_> = upper.chain(lower).collect();
                let band = Polygon::new(band, colour.mix(0.15));
                chart.draw_series([band]).map_err(undrawn)?;
            }
            let drawn = match self.is_histogram {
                true => {
                    let width = 0.8 / num_lines as f64;
                    let left = index as f64 * width - 0.4;
                    chart.draw_series(line.points.iter().map(|&(x, y)| {
                        let corners = [(x + left, 0.0), (x + left + width, y)];
                        Rectangle::new(corners, colour.filled())
                    }))
                }
                false => {
                    let points = line.points.iter().copied();
                    chart.draw_series(LineSeries::new(points, colour.stroke_width(2)))
                }
            };
            let drawn = drawn.map_err(undrawn)?;
            if num_lines > 1 {
                drawn.label(&line.label).legend(move |(x, y)| {
                    Rectangle::new([(x, y - 5), (x + 14, y + 5)], colour.filled())
                });
            }
        }
        if num_lines > 1 {
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(WHITE.mix(0.8))
                .label_font(("sans-serif", 12))
                .draw()
                .map_err(undrawn)?;
        }
        Ok(())
    }
}

/// Writes a number of an axis without needless digits.
fn short(number: f64) -> String {
    let magnitude = number.abs();
    let text = match magnitude {
        magnitude if magnitude >= 1e7 => format!("{number:.1e}"),
        magnitude if magnitude >= 1e3 => format!("{number:.0}"),
        magnitude if magnitude >= 1e-3 || magnitude == 0.0 => format!("{number:.4}"),
        _ => format!("{number:.1e}"),
    };
    match text.contains('.') && !text.contains('e') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// How each worker spent its time.
struct Timeline {
    title: String,
    rows: Vec<Row>,
    num_more: usize,
    seconds: f64,
    kept_every: u64,
}

struct Row {
    label: String,
    spent: Spent,
    /// When the worker was lost.
    losses: Vec<f64>,
    /// When it went on at another node.
    moves: Vec<f64>,
}

impl Timeline {
    const NUM_BINS: usize = 300;

    fn of(run: &RunRecord) -> Self {
        let seconds = run.seconds();
        let tally = run.tally();
        let workers: Vec<_> = tally.workers.keys().copied().collect();
        let rows = workers.iter().take(MAX_ROWS).map(|&worker| {
            let steps = run.steps().filter(|step| step.worker == worker);
            let steps = steps.filter_map(|step| {
                let times = step.times?;
                Some(Timed {
                    end: step.time,
                    data: times.data,
                    compute: times.compute,
                    wire: times.wire,
                    waiting: times.waiting,
                    apply: times.apply,
                })
            });
            let times = |when: fn(&Event) -> Option<(u32, f64)>| {
                let events = run.events().filter_map(when);
                let events = events.filter(|(who, _)| *who == worker.0);
                events.map(|(_, time)| time).collect()
            };
            Row {
                label: worker.to_string(),
                spent: Spent::of(steps, seconds, Self::NUM_BINS, run.kept_every()),
                losses: times(|event| match event {
                    Event::WorkerLost(lost) => Some((lost.worker.0, lost.time)),
                    _ => None,
                }),
                moves: times(|event| match event {
                    Event::WorkerMoved(moved) => Some((moved.worker.0, moved.time)),
                    _ => None,
                }),
            }
        });
        Self {
            title: title(run),
            rows: rows.collect(),
            num_more: workers.len().saturating_sub(MAX_ROWS),
            seconds: seconds.max(1e-9),
            kept_every: run.kept_every(),
        }
    }

    fn legend() -> [(&'static str, RGBColor); 5] {
        [
            ("data", COLOURS[4]),
            ("compute", COLOURS[0]),
            ("wire", COLOURS[2]),
            ("waiting at the server", GREY),
            ("apply", COLOURS[3]),
        ]
    }
}

impl Picture for Timeline {
    fn size(&self) -> (u32, u32) {
        (1200, 150 + 44 * self.rows.len().max(1) as u32)
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>) -> Result<(), RunError> {
        let style = |size: i32| TextStyle::from(("sans-serif", size).into_font());
        area.draw_text(&self.title, &style(20), (20, 14))
            .map_err(undrawn)?;
        let mut x = 120;
        for (name, colour) in Self::legend() {
            let square = Rectangle::new([(x, 50), (x + 14, 64)], colour.filled());
            area.draw(&square).map_err(undrawn)?;
            area.draw_text(name, &style(14), (x + 20, 50))
                .map_err(undrawn)?;
            x += 50 + 8 * name.len() as i32;
        }
        let mut notes = vec!["vertical lines: lost (red), moved (black)".to_owned()];
        if self.kept_every > 1 {
            notes.push(format!("drawn from one step in {}", self.kept_every));
        }
        if self.num_more > 0 {
            notes.push(format!("{} more workers are not shown", self.num_more));
        }
        let notes = notes.join("; ");
        area.draw_text(&notes, &style(13), (x + 10, 51))
            .map_err(undrawn)?;
        let num_rows = self.rows.len().max(1) as f64;
        let (_, body) = area.split_vertically(76);
        let mut chart = ChartBuilder::on(&body)
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(100)
            .build_cartesian_2d(0.0..self.seconds, num_rows..0.0)
            .map_err(undrawn)?;
        let label = |row: &f64| {
            let row = self.rows.get(*row as usize).filter(|_| row.fract() == 0.0);
            row.map_or_else(String::new, |row| row.label.clone())
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .disable_y_axis()
            .light_line_style(WHITE)
            .bold_line_style(GREY.mix(0.5))
            .label_style(("sans-serif", 12))
            .axis_desc_style(("sans-serif", 13))
            .x_desc("seconds")
            .x_labels(12)
            .x_label_formatter(&|number: &f64| short(*number))
            .draw()
            .map_err(undrawn)?;
        let width = self.seconds / Self::NUM_BINS as f64;
        for (index, row) in self.rows.iter().enumerate() {
            let (top, bottom) = (index as f64 + 0.08, index as f64 + 0.92);
            let spent = &row.spent;
            for bin in 0..Self::NUM_BINS {
                let (left, right) = (bin as f64 * width, (bin as f64 + 1.0) * width);
                let mut low = bottom;
                let parts = [
                    &spent.compute,
                    &spent.data,
                    &spent.wire,
                    &spent.apply,
                    &spent.waiting,
                ];
                let colours = [COLOURS[0], COLOURS[4], COLOURS[2], COLOURS[3], GREY];
                for (part, colour) in parts.into_iter().zip(colours) {
                    let high = low - part[bin] * (bottom - top);
                    if high < low {
                        let bar = Rectangle::new([(left, high), (right, low)], colour.filled());
                        chart.draw_series([bar]).map_err(undrawn)?;
                    }
                    low = high;
                }
            }
            for (times, colour) in [(&row.losses, RGBColor(220, 0, 0)), (&row.moves, BLACK)] {
                for &time in times {
                    let line =
                        LineSeries::new([(time, top), (time, bottom)], colour.stroke_width(2));
                    chart.draw_series(line).map_err(undrawn)?;
                }
            }
            let (_, y) = chart.backend_coord(&(0.0, index as f64 + 0.5));
            let text = Text::new(label(&(index as f64)), (24, y - 7), style(14));
            area.draw(&text).map_err(undrawn)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_an_axis_have_no_needless_digits() {
        for (number, expected) in [
            (0.0, "0"),
            (0.5, "0.5"),
            (2.25, "2.25"),
            (-0.125, "-0.125"),
            (40.0, "40"),
            (123_456.0, "123456"),
            (2e8, "2.0e8"),
            (0.00002, "2.0e-5"),
        ] {
            assert_eq!(short(number), expected);
        }
    }
}
