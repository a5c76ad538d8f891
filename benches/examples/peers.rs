//! A training step beside Hugging Face's: a VoRA of SmolLM2-135M, LoRA on twelve blocks, taught by DINOv2-small, by this
//! project and by transformers with PEFT (`benches/peers.py`), from the same weights on the same batches.
//!
//! `cargo xtask bench peers` runs it, and `cargo xtask bench ops` to have steps traced. Each is a process of its own that waits for its turn; the turns alternate, and on a CPU
//! CPU seconds are counted, so that what else the machine does matters little. Losses and gradients are compared first.
//! `benches/gpu.py` runs it on a GPU.
#![allow(clippy::print_stdout, reason = "a program says what it measured")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use benches::{Process, cpu_seconds};
use clap::Parser;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use vora_llm::DropoutSeed;
use vora_model::Input;
use vora_recipe::TrainConfig;
use vora_student::{DeviceBatch, Student};
use vora_text::{Span, Spans};
use vora_torch::{optim::Optimizer, runtime};
use vora_train::step::optim::optimizer;

/// Side of a patch.
const PATCH: i64 = 14;
/// Batches that the steps go through, over and over.
const BATCHES: i64 = 3;
/// How far the losses of the first step may lie apart, of 1.
const APART: [(&str, f64); 2] = [("f32", 2e-3), ("bf16", 5e-2)];

/// Measures a training step of ours against Hugging Face's
#[derive(Debug, Parser)]
struct Args {
    /// Folder of the language model
    #[arg(long)]
    llm: PathBuf,
    /// Folder of the teacher
    #[arg(long)]
    teacher: PathBuf,
    /// Where the start, the batches and what was measured go
    #[arg(long)]
    out: PathBuf,
    /// Python with torch, transformers and peft
    #[arg(long)]
    python: PathBuf,
    /// `benches/peers.py`
    #[arg(long)]
    script: PathBuf,
    /// Tokens of a picture
    #[arg(long, value_delimiter = ',', default_values_t = [64, 256])]
    tokens: Vec<i64>,
    /// Tokens of text after it, all of them learned
    #[arg(long, default_value_t = 32)]
    words: i64,
    /// Samples of a step
    #[arg(long, default_value_t = 8)]
    batch: i64,
    /// f32 or bf16
    #[arg(long, default_value = "f32")]
    dtype: String,
    /// Rank of the adapters
    #[arg(long, default_value_t = 64)]
    rank: i64,
    /// Blocks of the language model with adapters
    #[arg(long, default_value_t = 12)]
    blocks: i64,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Steps of a turn
    #[arg(long, default_value_t = 2)]
    steps: usize,
    /// Turns of each, behind one that is not counted
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Beside the same step of ours where pictures are attended to causally, in place of others' steps
    #[arg(long)]
    causal: bool,
    /// Steps of each that a profiler looks at, in place of turns: what `bench ops` reads
    #[arg(long, default_value_t = 0, conflicts_with = "causal")]
    traces: usize,
    /// To be the process that trains, which the others are started by
    #[arg(long, hide = true)]
    turns: bool,
}

/// What a process says of a turn.
#[derive(Debug, Clone, Deserialize, Serialize)]
struct Turn {
    /// Of the processor's time on a CPU, of the clock elsewhere.
    seconds: f64,
    peak_mib: f64,
    /// Cross-entropy, cosine loss and length of the gradient of the first step.
    first: [f64; 3],
    /// Operations of a sample that a step cannot do without; none from the peers.
    #[serde(default)]
    gflop: f64,
}

/// One row of the table.
#[derive(Debug, Serialize)]
struct Row {
    tokens: i64,
    dtype: String,
    name: &'static str,
    samples_per_second: f64,
    /// Of the operations that a step cannot do without, see [`operations`].
    gflop_per_second: f64,
    peak_mib: f64,
    first: [f64; 3],
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.steps > 0, "rounds and steps are at least 1");
    if args.turns { Trained::new(&args)?.take_turns() } else { compare(&args) }
}

/// The processes that take turns.
const NAMES: [&str; 3] = ["this project", "transformers + PEFT, logits where learned", "transformers + PEFT as usual"];

/// The same of a comparison with oneself.
const OWN_NAMES: [&str; 2] = ["pictures attended to both ways", "causal"];

