//! The results as a picture: bars with their medians, and lines from the least to the most.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::contenders::Work;
use crate::results::Results;
use crate::stats::Summary;

const WIDTH: u32 = 900;
const ROW: u32 = 22;
const TITLE: u32 = 40;
/// Where bars begin and end; names stand on their left, numbers on their right.
const BARS: (i32, i32) = (330, 800);

const OURS: RGBColor = RGBColor(0xd9, 0x5f, 0x02);
const RIVAL: RGBColor = RGBColor(0x8d, 0xa0, 0xb5);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);

struct Bar {
    name: String,
    is_ours: bool,
    summary: Summary,
}

/// Draws one panel per work: gradients per second, or the throughput of 100 MB.
pub(crate) fn draw(path: &Path, all: &[Results]) -> Result<()> {
    let panels: Vec<_> = all.iter().map(panel).collect();
    let height = |bars: &Vec<Bar>| TITLE + ROW * bars.len() as u32;
    let total = panels.iter().map(|(_, bars)| height(bars)).sum::<u32>() + ROW;
    let root = SVGBackend::new(path, (WIDTH, total)).into_drawing_area();
    let failed = |error: &dyn std::fmt::Display| anyhow!("the picture cannot be drawn: {error}");
    root.fill(&WHITE).map_err(|error| failed(&error))?;
    let mut top = 0;
    for (title, bars) in &panels {
        draw_panel(&root, top, title, bars).map_err(|error| failed(&error))?;
        top += height(bars) as i32;
    }
    root.present().map_err(|error| failed(&error))
}

fn panel(results: &Results) -> (String, Vec<Bar>) {
    let (key, unit) = match results.work {
        Work::Convnet | Work::Net => ("gradients_per_second", "gradients per second"),
        Work::Transfer => ("100mb_gb_per_s", "100 MB there and back, GB/s"),
    };
    let bars = results.runs.iter().filter_map(|runs| {
        Some(Bar {
            name: runs.contender.what.clone(),
            is_ours: runs.contender.is_ours(),
            summary: runs.summary(key)?,
        })
    });
    let mut bars: Vec<_> = bars.collect();
    bars.sort_by(|a, b| b.summary.median.total_cmp(&a.summary.median));
    (format!("{}: {unit}", results.work.title()), bars)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type DrawResult<'a> =
    Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn draw_panel<'a>(root: &Area<'a>, top: i32, title: &str, bars: &[Bar]) -> DrawResult<'a> {
    let font = ("sans-serif", 16).into_font().color(&INK);
    let bold = ("sans-serif", 19)
        .into_font()
        .style(FontStyle::Bold)
        .color(&INK);
    root.draw(&Text::new(title.to_owned(), (12, top + 16), bold))?;
    let most = bars.iter().map(|bar| bar.summary.max).fold(0.0, f64::max);
    let at = |value: f64| BARS.0 + (f64::from(BARS.1 - BARS.0) * value / most) as i32;
    for (bar, index) in bars.iter().zip(0..) {
        let (upper, height) = (top + TITLE as i32 + index * ROW as i32, ROW as i32);
        let middle = upper + height / 2;
        let Summary {
            median, min, max, ..
        } = bar.summary;
        let color = if bar.is_ours { OURS } else { RIVAL };
        root.draw(&Text::new(bar.name.clone(), (12, middle - 7), font.clone()))?;
        root.draw(&Rectangle::new(
            [(BARS.0, upper + 3), (at(median), upper + height - 3)],
            color.filled(),
        ))?;
        root.draw(&PathElement::new(
            [(at(min), middle), (at(max), middle)],
            INK,
        ))?;
        let digits = if median < 20.0 { 1 } else { 0 };
        let number = format!("{median:.digits$}");
        root.draw(&Text::new(number, (at(max) + 8, middle - 7), font.clone()))?;
    }
    Ok(())
}
