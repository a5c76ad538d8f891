//! `cargo xtask bench`: the criterion benches, the comparison of whole trainings, the default recipe and ablations over several
//! seeds, Chameleon's drift of norms, a step beside others' and its operators, what packing is worth, images a second of the loader, and what a plan foretells.

mod ablations;
mod data;
mod distributed;
mod drift;
mod infer;
mod memory;
mod ops;
mod plan;
mod seeds;
mod variants;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vora_run::side_by_side::{self, Variant};

use self::plan::Plan;
use crate::cmd::{self, Vora};
use crate::train::{self, Run};
use crate::{download, fixtures, setup};

/// Whole trainings that are compared under one name.
#[derive(Debug)]
struct Comparison {
    name: &'static str,
    trainings: &'static [Training],
}

/// One of them.
#[derive(Debug)]
struct Training {
    name: &'static str,
    config: &'static str,
    set: &'static [&'static str],
}

const COMPARISONS: [Comparison; 2] = [
    Comparison {
        name: "attention",
        trainings: &[
            Training { name: "bidirectional", config: train::SCENES, set: &["model.vision_attention=bidirectional"] },
            Training { name: "causal", config: train::SCENES, set: &["model.vision_attention=causal"] },
        ],
    },
    Comparison {
        name: "systems",
        trainings: &[
            Training { name: "vora", config: train::SCENES, set: &[] },
            Training { name: "llava", config: "crates/vora-train/recipes/scenes-llava.yaml", set: &[] },
            Training { name: "chameleon", config: "crates/vora-train/recipes/scenes-chameleon.yaml", set: &[] },
            Training { name: "gemma4", config: "crates/vora-train/recipes/scenes-gemma4.yaml", set: &[] },
        ],
    },
];

const EXAMPLES: &str = "\
Examples:
  cargo xtask bench                              every bench
  cargo xtask bench attention                    benches/benches/attention.rs
  cargo xtask bench attention -- cpu/bf16        only benches with this in their name
  cargo xtask bench attention --variants         ways to attend x kernels: time, counted operations, memory; table and plot
  cargo xtask bench attention --variants -- --tokens 4096 --dtype bf16
  cargo xtask bench attention --train            train with bidirectional and with causal vision attention, same seed
  cargo xtask bench attention --train --set max_steps=100
  cargo xtask bench systems --train              train a VoRA, a LLaVA, a Chameleon and Gemma 4's eyes on the same data
  cargo xtask bench attention --train --plot     draw again from the last two trainings
  cargo xtask bench seeds                        the default recipe with three seeds, and what seeing cost in text
  cargo xtask bench seeds --seeds 1 --set text_anchor.tokens=384 --dir runs/anchor-384
  cargo xtask bench ablations                    vision attention x distillation x the tokens that adapters act on, by seeds
  cargo xtask bench ablations --seeds 2 --steps 100 --dir runs/short
  cargo xtask bench attention --variants -- --layer --dtype bf16  one layer with its projections: bidirectional over causal
  cargo xtask bench peers                        a training step beside transformers with PEFT: samples a CPU-second, memory
  cargo xtask bench peers -- --tokens 64,256,1024 --dtype bf16
  cargo xtask bench peers -- --causal --tokens 1024 --batch 2 --dtype bf16  a step beside itself with causal attention to pictures
  cargo xtask bench peers --infer                answers beside transformers' and llama.cpp's: first token, tokens a CPU-second, memory
  cargo xtask bench peers --infer -- --batches 1,8,32 --rounds 5
  cargo xtask bench ops                          operators of such a step by kind: number, GFLOP, bytes, time; ours and transformers' with PEFT; on a quiet machine
  cargo xtask bench ops -- --tokens 256 --dtype bf16 --traces 3
  cargo xtask bench gpu --part speed             on a GPU: a step of random models of three sizes of batch and of 7B beside transformers
  cargo xtask bench gpu --part speed -- --rehearse  the same commands with tiny models on the CPU
  cargo xtask bench gpu --part photos -- --photos DIR --held-out DIR  a VoRA and a LLaVA on captioned photographs, five minutes together
  cargo xtask bench gpu --part nccl              one process of a group of one over NCCL, trained and resumed, beside Gloo and no group
  cargo xtask bench distributed                  two processes under torchrun: killed, frozen, beside one
  cargo xtask bench distributed -- --kills 2 --rounds 0
  cargo xtask bench drift                        what QK-norm and z-loss do to the norms of a small Chameleon
  cargo xtask bench drift -- --learning-rate 1e-2 --steps 300
  cargo xtask bench packing                      tokens/s and padding of samples in rows of their own and packed
  cargo xtask bench packing -- --batch-size 8 --row-len 1024
  cargo xtask bench memory                       memory and time of a run, planned and taken, with and without checkpointing
  cargo xtask bench memory -- --set max_steps=4
  cargo xtask bench data                         images/s of the loader against PyTorch's DataLoader
  cargo xtask bench data -- FOLDER --workers 2   on pictures of one's own";