fn compare(args: &Args) -> Result<()> {
    let names = if args.causal { &OWN_NAMES[..] } else { &NAMES };
    let (mut rows, mut traced) = (Vec::new(), Vec::new());
    for &tokens in &args.tokens {
        let out = args.out.join(format!("{tokens}-{}", args.dtype));
        fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
        let mut processes = start(args, tokens, &out)?;
        let mut turns: Vec<Vec<Turn>> = vec![Vec::new(); processes.len()];
        for round in 0..=args.rounds {
            for (process, turns) in processes.iter_mut().zip(&mut turns) {
                if round == 0 || args.traces == 0 {
                    turns.push(process.ask("go")?);
                }
            }
        }
        let (samples, gflop) = (args.steps as f64 * args.batch as f64, turns[0][0].gflop);
        if args.traces > 0 {
            let firsts: Vec<_> = names.iter().copied().zip(turns.iter().map(|turns| turns[0].first)).collect();
            agree(&firsts, &args.dtype)?;
            traced.push(trace(args, tokens, gflop, names, &mut processes, &out)?);
            continue;
        }
        for (&name, turns) in names.iter().zip(turns) {
            let mut rates: Vec<f64> = turns[1..].iter().map(|turn| samples / turn.seconds).collect();
            rates.sort_by(f64::total_cmp);
            let (samples_per_second, last) = (rates[rates.len() / 2], &turns[turns.len() - 1]);
            let row = Row {
                tokens,
                dtype: args.dtype.clone(),
                name,
                samples_per_second,
                gflop_per_second: samples_per_second * if last.gflop > 0.0 { last.gflop } else { gflop },
                peak_mib: last.peak_mib,
                first: turns[0].first,
            };
            println!("{}", row.line());
            rows.push(row);
        }
        if !args.causal {
            let firsts: Vec<_> = rows[rows.len() - names.len()..].iter().map(|row| (row.name, row.first)).collect();
            agree(&firsts, &args.dtype)?;
        }
    }
    if args.traces > 0 {
        let file = args.out.join("traces.json");
        let text = serde_json::to_string_pretty(&traced)?;
        return fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()));
    }
    let file = args.out.join("peers.json");
    fs::write(&file, serde_json::to_string_pretty(&rows)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    let second = if args.device == "cpu" { "CPU-second" } else { "second" };
    let header = format!(
        "| picture tokens | kind | | samples per {second} | ours over it | GFLOP/s | peak MiB | ours over it |\n|---|---|---|---|---|---|---|---|\n"
    );
    let line = |row: &Row| {
        let ours = rows.iter().find(|ours| ours.tokens == row.tokens).expect("the row itself at least");
        format!(
            "| {} | {} | {} | {:.2} | {:.2} | {:.0} | {:.0} | {:.2} |\n",
            row.tokens,
            row.dtype,
            row.name,
            row.samples_per_second,
            ours.samples_per_second / row.samples_per_second,
            row.gflop_per_second,
            row.peak_mib,
            ours.peak_mib / row.peak_mib
        )
    };
    let table = header + &rows.iter().map(line).collect::<String>();
    print!("{table}");
    fs::write(args.out.join("peers.md"), table).context("cannot write peers.md")
}

/// Starts the processes that are compared over pictures of so many tokens, this project's first.
fn start(args: &Args, tokens: i64, out: &Path) -> Result<Vec<Process>> {
    let paths = [("--llm", args.llm.as_path()), ("--teacher", &args.teacher), ("--out", out)];
    let unused = [("--python", args.python.as_path()), ("--script", &args.script)];
    let numbers = [
        ("--tokens", tokens),
        ("--words", args.words),
        ("--batch", args.batch),
        ("--rank", args.rank),
        ("--blocks", args.blocks),
    ];
    let steps = args.steps.to_string();
    let ours = |causal: bool| -> Result<Process> {
        let mut ours = Command::new(std::env::current_exe()?);
        ours.envs(runtime::missing_environment(runtime::Workload::Training)); // as the program has it
        ours.args(["--turns", "--dtype", &args.dtype, "--device", &args.device, "--steps", &steps]);
        ours.args(causal.then_some("--causal"));
        for (key, path) in paths.iter().chain(&unused) {
            ours.arg(key).arg(path);
        }
        for (key, number) in numbers {
            ours.args([key, &number.to_string()]);
        }
        Process::start(ours)
    };
    let mut processes = vec![ours(false)?]; // which writes what the others start from
    if args.causal {
        processes.push(ours(true)?);
        return Ok(processes);
    }
    for how in ["learned", "usual"] {
        let mut theirs = Command::new(&args.python);
        theirs.arg(&args.script).arg(out).arg(&args.llm).arg(&args.teacher).args(["--logits", how]);
        theirs.args(["--dtype", &args.dtype, "--device", &args.device, "--steps", &steps]);
        theirs.args(["--rank", &args.rank.to_string(), "--blocks", &args.blocks.to_string()]);
        processes.push(Process::start(theirs)?);
    }
    Ok(processes)
}

/// Steps of all sides that a profiler looked at, for `cargo xtask bench ops`.
#[derive(Debug, Serialize)]
struct Traced {
    tokens: i64,
    dtype: String,
    batch: i64,
    vocab_size: i64,
    /// 10^9 operations that a step cannot do without.
    gflop: f64,
    sides: Vec<Side>,
}

