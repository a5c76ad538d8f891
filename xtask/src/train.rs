//! `cargo xtask train`: the whole way from a fresh clone to a model that answers questions about pictures.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use vora_run::samples;

use crate::cmd::{self, Vora, shown};
use crate::{download, setup};

/// The default recipe, and the one of `--smoke`.
pub const SCENES: &str = "crates/vora-train/recipes/scenes.yaml";
const SMOKE: &str = "crates/vora-train/recipes/smoke.yaml";

/// The models that recipes name and `download` knows how to get without the hub.
pub(crate) const DEFAULT_MODELS: [&str; 2] = ["HuggingFaceTB/SmolLM2-135M-Instruct", "facebook/dinov2-small"];

/// How many questions at most are asked after the training, descriptions among them.
const QUESTIONS: usize = 6;

/// What the model is asked without a picture.
const CHAT: &str = "What is the capital of Japan?";

/// Tokens at most of an answer: a model that has learned nothing would go on for long.
const MAX_NEW_TOKENS: &str = "48";

const EXAMPLES: &str = "\
Examples:
  cargo xtask train                                        the default recipe, a quarter of an hour on two cores
  cargo xtask train --smoke                                every step in seconds, with a tiny random model
  cargo xtask train --set max_steps=200 --set output_dir=runs/short
  cargo xtask train --resume                               go on from the last checkpoint
  cargo xtask train --nproc 2                              in two processes
  cargo xtask train --config my.yaml --device cuda";

/// Arguments of `train`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Run file [default: crates/vora-train/recipes/scenes.yaml]
    #[arg(long, value_name = "FILE", conflicts_with = "smoke")]
    config: Option<PathBuf>,
    /// Change one key of the run file; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<String>,
    /// Go on from the last checkpoint of the run folder
    #[arg(long)]
    resume: bool,
    /// A tiny random model, in seconds: shows that every step works, learns nothing
    #[arg(long)]
    smoke: bool,
    /// Train in so many processes on this machine
    #[arg(long, value_name = "N")]
    nproc: Option<usize>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long)]
    device: Option<String>,
}

/// What clap checks of a `--set`; the key itself is the program's to judge.
pub fn key_value(text: &str) -> Result<String, String> {
    match text.split_once('=') {
        Some((key, _)) if !key.is_empty() => Ok(text.to_owned()),
        _ => Err("it must read KEY=VALUE, as in `model.lora.r=32`".to_owned()),
    }
}

/// One training of the program `vora`.
#[derive(Debug)]
pub struct Run {
    /// The run file.
    pub config: PathBuf,
    /// `KEY=VALUE`, applied in this order.
    pub set: Vec<String>,
    /// Handed on to `vora` where given.
    pub device: Option<String>,
}

/// Sets up, trains, merges, and asks the merged model about pictures it never saw.
pub fn run(args: &Args) -> Result<()> {
    let config = match &args.config {
        Some(file) => std::path::absolute(file)?,
        None => cmd::root().join(if args.smoke { SMOKE } else { SCENES }),
    };
    let run = Run { config, set: args.set.clone(), device: args.device.clone() };
    run.dir()?; // a run file that is wrong is told before anything is fetched
    setup::ensure()?;
    run.download()?;
    let resume = args.resume.then(|| "--resume".to_owned());
    let nproc = args.nproc.map(|nproc| format!("--nproc={nproc}"));
    train_merge_ask(&Vora::build()?, &run, resume.into_iter().chain(nproc))
}

/// `more` are arguments of `vora train` alone.
fn train_merge_ask(vora: &Vora, run: &Run, more: impl Iterator<Item = String>) -> Result<()> {
    let run_dir = run.dir()?;
    cmd::run(run.command(vora.command("train")).args(more))?;

    let merged = run_dir.join("merged");
    if merged.exists() {
        fs::remove_dir_all(&merged).with_context(|| format!("removing the older {}", merged.display()))?;
    }
    let last = run_dir.join("final");
    let becomes = if acts_on_pictures_alone(&last) { "apart" } else { "seeing" };
    cmd::run(vora.command("merge").arg(&last).arg("--out").arg(&merged).args(["--as", becomes]))?;
    ask(vora, &run_dir, run.device.as_deref())?;
    chat(vora, &run_dir, run.device.as_deref())?;
    report(vora, &run_dir);
    Ok(())
}

