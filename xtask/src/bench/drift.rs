//! `cargo xtask bench drift`: trains `benches/examples/drift.rs`'s four variants, then one table and one picture of them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table};
use plotters::prelude::*;
use serde_json::Value;
use vora_run::side_by_side::draw_curves;

use crate::{cmd, setup};

/// What is drawn: its key in `metrics.jsonl`, its name, whether its axis is logarithmic.
const PANELS: [(&str, &str, bool); 4] = [
    ("output_norm", "output norm", true),
    ("log_z", "log Z", false),
    ("max_attention_logit", "largest logit of attention", true),
    ("loss", "cross-entropy", true),
];

/// The lines of one variant, in the order of its steps.
#[derive(Debug)]
struct Variant {
    name: String,
    lines: Vec<Value>,
}

/// Trains, unless `plot`, with `args` for the example; then writes `drift.txt` and `drift.svg` beside `metrics.jsonl`.
pub fn run(out: &Path, plot: bool, args: &[String]) -> Result<()> {
    if !plot {
        setup::ensure()?;
        cmd::run(super::example("drift").arg("--out").arg(out).args(args))?;
    }
    let path = out.join("metrics.jsonl");
    let jsonl = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let variants = variants(&jsonl).with_context(|| path.display().to_string())?;
    let (table, svg) = (table(&variants), out.join("drift.svg"));
    println!("{table}");
    fs::write(svg.with_extension("txt"), format!("{table}\n")).context("cannot write drift.txt")?;
    draw(&variants, &svg)?;
    println!("{} and drift.txt beside it", cmd::shown(&svg));
    Ok(())
}

fn variants(jsonl: &str) -> Result<Vec<Variant>> {
    let mut variants: Vec<Variant> = Vec::new();
    for (i, line) in jsonl.lines().enumerate() {
        let line: Value = serde_json::from_str(line).with_context(|| format!("line {}", i + 1))?;
        let name = line["variant"].as_str().with_context(|| format!("line {} has no `variant`", i + 1))?.to_owned();
        match variants.iter_mut().find(|variant| variant.name == name) {
            Some(variant) => variant.lines.push(line),
            None => variants.push(Variant { name, lines: vec![line] }),
        }
    }
    ensure!(!variants.is_empty(), "no line");
    Ok(variants)
}

impl Variant {
    /// `(step, value)` where a step has that key; what was not finite is null there, and is left out.
    fn points(&self, key: &str) -> Vec<(f64, f64)> {
        self.lines.iter().filter_map(|line| Some((line["step"].as_f64()?, line[key].as_f64()?))).collect()
    }

    /// Mean over the last tenth of what was measured.
    fn last(&self, key: &str) -> Option<f64> {
        let points = self.points(key);
        let tail = &points[points.len() - points.len().div_ceil(10)..];
        (!tail.is_empty()).then(|| tail.iter().map(|p| p.1).sum::<f64>() / tail.len() as f64)
    }
}

/// One row a variant; means over the last tenth of the steps, and the largest of all attention logits.
fn table(variants: &[Variant]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header([
        "",
        "steps",
        "cross-entropy",
        "of pictures",
        "of words",
        "output norm",
        "log Z",
        "attention logit, largest",
    ]);
    for variant in variants {
        let last =
            |key: &str, places: usize| variant.last(key).map_or("-".to_owned(), |value| format!("{value:.places$}"));
        let largest = variant.points("max_attention_logit").into_iter().map(|p| p.1).reduce(f64::max);
        table.add_row([
            variant.name.clone(),
            variant.lines.len().to_string(),
            last("loss", 3),
            last("loss_image", 3),
            last("loss_text", 3),
            last("output_norm", 1),
            last("log_z", 2),
            largest.map_or("-".to_owned(), |value| format!("{value:.1}")),
        ]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// Writes an SVG of four panels over the steps.
fn draw(variants: &[Variant], path: &Path) -> Result<()> {
    let root = SVGBackend::new(path, (960, 680)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (key, title, logarithmic)) in root.split_evenly((2, 2)).iter().zip(PANELS) {
        let curves: Vec<Vec<(f64, f64)>> = variants.iter().map(|variant| variant.points(key)).collect();
        panel(area, title, logarithmic, variants, curves)?;
    }
    root.present().with_context(|| format!("cannot write {}", path.display()))
}

fn panel(
    area: &Area,
    title: &str,
    logarithmic: bool,
    variants: &[Variant],
    mut curves: Vec<Vec<(f64, f64)>>,
) -> Result<()> {
    // A logarithmic axis is one of exponents, so that both kinds are drawn by the same lines.
    if logarithmic {
        for curve in &mut curves {
            curve.retain(|point| point.1 > 0.0);
            curve.iter_mut().for_each(|point| point.1 = point.1.log10());
        }
    }
    let points = || curves.iter().flatten();
    let (low, high) = points().fold((f64::MAX, f64::MIN), |(low, high), p| (low.min(p.1), high.max(p.1)));
    ensure!(low <= high, "no value of {title} is finite");
    let steps = points().fold(1.0_f64, |max, p| max.max(p.0));
    let room = ((high - low) * 0.05).max(1e-3);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 16))
        .margin(10)
        .margin_right(20)
        .x_label_area_size(30)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..steps, low - room..high + room)?;
    let label = |y: &f64| if logarithmic { format!("{:.2}", 10f64.powf(*y)) } else { format!("{y:.1}") };
    chart
        .configure_mesh()
        .x_desc("step")
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(&label)
        .max_light_lines(0)
        .draw()?;
    let names = variants.iter().map(|variant| variant.name.as_str());
    draw_curves(&mut chart, names.zip(curves), SeriesLabelPosition::LowerRight)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> String {
        let line = |variant: &str, step: u64| {
            let look =
                if step.is_multiple_of(10) { format!(",\"max_attention_logit\":{step}.5") } else { String::new() };
            format!(
                "{{\"variant\":\"{variant}\",\"step\":{step},\"loss\":{},\"loss_image\":1.0,\"loss_text\":null,\
                 \"output_norm\":{step},\"log_z\":-2.5{look}}}\n",
                3.0 / step as f64
            )
        };
        ["both", "neither"].iter().flat_map(|variant| (1..=40).map(|step| line(variant, step))).collect()
    }

    #[test]
    fn table_has_what_was_measured_at_the_end() {
        let table = table(&variants(&example()).unwrap()).to_string();
        // Steps 37 to 40 are the last tenth.
        for text in ["both", "neither", "   40 |", "38.5", "-2.50", "0.078", "40.5", " - |"] {
            assert!(table.contains(text), "no `{text}` in\n{table}");
        }
    }

    #[test]
    fn picture_has_every_panel() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("drift.svg");
        draw(&variants(&example()).unwrap(), &path).unwrap();
        let svg = fs::read_to_string(&path).unwrap();
        for (_, title, _) in PANELS {
            assert!(svg.contains(title), "no `{title}` in the picture");
        }
        assert!(svg.matches("<polyline").count() >= 8);
    }

    #[test]
    fn wrong_lines_are_explained() {
        assert_eq!(variants("").unwrap_err().to_string(), "no line");
        assert_eq!(variants("{\"step\":1}\n").unwrap_err().to_string(), "line 1 has no `variant`");
        assert_eq!(variants("{\"variant\":\"both\"}\n{").unwrap_err().to_string(), "line 2");
    }
}
