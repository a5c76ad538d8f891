//! Answers beside transformers' and llama.cpp's: time to the first token of a prompt of 288, tokens a second after it at batches of 1
//! and 8, memory, perplexity. This project reads a picture of 256 patches and 32 words, by its engine, as a server does.
//!
//! `cargo xtask bench peers --infer` runs it. Each is a process of its own with one thread that waits for its turn; the turns
//! alternate, and CPU seconds are counted, so that what else the machine does matters little.
#![allow(clippy::print_stdout, reason = "a program says what it measured")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use benches::{Process, answer_seconds};
use clap::Parser;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use vora_image::{IMAGENET_DEFAULT, ImageProcessor, Resample, RgbImage};
use vora_infer::{Assistant, Engine, EngineConfig, Request, Tokenizer, Width};
use vora_llm::{KvPages, PackedDecoder, PackedStep};
use vora_model::VisionLanguageModel;
use vora_recipe::TrainConfig;
use vora_student::Student;
use vora_torch::nn::decode::LoraId;
use vora_torch::runtime::{self, Workload};
use vora_torch::weights::Quantization;

/// Side of a patch, and of a picture of 256 patches.
const PATCH: i64 = 14;
const SIDE: i64 = 16 * PATCH;
/// Tokens of a prompt.
const PROMPT: usize = 288;
/// Tokens of a window of the text, none of which lie in two.
const WINDOW: usize = 512;

/// Measures answers of ours against others'
#[derive(Debug, Parser)]
struct Args {
    /// Folder of the language model
    #[arg(long)]
    llm: PathBuf,
    /// The same as GGUF files, each by its kind: bf16=FILE
    #[arg(long, value_delimiter = ',', value_parser = named)]
    gguf: Vec<(String, PathBuf)>,
    /// Python with torch, transformers and llama_cpp
    #[arg(long)]
    python: PathBuf,
    /// `benches/infer.py`
    #[arg(long)]
    script: PathBuf,
    /// The text whose perplexity is measured
    #[arg(long)]
    text: PathBuf,
    /// Where what was measured goes
    #[arg(long)]
    out: PathBuf,
    /// What this project reads its weights in: f32, bf16, int8, int4
    #[arg(long, value_delimiter = ',', default_values_t = ["bf16".to_owned(), "int8".to_owned(), "int4".to_owned()])]
    dtypes: Vec<String>,
    /// Answers at once
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8])]
    batches: Vec<usize>,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128)]
    new: usize,
    /// Turns of each, behind one that is not counted
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// To be the process that answers by the model in this folder, not the one that starts the others
    #[arg(long, hide = true)]
    turns: Option<PathBuf>,
}

fn named(value: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = value.split_once('=').ok_or("it is KIND=FILE")?;
    Ok((name.to_owned(), path.into()))
}

/// What a process says of a turn.
#[derive(Debug, Clone, Deserialize, Serialize)]
struct Turn {
    /// Of the processor's time until every prompt has its first token,
    first: f64,
    /// and from there on until every answer has all of them.
    rest: f64,
    peak_mib: f64,
}

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    batch: usize,
    first_ms: f64,
    tokens_per_second: f64,
    peak_mib: f64,
    perplexity: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.new > 1, "rounds are at least 1, tokens of an answer at least 2");
    match &args.turns {
        Some(folder) => take_turns(folder, &args.text),
        None => compare(&args),
    }
}

