//! The program `vora`: trains a language model to see by low-rank adaptation, merges what it learned into the
//! weights, and asks the result about pictures. All work is done by the libraries; here are the command line, the
//! progress bar and the exit codes: 0 done, 1 failed, 2 wrong usage, 130 and 143 after SIGINT and SIGTERM.

mod ask;
mod bench;
mod chat;
mod contrast;
mod convert;
mod data;
mod download;
mod eval;
mod inspect;
mod lines;
mod merge;
mod model;
mod prompts;
mod quantize;
#[cfg(unix)]
mod ranks;
mod report;
mod sampling;
mod serve;
mod size;
mod train;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Vision as LoRA, and what it answers to: train, merge, quantize, ask, chat, serve, evaluate, bench, report, inspect, convert, download.
#[derive(Debug, Parser)]
#[command(
    version,
    about,
    max_term_width = 100,
    after_help = "\
Examples:
  vora train --config crates/vora-train/recipes/scenes.yaml
  vora data show crates/vora-train/recipes/scenes.yaml
  vora merge runs/scenes/final --out runs/scenes/merged --as seeing
  vora quantize runs/scenes/merged --out runs/scenes/int8 --weights int8
  vora ask runs/scenes/merged picture.png \"What color is the circle?\"
  vora chat runs/scenes/merged
  vora serve runs/scenes/merged
  vora eval runs/scenes/merged --data scenes:unseen
  vora report runs/scenes
  vora inspect runs/scenes/merged
  vora convert runs/scenes/merged llm --to llm
  vora download HuggingFaceTB/SmolLM2-135M-Instruct"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a VoRA, a LLaVA or a Chameleon as a run file says
    Train(train::Args),
    /// Show what a run learns from, as its model sees it
    Data(data::Args),
    /// Fold trained adapters into the weights and write a checkpoint folder
    Merge(merge::Args),
    /// Bring the weights of a model's decoder into 8 or 4 bits and write a checkpoint folder
    Quantize(quantize::Args),
    /// Ask a model about pictures; the answer is streamed
    Ask(ask::Args),
    /// Talk with a model in the terminal
    Chat(chat::Args),
    /// Serve a model over HTTP as OpenAI's API, with a page to chat on
    Serve(serve::Args),
    /// Score a model on held-out questions beside a blind control, or on a text
    Eval(eval::Args),
    /// Measure how fast a model answers
    Bench(bench::Args),
    /// Show a run as one HTML page: curves, accuracies, answers, block maps
    Report(report::Args),
    /// Show a checkpoint's tensors, adapters and parameter counts
    Inspect(inspect::Args),
    /// Write a checkpoint in another layout, dtype, or number of files
    Convert(convert::Args),
    /// Fetch models of the hub into its cache
    Download(download::Args),
}

/// What libraries read of the environment they read before `main`: the program starts itself again with what is missing of it,
/// in the same process.
#[cfg(target_os = "linux")]
fn complete_environment() {
    use std::os::unix::process::CommandExt;
    use vora_torch::runtime::{Workload, missing_environment};
    let trains = std::env::args_os().nth(1).is_some_and(|command| command == "train");
    let workload = if trains { Workload::Training } else { Workload::Answering };
    let missing: Vec<_> = missing_environment(workload).collect();
    if missing.is_empty() {
        return;
    }
    if let Ok(program) = std::env::current_exe() {
        let mut args = std::env::args_os();
        let mut again = std::process::Command::new(program);
        if let Some(name) = args.next() {
            again.arg0(name);
        }
        // It returns only where it failed: then the work is done here, perhaps slower.
        let _ = again.args(args).envs(missing).exec();
    }
}

fn main() -> ExitCode {
    #[cfg(target_os = "linux")]
    complete_environment();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("VORA_LOG").unwrap_or_else(|_| level().into()))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()))
        .without_time()
        .with_target(false)
        .init();
    let result = match Cli::parse().command {
        Command::Train(args) => train::run(&args),
        Command::Data(args) => data::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Ask(args) => ask::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Download(args) => download::run(&args),
    };
    match result {
        Ok(code) => code,
        // Whoever reads our output has read enough, as `head` has: no fault, and nobody left to tell of it.
        Err(error) if is_closed_pipe(&error) => ExitCode::from(141), // 128 + SIGPIPE
        Err(error) => {
            tell(&error);
            ExitCode::FAILURE
        }
    }
}

/// What is logged. Of processes that train together the first tells what all know, the others of records that they read.
fn level() -> &'static str {
    let is_another = std::env::var("RANK").is_ok_and(|rank| rank.trim() != "0");
    if is_another { "error,vora_data=warn" } else { "warn" }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// `error: ...` on stderr, followed by its causes; libtorch's frames are left out.
fn tell(error: &anyhow::Error) {
    let mut text = String::from("error: ");
    for (depth, cause) in error.chain().enumerate() {
        if depth > 0 {
            text.push_str(": ");
        }
        match cause.downcast_ref::<tch::TchError>() {
            Some(torch) => text.push_str(&vora_torch::error::first_line(torch)),
            None => text.push_str(&cause.to_string()),
        }
    }
    // The one place that prints an error: this is the program.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{text}\n").as_bytes());
}
