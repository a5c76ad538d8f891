//! `cargo xtask bench`: the criterion benches, the comparison of whole trainings, and Chameleon's drift of norms.

mod compare;
mod drift;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::cmd::{self, Vora};
use crate::setup;
use crate::train::{self, Run};
use compare::Variant;

/// The values of `model.vision_attention` that are compared.
const VARIANTS: [&str; 2] = ["bidirectional", "causal"];

const EXAMPLES: &str = "\
Examples:
  cargo xtask bench                              every bench
  cargo xtask bench attention                    benches/benches/attention.rs
  cargo xtask bench attention -- cpu/bf16        only benches with this in their name
  cargo xtask bench attention --train            train with bidirectional and with causal vision attention, same seed
  cargo xtask bench attention --train --set max_steps=100
  cargo xtask bench attention --train --plot     draw again from the last two trainings
  cargo xtask bench drift                        what QK-norm and z-loss do to the norms of a small Chameleon
  cargo xtask bench drift -- --learning-rate 1e-2 --steps 300";

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A file of benches/benches, without `.rs`, or drift; all benches by default
    #[arg(required_if_eq("train", "true"))]
    name: Option<String>,
    /// Compare whole trainings: one table and one picture of losses and accuracies
    #[arg(long)]
    train: bool,
    /// Train nothing, only make table and picture of the trainings that are there
    #[arg(long)]
    plot: bool,
    /// Run file of both trainings [default: crates/vora-train/recipes/scenes.yaml]
    #[arg(long, value_name = "FILE", requires = "train")]
    config: Option<PathBuf>,
    /// Change one key of the run file, in both trainings
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "train", value_parser = train::key_value)]
    set: Vec<String>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, requires = "train")]
    device: Option<String>,
    /// Where the trainings and their comparison go; older ones there are replaced [default: runs/bench-attention, or
    /// runs/drift]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Handed to the bench
    #[arg(last = true, value_name = "ARGS", conflicts_with = "train")]
    args: Vec<String>,
}

/// Runs benches, or trains and compares.
pub fn run(args: &Args) -> Result<()> {
    if args.train {
        return compare_trainings(args);
    }
    if args.name.as_deref() == Some("drift") {
        let out = args.out.clone().unwrap_or_else(|| "runs/drift".into());
        return drift::run(&cmd::root().join(out), args.plot, &args.args);
    }
    ensure!(!args.plot && args.out.is_none(), "--plot and --out are for --train and for drift");
    criterion(args)
}

fn criterion(args: &Args) -> Result<()> {
    setup::ensure()?;
    let mut bench = cmd::cargo();
    bench.args(["bench", "--locked", "--package", "benches"]);
    match &args.name {
        Some(name) => bench.args(["--bench", name]),
        None => bench.arg("--benches"),
    };
    cmd::run(bench.arg("--").args(&args.args))
}

fn compare_trainings(args: &Args) -> Result<()> {
    let name = args.name.as_deref().unwrap_or_default();
    ensure!(name == "attention", "no bench `{name}` trains; `attention` does");
    let config = match &args.config {
        Some(file) => std::path::absolute(file)?,
        None => cmd::root().join(train::SCENES),
    };
    let out = cmd::root().join(args.out.clone().unwrap_or_else(|| "runs/bench-attention".into()));
    if !args.plot {
        setup::ensure()?;
        let vora = Vora::build()?;
        for variant in VARIANTS {
            let dir = out.join(variant);
            if dir.exists() {
                fs::remove_dir_all(&dir).with_context(|| format!("removing the older {}", dir.display()))?;
            }
            let mut set = args.set.clone();
            set.push(format!("model.vision_attention={variant}"));
            set.push(format!("output_dir={}", dir.display()));
            let run = Run { config: config.clone(), set, device: args.device.clone() };
            run.download()?;
            cmd::run(&mut run.command(vora.command("train")))?;
        }
    }
    let variants: Vec<_> = VARIANTS.iter().map(|name| Variant::read(name, &out.join(name))).collect::<Result<_>>()?;
    let (table, svg) = (compare::table(&variants), out.join("attention.svg"));
    println!("{table}");
    fs::write(out.join("attention.txt"), format!("{table}\n")).context("cannot write attention.txt")?;
    compare::draw(&variants, &svg)?;
    println!("{} and attention.txt beside it", cmd::shown(&svg));
    Ok(())
}
