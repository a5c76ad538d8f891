//! `loss.svg`: both losses over the steps, what the cosine loss would be without looking, and the accuracies; for the
//! report a chart of everything else that is measured, each alone; and curves over another number than steps.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::metrics::{Line, StepMetrics};

const LANGUAGE: RGBColor = RGBColor(0x1f, 0x6f, 0xb4);
const DISTILL: RGBColor = RGBColor(0xd9, 0x6c, 0x1e);
const SPLITS: [RGBColor; 4] =
    [RGBColor(0x2a, 0x8f, 0x4e), RGBColor(0x8e, 0x44, 0xad), RGBColor(0xc0, 0x39, 0x2b), RGBColor(0x16, 0xa0, 0x85)];
const GREY: RGBColor = RGBColor(0x55, 0x55, 0x55);
/// From the first block to the last.
const BLOCKS: [RGBColor; 3] = [LANGUAGE, RGBColor(0x2a, 0x8f, 0x4e), DISTILL];
const WIDTH: u32 = 860;
const PANEL: u32 = 230;
/// Of a chart that stands alone.
const CHART: (u32, u32) = (520, 250);
const HEAD: u32 = 36;
const LINE: i32 = 14;
/// A curve of at most this many points shows each.
const MARKED: usize = 24;
/// A curve has this many points at most, each the mean of its neighbours.
const POINTS: usize = 500;
/// A running mean goes over this part of the run.
const MEANS: usize = 40;
/// So many blocks at most are named.
const NAMED: usize = 7;

/// One curve: points `(step, value)`.
struct Curve {
    name: String,
    color: RGBColor,
    points: Vec<(f64, f64)>,
    dashed: bool,
    opacity: f64,
}

impl Curve {
    fn new(name: &str, color: RGBColor, points: Vec<(f64, f64)>) -> Self {
        Self { name: name.to_owned(), color, points, dashed: false, opacity: 1.0 }
    }
}

/// The accuracies of a split, as points `(step, exact match)`.
#[derive(Default)]
struct Accuracy {
    split: String,
    seeing: Vec<(f64, f64)>,
    blind: Vec<(f64, f64)>,
}

/// Draws a run into `path`: a panel for the language loss, one for the cosine loss, one for the accuracies, each only
/// where the run has such numbers.
///
/// # Errors
/// Where the file cannot be written.
pub fn draw(path: &Path, title: &str, lines: &[Line]) -> Result<()> {
    let panels = panels(lines);
    if panels.is_empty() {
        return Ok(());
    }
    write(path, title, &panels)
}

/// Draws panels into `path`.
fn write(path: &Path, title: &str, panels: &[Panel]) -> Result<()> {
    let mut svg = String::new();
    paint(&mut svg, title, (WIDTH, HEAD + PANEL * panels.len() as u32), panels)
        .map_err(|e| anyhow!("cannot draw {}: {e}", path.display()))?;
    vora_files::write_bytes(path, svg.as_bytes())
}

