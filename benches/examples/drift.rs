//! Chameleon's drift of norms (arXiv 2405.09818, section 2.3) at a small size: one decoder, trained from the same start
//! on the same pictures and words, with and without QK-norm and z-loss.
//!
//! `cargo xtask bench drift` runs it and draws what it wrote. Softmax does not change when all its inputs grow by the
//! same amount, so nothing in the cross-entropy holds the scale of logits, and the two kinds of token that share all
//! weights push it up against each other. Measured at every step: the length of the residual stream before the final
//! norm ("output norm"), `log Z` of the logits, and every tenth step the largest logit of attention.
//!
//! The pictures are those of `scenes`, one token for each patch: its mean colour, every channel rounded to one of four
//! levels, so a codebook of 64 colours that needs no training. It serves to have two kinds of token in one vocabulary,
//! not to draw. Words are bytes.
#![allow(clippy::print_stderr, reason = "a program says how far it has come")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;
use tch::{Device, Kind, Reduction, Tensor};
use vora_data::scenes::{QuestionKind, Scenes, ScenesConfig, Split};
use vora_llm::{AttentionPlan, CausalLm, LlmConfig, Output, SharedKeys, VisionAttention};
use vora_recipe::{Curve, LearningRates, OptimConfig, Schedule, SchedulerKwargs};
use vora_text::Spans;
use vora_torch::nn::loss::cross_entropy_and_z_loss;
use vora_torch::runtime;
use vora_torch::weights::Weights;
use vora_train::step::optim::optimizer;

const PATCH: u32 = 7;
const LEVELS: i64 = 4;
/// Ids: bytes first, then the codes of pictures, then marks.
const FIRST_CODE: i64 = 256;
const BEGIN: i64 = FIRST_CODE + LEVELS * LEVELS * LEVELS;
const BEGIN_IMAGE: i64 = BEGIN + 1;
const END_IMAGE: i64 = BEGIN + 2;
const END: i64 = BEGIN + 3;
const VOCAB: i64 = BEGIN + 4;

const BATCH: u64 = 4;
const SEED: u64 = 7;
/// Attention logits are looked at every so many steps.
const LOOK_EVERY: u64 = 10;

/// Trains the four variants and writes `metrics.jsonl`
#[derive(Debug, Parser)]
struct Args {
    /// Folder of `metrics.jsonl`
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps of each variant
    #[arg(long, default_value_t = 300)]
    steps: u64,
    /// Peak learning rate of AdamW, constant behind a warm-up of a twentieth of the steps
    #[arg(long, default_value_t = 1e-2)]
    learning_rate: f64,
    /// Coefficient of the z-loss; Chameleon's is 1e-5
    #[arg(long, default_value_t = 1e-5)]
    z_loss: f64,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
}

/// What a training has of Chameleon's remedies.
#[derive(Debug, Clone, Copy)]
struct Variant {
    name: &'static str,
    qk_norm: bool,
    z_loss: bool,
}

const VARIANTS: [Variant; 4] = [
    Variant { name: "both", qk_norm: true, z_loss: true },
    Variant { name: "QK-norm", qk_norm: true, z_loss: false },
    Variant { name: "z-loss", qk_norm: false, z_loss: true },
    Variant { name: "neither", qk_norm: false, z_loss: false },
];

/// One line of `metrics.jsonl`. What is not finite is written as null.
#[derive(Debug, Default, Serialize)]
struct Line {
    variant: &'static str,
    step: u64,
    /// Cross-entropy of a token, and of the two kinds by themselves.
    loss: f64,
    loss_image: f64,
    loss_text: f64,
    /// 2-norm of the residual stream before the final norm, mean over tokens.
    output_norm: f64,
    /// Mean over tokens.
    log_z: f64,
    /// Largest absolute logit of attention in any layer, where it was looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    max_attention_logit: Option<f64>,
    grad_norm: f64,
    seconds: f64,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let device = runtime::device(&args.device)?;
    fs::create_dir_all(&args.out).with_context(|| format!("cannot make {}", args.out.display()))?;
    let path = args.out.join("metrics.jsonl");
    let what = || format!("cannot write {}", path.display());
    let mut metrics = BufWriter::new(File::create(&path).with_context(what)?);
    let scenes = Scenes::new(scenes_config(), Split::Train)?;
    let batches: Vec<Batch> = (0..args.steps).map(|step| Batch::new(&scenes, step, device)).collect::<Result<_>>()?;
    for variant in VARIANTS {
        train(variant, &args, &batches, device, &mut metrics).with_context(|| format!("variant {}", variant.name))?;
    }
    metrics.flush().with_context(what)
}