/// Arguments of `bench`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// A file of benches/benches, without `.rs`, or ablations, data, distributed, drift, gpu, memory, ops, packing, peers or seeds; all
    /// benches by default.
    /// With --train: attention or systems
    #[arg(required_if_eq("train", "true"))]
    name: Option<String>,
    /// Compare whole trainings: one table and one picture of losses and accuracies
    #[arg(long)]
    train: bool,
    /// Of attention: every way that pictures may attend, by every kernel that serves it
    #[arg(long, conflicts_with = "train")]
    variants: bool,
    /// Of peers: answers in place of training steps
    #[arg(long, conflicts_with = "train")]
    infer: bool,
    /// Train nothing, only make table and picture of the trainings that are there
    #[arg(long)]
    plot: bool,
    /// Run file of all trainings in place of their own
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Change one key of the run file, in all trainings
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = train::key_value)]
    set: Vec<String>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long)]
    device: Option<String>,
    /// Where the trainings and their comparison go; older ones there are replaced, but for those of ablations and seeds, which
    /// go on [default: runs/bench-NAME]
    #[arg(long, visible_alias = "dir", value_name = "DIR")]
    out: Option<PathBuf>,
    /// Of seeds: trainings [default: 3]. Of ablations: trainings of each variant, three at most where adapters act on image
    /// tokens alone [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Of seeds and ablations: steps of each training [default: the run file's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    steps: Option<u64>,
    /// Of gpu: what is measured, some minutes each
    #[arg(long, value_parser = ["speed", "photos", "nccl"], required_if_eq("name", "gpu"))]
    part: Option<String>,
    /// Handed to the bench
    #[arg(last = true, value_name = "ARGS", conflicts_with = "train")]
    args: Vec<String>,
}

/// Runs benches, or trains and compares.
pub fn run(args: &Args) -> Result<()> {
    match args.name.as_deref() {
        Some("ablations") => return ablate(args),
        Some("seeds") => return over_seeds(args),
        _ => ensure!(args.seeds.is_none() && args.steps.is_none(), "--seeds and --steps are for seeds and ablations"),
    }
    if args.train {
        return compare_trainings(args);
    }
    ensure!(
        args.config.is_none() && args.set.is_empty() && args.device.is_none(),
        "--config, --set and --device are for --train, seeds and ablations"
    );
    if args.variants {
        ensure!(args.name.as_deref() == Some("attention"), "--variants is for attention");
        let out = args.out.clone().unwrap_or_else(|| "runs/bench-variants".into());
        return variants::run(&cmd::root().join(out), args.plot, &args.args);
    }
    if args.name.as_deref() == Some("drift") {
        let out = args.out.clone().unwrap_or_else(|| "runs/drift".into());
        return drift::run(&cmd::root().join(out), args.plot, &args.args);
    }
    if args.name.as_deref() == Some("ops") {
        let out = args.out.clone().unwrap_or_else(|| "runs/bench-ops".into());
        return ops::run(&cmd::root().join(out), args.plot, &args.args);
    }
    if args.name.as_deref() == Some("packing") && !args.plot && args.out.is_none() {
        return packing(&args.args);
    }
    if args.name.as_deref() == Some("distributed") && !args.plot {
        return distributed::run(&args.args);
    }
    if args.name.as_deref() == Some("memory") && !args.plot {
        let out = args.out.clone().unwrap_or_else(|| "runs/bench-memory".into());
        return memory::run(&cmd::root().join(out), &args.args);
    }
    ensure!(
        !args.plot && args.out.is_none(),
        "--plot and --out are for --train, seeds, ablations, drift and ops, --out for memory too"
    );
    if args.name.as_deref() == Some("data") {
        return data::run(&args.args);
    }
    if args.infer {
        ensure!(args.name.as_deref() == Some("peers"), "--infer is for peers");
        return infer::run(&args.args);
    }
    if args.name.as_deref() == Some("peers") {
        return peers(&args.args);
    }
    if let Some(part) = &args.part {
        ensure!(args.name.as_deref() == Some("gpu"), "--part is for gpu");
        return gpu(part, &args.args);
    }
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

/// A program of `benches/examples`. What does its work is optimised in any profile.
fn example(name: &str) -> Command {
    let mut example = cmd::cargo();
    example.args(["run", "--release", "--locked", "--package", "benches", "--example", name, "--"]);
    example
}

/// Measures turns of steps.
fn peers(args: &[String]) -> Result<()> {
    cmd::run(peers_into(&cmd::root().join("runs/bench-peers"))?.args(args))
}

/// `benches/examples/peers.rs` over the default recipe's models, beside `benches/peers.py`, which writes into `out`.
fn peers_into(out: &Path) -> Result<Command> {
    setup::ensure()?;
    let [llm, teacher] = [download::ensure(train::DEFAULT_MODELS[0])?, download::ensure(train::DEFAULT_MODELS[1])?];
    let mut example = example("peers");
    example.arg("--llm").arg(llm).arg("--teacher").arg(teacher).arg("--python").arg(fixtures::python()?);
    example.arg("--script").arg(cmd::root().join("benches/peers.py")).arg("--out").arg(out);
    Ok(example)
}

/// Runs `benches/gpu.py` over `benches/examples/peers.rs`, or over `vora`.
fn gpu(part: &str, args: &[String]) -> Result<()> {
    setup::ensure()?;
    let (build, program): (&[&str], _) = match part {
        "speed" => (&["--package", "benches", "--example", "peers"], "debug/examples/peers"),
        _ => (&["--package", "vora-cli"], "debug/vora"),
    };
    cmd::run(cmd::cargo().args(["build", "--locked"]).args(build))?;
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| cmd::root().join("target"), PathBuf::from);
    let mut script = Command::new(fixtures::python()?);
    script.arg(cmd::root().join("benches/gpu.py")).args(["--part", part, "--program"]);
    script.arg(target.join(program)).arg("--out").arg(cmd::root().join("runs/bench-gpu"));
    if part == "photos" && !args.iter().any(|arg| arg == "--rehearse") {
        for (flag, model) in ["--llm", "--teacher"].into_iter().zip(train::DEFAULT_MODELS) {
            script.arg(flag).arg(download::ensure(model)?);
        }
    }
    cmd::run(script.args(args).env("LD_LIBRARY_PATH", cmd::root().join(".libtorch/lib")))
}