/// What was measured at several values of one number, `title`: points `(value, measured)` of one panel.
#[derive(Debug)]
pub struct Measured {
    /// What was measured.
    pub name: &'static str,
    /// The most that it can be, where there is a most.
    pub most: Option<f64>,
    /// The points.
    pub points: Vec<(f64, f64)>,
    /// Those of a control beside it, dashed, and its name.
    pub control: Option<(&'static str, Vec<(f64, f64)>)>,
}

/// Draws such panels below each other into `path`.
///
/// # Errors
/// Where the file cannot be written.
pub fn draw_measured(path: &Path, title: &str, measured: Vec<Measured>) -> Result<()> {
    let panel = |Measured { name, most, points, control }: Measured| {
        let control = control.filter(|(_, points)| !points.is_empty());
        let control = control.map(|(name, points)| Curve { dashed: true, ..Curve::new(name, GREY, points) });
        (name, most, control.into_iter().chain([Curve::new(name, LANGUAGE, points)]).collect())
    };
    write(path, title, &measured.into_iter().map(panel).collect::<Vec<_>>())
}

/// Everything that a run measured, as SVG, a chart each.
///
/// # Errors
/// Where a chart cannot be drawn.
pub fn charts(lines: &[Line]) -> Result<Vec<String>> {
    let chart = |panel: Panel| {
        let (mut svg, name) = (String::new(), panel.0);
        paint(&mut svg, "", CHART, &[panel]).map_err(|e| anyhow!("cannot draw {name}: {e}"))?;
        Ok(svg)
    };
    panels(lines).into_iter().chain(more_panels(lines)).map(chart).collect()
}

/// A number of a step, where it has one.
type Number = fn(&StepMetrics) -> Option<f64>;

/// What is measured beside losses and accuracies.
fn more_panels(lines: &[Line]) -> Vec<Panel> {
    let steps = || lines.iter().filter_map(|line| if let Line::Step(step) = line { Some(step) } else { None });
    let of = |value: &dyn Fn(&StepMetrics) -> Option<f64>| -> Vec<(f64, f64)> {
        steps().filter_map(|step| Some((step.step as f64, value(step)?))).collect()
    };
    let blocks = steps().map(|step| step.distill_blocks.len()).max().unwrap_or(0);
    let block = |block: usize| {
        let points = of(&|step| step.distill_blocks.get(block).map(|loss| 1.0 - loss));
        let share = block as f64 / (blocks - 1).max(1) as f64;
        let is_named = block.is_multiple_of(blocks.div_ceil(NAMED)) || block + 1 == blocks;
        let name = if is_named { format!("block {block}") } else { String::new() };
        Curve::new(&name, between(share), running_mean(&points))
    };
    let mut panels: Vec<Panel> = Vec::new();
    if blocks > 0 {
        panels.push(("cosine with the teacher, by block", None, (0..blocks).map(block).collect()));
    }
    let others: [(&str, &str, Number); 5] = [
        ("learning rate", "rate", |step| Some(step.lr)),
        ("norm of the gradient, before clipping", "norm", |step| Some(step.grad_norm)),
        ("tokens a second", "tokens/s", |step| Some(step.tokens_per_second)),
        ("milliseconds of waiting for data, a step", "ms", |step| Some(step.data_wait * 1e3)),
        ("memory in GiB", "GiB", |step| step.memory.map(|bytes| bytes as f64 / f64::from(1 << 30))),
    ];
    for (title, name, value) in others {
        let points = of(&value);
        if !points.is_empty() {
            let curves = if name == "rate" {
                vec![Curve::new(name, LANGUAGE, points)]
            } else {
                smoothed(name, LANGUAGE, points)
            };
            panels.push((title, None, curves));
        }
    }
    panels
}

/// A colour between those of the first block and the last.
fn between(share: f64) -> RGBColor {
    let place = share * (BLOCKS.len() - 1) as f64;
    let i = (place as usize).min(BLOCKS.len() - 2);
    let mix = |a: u8, b: u8| (f64::from(a) + (place - i as f64) * (f64::from(b) - f64::from(a))).round() as u8;
    let (a, b) = (BLOCKS[i], BLOCKS[i + 1]);
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

/// What each panel shows: its title, the value at its top where that is fixed, its curves.
type Panel = (&'static str, Option<f64>, Vec<Curve>);

fn panels(lines: &[Line]) -> Vec<Panel> {
    let (mut language, mut distill, mut baseline) = (Vec::new(), Vec::new(), Vec::new());
    let mut splits: Vec<Accuracy> = Vec::new();
    for line in lines {
        match line {
            Line::Step(step) => {
                let x = step.step as f64;
                language.push((x, step.loss_lm));
                distill.extend(step.loss_distill.map(|y| (x, y)));
                baseline.extend(step.baseline_distill.map(|y| (x, y)));
            }
            Line::Event(_) => {}
            Line::Eval(eval) => {
                for (split, kinds) in &eval.eval.0 {
                    let Some(all) = kinds.get("all") else { continue };
                    let place = splits.iter().position(|s| s.split == *split).unwrap_or_else(|| {
                        splits.push(Accuracy { split: split.clone(), ..Accuracy::default() });
                        splits.len() - 1
                    });
                    let x = eval.step as f64;
                    splits[place].seeing.push((x, all.exact_match));
                    splits[place].blind.extend(all.blind_exact_match.map(|y| (x, y)));
                }
            }
        }
    }
    let mut panels: Vec<Panel> = Vec::new();
    if !language.is_empty() {
        panels.push(("cross-entropy per answer token", None, smoothed("language", LANGUAGE, language)));
    }
    if !distill.is_empty() {
        let mut curves = smoothed("distillation", DISTILL, distill);
        if !baseline.is_empty() {
            curves.push(Curve { dashed: true, ..Curve::new("without looking", GREY, baseline) });
        }
        panels.push(("1 - cosine with the teacher", None, curves));
    }
    if !splits.is_empty() {
        let mut curves = Vec::new();
        for (accuracy, color) in splits.into_iter().zip(SPLITS.into_iter().cycle()) {
            let Accuracy { split, seeing, blind } = accuracy;
            if !blind.is_empty() {
                curves.push(Curve { dashed: true, ..Curve::new(&format!("{split}, wrong picture"), color, blind) });
            }
            curves.push(Curve::new(&split, color, seeing));
        }
        panels.push(("exact match", Some(1.0), curves));
    }
    panels
}

/// The curve itself, pale, and its running mean over a fortieth of the run.
fn smoothed(name: &str, color: RGBColor, points: Vec<(f64, f64)>) -> Vec<Curve> {
    if points.len() < 2 * MEANS {
        return vec![Curve::new(name, color, points)];
    }
    let smooth = running_mean(&points);
    vec![Curve { opacity: 0.4, ..Curve::new("", color, points) }, Curve::new(name, color, smooth)]
}

/// Each value's mean with those before it, over a fortieth of the run.
fn running_mean(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let window = (points.len() / MEANS).max(1);
    let mean = |i: usize| {
        let range = &points[i.saturating_sub(window - 1)..=i];
        (points[i].0, range.iter().map(|p| p.1).sum::<f64>() / range.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

/// At most [`POINTS`] points, each the mean of as many neighbours.
fn thinned(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mean = |chunk: &[(f64, f64)]| {
        let n = chunk.len() as f64;
        (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
    };
    points.chunks(points.len().div_ceil(POINTS).max(1)).map(mean).collect()
}

/// A value, as exact as the largest one beside it makes sensible.
fn number(value: f64, top: f64) -> String {
    match top {
        _ if value == 0.0 => "0".to_owned(),
        ..0.01 => format!("{value:.1e}"),
        ..0.1 => format!("{value:.3}"),
        ..20.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// Draws panels below each other, under a title where there is one.
fn paint(svg: &mut String, title: &str, size: (u32, u32), panels: &[Panel]) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, size).into_drawing_area();
    root.fill(&WHITE)?;
    let (head, body) = root.split_vertically(if title.is_empty() { 0 } else { HEAD });
    if !title.is_empty() {
        head.draw_text(title, &("sans-serif", 17).into_font().color(&BLACK), (58, 11))?;
    }
    let last = panels.iter().flat_map(|p| &p.2).flat_map(|c| &c.points).fold(1.0, |max: f64, p| max.max(p.0));
    for (area, (name, top, curves)) in body.split_evenly((panels.len(), 1)).into_iter().zip(panels) {
        let points = || curves.iter().flat_map(|c| &c.points).map(|p| p.1);
        let top = top.unwrap_or_else(|| points().fold(0.0, f64::max) * 1.05);
        let mut chart = ChartBuilder::on(&area)
            .margin_top(20)
            .margin_right(if size.0 < WIDTH { 132 } else { 190 })
            .margin_bottom(6)
            .x_label_area_size(26)
            .y_label_area_size(58)
            .build_cartesian_2d(0.0..last, 0.0..top.max(1e-6))?;
        chart
            .configure_mesh()
            .light_line_style(WHITE)
            .bold_line_style(RGBColor(0xe6, 0xe6, 0xe6))
            .axis_style(GREY)
            .label_style(("sans-serif", 12).into_font().color(&GREY))
            .x_labels(if size.0 < WIDTH { 5 } else { 9 })
            .y_labels(5)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| number(*y, top))
            .draw()?;
        for curve in curves {
            let points = thinned(&curve.points);
            let style = curve.color.mix(curve.opacity).stroke_width(2);
            if points.len() <= MARKED {
                chart.draw_series(points.iter().map(|&at| Circle::new(at, 3, curve.color.filled())))?;
            }
            if curve.dashed {
                chart.draw_series(DashedLineSeries::new(points, 6, 4, style))?;
            } else {
                chart.draw_series(LineSeries::new(points, style))?;
            }
        }
        area.draw_text(name, &("sans-serif", 13).into_font().color(&GREY), (58, 3))?;
        label(&area, &chart.plotting_area().get_pixel_range(), top, curves)?;
    }
    root.present()?;
    Ok(())
}

/// Names each curve at its right end, with its last value, pushed apart where they would overlap.
fn label(
    area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>,
    (x, y): &(std::ops::Range<i32>, std::ops::Range<i32>),
    top: f64,
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error>> {
    let (left, upper) = area.get_base_pixel();
    let mut labels: Vec<(i32, String, RGBColor)> = curves
        .iter()
        .filter(|c| !c.name.is_empty())
        .filter_map(|c| {
            let (_, value) = *c.points.last()?;
            let height = y.end - ((value / top).clamp(0.0, 1.0) * f64::from(y.end - y.start)) as i32;
            Some((height - upper, format!("{} {}", c.name, number(value, top)), c.color))
        })
        .collect();
    labels.sort_by_key(|l| l.0);
    for i in 1..labels.len() {
        labels[i].0 = labels[i].0.max(labels[i - 1].0 + LINE);
    }
    let mut lowest = y.end - upper - LINE / 2;
    for label in labels.iter_mut().rev() {
        label.0 = label.0.min(lowest);
        lowest = label.0 - LINE;
    }
    for (height, text, color) in labels {
        let style = ("sans-serif", 12).into_font().color(&color).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw_text(&text, &style, (x.end - left + 8, height))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{EvalReport, Score};
    use crate::metrics::EvalMetrics;

    /// A run as it might have been.
    pub(crate) fn example() -> Vec<Line> {
        let mut lines = Vec::new();
        for step in 1..=400u64 {
            let x = step as f64;
            let wiggle = ((x * 12.9898).sin() * 43758.547).fract() * 0.15;
            lines.push(Line::Step(StepMetrics {
                step,
                loss: 0.0,
                loss_lm: 0.3 + 2.5 * (-x / 60.0).exp() + wiggle,
                loss_distill: Some(0.55 + 0.45 * (-x / 150.0).exp() + wiggle * 0.1),
                distill_weight: None,
                distill_blocks: vec![0.5 + 0.4 * (-x / 90.0).exp(), 0.6 + 0.4 * (-x / 200.0).exp()],
                baseline_distill: Some(0.98),
                loss_anchor: None,
                rewards: None,
                lr: 1e-3,
                grad_norm: 1.0,
                samples_per_second: 1.0,
                tokens_per_second: 1.0,
                padding_share: 0.0,
                truncated: 0,
                too_long: 0,
                data_wait: 0.0,
                memory: Some(1 << 30),
                skipped_steps: 0,
                seconds: x,
            }));
            if step % 100 == 0 {
                let score = |m| Score { n: 100, exact_match: m, blind_exact_match: Some(0.3) };
                let kinds = |m| [("all".to_owned(), score(m))].into();
                let eval = EvalReport(
                    [("test".to_owned(), kinds(1.0 - 60.0 / x)), ("unseen".to_owned(), kinds(0.9 - 60.0 / x))].into(),
                );
                lines.push(Line::Eval(EvalMetrics { step, eval }));
            }
        }
        lines
    }

    #[test]
    fn draws_what_a_run_has() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("loss.svg");
        draw(&path, "scenes", &[]).unwrap();
        assert!(!path.exists());
        draw(&path, "scenes", &example()).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["cross-entropy", "without looking", "exact match", "test", "wrong picture"] {
            assert!(svg.contains(text), "no `{text}`");
        }
        let steps: Vec<Line> = example().into_iter().filter(|l| matches!(l, Line::Step(_))).take(3).collect();
        draw(&path, "three steps", &steps).unwrap();
        assert!(!std::fs::read_to_string(&path).unwrap().contains("exact match"));
    }

    #[test]
    fn what_was_measured_is_drawn_beside_its_control() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("budgets.svg");
        let score = Measured {
            name: "exact_match",
            most: Some(1.0),
            points: vec![(16.0, 0.5), (64.0, 0.75)],
            control: Some(("wrong picture", vec![(16.0, 0.25), (64.0, 0.25)])),
        };
        let seconds = Measured { name: "seconds", most: None, points: vec![(16.0, 0.1), (64.0, 0.4)], control: None };
        draw_measured(&path, "max_image_tokens", vec![score, seconds]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        for text in ["max_image_tokens", "exact_match 0.75", "wrong picture 0.25", "seconds 0.40"] {
            assert!(svg.contains(text), "no `{text}`");
        }
    }

    #[test]
    fn each_chart_stands_alone() {
        let charts = charts(&example()).unwrap();
        assert_eq!(charts.len(), 9);
        for (chart, text) in charts.iter().zip(["cross-entropy", "1 - cosine", "exact match", "by block", "rate"]) {
            assert!(chart.starts_with("<svg") && chart.contains(text), "no `{text}`");
        }
        assert!(charts[3].contains("block 0 0.50") && charts[3].contains("block 1 0.34"), "the last cosine of each");
    }

    #[test]
    fn a_long_curve_is_thinned_to_means() {
        let points: Vec<(f64, f64)> = (0..1500).map(|x| (f64::from(x), f64::from(x % 3))).collect();
        let thin = thinned(&points);
        assert_eq!((thin.len(), thin[0], thin[499]), (500, (1.0, 1.0), (1498.0, 1.0)));
        assert_eq!(thinned(&points[..500]), points[..500]);
    }
}