/// Pictures of one to three objects, with captions and short answers alike.
fn scenes_config() -> ScenesConfig {
    let free = [QuestionKind::Describe, QuestionKind::Box]; // judged by what is said
    let asked = QuestionKind::ALL.into_iter().filter(|kind| !free.contains(kind));
    let kinds: BTreeMap<QuestionKind, f64> = asked.map(|kind| (kind, 1.0)).collect();
    ScenesConfig {
        objects: [1.0; 3],
        lone_first: 0,
        questions_per_image: 3,
        kinds,
        kinds_of_several: None,
        ..ScenesConfig::default()
    }
}

/// A Chameleon of four layers, as it starts.
fn config(variant: Variant) -> LlmConfig {
    LlmConfig {
        model_type: "chameleon".to_owned(),
        hidden_size: 128,
        intermediate_size: 384,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: Some(4),
        qk_norm: Some(variant.qk_norm),
        tie_word_embeddings: false,
        ..LlmConfig::tiny(VOCAB)
    }
}

/// Rows of one picture and its words each, on the device.
struct Batch {
    input_ids: Tensor, // [batch, seq]
    lens: Vec<i64>,
    positions: Tensor, // [n], in batch * seq: all but each row's last token
    targets: Tensor,   // [n], the token behind each
    is_code: Tensor,   // [n], whether that is a picture's
    plan: AttentionPlan,
}

impl Batch {
    fn new(scenes: &Scenes, step: u64, device: Device) -> Result<Self> {
        let rows: Vec<Vec<i64>> = (step * BATCH..(step + 1) * BATCH).map(|index| row(scenes, index)).collect();
        let lens: Vec<i64> = rows.iter().map(|row| row.len() as i64).collect();
        let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
        let (mut input_ids, mut positions, mut targets) = (Vec::new(), Vec::new(), Vec::<i64>::new());
        for (row_idx, row) in rows.iter().enumerate() {
            positions.extend((0..row.len() - 1).map(|i| (row_idx * seq + i) as i64));
            targets.extend(&row[1..]);
            input_ids.extend(row.iter().copied().chain(std::iter::repeat_n(END, seq - row.len())));
        }
        let targets = Tensor::from_slice(&targets).to_device(device);
        Ok(Self {
            input_ids: Tensor::from_slice(&input_ids).view([BATCH as i64, seq as i64]).to_device(device),
            positions: Tensor::from_slice(&positions).to_device(device),
            is_code: targets.ge(FIRST_CODE).logical_and(&targets.lt(BEGIN)),
            targets,
            plan: AttentionPlan::new(&Spans::text(&lens), VisionAttention::Causal, device, Kind::Float)?,
            lens,
        })
    }

    /// `[batch, seq, hidden]` -> `[n, hidden]`
    fn at_positions(&self, x: &Tensor) -> Tensor {
        x.flatten(0, 1).index_select(0, &self.positions)
    }

    /// The largest absolute logit of attention in any layer and head, between tokens that may attend to each other.
    fn max_attention_logit(&self, llm: &CausalLm, hidden_states: &[Tensor]) -> f64 {
        let mut largest: f64 = 0.0;
        let (cos_sin, mut keys) = (llm.decoder().cos_sin(&self.plan), SharedKeys::default());
        for (layer, x) in llm.decoder().layers().iter().zip(hidden_states) {
            let logits = layer.attention_logits(x, &cos_sin, &mut keys); // [batch, heads, seq, seq]
            for (row, &len) in (0..).zip(&self.lens) {
                let logits = logits.get(row).narrow(1, 0, len).narrow(2, 0, len); // [heads, len, len]
                largest = largest.max(logits.tril(0).abs().max().double_value(&[]));
            }
        }
        largest
    }
}

/// A picture, then what is asked and answered about it; every second time the other way round.
fn row(scenes: &Scenes, index: u64) -> Vec<i64> {
    let mut picture = vec![BEGIN_IMAGE];
    picture.extend(codes(scenes, index));
    picture.push(END_IMAGE);
    let words: String = scenes.questions(index).iter().map(|q| format!("{} {}\n", q.question, q.answer)).collect();
    let words: Vec<i64> = words.bytes().map(i64::from).collect();
    let [first, second] = if index.is_multiple_of(2) { [picture, words] } else { [words, picture] };
    [vec![BEGIN], first, second, vec![END]].concat()
}

