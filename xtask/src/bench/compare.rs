//! Run folders side by side: one table, one picture.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use serde_json::Value;

/// One for each variant, in order.
pub const COLOURS: [RGBColor; 4] =
    [RGBColor(31, 119, 180), RGBColor(214, 39, 40), RGBColor(44, 160, 44), RGBColor(148, 103, 189)];

/// What one run folder says about one training.
#[derive(Debug)]
pub struct Variant {
    name: String,
    steps: Vec<Step>,
    accuracy: BTreeMap<(String, String), Accuracy>, // by split and kind of question
    results: Value,                                 // train_results.json
}

/// The numbers of one line of `metrics.jsonl` that are compared.
#[derive(Debug, Clone, Copy)]
struct Step {
    step: f64,
    loss_lm: f64,
    loss_distill: Option<f64>, // none where nothing is distilled
    samples_per_second: Option<f64>,
}

/// One entry of `eval.json`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Accuracy {
    n: f64,
    exact_match: f64,
    blind: Option<f64>, // none where there was no control
}

impl Variant {
    /// Reads `metrics.jsonl` and `eval.json` of a run folder.
    pub fn read(name: &str, dir: &Path) -> Result<Self> {
        let read = |file: &str| {
            let path = dir.join(file);
            fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}; has this training ended?", path.display()))
        };
        let steps = steps(&read("metrics.jsonl")?).with_context(|| format!("{}/metrics.jsonl", dir.display()))?;
        let accuracy = accuracy(&read("eval.json")?).with_context(|| format!("{}/eval.json", dir.display()))?;
        let results = serde_json::from_str(&read("train_results.json")?)
            .with_context(|| format!("{}/train_results.json", dir.display()))?;
        Ok(Self { name: name.to_owned(), steps, accuracy, results })
    }

    /// Mean over the last tenth of the steps: single steps are noisy.
    fn last(&self, value: impl Fn(&Step) -> Option<f64>) -> Option<f64> {
        let tail = &self.steps[self.steps.len() - self.steps.len().div_ceil(10)..];
        mean(tail.iter().filter_map(value))
    }
}

/// Lines that are no training step (an evaluation between, say) have no `loss_lm` and are passed over.
fn steps(jsonl: &str) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for (i, line) in jsonl.lines().enumerate() {
        let value: Value = serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
        let number = |key: &str| value[key].as_f64();
        if let (Some(step), Some(loss_lm)) = (number("step"), number("loss_lm")) {
            let (loss_distill, samples_per_second) = (number("loss_distill"), number("samples_per_second"));
            steps.push(Step { step, loss_lm, loss_distill, samples_per_second });
        }
    }
    ensure!(!steps.is_empty(), "no line has `step` and `loss_lm`");
    Ok(steps)
}