fn compare(args: &Args) -> Result<()> {
    let mut processes = Vec::new();
    let ids = Tokenizer::open(&args.llm)?.encode_whole(&fs::read_to_string(&args.text)?)?;
    let text = args.out.join("ids.json");
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    fs::write(&text, serde_json::to_string(&ids)?).with_context(|| format!("cannot write {}", text.display()))?;
    for dtype in &args.dtypes {
        let folder = args.out.join(format!("model-{dtype}"));
        if !folder.join("config.json").exists() {
            make_model(&args.llm, dtype, &folder)?;
        }
        let mut ours = Command::new(std::env::current_exe()?);
        ours.envs(runtime::missing_environment(Workload::Answering)); // as the program has it
        ours.arg("--turns").arg(folder).arg("--text").arg(&text).arg("--llm").arg(&args.llm);
        ours.arg("--python").arg(&args.python).arg("--script").arg(&args.script).arg("--out").arg(&args.out);
        processes.push((format!("this project, {dtype}"), Process::start(ours)?));
    }
    let theirs = |peer: &str, model: &Path, dtype: &str| {
        let mut theirs = Command::new(&args.python);
        theirs.arg(&args.script).arg(peer).arg(model).args(["--dtype", dtype]);
        Process::start(theirs)
    };
    for dtype in args.dtypes.iter().filter(|dtype| matches!(dtype.as_str(), "f32" | "bf16")) {
        processes.push((format!("transformers, {dtype}"), theirs("hf", &args.llm, dtype)?));
    }
    for (kind, file) in &args.gguf {
        processes.push((format!("llama.cpp, {kind}"), theirs("llama", file, "f32")?));
    }
    let mut rows: Vec<Row> = Vec::new();
    for &batch in &args.batches {
        let mut turns: Vec<Vec<Turn>> = vec![Vec::new(); processes.len()];
        for _ in 0..=args.rounds {
            for ((_, process), turns) in processes.iter_mut().zip(&mut turns) {
                turns.push(process.ask(&format!("{batch} {}", args.new))?);
            }
        }
        for ((name, _), turns) in processes.iter().zip(turns) {
            let median = |of: &dyn Fn(&Turn) -> f64| {
                let mut values: Vec<f64> = turns[1..].iter().map(of).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            };
            let tokens = (batch * (args.new - 1)) as f64;
            let row = Row {
                name: name.clone(),
                batch,
                first_ms: median(&|turn| 1e3 * turn.first / batch as f64),
                tokens_per_second: tokens / median(&|turn| turn.rest),
                peak_mib: turns[turns.len() - 1].peak_mib,
                perplexity: f64::NAN,
            };
            println!(
                "{name}, batch {batch}: {:.0} ms, {:.1} tokens/s, {:.0} MiB",
                row.first_ms, row.tokens_per_second, row.peak_mib
            );
            rows.push(row);
        }
    }
    for (name, mut process) in processes {
        let perplexity: f64 = process.ask(&format!("perplexity {}", text.display()))?;
        rows.iter_mut().filter(|row| row.name == name).for_each(|row| row.perplexity = perplexity);
    }
    let table = table(&rows);
    print!("{table}");
    fs::write(args.out.join("infer.json"), serde_json::to_string_pretty(&rows)?).context("cannot write infer.json")?;
    fs::write(args.out.join("infer.md"), table).context("cannot write infer.md")
}

fn table(rows: &[Row]) -> String {
    let header = "| | batch | first token, ms a prompt | tokens per CPU-second | peak MiB | perplexity |\n\
                  |---|---|---|---|---|---|\n";
    let line = |row: &Row| {
        let Row { name, batch, first_ms, tokens_per_second, peak_mib, perplexity } = row;
        format!("| {name} | {batch} | {first_ms:.0} | {tokens_per_second:.1} | {peak_mib:.0} | {perplexity:.2} |\n")
    };
    rows.iter().map(line).fold(header.to_owned(), |table, line| table + &line)
}

/// Writes a VoRA of that language model, merged, with a patch embedding that nobody trained.
fn make_model(llm: &Path, dtype: &str, folder: &Path) -> Result<()> {
    // int8 and int4 are widths of the weights of a model in bf16.
    let width = Width::parse(dtype)?;
    let kind = runtime::kind(if width.is_quantised() { "bf16" } else { dtype }, Device::Cpu)?;
    let text = format!(
        "model: {{ llm: LLM, patch_size: {PATCH}, image_size: {SIDE}, lora: {{ layers: 1, r: 1 }} }}\n\
         data: {{ train: {{ scenes: {{ image_size: {SIDE} }} }} }}\noutput_dir: unused\nmax_steps: 1"
    );
    let resolve = move |_: &str| Ok(llm.to_owned());
    let mut model = Student::new(&TrainConfig::parse(&text, &[])?, Device::Cpu, kind, &resolve)?.model;
    model.merge()?;
    if let Some(quantization) = Quantization::of_width(width) {
        model.adapted_mut().quantize(quantization)?;
    }
    model.save(folder)?;
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"] {
        let from = llm.join(file);
        if from.exists() {
            fs::copy(&from, folder.join(file)).with_context(|| format!("copying {}", from.display()))?;
        }
    }
    let (mean, std) = IMAGENET_DEFAULT;
    let processor = ImageProcessor::square(SIDE as u32, mean, std, Resample::Bicubic).to_json();
    fs::write(folder.join("preprocessor_config.json"), processor.to_string())?;
    Ok(())
}