/// The picture of that number, row by row: for each patch the nearest of the codebook's colours to its mean.
fn codes(scenes: &Scenes, index: u64) -> Vec<i64> {
    let picture = scenes.render(index);
    let (width, height) = picture.dimensions();
    let code = |left: u32, top: u32| {
        let mut sums = [0u32; 3];
        for (x, y) in (top..top + PATCH).flat_map(|y| (left..left + PATCH).map(move |x| (x, y))) {
            for (sum, channel) in sums.iter_mut().zip(picture.get_pixel(x, y).0) {
                *sum += u32::from(channel);
            }
        }
        let steps = (LEVELS - 1) as f64;
        let level = |sum: u32| (f64::from(sum) / f64::from(PATCH * PATCH) / 255.0 * steps).round() as i64;
        sums.iter().fold(0, |code, &sum| code * LEVELS + level(sum)) + FIRST_CODE
    };
    let starts = |side: u32| (0..side / PATCH).map(|i| i * PATCH);
    starts(height).flat_map(|top| starts(width).map(move |left| (left, top))).map(|(x, y)| code(x, y)).collect()
}

/// Trains one variant and writes a line for each step.
fn train(variant: Variant, args: &Args, batches: &[Batch], device: Device, metrics: &mut impl Write) -> Result<()> {
    let weights = Weights::random(SEED, device, Kind::Float);
    let llm = CausalLm::load(&config(variant), &weights.trained())?;
    let parameters = weights.parameters();
    let count: usize = parameters.iter().map(|(_, tensor)| tensor.numel()).sum();
    eprintln!("{}: {:.2}M parameters", variant.name, count as f64 / 1e6);
    // But for the learning rate, what Chameleon is trained with (section 2.3).
    let optim = OptimConfig {
        learning_rate: args.learning_rate,
        learning_rates: LearningRates::default(),
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-5,
        weight_decay: 0.1,
        max_grad_norm: 1.0,
    };
    let mut optimizer = optimizer(parameters, &optim)?;
    let max_steps = batches.len() as u64;
    let schedule = Schedule {
        curve: Curve::ConstantWithWarmup,
        warmup_steps: max_steps / 20,
        max_steps,
        kwargs: SchedulerKwargs::default(),
    };
    let z_loss = if variant.z_loss { args.z_loss } else { 0.0 };
    let start = Instant::now();
    for (step, batch) in (1..).zip(batches) {
        let output = llm.decoder().forward(&llm.embed(&batch.input_ids), &batch.plan, llm.config().num_hidden_layers);
        let hidden = batch.at_positions(&output.last_hidden_state); // [n, hidden]
        let loss = cross_entropy_and_z_loss(&hidden, &batch.targets, i64::MAX, z_loss, |rows| llm.logits(rows));
        (loss / batch.targets.size()[0] as f64).backward();
        let grad_norm = optimizer.grad_norm()?.double_value(&[]);
        let mut line = tch::no_grad(|| look(&llm, batch, &output, &hidden));
        (line.variant, line.step, line.grad_norm) = (variant.name, step, grad_norm);
        line.seconds = start.elapsed().as_secs_f64();
        if step == 1 || step % LOOK_EVERY == 0 {
            line.max_attention_logit = Some(tch::no_grad(|| batch.max_attention_logit(&llm, &output.hidden_states)));
            let Line { loss, output_norm, log_z, .. } = line;
            eprintln!("{step}/{max_steps}  loss {loss:.3}  output norm {output_norm:.1}  log Z {log_z:.2}");
        }
        serde_json::to_writer(&mut *metrics, &line)?;
        writeln!(metrics)?;
        if !grad_norm.is_finite() {
            eprintln!("the gradient's norm is {grad_norm}: diverged");
            return Ok(());
        }
        optimizer.step(schedule.factor(step), grad_norm)?;
        optimizer.zero_grad()?;
    }
    Ok(())
}

/// What goes into the final norm, `[batch, seq, hidden]`: the last layer's output, of which a forward leaves the norm.
fn before_norm(llm: &CausalLm, batch: &Batch, output: &Output) -> Tensor {
    let layers = llm.decoder().layers();
    let (last, x) = (&layers[layers.len() - 1], &output.hidden_states[layers.len() - 1]);
    last.forward(x, &llm.decoder().cos_sin(&batch.plan), &batch.plan, &mut SharedKeys::default())
}

/// What is measured of a forward; `hidden` `[n, hidden]` is what its logits come from.
fn look(llm: &CausalLm, batch: &Batch, output: &Output, hidden: &Tensor) -> Line {
    let logits = llm.logits(hidden);
    let losses = logits.cross_entropy_loss::<Tensor>(&batch.targets, None, Reduction::None, -100, 0.0); // [n]
    let mean = |t: &Tensor| t.mean(Kind::Float).double_value(&[]);
    Line {
        loss: mean(&losses),
        loss_image: mean(&losses.masked_select(&batch.is_code)),
        loss_text: mean(&losses.masked_select(&batch.is_code.logical_not())),
        output_norm: mean(&batch.at_positions(&before_norm(llm, batch, output)).norm_scalaropt_dim(2, [-1], false)),
        log_z: mean(&logits.logsumexp([-1i64].as_slice(), false)),
        ..Line::default()
    }
}