/// Whether the adapters of a trained folder were trained through the tokens of pictures alone: they are never merged.
fn acts_on_pictures_alone(last: &Path) -> bool {
    let config = fs::read(last.join("config.json")).ok();
    let config: Option<serde_json::Value> = config.and_then(|text| serde_json::from_slice(&text).ok());
    config.is_some_and(|config| config["lora"]["acts_on"] == "image_tokens")
}

impl Run {
    /// `vora train` and its arguments.
    pub fn command(&self, mut train: Command) -> Command {
        train.arg("--config").arg(&self.config);
        for set in &self.set {
            train.args(["--set", set]);
        }
        if let Some(device) = &self.device {
            train.args(["--device", device]);
        }
        train
    }

    /// The run folder: the last `--set output_dir=`, else what the run file says; relative to the clone, as `vora` is run there.
    pub fn dir(&self) -> Result<PathBuf> {
        let text = self.text()?;
        let dir = self.set.iter().rev().find_map(|set| set.strip_prefix("output_dir=")).or_else(|| output_dir(&text));
        let dir = dir
            .with_context(|| format!("{} has no key `output_dir`; add --set output_dir=DIR", self.config.display()))?;
        Ok(cmd::root().join(dir))
    }

    /// Fetches those default models that this run needs and the cache lacks.
    pub fn download(&self) -> Result<()> {
        let text = self.text()?;
        for model in DEFAULT_MODELS {
            if std::iter::once(&text).chain(&self.set).any(|place| place.contains(model)) {
                download::ensure(model).with_context(|| format!("fetching {model}"))?;
            }
        }
        Ok(())
    }

    fn text(&self) -> Result<String> {
        fs::read_to_string(&self.config)
            .with_context(|| format!("cannot read {}; --config takes a run file", self.config.display()))
    }
}

/// The value of the top-level key `output_dir` in a YAML text.
fn output_dir(text: &str) -> Option<&str> {
    let value = text.lines().find_map(|line| line.strip_prefix("output_dir:"))?;
    let value = value.split(" #").next()?.trim().trim_matches(['"', '\'']);
    (!value.is_empty()).then_some(value)
}

/// Shows pictures that the training held out, with their questions, and what the merged model answers.
fn ask(vora: &Vora, run_dir: &Path, device: Option<&str>) -> Result<()> {
    let folder = run_dir.join(samples::FOLDER);
    let questions = samples::read(&folder)?;
    println!("\npictures that it never saw:");
    let every = questions.len().div_ceil(QUESTIONS).max(1); // some of each split: they stand one after another
    for question in questions.iter().step_by(every) {
        let image = folder.join(&question.image);
        let says = says(vora, &run_dir.join("merged"), Some(&image), &question.question, device)?;
        println!("  {}", shown(&image));
        println!("    {}\n    {says}   (right: {})", question.question, question.answer);
    }
    Ok(())
}

/// Shows what is said without a picture: by the folder whose adapters a picture switches on, where they do so, and merged.
fn chat(vora: &Vora, run_dir: &Path, device: Option<&str>) -> Result<()> {
    println!("\nwithout a picture:\n    {CHAT}");
    for (folder, whose) in [("final", "adapters apart"), ("merged", "merged")] {
        println!("    {}   ({whose})", says(vora, &run_dir.join(folder), None, CHAT, device)?);
    }
    Ok(())
}

/// What the model in `folder` answers.
fn says(vora: &Vora, folder: &Path, image: Option<&Path>, question: &str, device: Option<&str>) -> Result<String> {
    let mut ask = vora.command("ask");
    ask.arg(folder).args(image).arg(question).args(["--max-new-tokens", MAX_NEW_TOKENS]);
    if let Some(device) = device {
        ask.args(["--device", device]);
    }
    let output = ask.output().context("cannot run vora")?;
    let says = String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr });
    ensure!(output.status.success(), "`vora ask` of {} failed: {}", folder.display(), says.trim());
    Ok(says.trim().to_owned())
}

