//! The variants' means, and what each factor changes, in Markdown.

use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table};
use vora_run::interval::Interval;

use super::variant::{FACTORS, Factor, Variant, splits};

/// The variants' means and what each factor changes, in Markdown.
pub fn text(variants: &[Variant]) -> Result<String> {
    let splits = splits(variants);
    ensure!(!splits.is_empty(), "no training has ended, or none is asked about held-out data (`data.eval`)");
    Ok(format!(
        "Exact match: mean over the seeds, with its 95% interval (Student's t).\n\n{}\n\nDifferences between trainings of \
         one seed: their mean, with its 95% interval (paired t).\n\n{}\n",
        means(variants, &splits),
        differences(variants, &splits)
    ))
}

fn means(variants: &[Variant], splits: &[String]) -> Table {
    let mut table = table(FACTORS.map(|factor| factor.name).into_iter().chain(["seeds"]), splits);
    for variant in variants {
        let ended = variant.runs.iter().filter(|(_, report)| report.is_some()).count();
        let seeds = match variant.runs.len() {
            all if all == ended => all.to_string(),
            all => format!("{ended} of {all}"),
        };
        let scores = splits.iter().map(|split| {
            let scores: Vec<f64> = variant.scores(split).into_iter().map(|(_, score)| score).collect();
            mean_and_interval(&scores, |score| format!("{score:.3}"))
        });
        table.add_row(variant.names().map(str::to_owned).into_iter().chain([seeds]).chain(scores));
    }
    table
}

fn differences(variants: &[Variant], splits: &[String]) -> Table {
    let mut table = table(["difference", "where", "seeds"].into_iter(), splits);
    for (factor, Factor { values: [without, with], .. }) in FACTORS.iter().enumerate() {
        for variant in variants.iter().filter(|variant| variant.levels[factor] == 0) {
            let mut other = variant.levels;
            other[factor] = 1;
            let Some(other) = variants.iter().find(|variant| variant.levels == other) else { continue };
            let others = variant.names().into_iter().enumerate().filter(|(idx, _)| *idx != factor);
            let place = others.map(|(_, name)| name).collect::<Vec<_>>().join(", ");
            let paired: Vec<Vec<f64>> = splits.iter().map(|split| paired(variant, other, split)).collect();
            let seeds = paired.iter().map(Vec::len).max().unwrap_or(0).to_string();
            let cells = paired.iter().map(|paired| mean_and_interval(paired, |change| format!("{change:+.3}")));
            table.add_row([format!("{} over {}", with.name, without.name), place, seeds].into_iter().chain(cells));
        }
    }
    table
}

/// What `with` has more than `without`, of every seed that both have.
fn paired(without: &Variant, with: &Variant, split: &str) -> Vec<f64> {
    let with = with.scores(split);
    let of_seed = |seed| with.iter().find(|(of, _)| *of == seed).map(|(_, score)| *score);
    without.scores(split).into_iter().filter_map(|(seed, score)| Some(of_seed(seed)? - score)).collect()
}

/// The mean of some numbers and its interval, where two at least make one.
fn mean_and_interval(values: &[f64], shown: fn(f64) -> String) -> String {
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    match Interval::of_mean(values) {
        Some(Interval { low, high }) => format!("{} ({} to {})", shown(mean), shown(low), shown(high)),
        None if values.is_empty() => "-".to_owned(),
        None => shown(mean),
    }
}

fn table<'a>(columns: impl Iterator<Item = &'a str>, splits: &'a [String]) -> Table {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    let columns: Vec<&str> = columns.collect();
    let num_named = columns.len();
    table.set_header(columns.into_iter().chain(splits.iter().map(String::as_str)));
    for column in table.column_iter_mut().skip(num_named - 1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}
