//! `vora report`: a run folder as one HTML page, with the trained model's own answers.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use vora_files::write_bytes;
use vora_infer::{Assistant, Request};
use vora_run::report::{Answers, html};
use vora_run::samples;
use vora_torch::runtime;

use crate::ask;
use crate::model::ensure_apart;

/// Tokens of an answer at most.
const MAX_NEW_TOKENS: usize = 64;

/// Show a run as one HTML page: curves, accuracies, answers, block maps.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora report runs/scenes
  vora report runs/scenes --out scenes.html --no-answers

The page holds all its pictures and needs no network. The model in RUN/final is asked about the pictures in
RUN/samples; a run still in training has no answers yet, and the page says so.")]
pub(crate) struct Args {
    /// The run's folder
    run: PathBuf,
    /// The page; RUN/report.html by default
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Do not open the model
    #[arg(long)]
    no_answers: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", env = "VORA_DEVICE")]
    device: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(out) = &args.out {
        let is_page =
            out.extension().is_some_and(|end| ["html", "htm"].iter().any(|html| end.eq_ignore_ascii_case(html)));
        ensure!(is_page || !out.exists(), "{} is there and no page (.html); choose another --out", out.display());
        ensure_apart(out, &[])?;
    }
    let log = args.run.join("metrics.jsonl");
    ensure!(log.is_file(), "{} is no folder of a run: there is no {}", args.run.display(), log.display());
    let answers = if args.no_answers {
        Err("--no-answers was given".to_owned())
    } else {
        answers(&args.run, &args.device).map_err(|error| {
            tracing::warn!("the page has no answers: {error:#}");
            format!("{error:#}")
        })
    };
    let page = html(&args.run, answers)?;
    let out = args.out.clone().unwrap_or_else(|| args.run.join("report.html"));
    write_bytes(&out, page.as_bytes())?;
    writeln!(std::io::stdout(), "report: {}", out.display())?;
    Ok(ExitCode::SUCCESS)
}

/// Asks the trained model about the run's samples.
fn answers(run: &Path, device: &str) -> Result<Answers> {
    let (trained, folder) = (run.join("final"), run.join(samples::FOLDER));
    ensure!(trained.exists(), "there is no {}: the run is not done", trained.display());
    let questions = samples::read(&folder)?;
    let device = runtime::device(device)?;
    let model = vora_model::open(&trained, device, runtime::kind("auto", device)?, &vora_hub::resolve)?;
    let engine = ask::alone(Assistant::new(model, &trained)?)?;
    let ask = |question: samples::Question| {
        let picture = vec![vora_image::open_image(&folder.join(&question.image))?];
        let request = Request::question(picture, &question.question).with_max_new_tokens(MAX_NEW_TOKENS);
        let answer =
            ask::answer(&engine, request, |_| true).with_context(|| format!("asking about {}", question.image))?;
        Ok((question.image, answer.text))
    };
    questions.into_iter().map(ask).collect()
}
