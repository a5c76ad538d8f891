//! The picture: a panel for each split, a row for each variant, a point for each seed.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use vora_run::interval::Interval;
use vora_run::side_by_side::COLOURS;

use super::variant::Variant;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Sizes in pixels.
const NAMES: u32 = 270;
const PANEL: u32 = 260;
const ROW: u32 = 34;
const FRAME: u32 = 70;

/// Writes an SVG: points are seeds, bars the 95% intervals of their means; bidirectional and causal differ in colour.
pub fn draw(variants: &[Variant], splits: &[String], path: &Path) -> Result<()> {
    let size = (NAMES + PANEL * splits.len() as u32, FRAME + ROW * variants.len() as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (names, panels) = root.split_horizontally(NAMES);
    for (row, variant) in variants.iter().enumerate() {
        let style = ("sans-serif", 13).into_text_style(&names).pos(Pos::new(HPos::Right, VPos::Center));
        let middle = 30.0 + ROW as f64 * (row as f64 + 0.5);
        names.draw(&Text::new(variant.names().join(", "), (NAMES as i32 - 6, middle as i32), style))?;
    }
    for (area, split) in panels.split_evenly((1, splits.len())).iter().zip(splits) {
        panel(area, variants, split)?;
    }
    root.present().with_context(|| format!("cannot write {}", path.display()))
}

fn panel(area: &Area, variants: &[Variant], split: &str) -> Result<()> {
    let rows = variants.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .margin_top(30)
        .margin_bottom(5)
        .margin_right(16)
        .margin_left(4)
        .x_label_area_size(FRAME - 35)
        .build_cartesian_2d(0.0..1.0, rows..0.0)?;
    let caption = ("sans-serif", 15).into_text_style(area).pos(Pos::new(HPos::Center, VPos::Top));
    area.draw(&Text::new(split.to_owned(), (PANEL as i32 / 2, 8), caption))?;
    let label = |share: &f64| format!("{share:.1}");
    chart
        .configure_mesh()
        .disable_y_axis()
        .disable_y_mesh()
        .x_labels(6)
        .x_label_formatter(&label)
        .x_desc("exact match")
        .draw()?;
    for (row, variant) in variants.iter().enumerate() {
        let (y, colour) = (row as f64 + 0.5, COLOURS[variant.levels[0]]);
        let scores: Vec<f64> = variant.scores(split).into_iter().map(|(_, score)| score).collect();
        if let Some(Interval { low, high }) = Interval::of_mean(&scores) {
            // An interval of scores that are all near 1 goes beyond it.
            let [low, high] = [low, high].map(|end| end.clamp(0.0, 1.0));
            chart.draw_series([Rectangle::new([(low, y - 0.12), (high, y + 0.12)], colour.mix(0.25).filled())])?;
            let mean = scores.iter().sum::<f64>() / scores.len() as f64;
            chart.draw_series([PathElement::new([(mean, y - 0.3), (mean, y + 0.3)], colour.stroke_width(2))])?;
        }
        chart.draw_series(scores.iter().map(|&score| Circle::new((score, y), 3, colour.mix(0.7).filled())))?;
    }
    Ok(())
}
