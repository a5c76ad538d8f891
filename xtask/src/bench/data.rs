//! `cargo xtask bench data`: images a second of our loader against PyTorch's DataLoader, by turns, medians.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use comfy_table::Table;

use crate::{cmd, fixtures, setup};

/// What stands behind `--`.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench data --")]
struct Options {
    /// Folder of pictures; without one, 128 JPEGs of 640 x 480 are made
    folder: Option<PathBuf>,
    /// Side of the square that pictures become
    #[arg(long, default_value_t = 224)]
    size: u32,
    /// Threads of ours, processes of PyTorch's
    #[arg(long, default_value_t = 2)]
    workers: usize,
    /// Pictures in a batch
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Pictures to time in each round
    #[arg(long, default_value_t = 512)]
    images: usize,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

/// Builds, measures by turns, prints a table.
pub fn run(args: &[String]) -> Result<()> {
    let options = Options::parse_from([String::new()].iter().chain(args));
    ensure!(options.rounds > 0, "--rounds is 0, it must be at least 1");
    setup::ensure()?;
    let python = fixtures::python()?;
    let script = cmd::root().join("benches/data.py");
    let folder = match &options.folder {
        Some(folder) => std::path::absolute(folder)?,
        None => {
            let folder = cmd::root().join("runs/bench-data/pictures");
            cmd::run(Command::new(&python).arg(&script).arg(&folder).arg("--make"))?;
            folder
        }
    };
    let mut build = cmd::cargo();
    cmd::run(build.args(["build", "--locked", "--release", "--package", "benches", "--example", "data"]))?;

    let numbers = [
        ("--size", options.size as usize),
        ("--workers", options.workers),
        ("--batch", options.batch),
        ("--images", options.images),
    ];
    let numbers: Vec<String> = numbers.iter().flat_map(|(key, value)| [(*key).to_owned(), value.to_string()]).collect();
    let ours = || {
        let mut command = cmd::cargo();
        command.args(["run", "--quiet", "--locked", "--release", "--package", "benches", "--example", "data", "--"]);
        command
    };
    let theirs = |how: &str| {
        let mut command = Command::new(&python);
        command.arg(&script).args(["--how", how]);
        command
    };
    let names = ["vora_data::Loader", "DataLoader, Pillow", "DataLoader, torchvision"];
    let mut rates = [const { Vec::new() }; 3];
    for _ in 0..options.rounds {
        for (rates, mut command) in rates.iter_mut().zip([ours(), theirs("pillow"), theirs("torchvision")]) {
            rates.push(rate(command.arg(&folder).args(&numbers))?);
        }
    }
    let mut table = Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["", "images/s, median", "lowest", "highest"]);
    for (name, mut rates) in names.into_iter().zip(rates) {
        rates.sort_by(f64::total_cmp);
        let shown = [rates[rates.len() / 2], rates[0], rates[rates.len() - 1]].map(|rate| format!("{rate:.1}"));
        table.add_row([name.to_owned()].into_iter().chain(shown));
    }
    println!("{table}");
    Ok(())
}

/// What a program prints: images a second.
fn rate(command: &mut Command) -> Result<f64> {
    let output = command.output().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !output.status.success() {
        bail!("{}: {}", command.get_program().display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().with_context(|| format!("`{}` is no number of images a second", text.trim()))
}