fn accuracy(json: &str) -> Result<BTreeMap<(String, String), Accuracy>> {
    let value: Value = serde_json::from_str(json)?;
    let mut accuracy = BTreeMap::new();
    for (split, kinds) in value.as_object().context("it must hold {split: {kind: ..}}")? {
        for (kind, entry) in kinds.as_object().with_context(|| format!("`{split}` must hold {{kind: ..}}"))? {
            let number = |key| entry[key].as_f64().with_context(|| format!("`{split}.{kind}` has no number `{key}`"));
            let blind = entry["blind_exact_match"].as_f64();
            let entry = Accuracy { n: number("n")?, exact_match: number("exact_match")?, blind };
            accuracy.insert((split.clone(), kind.clone()), entry);
        }
    }
    Ok(accuracy)
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
    let result = |v: &Variant, key: &str| v.results[key].as_f64();
    row("trained parameters".into(), &|v| result(v, "trained_parameters").map(|n| format!("{:.2}M", n / 1e6)));
    row("seconds a step".into(), &|v| result(v, "train_steps_per_second").map(|rate| format!("{:.2}", 1.0 / rate)));
    row("peak memory".into(), &|v| result(v, "peak_memory").map(|n| format!("{:.2} GiB", n / 1024f64.powi(3))));
    row("cross-entropy, last tenth".into(), &|v| v.last(|s| Some(s.loss_lm)).map(|x| format!("{x:.3}")));
    row("distillation, last tenth".into(), &|v| v.last(|s| s.loss_distill).map(|x| format!("{x:.3}")));
    row("samples/s".into(), &|v| mean(v.steps.iter().filter_map(|s| s.samples_per_second)).map(|x| format!("{x:.1}")));
    for key in keys(variants) {
        row(format!("{}: {}", key.0, key.1), &|v| {
            v.accuracy.get(&key).map(|a| {
                let blind = a.blind.map_or_else(|| "-".to_owned(), |blind| format!("{blind:.3}"));
                format!("{:.3} (blind {blind}, n {})", a.exact_match, a.n)
            })
        });
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Every split and kind that some variant has.
fn keys(variants: &[Variant]) -> Vec<(String, String)> {
    let mut keys: Vec<_> = variants.iter().flat_map(|variant| variant.accuracy.keys().cloned()).collect();
    keys.sort();
    keys.dedup();
    keys
}

/// Writes an SVG: the two losses over the steps above, exact match by kind below, a black line for the blind control.
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

fn draw_loss(area: &Area, title: &str, variants: &[Variant], value: impl Fn(&Step) -> Option<f64>) -> Result<()> {
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
fn smooth(variant: &Variant, value: impl Fn(&Step) -> Option<f64>) -> Vec<(f64, f64)> {
    let points: Vec<_> = variant.steps.iter().filter_map(|s| Some((s.step, value(s)?))).collect();
    let window = points.len().div_ceil(50).max(1);
    let running = |i: usize| mean(points[i.saturating_sub(window - 1)..=i].iter().map(|p| p.1)).unwrap_or_default();
    (0..points.len()).map(|i| (points[i].0, running(i))).collect()
}

fn draw_accuracy(area: &Area, variants: &[Variant], keys: &[(String, String)]) -> Result<()> {
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
            let Some(accuracy) = variant.accuracy.get(key) else { continue };
            let (from, to) = (group as f64 + 0.1 + bar * i as f64, group as f64 + 0.1 + bar * (i + 1) as f64);
            chart.draw_series([Rectangle::new([(from, 0.0), (to, accuracy.exact_match)], colour.filled())])?;
            chart.draw_series(
                accuracy
                    .blind
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
    use super::*;

    fn variant(name: &str, level: f64) -> Variant {
        let metrics: String = (1..=200)
            .map(|step| {
                let loss = level + 3.0 / step as f64;
                let distill = 0.2 + level / step as f64;
                format!("{{\"step\":{step},\"loss\":1.0,\"loss_lm\":{loss},\"loss_distill\":{distill},\"samples_per_second\":20}}\n")
            })
            .collect();
        let eval = r#"{"test":{"colour":{"n":100,"exact_match":0.97,"blind_exact_match":0.1},
            "shape":{"n":100,"exact_match":0.5,"blind_exact_match":0.2}},
            "unseen":{"shape":{"n":50,"exact_match":0.4,"blind_exact_match":null}}}"#;
        let results = serde_json::json!({
            "train_steps_per_second": 0.5, "trained_parameters": 7_020_000, "peak_memory": 3u64 << 30
        });
        Variant { name: name.into(), steps: steps(&metrics).unwrap(), accuracy: accuracy(eval).unwrap(), results }
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
    fn wrong_files_are_explained() {
        assert_eq!(steps("{\"step\":1}\n").unwrap_err().to_string(), "no line has `step` and `loss_lm`");
        assert_eq!(format!("{}", steps("{\"step\":1,\"loss_lm\":2}\n{").unwrap_err()), "line 2");
        let err = accuracy(r#"{"test":{"shape":{"n":1}}}"#).unwrap_err().to_string();
        assert_eq!(err, "`test.shape` has no number `exact_match`");
        let err = format!("{:#}", Variant::read("x", Path::new("/nowhere")).unwrap_err());
        assert!(err.starts_with("cannot read /nowhere/metrics.jsonl; has this training ended?"), "{err}");
    }
}
