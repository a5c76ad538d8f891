//! What the engine is measured against itself by: a second question about a picture beside the first, many clients beside one, a VoRA
//! merged into its language model beside that model alone.
//!
//! `cargo xtask bench peers --infer` runs it behind `infer.rs`, over the model that it made. The processor's time is counted, on one
//! thread; turns alternate, and medians are told.
#![allow(clippy::print_stdout, reason = "a program says what it measured")]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use benches::answer_seconds;
use clap::Parser;
use fixtures::Random;
use tch::Device;
use vora_image::RgbImage;
use vora_infer::{Assistant, Engine, EngineConfig, Request};

/// Side of a picture of 256 patches.
const SIDE: u32 = 224;
/// Tokens of an answer.
const NEW: usize = 128;

/// Measures the engine against itself
#[derive(Debug, Parser)]
struct Args {
    /// Folder of a merged VoRA
    #[arg(long)]
    model: PathBuf,
    /// Folder of the language model in it
    #[arg(long)]
    llm: PathBuf,
    /// Where what was measured goes
    #[arg(long)]
    out: PathBuf,
    /// Clients at once, each with a picture of its own
    #[arg(long, default_value_t = 32)]
    clients: usize,
    /// Turns of each, behind one that is not counted
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.clients > 1, "rounds are at least 1, clients at least 2");
    let mut lines = vec!["| | | |".to_owned(), "|---|---|---|".to_owned()];
    let mut say = |what: &str, ratio: f64, of: String| {
        let line = format!("| {what} | {ratio:.3} | {of} |");
        println!("{line}");
        lines.push(line);
    };

    let engine = start(&args.model, EngineConfig::default())?;
    let times = alternating(args.rounds, |round| {
        let picture = picture(round)?;
        let ask = |words: &str| answer_seconds(&engine, vec![Request::question(vec![picture.clone()], words)], None, 1);
        Ok([ask("What is in the picture, and where does it stand?")?, ask("Is there anything else that is red?")?])
    })?;
    say("first token of a second question about a picture, over that of the first", times[1] / times[0], ms(&times));

    let config = EngineConfig::default().with_max_batch(args.clients).with_prefix_caching(false);
    let engine = start(&args.model, config)?;
    let words = "What do you see in this picture, and what is it that stands to the left of the other things?";
    let request = |client| Ok(Request::question(vec![picture(client)?], words));
    let times = alternating(args.rounds.min(3), |_| {
        let all = answer_seconds(&engine, (0..args.clients).map(request).collect::<Result<_>>()?, None, NEW)?;
        Ok([answer_seconds(&engine, vec![request(0)?], None, NEW)?, all / args.clients as f64])
    })?;
    let what = format!("tokens a second of {} clients with a picture each, over those of one", args.clients);
    say(&what, times[0] / times[1], format!("{} an answer", ms(&times)));

    let config = || EngineConfig::default().with_prefix_caching(false);
    let (merged, plain) = (start(&args.model, config())?, start(&args.llm, config())?);
    let text = "Tell me about the sea. ".repeat(40);
    for (new, what) in [(1, "first token"), (NEW, "an answer")] {
        let times = alternating(args.rounds, |_| {
            let ask = |engine| answer_seconds(engine, vec![Request::question(Vec::new(), &text)], None, new);
            Ok([ask(&plain)?, ask(&merged)?])
        })?;
        say(
            &format!("{what} of a merged VoRA without a picture, over its language model's"),
            times[1] / times[0],
            ms(&times),
        );
    }
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    fs::write(args.out.join("engine.md"), lines.join("\n") + "\n").context("cannot write engine.md")
}

fn start(folder: &Path, config: EngineConfig) -> Result<Engine> {
    let nowhere = |name: &str| bail!("{name}: the folder is whole");
    let kind = vora_model::stored_kind(folder, &nowhere)?;
    Engine::start(Assistant::open(folder, Device::Cpu, kind, &nowhere)?, config)
}

/// A picture of noise, another one for each number.
fn picture(number: usize) -> Result<RgbImage> {
    let noise = Random::new(number as u64).integers(0, 256, [i64::from(3 * SIDE * SIDE)]);
    let pixels = Vec::<i64>::try_from(noise)?.into_iter().map(|x| x as u8).collect();
    RgbImage::from_raw(SIDE, SIDE, pixels).context("as many bytes as pixels")
}

/// Medians of two that take turns.
fn alternating(rounds: usize, mut turn: impl FnMut(usize) -> Result<[f64; 2]>) -> Result<[f64; 2]> {
    let mut turns = (0..=rounds).map(&mut turn).collect::<Result<Vec<_>>>()?;
    turns.remove(0);
    Ok([0, 1].map(|which| {
        let mut times: Vec<f64> = turns.iter().map(|turn| turn[which]).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }))
}

fn ms(times: &[f64; 2]) -> String {
    format!("{:.1} and {:.1} ms", 1e3 * times[0], 1e3 * times[1])
}