fn open(folder: &Path) -> Result<Box<dyn VisionLanguageModel>> {
    let nowhere = |name: &str| bail!("{name}: the folder is whole");
    let kind = vora_model::stored_kind(folder, &nowhere)?;
    vora_model::open(folder, Device::Cpu, kind, &nowhere)
}

/// Of the tokens of a text, as the decoder of the engine foretells them.
fn perplexity(folder: &Path, ids: &[i64]) -> Result<f64> {
    let model = open(folder)?;
    let llm = model.llm();
    let mut decoder = llm.width().map(|width| PackedDecoder::new(llm, width)).transpose()?.flatten();
    let decoder = decoder.as_mut().context("the model is not one that the kernels serve")?;
    let cache = KvPages::new(llm.config(), 1, WINDOW as i64, Device::Cpu, llm.kind())?;
    let pages = cache.packed()?;
    let (mut sum, mut tokens) = (0.0, 0);
    for window in ids.chunks(WINDOW).filter(|window| window.len() > 1) {
        let places: Vec<i64> = (0..window.len() as i64).collect();
        let step = PackedStep {
            tables: &vec![0; window.len()],
            lens: &places,
            position_ids: &places,
            adapters: &vec![LoraId::NONE; window.len()],
            ..PackedStep::default()
        };
        let logits = decoder.decode_step(window, &pages, &step)?; // [window, vocab]
        let foretold = logits.narrow(0, 0, window.len() as i64 - 1).log_softmax(-1, Kind::Float);
        let next = Tensor::from_slice(&window[1..]).unsqueeze(1);
        sum -= foretold.gather(1, &next, false).sum(Kind::Double).double_value(&[]);
        tokens += window.len() - 1;
    }
    Ok((sum / tokens as f64).exp())
}

/// Takes a turn for each line that comes in.
fn take_turns(folder: &Path, text: &Path) -> Result<()> {
    let model = open(folder)?;
    // Eight contexts of 512 tokens, as llama.cpp gets them; nothing is found again, so that each turn computes all of it.
    let bytes = 8 * 512 * KvPages::page_bytes(model.llm().config(), 1, model.llm().kind());
    let config = EngineConfig::default().with_prefix_caching(false).with_cache_bytes(bytes);
    let engine = Engine::start(Assistant::new(model, folder)?, config)?;
    let pixels = (0..3 * SIDE * SIDE).map(|i| (i * 7919 % 251) as u8);
    let picture = RgbImage::from_raw(SIDE as u32, SIDE as u32, pixels.collect()).context("a picture")?;
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line?;
        let (batch, new) = line.split_once(' ').context("BATCH NEW")?;
        if batch == "perplexity" {
            println!("{}", perplexity(folder, &serde_json::from_slice::<Vec<i64>>(&fs::read(text)?)?)?);
            continue;
        }
        let (batch, new): (usize, usize) = (batch.parse()?, new.parse()?);
        let answers = |new| {
            let requests = vec![Request::question(vec![picture.clone()], "Hi"); batch];
            answer_seconds(&engine, requests, Some(PROMPT), new)
        };
        let first = answers(1)?;
        let rest = answers(new)? - first;
        let peak_mib = runtime::peak_memory(Device::Cpu).unwrap_or(0) as f64 / f64::from(1 << 20);
        println!("{}", serde_json::to_string(&Turn { first, rest, peak_mib })?);
    }
    Ok(())
}
