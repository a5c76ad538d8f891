//! Run folders side by side: one table, one picture.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use crate::eval::{EvalReport, Score};
use crate::metrics::{Line, MetricsLog, StepMetrics};
use crate::results::TrainResults;

/// One for each variant, in order.
pub const COLOURS: [RGBColor; 4] =
    [RGBColor(31, 119, 180), RGBColor(214, 39, 40), RGBColor(44, 160, 44), RGBColor(148, 103, 189)];

/// What one run folder says about one training.
#[derive(Debug)]
pub struct Variant {
    name: String,
    steps: Vec<StepMetrics>,
    report: EvalReport,
    results: TrainResults,
}

impl Variant {
    /// Reads `metrics.jsonl`, `eval.json` and `train_results.json` of a run folder.
    ///
    /// # Errors
    /// Where one of them is missing or cannot be read, or no step is in the log.
    pub fn read(name: &str, dir: &Path) -> Result<Self> {
        let ended = || format!("reading the run {}; has this training ended?", dir.display());
        let steps = steps(MetricsLog::read(&dir.join("metrics.jsonl")).with_context(ended)?);
        ensure!(!steps.is_empty(), "{} has no line of a step", dir.join("metrics.jsonl").display());
        let report = EvalReport::open(&dir.join("eval.json")).with_context(ended)?;
        let results = TrainResults::open(dir).with_context(ended)?;
        Ok(Self { name: name.to_owned(), steps, report, results })
    }

    /// Mean over the last tenth of the steps: single steps are noisy.
    fn last(&self, value: impl Fn(&StepMetrics) -> Option<f64>) -> Option<f64> {
        let tail = &self.steps[self.steps.len() - self.steps.len().div_ceil(10)..];
        mean(tail.iter().filter_map(value))
    }

    fn score(&self, (split, question_type): &Key) -> Option<Score> {
        self.report.0.get(split)?.get(question_type).copied()
    }
}

/// A split, and a type of question.
type Key = (String, String);

/// The steps among the lines of a log.
pub fn steps(lines: Vec<Line>) -> Vec<StepMetrics> {
    lines.into_iter().filter_map(|line| if let Line::Step(step) = line { Some(step) } else { None }).collect()
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, n) = values.fold((0.0, 0.0), |(sum, n), value| (sum + value, n + 1.0));
    (n > 0.0).then(|| sum / n)
}

