//! `vora eval`: a model's scores on held-out questions, beside a blind control, or its perplexity on a text.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::builder::PossibleValuesParser;
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tch::{Device, Kind};
use vora_eval::language::{Side, language};
use vora_eval::{Answered, Asking, Budgets, Perplexity, QuestionSet, Report, Task, answer, engine_config, perplexity};
use vora_files::{read_text, write_bytes};
use vora_image::ImageProcessor;
use vora_infer::{Assistant, Engine, Width};
use vora_llm::{CausalLm, LlmConfig};
use vora_lora::ActsOn;
use vora_model::{VisionLanguageModel, named};
use vora_run::plot::{Measured, draw_measured};
use vora_text::{ChatTemplate, Tokenizer};
use vora_torch::runtime;
use vora_torch::weights::Weights;

use crate::model::ensure_apart;

/// Score a model on held-out questions beside a blind control, or on a text.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora eval runs/scenes/merged --data scenes:unseen --limit 50
  vora eval runs/photos/final --data photos_eval/captions.jsonl --out captions.json
  vora eval runs/photos/merged --data questions.jsonl --task vqa --max-tokens 10 --json
  vora eval runs/shaped/merged --data scenes:shaped --max-image-tokens 16,36,64,144,256 --curve budgets.svg
  vora eval runs/photos/merged --text held-out.txt
  vora eval runs/scenes/merged --language

MODEL is a folder that `vora merge` wrote, or a run's final/ or checkpoint, its adapters apart; for --text
also a language model alone. The blind control asks the same questions about another picture.

Data are JSON lines or one JSON array. A record names its pictures as for training (`frames`, `images` or
`image`) and has a conversation, or `question` and `answer` or `answers`, or POPE's `text` and `label`, or
`captions`. A picture's captions are those of all its records, or their `captions`. What most of the distinct
questions are made for is the task, unless --task says. By --task the scores:
  exact       exact_match
  vqa         vqa_accuracy of VQAv2; with a single answer, a match once both are normalised
  yesno       accuracy, precision, recall, f1 and yes_share as POPE reports them
  caption     bleu_1 to bleu_4, rouge_l and cider of pycocoevalcap
  perplexity  of --text")]
pub(crate) struct Args {
    /// A model's folder, or its name in the hub's cache
    model: String,
    /// JSON lines or a JSON array, or scenes:test, scenes:unseen, scenes:shaped
    #[arg(long, value_name = "FILE", required_unless_present_any = ["text", "language"], conflicts_with_all = ["text", "language"])]
    data: Option<String>,
    /// The folder that the data's pictures are in; else that of the data
    #[arg(long, value_name = "DIR", conflicts_with = "text")]
    images: Option<PathBuf>,
    /// A text to measure the perplexity on
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Measure what the model keeps of its LLM's language: perplexity of prose, and answers to 20 questions without a
    /// picture
    #[arg(long, conflicts_with = "text")]
    language: bool,
    /// With --language: the LLM that the model was, where its folder does not name it
    #[arg(long, value_name = "DIR", requires = "language")]
    base: Option<String>,
    /// What is scored; auto goes by the data
    #[arg(long, default_value = AUTO, value_parser = tasks())]
    task: String,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 64, conflicts_with = "text")]
    max_tokens: usize,
    /// Records, or scenes, at most
    #[arg(long, value_name = "N", conflicts_with = "text", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Tokens of a window over the text; else 1024, or the model's context where that is less
    #[arg(long, value_name = "TOKENS", conflicts_with = "data")]
    max_length: Option<usize>,
    /// Tokens from one window to the next; else half a window
    #[arg(long, value_name = "TOKENS", conflicts_with = "data")]
    stride: Option<usize>,
    /// Ask everything once more for each of these, the most tokens that a picture may become, of a model whose pictures keep
    /// their shape: 16,36,64
    #[arg(long, value_name = "N,…", value_delimiter = ',', conflicts_with_all = ["text", "language"])]
    max_image_tokens: Vec<u32>,
    /// With --max-image-tokens: draw scores and seconds over it into this SVG file
    #[arg(long, value_name = "FILE", requires = "max_image_tokens")]
    curve: Option<PathBuf>,
    /// Questions that are answered together
    #[arg(long, value_name = "N", default_value_t = 8, conflicts_with = "text", value_parser = batch_size)]
    batch_size: usize,
    /// With --data, what the weights are brought into: f32, bf16, int8 or int4 (on a CPU); else as they are
    #[arg(long, value_name = "WIDTH", value_parser = Width::parse, conflicts_with_all = ["text", "language"])]
    weights: Option<Width>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
    /// Write the JSON into this file, with every question and its answers
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The tokens that adapters act on, where they are apart from the weights: all, with_image or image_tokens; else as
    /// the folder says
    #[arg(long, value_name = "TOKENS", value_parser = ActsOn::parse)]
    acts_on: Option<ActsOn>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", env = "VORA_DEVICE")]
    device: String,
    /// auto, bf16, f32 or f16
    #[arg(long, default_value = "auto")]
    dtype: String,
}