/// Says what lies where.
fn report(vora: &Vora, run_dir: &Path) {
    println!("\n{}:", shown(run_dir));
    for (name, what) in [
        ("config.yaml", "the run file as it was used"),
        ("metrics.jsonl", "one line a step"),
        ("loss.svg", "both losses over the steps"),
        ("eval.json", "exact match by split and question type, and that of the blind control"),
        ("language.json", "what seeing cost in text: perplexity of prose, and chats, beside the LLM's own"),
        ("checkpoints", "what `--resume` goes on from"),
        ("final", "adapters and patch embedding, to ask or to train further"),
        ("merged", "a plain checkpoint: nothing is left to pay for at inference"),
    ] {
        if run_dir.join(name).exists() {
            println!("  {name:<14} {what}");
        }
    }
    let (vora, merged) = (shown(&vora.program), shown(&run_dir.join("merged")));
    println!("\nask it yourself:\n  {vora} ask {merged} IMAGE \"What is in the picture?\"");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_folder_is_read_from_run_file_and_set() {
        assert_eq!(output_dir("seed: 1\noutput_dir: runs/a  # here\n"), Some("runs/a"));
        assert_eq!(output_dir("output_dir: \"runs/b\"\n"), Some("runs/b"));
        assert_eq!(output_dir("train:\n  output_dir: runs/c\n"), None);

        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("a.yaml");
        fs::write(&config, "seed: 1\n").unwrap();
        let mut run = Run { config, set: vec![], device: None };
        assert!(run.dir().unwrap_err().to_string().ends_with("has no key `output_dir`; add --set output_dir=DIR"));
        run.set = vec!["output_dir=runs/x".into(), "output_dir=/y".into()];
        assert_eq!(run.dir().unwrap(), Path::new("/y"));
    }

    #[test]
    fn missing_run_file_is_named() {
        let run = Run { config: "/nowhere/a.yaml".into(), set: vec![], device: None };
        let err = format!("{:#}", run.dir().unwrap_err());
        assert!(err.starts_with("cannot read /nowhere/a.yaml; --config takes a run file: "), "{err}");
    }

    #[test]
    fn command_hands_everything_on() {
        let run =
            Run { config: "/a.yaml".into(), set: vec!["lr=1".into(), "x.y=2".into()], device: Some("cpu".into()) };
        let command = run.command(Command::new("vora"));
        let args: Vec<_> = command.get_args().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(args, ["--config", "/a.yaml", "--set", "lr=1", "--set", "x.y=2", "--device", "cpu"]);
    }

    #[test]
    fn training_is_followed_by_merge_and_questions() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("run/samples")).unwrap();
        fs::create_dir_all(at("run/merged/older")).unwrap();
        let line = r#"{"image":"0.png","question":"What shape?","answer":"circle","kind":"shape","split":"test"}"#;
        fs::write(at("run/samples/questions.jsonl"), line).unwrap();
        fs::write(at("a.yaml"), format!("output_dir: {}\n", at("run").display())).unwrap();
        // A program `vora` that only writes down how it was called.
        fs::write(at("vora"), format!("#!/bin/sh\necho \"$*\" >> {}\n", at("log").display())).unwrap();
        fs::set_permissions(at("vora"), fs::Permissions::from_mode(0o755)).unwrap();

        let run = Run { config: at("a.yaml"), set: vec![], device: Some("cpu".into()) };
        let more = ["--resume", "--nproc=2"].map(str::to_owned).into_iter();
        train_merge_ask(&Vora { program: at("vora") }, &run, more).unwrap();
        let log = fs::read_to_string(at("log")).unwrap().replace(dir.path().to_str().unwrap(), "");
        let expected = [
            "train --config /a.yaml --device cpu --resume --nproc=2",
            "merge /run/final --out /run/merged --as seeing",
            "ask /run/merged /run/samples/0.png What shape? --max-new-tokens 48 --device cpu",
            "ask /run/final What is the capital of Japan? --max-new-tokens 48 --device cpu",
            "ask /run/merged What is the capital of Japan? --max-new-tokens 48 --device cpu",
        ];
        assert_eq!(log.lines().collect::<Vec<_>>(), expected);
        assert!(!at("run/merged").exists(), "the older one is removed");
    }

    #[test]
    fn set_without_a_value_is_refused() {
        assert!(key_value("lora.r").is_err() && key_value("=1").is_err());
        assert_eq!(key_value("a=b=c"), Ok("a=b=c".to_owned()));
    }
}
