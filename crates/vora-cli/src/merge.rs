//! `vora merge`: trained adapters folded into the weights, as a folder that runs by itself.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use vora_lora::ActsOn;
use vora_model::{HfFiles, VisionLanguageModel, beside};
use vora_torch::runtime;

use crate::model::{ensure_vacant, same_place, written_kind};
use crate::prompts::{logits, prompts, same_likeliest};

/// Fold trained adapters into the weights and write a checkpoint folder.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora merge runs/scenes/final --out runs/scenes/merged --as seeing
  vora merge runs/scenes/checkpoints/step-240 --out merged --as seeing --check
  vora merge runs/scenes/final --out merged --as seeing --llm merged-llm
  vora merge runs/scenes/final --out whole --as apart
  vora merge runs/scenes/final --out merged --as seeing --hf
  vora merge runs/llava/final --out base --as base

A VoRA folder has the layout and tensor names of the published models, a LLaVA folder those of HF's
LlavaForConditionalGeneration. With --llm the language model inside it is written as well, as a plain
checkpoint that any tool reads. With --hf transformers opens the whole of a VoRA:

  AutoModelForCausalLM.from_pretrained(\"merged\", trust_remote_code=True)
  AutoProcessor.from_pretrained(\"merged\", trust_remote_code=True)

and of a LLaVA, in its own class; vLLM serves that folder too.")]
pub(crate) struct Args {
    /// A run's final/ folder, or one of its checkpoints
    trained: PathBuf,
    /// The folder to write
    #[arg(long)]
    out: PathBuf,
    /// Also write the LLM alone, without pictures, into this folder
    #[arg(long)]
    llm: Option<PathBuf>,
    /// Also write what HF transformers shows pictures with: of a VoRA the code of its classes and their settings, of a LLaVA the
    /// settings of its processor, with a token for pictures that tokenizer, embedding and head get where they have none
    #[arg(long)]
    hf: bool,
    /// Ask about pictures before and after, and print how far the logits moved; where the answers change, nothing is
    /// written
    #[arg(long)]
    check: bool,
    /// What becomes of adapters that do not act on every token: `seeing` folds them in, so that they do; `apart` keeps
    /// them beside the LLM's own weights, in a folder that runs by itself. `base` leaves the adapters of a LLaVA's LLM and
    /// vision tower out: on that folder PEFT puts them
    #[arg(long = "as", value_enum)]
    becomes: Option<Becomes>,
    /// The dtype of the merged weights: auto keeps what the LLM is stored in; bf16 or f32
    #[arg(long, default_value = "auto")]
    dtype: String,
}

/// The values of `--as`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Becomes {
    Seeing,
    Apart,
    Base,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let kind = written_kind(&args.dtype, &args.trained)?;
    ensure_vacant("--out", &args.out)?;
    if let Some(llm) = &args.llm {
        ensure_vacant("--llm", llm)?;
        ensure!(
            !same_place(llm, &args.out),
            "--llm and --out are both {}: the LLM wants a folder of its own",
            llm.display()
        );
    }
    if args.hf {
        HfFiles::ensure_vacant(&args.out)?;
    }
    let mut model = vora_model::open(&args.trained, Device::Cpu, kind, &vora_hub::resolve)?;
    ensure!(
        model.sees(),
        "{} is a language model alone, of which there is nothing to merge; `vora convert` merges PEFT's adapters into one",
        args.trained.display()
    );
    let becomes = becomes(&*model, args)?;
    if becomes != Becomes::Seeing {
        ensure!(
            !args.check && !args.hf && args.llm.is_none(),
            "--as apart and --as base merge nothing: leave out --check, --llm and --hf"
        );
        if becomes == Becomes::Base {
            model.detach()?;
        }
        model.save(&args.out)?;
        beside::copy_beside(&args.trained, &args.out)?;
        let what = if becomes == Becomes::Base { "model below the adapters" } else { "model with its adapters apart" };
        writeln!(std::io::stdout(), "{what}: {}", args.out.display())?;
        return Ok(ExitCode::SUCCESS);
    }
    let prompts = if args.check { prompts(&args.trained, &*model)? } else { Vec::new() };
    let before = logits(&*model, &prompts)?;
    model.merge().with_context(|| args.trained.display().to_string())?;
    let mut out = std::io::stdout().lock();
    if let (Some(before), Some(after)) = (before, logits(&*model, &prompts)?) {
        check(&before, &after, kind, &mut out)?;
    }
    let hf = args.hf.then(|| hf_files(args, &mut *model, kind)).transpose()?;
    model.save(&args.out)?;
    beside::copy_beside(&args.trained, &args.out)?;
    if let Some(hf) = hf {
        hf.write(&args.out)?;
    }
    if let Some(llm) = &args.llm {
        model.save_llm(llm)?;
        beside::copy_beside(&args.trained, llm)?;
    }
    writeln!(out, "merged model: {}", args.out.display())?;
    Ok(ExitCode::SUCCESS)
}

/// What transformers needs beside the weights, for which a LLaVA's are given a row where they have none for a picture.
fn hf_files(args: &Args, model: &mut dyn VisionLanguageModel, kind: Kind) -> Result<HfFiles> {
    let config = model.config_json()?;
    if config["model_type"] == "llava" {
        return HfFiles::of_llava(&args.trained, model);
    }
    HfFiles::new(&args.trained, &config, kind)
}

/// What becomes of the adapters: without a word those that act on every token are folded in, and others left as they are.
fn becomes(model: &dyn VisionLanguageModel, args: &Args) -> Result<Becomes> {
    let (acts_on, trained) = (model.adapted().acts_on(), model.lora().map(|lora| lora.acts_on));
    ensure!(
        args.becomes != Some(Becomes::Seeing) || trained != Some(ActsOn::ImageTokens),
        "--as seeing: the adapters of {} were trained through the tokens of pictures alone, and would act on words; \
         --as apart keeps them from that",
        args.trained.display()
    );
    ensure!(
        args.becomes != Some(Becomes::Base) || model.vision_lora().is_some(),
        "--as base: {} has no adapters on a vision tower; where the LLM alone has some, PEFT puts them on the LLM that the run \
         took",
        args.trained.display()
    );
    match args.becomes {
        Some(becomes) => Ok(becomes),
        None if acts_on == ActsOn::All => Ok(Becomes::Seeing),
        None => bail!(
            "the adapters of {} act on `{acts_on}`, weights act on every token: say --as seeing for one set of weights \
             that always sees, or --as apart for a folder that keeps the adapters beside the LLM's own weights",
            args.trained.display()
        ),
    }
}

/// Of a hundred places, at this many the likeliest token must stay the same. Rounding in bf16 turns near ties.
const SAME_OF_HUNDRED: i64 = 95;

/// Says how far merging moved the logits, `[words, vocab]` both.
///
/// # Errors
/// Where they are not finite, or the likeliest token is another one at too many places.
fn check(before: &Tensor, after: &Tensor, kind: Kind, out: &mut impl Write) -> Result<()> {
    for (logits, when) in [(before, "before"), (after, "after")] {
        ensure!(
            bool::try_from(logits.isfinite().all())?,
            "--check: logits {when} merging are not finite; nothing was written"
        );
    }
    let largest = (after - before).abs().max().double_value(&[]);
    let scale = before.abs().max().double_value(&[]);
    let same = same_likeliest(before, after);
    let (places, dtype) = (before.size()[0], runtime::name_of(kind));
    writeln!(
        out,
        "largest change in logits {largest:.2e}, of logits up to {scale:.1} ({dtype} weights); the likeliest token is the \
         same at {same} of {places} places"
    )?;
    ensure!(
        same * 100 >= places * SAME_OF_HUNDRED,
        "--check: the likeliest token is another one at {} of {places} places; nothing was written. --dtype f32 keeps \
         what rounding loses",
        places - same
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_passed_or_an_error() {
        let before = Tensor::eye(20, (Kind::Float, Device::Cpu)); // [words, vocab], each word's token another one
        let told = |after: &Tensor| {
            let mut out = Vec::new();
            check(&before, after, Kind::Float, &mut out)
                .map(|()| String::from_utf8(out).unwrap())
                .map_err(|e| e.to_string())
        };
        let said = told(&(&before + 0.25)).unwrap();
        assert!(said.contains("2.50e-1") && said.contains("(f32 weights)") && said.contains("20 of 20"), "{said}");
        assert!(
            told(&before.roll([1], [0])).unwrap_err().contains("another one at 20 of 20 places; nothing was written")
        );
        let nan = before.copy();
        let _ = nan.get(3).fill_(f64::NAN);
        assert!(told(&nan).unwrap_err().contains("after merging are not finite"));
    }
}