/// One row a measure, one column a variant; exact match is followed by that of the blind control.
pub fn table(variants: &[Variant]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(std::iter::once("").chain(variants.iter().map(|v| v.name.as_str())));
    let mut row = |name: String, cell: &dyn Fn(&Variant) -> Option<String>| {
        let cells = variants.iter().map(|variant| cell(variant).unwrap_or_else(|| "-".to_owned()));
        table.add_row(std::iter::once(name).chain(cells));
    };
    row("steps".into(), &|v| Some(v.steps.len().to_string()));
    row("trained parameters".into(), &|v| Some(format!("{:.2}M", v.results.trained_parameters as f64 / 1e6)));
    row("seconds a step".into(), &|v| Some(format!("{:.2}", 1.0 / v.results.train_steps_per_second)));
    row("peak memory".into(), &|v| v.results.peak_memory.map(|n| format!("{:.2} GiB", n as f64 / 1024f64.powi(3))));
    row("cross-entropy, last tenth".into(), &|v| v.last(|s| Some(s.loss_lm)).map(|x| format!("{x:.3}")));
    row("distillation, last tenth".into(), &|v| v.last(|s| s.loss_distill).map(|x| format!("{x:.3}")));
    row("samples/s".into(), &|v| mean(v.steps.iter().map(|s| s.samples_per_second)).map(|x| format!("{x:.1}")));
    for key in keys(variants) {
        row(format!("{}: {}", key.0, key.1), &|v| {
            v.score(&key).map(|score| {
                let blind = score.blind_exact_match.map_or_else(|| "-".to_owned(), |blind| format!("{blind:.3}"));
                format!("{:.3} (blind {blind}, n {})", score.exact_match, score.n)
            })
        });
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Every split and question type that some variant has.
fn keys(variants: &[Variant]) -> Vec<Key> {
    let splits = variants.iter().flat_map(|variant| &variant.report.0);
    let keys = splits.flat_map(|(split, types)| types.keys().map(|of| (split.clone(), of.clone())));
    keys.collect::<BTreeSet<_>>().into_iter().collect()
}

/// Writes an SVG: the two losses over the steps above, exact match by question type below, a black line for the blind control.
///
/// # Errors
/// Where the file cannot be written.
pub fn draw(variants: &[Variant], path: &Path) -> Result<()> {
    let keys = keys(variants);
    let root = SVGBackend::new(path, (960, 720)).into_drawing_area();
    root.fill(&WHITE)?;
    let (losses, accuracies) = root.split_vertically(360);
    let (left, right) = losses.split_horizontally(480);
    draw_loss(&left, "cross-entropy", variants, |s| Some(s.loss_lm))?;
    draw_loss(&right, "distillation (cosine loss)", variants, |s| s.loss_distill)?;
    draw_accuracy(&accuracies, variants, &keys)?;
    root.present().with_context(|| format!("cannot write {}", path.display()))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn draw_loss(
    area: &Area,
    title: &str,
    variants: &[Variant],
    value: impl Fn(&StepMetrics) -> Option<f64>,
) -> Result<()> {
    let lines: Vec<_> = variants.iter().map(|variant| smooth(variant, &value)).collect();
    let points = || lines.iter().flatten();
    let steps = points().fold(1.0_f64, |max, p| max.max(p.0));
    let top = points().fold(f64::MIN_POSITIVE, |max, p| max.max(p.1));
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .margin_right(20)
        .x_label_area_size(30)
        .y_label_area_size(45)
        .build_cartesian_2d(0.0..steps, 0.0..top * 1.05)?;
    chart.configure_mesh().x_desc("step").x_label_formatter(&|step| format!("{step:.0}")).max_light_lines(0).draw()?;
    let names = variants.iter().map(|variant| variant.name.as_str());
    draw_curves(&mut chart, names.zip(lines), SeriesLabelPosition::UpperRight)
}

/// A chart over two axes of numbers.
pub type Chart<'a> = ChartContext<'a, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// A curve for each name, in its colour, and the legend.
///
/// # Errors
/// What the drawing says.
pub fn draw_curves<'a>(
    chart: &mut Chart<'_>,
    curves: impl Iterator<Item = (&'a str, Vec<(f64, f64)>)>,
    legend: SeriesLabelPosition,
) -> Result<()> {
    for ((name, curve), colour) in curves.zip(COLOURS) {
        let series = chart.draw_series(LineSeries::new(curve, colour.stroke_width(2)))?;
        series.label(name).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// `(step, running mean)`: over a fiftieth of the training, so that the two curves can be told apart.
fn smooth(variant: &Variant, value: impl Fn(&StepMetrics) -> Option<f64>) -> Vec<(f64, f64)> {
    let points: Vec<_> = variant.steps.iter().filter_map(|s| Some((s.step as f64, value(s)?))).collect();
    let window = points.len().div_ceil(50).max(1);
    let running = |i: usize| mean(points[i.saturating_sub(window - 1)..=i].iter().map(|p| p.1)).unwrap_or_default();
    (0..points.len()).map(|i| (points[i].0, running(i))).collect()
}

fn draw_accuracy(area: &Area, variants: &[Variant], keys: &[Key]) -> Result<()> {
    let groups = keys.len().max(1);
    let mut chart = ChartBuilder::on(area)
        .caption("exact match (black: shown another picture)", ("sans-serif", 16))
        .margin(10)
        .x_label_area_size(45)
        .y_label_area_size(45)
        .build_cartesian_2d(0.0..groups as f64, 0.0..1.0)?;
    let plot = chart.plotting_area().strip_coord_spec();
    chart.configure_mesh().disable_x_axis().disable_x_mesh().max_light_lines(0).draw()?;
    let (width, height) = plot.dim_in_pixel();
    let (left, top) =
        (plot.get_base_pixel().0 - area.get_base_pixel().0, plot.get_base_pixel().1 - area.get_base_pixel().1);
    let style = ("sans-serif", 12).into_text_style(area).pos(plotters::style::text_anchor::Pos::new(
        plotters::style::text_anchor::HPos::Center,
        plotters::style::text_anchor::VPos::Top,
    ));
    let bar = 0.8 / variants.len().max(1) as f64;
    for (group, key) in keys.iter().enumerate() {
        for (i, (variant, colour)) in variants.iter().zip(COLOURS).enumerate() {
            let Some(score) = variant.score(key) else { continue };
            let (from, to) = (group as f64 + 0.1 + bar * i as f64, group as f64 + 0.1 + bar * (i + 1) as f64);
            chart.draw_series([Rectangle::new([(from, 0.0), (to, score.exact_match)], colour.filled())])?;
            chart.draw_series(
                score
                    .blind_exact_match
                    .map(|blind| Rectangle::new([(from, blind - 0.004), (to, blind + 0.004)], BLACK.filled())),
            )?;
        }
        let x = left + (width as f64 * (group as f64 + 0.5) / groups as f64) as i32;
        for (line, text) in [&key.1, &key.0].into_iter().enumerate() {
            area.draw(&Text::new(text.clone(), (x, top + height as i32 + 6 + 15 * line as i32), style.clone()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// A run folder, read.
    fn variant(name: &str, level: f64) -> Variant {
        let metrics: String = (1..=200)
            .map(|step| {
                let loss = level + 3.0 / f64::from(step);
                let distill = 0.2 + level / f64::from(step);
                format!(
                    "{{\"step\":{step},\"loss\":1.0,\"loss_lm\":{loss},\"loss_distill\":{distill},\"lr\":1e-3,\
                     \"grad_norm\":1.0,\"samples_per_second\":20,\"tokens_per_second\":80,\"data_wait\":0,\
                     \"seconds\":{step}}}\n"
                )
            })
            .collect();
        let eval = r#"{"test":{"colour":{"n":100,"exact_match":0.97,"blind_exact_match":0.1},
            "shape":{"n":100,"exact_match":0.5,"blind_exact_match":0.2}},
            "unseen":{"shape":{"n":50,"exact_match":0.4,"blind_exact_match":null}}}"#;
        let results = r#"{"steps":200,"train_runtime":400.0,"train_steps_per_second":0.5,
            "trained_parameters":7020000,"peak_memory":3221225472}"#;
        let dir = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(dir.path().join(file), text).unwrap();
        write("metrics.jsonl", &(metrics + "{\"step\":200,\"eval\":{}}\n"));
        write("eval.json", eval);
        write("train_results.json", results);
        Variant::read(name, dir.path()).unwrap()
    }

    #[test]
    fn table_has_each_measure_of_each_variant() {
        let table = table(&[variant("bidirectional", 0.1), variant("causal", 0.2)]).to_string();
        for text in [
            "bidirectional",
            "causal",
            "unseen: shape",
            "0.970 (blind 0.100, n 100)",
            "0.400 (blind -, n 50)",
            "7.02M",
            "2.00",
            "3.00 GiB",
            "0.116",
            "20.0",
        ] {
            assert!(table.contains(text), "no `{text}` in\n{table}");
        }
    }

    #[test]
    fn picture_has_both_curves_and_all_bars() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.svg");
        draw(&[variant("bidirectional", 0.1), variant("causal", 0.2)], &path).unwrap();
        let svg = fs::read_to_string(&path).unwrap();
        assert!(svg.matches("<polyline").count() >= 4, "two losses of two variants");
        for text in ["causal", "cross-entropy", "unseen", "colour"] {
            assert!(svg.contains(text), "no `{text}` in the picture");
        }
    }

    #[test]
    fn a_run_that_has_not_ended_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let error = |dir: &Path| format!("{:#}", Variant::read("x", dir).unwrap_err());
        let nowhere = error(Path::new("/nowhere"));
        assert!(nowhere.starts_with("reading the run /nowhere; has this training ended?: cannot read"), "{nowhere}");
        fs::write(dir.path().join("metrics.jsonl"), "{\"step\":1,\"eval\":{}}\n").unwrap();
        assert!(error(dir.path()).ends_with("metrics.jsonl has no line of a step"), "{}", error(dir.path()));
        fs::write(dir.path().join("metrics.jsonl"), "{\"step\":1}\n").unwrap();
        assert!(error(dir.path()).contains("metrics.jsonl:1 is not a line of metrics"), "{}", error(dir.path()));
    }
}
