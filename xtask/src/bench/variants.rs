//! `cargo xtask bench attention --variants`: what `benches/examples/variants.rs` measures, as one table and one picture.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table};
use plotters::prelude::*;
use serde::Deserialize;
use vora_run::side_by_side::draw_curves;

use crate::{cmd, setup};

/// One line of the example's JSON.
#[derive(Debug, Deserialize)]
struct Measured {
    layout: String,
    kernel: String,
    dtype: String,
    picture_tokens: u64,
    milliseconds: [f64; 2],
    mebibytes: Option<f64>,
    gflop: [f64; 2],
}

impl Measured {
    /// 10^9 operations a second, forward and backward.
    fn speed(&self) -> f64 {
        self.gflop[1] / self.milliseconds[1] * 1e3
    }
}

/// Measures, unless `plot`, with `args` for the example; then writes `variants.txt` and `variants.svg` beside its JSON.
pub fn run(out: &Path, plot: bool, args: &[String]) -> Result<()> {
    let json = out.join("variants.json");
    if !plot {
        setup::ensure()?;
        fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        cmd::run(super::example("variants").arg("--json").arg(&json).args(args))?;
    }
    let text = fs::read_to_string(&json).with_context(|| format!("cannot read {}", json.display()))?;
    let all: Vec<Measured> = serde_json::from_str(&text).with_context(|| json.display().to_string())?;
    let (table, svg) = (format!("{}\n\n{}", table(&all), ratios(&all)), json.with_extension("svg"));
    println!("{table}");
    fs::write(json.with_extension("txt"), format!("{table}\n")).context("cannot write variants.txt")?;
    draw(&all, &svg)?;
    println!("{} and variants.txt beside it", cmd::shown(&svg));
    Ok(())
}

fn table(all: &[Measured]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["", "kernel", "kind", "picture tokens", "forward ms", "and backward", "GFLOP/s", "MiB"]);
    for m in all {
        let [forward, both] = m.milliseconds;
        table.add_row([
            m.layout.clone(),
            m.kernel.clone(),
            m.dtype.clone(),
            m.picture_tokens.to_string(),
            format!("{forward:.2}"),
            format!("{both:.2}"),
            format!("{:.1}", m.speed()),
            m.mebibytes.map_or("-".to_owned(), |held| format!("{held:.1}")),
        ]);
    }
    for column in table.column_iter_mut().skip(3) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What bidirectional attention takes over causal, forward and backward, beside what it computes more.
fn ratios(all: &[Measured]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["bidirectional over causal", "kind", "picture tokens", "ms", "operations", "ms over operations"]);
    for both in all.iter().filter(|m| m.layout == "bidirectional") {
        let is_same =
            |m: &&Measured| (&m.kernel, &m.dtype, m.picture_tokens) == (&both.kernel, &both.dtype, both.picture_tokens);
        let Some(causal) = all.iter().filter(|m| m.layout == "causal").find(is_same) else { continue };
        let (ms, gflop) = (both.milliseconds[1] / causal.milliseconds[1], both.gflop[1] / causal.gflop[1]);
        let numbers = [ms, gflop, ms / gflop].map(|x| format!("{x:.2}"));
        let names = [both.kernel.clone(), both.dtype.clone(), both.picture_tokens.to_string()];
        table.add_row(names.into_iter().chain(numbers));
    }
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Writes an SVG of a panel for each layout and kind: operations a second over the picture's tokens.
fn draw(all: &[Measured], path: &Path) -> Result<()> {
    let distinct = |of: fn(&Measured) -> &str| {
        let mut names: Vec<&str> = Vec::new();
        all.iter().map(of).for_each(|name| names.extend((!names.contains(&name)).then_some(name)));
        names
    };
    let (layouts, kernels, dtypes) = (distinct(|m| &m.layout), distinct(|m| &m.kernel), distinct(|m| &m.dtype));
    let highest = all.iter().map(Measured::speed).fold(1.0, f64::max);
    let size = (260 * layouts.len() as u32, 260 * dtypes.len() as u32);
    let root = SVGBackend::new(path, size).into_drawing_area();
    root.fill(&WHITE)?;
    let panels = dtypes.iter().flat_map(|dtype| layouts.iter().map(move |layout| (dtype, layout)));
    for (area, (dtype, layout)) in root.split_evenly((dtypes.len(), layouts.len())).iter().zip(panels) {
        let mine = || all.iter().filter(|m| m.dtype == **dtype && m.layout == **layout);
        // The axis is one of exponents of two.
        let place = |m: &Measured| (m.picture_tokens as f64).log2();
        let (from, to) = mine().map(place).fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(x), high.max(x)));
        let mut chart = ChartBuilder::on(area)
            .caption(format!("{layout}, {dtype}: GFLOP/s by tokens"), ("sans-serif", 14))
            .margin(8)
            .x_label_area_size(28)
            .y_label_area_size(32)
            .build_cartesian_2d(from - 0.2..to + 0.2, 0.0..highest * 1.5)?;
        chart.configure_mesh().disable_mesh().x_label_formatter(&|x| format!("{:.0}", x.exp2())).draw()?;
        let curve = |kernel: &str| mine().filter(|m| m.kernel == kernel).map(|m| (place(m), m.speed())).collect();
        draw_curves(&mut chart, kernels.iter().map(|kernel| (*kernel, curve(kernel))), SeriesLabelPosition::UpperLeft)?;
    }
    root.present().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_of_the_same_kernel_kind_and_size() {
        let measured = |layout: &str, kernel: &str, picture_tokens, ms, gflop| Measured {
            layout: layout.to_owned(),
            kernel: kernel.to_owned(),
            dtype: "bf16".to_owned(),
            picture_tokens,
            milliseconds: [1.0, ms],
            mebibytes: None,
            gflop: [1.0, gflop],
        };
        let all = [
            measured("bidirectional", "own", 64, 3.0, 8.0),
            measured("causal", "mask", 64, 9.0, 4.0),
            measured("causal", "own", 256, 8.0, 4.0),
            measured("causal", "own", 64, 2.0, 4.0),
        ];
        let rows: Vec<Vec<String>> =
            ratios(&all).row_iter().map(|row| row.cell_iter().map(|cell| cell.content()).collect()).collect();
        assert_eq!(rows, [["own", "bf16", "64", "1.50", "2.00", "0.75"]]);
    }
}
