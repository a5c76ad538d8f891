//! `vora merge`: trained adapters folded into the weights, as a folder that runs by itself.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_llm::{Span, Spans};
use vora_model::{Input, Vora};
use vora_torch::runtime;
use vora_train::saved;

/// Fold trained adapters into the weights and write a checkpoint folder.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora merge runs/scenes/final --out runs/scenes/merged
  vora merge runs/scenes/checkpoints/step-200 --out merged --check
  vora merge runs/scenes/final --out merged --llm merged-llm

The folder has the layout and tensor names of the published VoRA models. With --llm the language model
inside it is written as well, as a plain checkpoint that any tool reads.")]
pub(crate) struct Args {
    /// A run's final/ folder, or one of its checkpoints
    trained: PathBuf,
    /// The folder to write
    #[arg(long)]
    out: PathBuf,
    /// Also write the LLM alone, without pictures, into this folder
    #[arg(long)]
    llm: Option<PathBuf>,
    /// Compare the logits before and after on a picture and words, and print the largest change
    #[arg(long)]
    check: bool,
    /// The kind of the merged weights: auto keeps what the LLM is stored in; bf16 or f32
    #[arg(long, default_value = "auto")]
    dtype: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let kind = match args.dtype.as_str() {
        "auto" => stored_kind(&args.trained)?,
        other => runtime::kind(other, Device::Cpu)?,
    };
    ensure!(
        !args.out.join("config.json").exists(),
        "{} already holds a model; choose another --out",
        args.out.display()
    );
    let mut model = saved::open(&args.trained, Device::Cpu, kind, &crate::hub::resolve)?;
    let input = args.check.then(|| example(&model));
    let before = input.as_ref().map(|input| logits(&model, input)).transpose()?;
    model.merge()?;
    model.save(&args.out)?;
    saved::copy_beside(&args.trained, &args.out)?;
    if let Some(llm) = &args.llm {
        model.save_llm(llm)?;
        saved::copy_beside(&args.trained, llm)?;
    }
    let mut out = std::io::stdout().lock();
    if let (Some(input), Some(before)) = (&input, before) {
        let after = logits(&model, input)?;
        let largest = (&after - &before).abs().max().double_value(&[]);
        let scale = before.abs().max().double_value(&[]);
        writeln!(out, "largest change in logits {largest:.2e}, of logits up to {scale:.1} ({kind:?} weights)")?;
    }
    writeln!(out, "merged model: {}", args.out.display())?;
    Ok(ExitCode::SUCCESS)
}

/// The kind that the LLM's own folder stores its weights in.
fn stored_kind(trained: &Path) -> Result<Kind> {
    let config = vora_model::VoraConfig::open(trained)?;
    let llm = crate::hub::resolve(&config.llm_name)?;
    let checkpoint = vora_torch::safetensors::Checkpoint::open(&llm)?;
    let kind = checkpoint.info("model.norm.weight").map(|(kind, _)| kind);
    kind.with_context(|| format!("{} has no model.norm.weight", llm.display()))
}

/// A picture of noise between words: every path of the model runs.
fn example(model: &Vora) -> Input {
    let config = model.config();
    let side = config.image_size / config.patch_size;
    let words = (config.llm.vocab_size - 1).min(16);
    let text = Tensor::arange(words, (Kind::Int64, Device::Cpu));
    let places = Tensor::zeros([side * side], (Kind::Int64, Device::Cpu));
    tch::manual_seed(0);
    Input {
        input_ids: Tensor::cat(&[&text, &places, &text], 0).unsqueeze(0),
        pixel_values: vec![Tensor::randn([3, config.image_size, config.image_size], (Kind::Float, Device::Cpu))],
        spans: Spans { rows: vec![vec![Span::text(words), Span::image(side, side), Span::text(words)]] },
    }
}

fn logits(model: &Vora, input: &Input) -> Result<Tensor> {
    tch::no_grad(|| {
        let output = model.forward(input, 0)?;
        Ok(model.llm().logits(&output.last_hidden_state.flatten(0, 1)).to_kind(Kind::Float))
    })
}
