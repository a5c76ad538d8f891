//! `vora ask`: pictures and a question in, a streamed answer out.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use vora_infer::{Assistant, SamplingParams};
use vora_torch::runtime;

/// Ask a model about pictures; the answer is streamed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora ask runs/scenes/merged picture.png \"What color is the circle?\"
  vora ask runs/scenes/merged one.jpg two.jpg \"What differs?\" --temperature 0.7 --top-p 0.9 --seed 1")]
pub(crate) struct Args {
    /// The folder that `vora merge` wrote
    model: String,
    /// Pictures, then the question
    #[arg(required = true, value_name = "IMAGE… QUESTION")]
    rest: Vec<String>,
    /// 0 takes the most likely token each time
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Keep the k most likely tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the most likely tokens that make up this share
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Above 1, tokens already said become less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Of the random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens at most
    #[arg(long, default_value_t = 256)]
    max_new_tokens: usize,
    /// Print one JSON object when done instead of streaming
    #[arg(long)]
    json: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", env = "VORA_DEVICE")]
    device: String,
    /// auto, bf16, f32 or f16
    #[arg(long, default_value = "auto")]
    dtype: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let params = SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    params.validate()?;
    let Some((question, pictures)) = args.rest.split_last() else { anyhow::bail!("no question given") };
    ensure!(!PathBuf::from(question).is_file(), "the last argument, {question}, is a file: put the question after it");
    let images = pictures.iter().map(|path| vora_vision::open_image(path.as_ref())).collect::<Result<Vec<_>>>()?;
    let device = runtime::device(&args.device)?;
    let kind = runtime::kind(&args.dtype, device)?;
    let assistant = Assistant::open(&crate::hub::resolve(&args.model)?, device, kind)?;

    let mut out = std::io::stdout();
    let answer = assistant.ask(&images, question, &params, args.max_new_tokens, |text| {
        // A reader that went away ends the answer.
        args.json || (write!(out, "{text}").is_ok() && out.flush().is_ok())
    })?;
    if args.json {
        let json = serde_json::json!({
            "answer": answer.text,
            "finish_reason": format!("{:?}", answer.generated.finish_reason).to_lowercase(),
            "prompt_tokens": answer.generated.prompt_tokens,
            "completion_tokens": answer.generated.ids.len(),
        });
        writeln!(out, "{json}")?;
    } else {
        writeln!(out)?;
    }
    Ok(ExitCode::SUCCESS)
}