/// One of them, and its traces.
#[derive(Debug, Serialize)]
struct Side {
    name: &'static str,
    traces: Vec<PathBuf>,
}

/// Has all processes trace steps, in turns.
fn trace(
    args: &Args,
    tokens: i64,
    gflop: f64,
    names: &[&'static str],
    processes: &mut [Process],
    out: &Path,
) -> Result<Traced> {
    let mut sides: Vec<_> = names.iter().map(|name| Side { name, traces: Vec::new() }).collect();
    for round in 0..args.traces {
        for (i, (process, side)) in processes.iter_mut().zip(&mut sides).enumerate() {
            let path = out.join(format!("trace-{i}-{round}.json"));
            process.ask::<Turn>(&format!("trace {}", path.display()))?;
            side.traces.push(path);
        }
    }
    let config: serde_json::Value = serde_json::from_slice(&fs::read(args.llm.join("config.json"))?)?;
    let vocab_size = config["vocab_size"].as_i64().context("vocab_size in the language model's config.json")?;
    let (dtype, batch) = (args.dtype.clone(), args.batch);
    Ok(Traced { tokens, dtype, batch, vocab_size, gflop: gflop * batch as f64, sides })
}

/// Checks that all computed the same in their first step, and that something was learned. The length of the gradient is
/// compared in f32 alone: at 256 picture tokens it is 86 there, and by rounding 170 here and 310 there in bf16.
fn agree(firsts: &[(&str, [f64; 3])], dtype: &str) -> Result<()> {
    let apart = APART.iter().find(|(of, _)| *of == dtype).map_or(5e-2, |(_, apart)| *apart);
    for (name, first) in firsts {
        for (what, (theirs, ours)) in
            ["cross-entropy", "cosine loss", "gradient"].iter().zip(first.iter().zip(firsts[0].1))
        {
            let is_compared = *what != "gradient" || dtype == "f32";
            let is_close = !is_compared || (theirs - ours).abs() <= apart * ours.abs();
            let is_some = *theirs > 0.0 && ours > 0.0;
            ensure!(is_some && is_close, "{what} of the first step: {name} has {theirs}, ours is {ours}");
        }
    }
    Ok(())
}

impl Row {
    fn line(&self) -> String {
        let [lm, distill, gradient] = self.first;
        format!(
            "{:>5} tokens, {}: {:.2} samples a second, {:.0} MiB; first step: cross-entropy {lm:.4}, cosine loss {distill:.4}, gradient {gradient:.4}",
            self.tokens, self.name, self.samples_per_second, self.peak_mib
        )
    }
}

/// What this project trains.
struct Trained {
    student: Student,
    optimizer: Optimizer,
    batches: Vec<DeviceBatch>,
    next: usize,
    steps: usize,
    device: Device,
    gflop: f64,
}

impl Trained {
    /// Opens everything, and writes what the others start from.
    fn new(args: &Args) -> Result<Self> {
        let device = runtime::device(&args.device)?;
        let tokens = *args.tokens.last().context("--tokens")?;
        let side = (tokens as f64).sqrt() as i64;
        ensure!(side * side == tokens, "--tokens {tokens} is no square");
        let mode = if args.causal { "causal" } else { "bidirectional" };
        let text = format!(
            "model: {{ llm: LLM, aux_vision: TEACHER, vision_attention: {mode}, patch_size: {PATCH}, image_size: {}, lora: {{ layers: {}, r: {} }} }}\n\
             data: {{ train: {{ scenes: {{ image_size: {} }} }} }}\noutput_dir: unused\nmax_steps: 1\nlearning_rate: 1e-4\nweight_decay: 0.05",
            side * PATCH,
            args.blocks,
            args.rank,
            side * PATCH
        );
        let config = TrainConfig::parse(&text, &[])?;
        let kind = runtime::kind(&args.dtype, device)?;
        let folders = (args.llm.clone(), args.teacher.clone());
        let student = Student::new(&config, device, kind, &move |name| {
            Ok(if name == "LLM" { folders.0.clone() } else { folders.1.clone() })
        })?;

        let random = fixtures::Random::new(5);
        let vocab = student.model.llm().config().vocab_size;
        let shape = [BATCHES * args.batch, 3, side * PATCH, side * PATCH];
        let pixel_values = random.normal(shape).to_device(device);
        let input_ids = random.integers(0, vocab, [BATCHES * args.batch, args.words]).to_device(device);
        let mut start = student.parameters();
        start.push(("pixel_values".to_owned(), pixel_values.shallow_clone()));
        start.push(("input_ids".to_owned(), input_ids.shallow_clone()));
        let start: Vec<_> = start
            .iter()
            .map(|(name, tensor)| (name.as_str(), tensor.detach().contiguous().to_device(Device::Cpu)))
            .collect();
        Tensor::write_safetensors(&start, args.out.join("start.safetensors"))?;

        let seq = tokens + args.words;
        let row = vec![Span::image(side, side), Span::text(args.words)];
        let spans = Spans::new(vec![row; args.batch as usize]);
        let places: Vec<i64> = (0..args.batch).flat_map(|row| row * seq + tokens - 1..(row + 1) * seq - 1).collect();
        let batches = (0..BATCHES).map(|i| {
            let words = input_ids.narrow(0, i * args.batch, args.batch);
            let blank = Tensor::zeros([args.batch, tokens], (Kind::Int64, device));
            let pictures = pixel_values.narrow(0, i * args.batch, args.batch).unbind(0);
            DeviceBatch {
                input: Input::new(Tensor::cat(&[&blank, &words], 1), pictures, spans.clone()),
                positions: Tensor::from_slice(&places).to_device(device),
                targets: words.flatten(0, 1),
                pairs: Vec::new(),
                image_places: Tensor::from_slice(&spans.image_positions()).to_device(device),
            }
        });
        let optimizer = optimizer(student.parameters(), &config.optim())?;
        let gflop = operations(&student, args, tokens)? / 1e9;
        Ok(Self { optimizer, batches: batches.collect(), next: 0, steps: args.steps, device, gflop, student })
    }

    /// Takes a turn for each line that comes in, or one step under a profiler.
    fn take_turns(mut self) -> Result<()> {
        println!("ready");
        for line in std::io::stdin().lines() {
            let (line, clock, before) = (line?, Instant::now(), cpu_seconds()?);
            let losses = match line.strip_prefix("trace ") {
                Some(path) => vec![runtime::profiled(Path::new(path), || self.step())?],
                None => (0..self.steps).map(|_| self.step()).collect::<Result<_>>()?, // each waits for its numbers
            };
            let seconds = match self.device {
                Device::Cpu => cpu_seconds()? - before,
                _ => clock.elapsed().as_secs_f64(),
            };
            let peak_mib = runtime::peak_memory(self.device).unwrap_or(0) as f64 / f64::from(1 << 20);
            println!("{}", serde_json::to_string(&Turn { seconds, peak_mib, first: losses[0], gflop: self.gflop })?);
        }
        Ok(())
    }

    fn step(&mut self) -> Result<[f64; 3]> {
        let batch = &self.batches[self.next % self.batches.len()];
        self.next += 1;
        self.optimizer.zero_grad()?;
        let (words, mut read) = (batch.targets.numel() as f64, Vec::new());
        self.student.backward(batch, DropoutSeed::new(0), |losses| {
            let (lm, distill) = (losses.lm_sum / words, losses.distill.expect("a teacher"));
            read = vec![lm.detach(), distill.detach()];
            lm + distill
        })?;
        let gradient = self.optimizer.grad_norm()?.double_value(&[]);
        self.optimizer.step(1.0, gradient)?;
        Ok([read[0].double_value(&[]), read[1].double_value(&[]), gradient])
    }
}

/// Floating-point operations of a sample that a step cannot do without, twice the multiplications: all linear layers forward and
/// for the gradient of what goes in, adapters and heads for their own too, attention of the pairs that attend to each other
/// (two products forward, four back), logits where something is learned, the teacher forward. What is computed twice to
/// save memory, norms and the like do not count.
fn operations(student: &Student, args: &Args, tokens: i64) -> Result<f64> {
    let (mut linear, mut adapters) = (0, 0);
    student.model.llm().linears(&mut |_, layer| {
        linear += layer.in_features() * layer.out_features();
        adapters += layer.num_adapter_parameters() as i64;
        Ok(())
    })?;
    let (llm, seq) = (student.model.llm().config(), tokens + args.words);
    let seen = if args.causal { tokens * (tokens + 1) / 2 } else { tokens * tokens };
    let pairs = seen + args.words * tokens + args.words * (args.words + 1) / 2;
    let attention = 12 * pairs * llm.num_attention_heads * llm.head_width() * llm.num_hidden_layers as i64;
    let logits = 4 * args.words * llm.vocab_size * llm.hidden_size;
    let teacher: serde_json::Value = serde_json::from_slice(&fs::read(args.teacher.join("config.json"))?)?;
    let of = |key: &str| teacher[key].as_i64().with_context(|| format!("{key} in the teacher's config.json"));
    let (width, layers, seen) = (of("hidden_size")?, of("num_hidden_layers")?, tokens + 1);
    let teacher = layers * (24 * width * width * seen + 4 * seen * seen * width);
    let heads = 6 * args.blocks * tokens * width * llm.hidden_size;
    Ok((seq * (4 * linear + 6 * adapters) + attention + logits + teacher + heads) as f64)
}