/// The task that goes by the data.
const AUTO: &str = "auto";
/// The task of a text.
const PERPLEXITY: &str = "perplexity";

/// The names that `--task` takes.
fn tasks() -> impl clap::builder::TypedValueParser<Value = String> {
    let names = [AUTO].into_iter().chain(Task::ALL.map(Task::name)).chain([PERPLEXITY]);
    PossibleValuesParser::new(names.collect::<Vec<_>>())
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    if let Some(out) = &args.out {
        let read = [args.data.as_deref().map(Path::new), args.text.as_deref()];
        ensure_apart(out, &read.into_iter().flatten().collect::<Vec<_>>())?;
    }
    let device = runtime::device(&args.device)?;
    let kind = runtime::kind(&args.dtype, device)?;
    let folder = vora_hub::resolve(&args.model)?;
    let (table, mut results, answers) = match (&args.text, &args.data) {
        _ if args.language => on_language(args, &folder, device, kind)?,
        (Some(text), _) => on_text(args, text, &folder, device, kind)?,
        (None, Some(data)) => on_questions(args, data, &folder, device, kind)?,
        (None, None) => anyhow::bail!("give --data, --text or --language"),
    };
    results["model"] = args.model.as_str().into();
    results["dtype"] = runtime::name_of(kind).into();
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{results:#}")?;
    } else {
        writeln!(out, "{table}")?;
    }
    if let Some(path) = &args.out {
        if let Some(answers) = answers {
            results["answers"] = answers;
        }
        write_bytes(path, format!("{results:#}\n").as_bytes())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A table, its JSON, and what else goes into a file.
type Found = (String, Value, Option<Value>);

fn on_text(args: &Args, path: &Path, folder: &Path, device: Device, kind: Kind) -> Result<Found> {
    ensure!(
        [AUTO, PERPLEXITY].contains(&args.task.as_str()),
        "--text has a perplexity and no {}: give --data",
        args.task
    );
    let text = read_text(path)?;
    let input_ids = Tokenizer::open(folder)?.encode_whole(&text)?;
    let measure = |llm: &CausalLm, acts_on| {
        let context = usize::try_from(llm.config().max_position_embeddings)?;
        let max_length = args.max_length.unwrap_or(context.min(1024));
        let stride = args.stride.unwrap_or((max_length / 2).max(1));
        let found =
            perplexity(llm, acts_on, &input_ids, max_length, stride).with_context(|| path.display().to_string())?;
        Ok::<_, anyhow::Error>((found, max_length, stride))
    };
    let (found, max_length, stride) = if vora_model::is_vision_language_model(folder)? {
        let model = opened(args, folder, device, kind)?;
        measure(model.llm(), model.adapted().acts_on())?
    } else {
        let weights = Weights::open(folder, device, kind)?;
        let llm = CausalLm::load(&LlmConfig::open(folder)?, &weights)?;
        weights.finish().with_context(|| format!("loading {}", folder.display()))?;
        ensure!(args.acts_on.is_none(), "--acts-on: {} is a language model without adapters", args.model);
        measure(&llm, ActsOn::All)?
    };
    let Perplexity { perplexity, loss, tokens, .. } = found;
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["tokens", "loss", "perplexity"]);
    table.add_row([tokens.to_string(), format!("{loss:.4}"), format!("{perplexity:.3}")]);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let results = json!({
        "task": PERPLEXITY,
        "text": path,
        "perplexity": perplexity,
        "loss": loss,
        "tokens": tokens,
        "max_length": max_length,
        "stride": stride,
    });
    Ok((table.to_string(), results, None))
}

/// The model in `folder`, its adapters acting on what the arguments ask for.
fn opened(args: &Args, folder: &Path, device: Device, kind: Kind) -> Result<Box<dyn VisionLanguageModel>> {
    let mut model = vora_model::open(folder, device, kind, &vora_hub::resolve)?;
    if let Some(acts_on) = args.acts_on {
        model.set_acts_on(acts_on).context("--acts-on")?;
    }
    Ok(model)
}

/// What the model keeps of the language of its LLM: with adapters apart from its weights that is the LLM below them, else
/// the one that `--base` or the model's folder names.
fn on_language(args: &Args, folder: &Path, device: Device, kind: Kind) -> Result<Found> {
    let model = opened(args, folder, device, kind)?;
    let (tokenizer, chat) = (Tokenizer::open(folder)?, ChatTemplate::open(folder)?);
    let this = Side { llm: model.llm(), acts_on: model.adapted().acts_on() };
    let found = if model.lora().is_some() && args.base.is_none() {
        language(Side::frozen(model.llm()), this, &tokenizer, &chat)?
    } else {
        let base = match &args.base {
            Some(name) => vora_hub::resolve(name).context("--base")?,
            None => named::find(folder, "llm", &vora_hub::resolve)
                .with_context(|| format!("the LLM that {} was, which --base names", args.model))?,
        };
        let base = vora_model::open(&base, device, kind, &vora_hub::resolve).context("--base")?; // an LLM, or a Gemma 4
        language(Side::whole(base.llm()), this, &tokenizer, &chat)?
    };
    let mut results = json!(found);
    results["task"] = "language".into();
    results["ratio"] = found.ratio().into();
    Ok((found.to_string(), results, None))
}

fn on_questions(args: &Args, data: &str, folder: &Path, device: Device, kind: Kind) -> Result<Found> {
    ensure!(args.task != PERPLEXITY, "perplexity is of a text: give --text instead of --data");
    let mut set = QuestionSet::open(data, args.images.as_deref(), args.limit)?;
    let mut stderr = std::io::stderr();
    let task = if args.task == AUTO {
        let (found, why) = set.task()?;
        writeln!(stderr, "task {}, {why}; --task sets another", found.name())?;
        found
    } else {
        args.task.parse()?
    };
    set.prepare(task)?;
    for (note, count) in &set.notes {
        writeln!(stderr, "{count} records: {note}")?;
    }
    let model = opened(args, folder, device, kind).with_context(|| format!("{} cannot be asked", args.model))?;
    let assistant = Assistant::new(model, folder)?;
    for &most in &args.max_image_tokens {
        ImageProcessor::open(folder)?.with_max_image_tokens(most).context("--max-image-tokens")?;
    }
    let mut config = engine_config(&assistant, args.batch_size);
    config.width = args.weights;
    config.prefix_caching = args.max_image_tokens.is_empty(); // else each question costs what it costs alone
    let engine = Engine::start(assistant, config)?;
    let mut results = json!({"task": task.name(), "data": data, "max_tokens": args.max_tokens, "notes": set.notes});
    if !args.max_image_tokens.is_empty() {
        let budgets = within_budgets(args, &engine, &set, task)?;
        results["budgets"] = budgets.json();
        return Ok((budgets.to_string(), results, None));
    }
    let (answered, left_out) = answers(&engine, &set, Asking::new(args.max_tokens))?;
    let report = Report::new(task, &answered)?;
    results["scores"] = report.scores();
    results["left_out"] = left_out.into();
    Ok((report.to_string(), results, Some(report.answers().into())))
}

/// Every question within each budget of image tokens, and a curve of it where one is asked for.
fn within_budgets(args: &Args, engine: &Engine, set: &QuestionSet, task: Task) -> Result<Budgets> {
    let mut budgets = Budgets::default();
    for &max_image_tokens in &args.max_image_tokens {
        let asking = Asking::new(args.max_tokens).with_max_image_tokens(max_image_tokens);
        let (answered, left_out) = answers(engine, set, asking)?;
        budgets.push(max_image_tokens, &answered, left_out.len(), Report::new(task, &answered)?);
    }
    if let Some(path) = &args.curve {
        let [(name, points), control, (seconds, taken)] = budgets.curves();
        let most = (task != Task::Caption).then_some(1.0);
        draw_measured(
            path,
            "max_image_tokens",
            vec![
                Measured { name, most, points, control: Some(control) },
                Measured { name: seconds, most: None, points: taken, control: None },
            ],
        )?;
    }
    Ok(budgets)
}

/// How many of the records that were left out are named on the terminal; a file has all.
const NAMED: usize = 5;

/// Questions between two lines off a terminal.
const QUESTIONS_PER_LINE: usize = 25;

/// A number of questions.
fn batch_size(text: &str) -> Result<usize> {
    let size: usize = text.parse()?;
    ensure!(size > 0, "it must be at least 1");
    Ok(size)
}

/// The answers to every question, with a progress bar; what was left out is named.
fn answers(engine: &Engine, set: &QuestionSet, asking: Asking) -> Result<(Vec<Answered>, Vec<String>)> {
    let mut stderr = std::io::stderr();
    let is_terminal = stderr.is_terminal();
    let total = set.questions.len();
    let target = if is_terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(total as u64), target);
    if let Ok(style) = ProgressStyle::with_template("{bar:24} {pos}/{len} {eta} left") {
        bar.set_style(style);
    }
    let mut told = 0;
    let (answered, left_out) = answer(engine, set, asking, &mut |done| {
        bar.set_position(done as u64);
        if !is_terminal && (done >= told + QUESTIONS_PER_LINE || done == total) {
            told = done;
            let _ = writeln!(std::io::stderr(), "{done}/{total} questions"); // a closed stderr is no reason to stop
        }
    });
    bar.finish_and_clear();
    if !left_out.is_empty() {
        writeln!(stderr, "{} left out: {}", left_out.len(), left_out[..left_out.len().min(NAMED)].join("; "))?;
    }
    ensure!(!answered.is_empty(), "no question could be asked; the first: {}", left_out[0]);
    Ok((answered, left_out))
}