/// Runs `benches/examples/packing.rs` over the default recipe's language model.
fn packing(args: &[String]) -> Result<()> {
    setup::ensure()?;
    let llm = download::ensure(train::DEFAULT_MODELS[0])?;
    cmd::run(example("packing").arg("--llm").arg(llm).args(args))
}

/// Trains what is missing of the ablations, and puts all of them side by side.
fn ablate(args: &Args) -> Result<()> {
    let plan = plan(args, "runs/bench-ablations", 5)?;
    ablations::run(program(args, &plan.base)?.as_ref(), &plan)
}

/// Trains and measures what is missing of the default recipe's seeds, and makes their tables.
fn over_seeds(args: &Args) -> Result<()> {
    let plan = plan(args, "runs/bench-seeds", 3)?;
    seeds::run(program(args, &plan.base)?.as_ref(), &plan)
}

/// The trainings that are asked for, by default so many into `out`.
fn plan(args: &Args, out: &str, seeds: u64) -> Result<Plan> {
    let mut set = args.set.clone();
    set.extend(args.steps.map(|steps| format!("max_steps={steps}")));
    let config = args.config.as_ref().map_or_else(|| Ok(cmd::root().join(train::SCENES)), std::path::absolute)?;
    let out = cmd::root().join(args.out.clone().unwrap_or_else(|| out.into()));
    let base = Run { config, set, device: args.device.clone() };
    Ok(Plan { base, seeds: args.seeds.unwrap_or(seeds), out })
}

/// The program, built, with all that its trainings need; none where nothing is to be trained.
fn program(args: &Args, base: &Run) -> Result<Option<Vora>> {
    if args.plot {
        return Ok(None);
    }
    setup::ensure()?;
    base.download()?;
    Vora::build().map(Some)
}

fn compare_trainings(args: &Args) -> Result<()> {
    let name = args.name.as_deref().unwrap_or_default();
    let comparison = COMPARISONS.iter().find(|comparison| comparison.name == name);
    let Comparison { trainings, .. } = comparison.with_context(|| {
        let known = COMPARISONS.map(|comparison| comparison.name).join(" and ");
        format!("no bench `{name}` trains; {known} do")
    })?;
    let out = cmd::root().join(args.out.clone().unwrap_or_else(|| format!("runs/bench-{name}").into()));
    if !args.plot {
        setup::ensure()?;
        let vora = Vora::build()?;
        for training in *trainings {
            let dir = out.join(training.name);
            if dir.exists() {
                fs::remove_dir_all(&dir).with_context(|| format!("removing the older {}", dir.display()))?;
            }
            let mut set = args.set.clone();
            set.extend(training.set.iter().map(|&set| set.to_owned()));
            set.push(format!("output_dir={}", dir.display()));
            let config = match &args.config {
                Some(file) => std::path::absolute(file)?,
                None => cmd::root().join(training.config),
            };
            let run = Run { config, set, device: args.device.clone() };
            run.download()?;
            cmd::run(&mut run.command(vora.command("train")))?;
        }
    }
    let variants: Vec<_> = trainings.iter().map(|t| Variant::read(t.name, &out.join(t.name))).collect::<Result<_>>()?;
    let (table, svg) = (side_by_side::table(&variants), out.join(format!("{name}.svg")));
    println!("{table}");
    fs::write(svg.with_extension("txt"), format!("{table}\n")).with_context(|| format!("cannot write {name}.txt"))?;
    side_by_side::draw(&variants, &svg)?;
    println!("{} and {name}.txt beside it", cmd::shown(&svg));
    Ok(())
}
