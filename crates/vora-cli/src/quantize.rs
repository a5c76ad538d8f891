//! `vora quantize`: a model's weights brought into 8 or 4 bits, as a folder that runs by itself.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind};
use vora_eval::language::{Side, language};
use vora_image::ImageProcessor;
use vora_infer::{Width, not_finite};
use vora_model::{VisionLanguageModel, beside};
use vora_text::{ChatTemplate, Tokenizer};
use vora_torch::weights::Quantization;

use crate::model::{ensure_vacant, written_kind};
use crate::prompts::{logits, prompts, same_likeliest};

/// Bring the weights of a model's decoder into 8 or 4 bits and write a checkpoint folder.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora quantize runs/scenes/merged --out merged-int8 --weights int8
  vora quantize HuggingFaceTB/SmolLM2-135M-Instruct --out smollm-int4 --weights int4
  vora serve merged-int8

Every 32 numbers of a row share a scale, as in ggml's Q8_0 and Q4_0. The linear layers of the decoder's
blocks are stored so; embedding, head, norms and all that sees stay as they are. The folder is one of
compressed-tensors' format pack-quantized: that of a language model alone is opened by transformers, too.")]
pub(crate) struct Args {
    /// The folder that `vora merge` wrote, or another model's; a model's name in the hub's cache
    model: String,
    /// The folder to write
    #[arg(long)]
    out: PathBuf,
    /// int8 or int4
    #[arg(long, value_name = "WIDTH", value_parser = quantised)]
    weights: Quantization,
    /// Do not measure what it costs: the text of both models on prose and on chats, and their words about pictures
    #[arg(long)]
    no_check: bool,
    /// The dtype that the model computes in: auto is what it is stored in, f32 for f16; bf16 or f32
    #[arg(long, default_value = "auto")]
    dtype: String,
}

fn quantised(name: &str) -> Result<Quantization> {
    let width = Width::parse(name)?;
    Quantization::of_width(width).with_context(|| format!("{width} is not quantised: int8 or int4"))
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let folder = vora_hub::resolve(&args.model)?;
    ensure_vacant("--out", &args.out)?;
    // Weights in few bits are packed out of f32 or bf16, and f16 has numbers that bf16 has not.
    let kind = match written_kind(&args.dtype, &folder)? {
        Kind::Half if args.dtype == "auto" => Kind::Float,
        kind => kind,
    };
    let open = || vora_model::open(&folder, Device::Cpu, kind, &vora_hub::resolve);
    let (base, mut model) = (open()?, open()?);
    ensure!(
        base.adapted().merged().is_ok(),
        "the adapters of {} are apart from its weights: `vora merge` first, or quantize as it is opened, by --weights of \
         serve, chat and bench",
        folder.display()
    );
    ensure!(base.adapted().quantization().is_none(), "the weights of {} are in few bits already", folder.display());
    if let Some(name) = not_finite(&*base) {
        bail!("the weight `{name}` of {} has numbers that are not finite", folder.display());
    }
    model.adapted_mut().quantize(args.weights)?;
    model.save(&args.out)?;
    beside::copy_beside(&folder, &args.out)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "quantized model: {}", args.out.display())?;
    if !args.no_check {
        for line in costs(&folder, &*base, &*model)? {
            writeln!(out, "{line}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the few bits cost, a line for text and one for pictures, as far as the model has either.
fn costs(folder: &Path, base: &dyn VisionLanguageModel, model: &dyn VisionLanguageModel) -> Result<Vec<String>> {
    let (chat, tokenizer) = match ChatTemplate::open(folder).and_then(|chat| Ok((chat, Tokenizer::open(folder)?))) {
        Ok(words) => words,
        Err(error) => return Ok(vec![format!("what the few bits cost is not measured: {error:#}")]),
    };
    let side = |model| Side::whole(VisionLanguageModel::llm(model));
    let mut lines = vec![language(side(base), side(model), &tokenizer, &chat)?.to_string()];
    if model.sees() && !ImageProcessor::is_stored(folder)? {
        lines.push(format!("nothing is asked about pictures: {} has no image processor", folder.display()));
    } else if model.sees() {
        let prompts = prompts(folder, model)?;
        if let (Some(before), Some(after)) = (logits(base, &prompts)?, logits(model, &prompts)?) {
            lines.push(format!(
                "asked about {} pictures, the likeliest token is the same at {} of {} places",
                prompts.len(),
                same_likeliest(&before, &after),
                before.size()[0]
            ));
        }
    }
    Ok(lines)
}
