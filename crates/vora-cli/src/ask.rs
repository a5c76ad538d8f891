//! `vora ask`: pictures and a question in, a streamed answer out.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use vora_image::{BoundingBox, RgbImage};
use vora_infer::{
    Assistant, Engine, EngineConfig, Event, FinishReason, OutputModality, Passage, Request, SamplingParams,
};

use crate::model::ModelArgs;
use crate::sampling::SamplingArgs;

/// Ask a model about pictures; the answer is streamed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora ask runs/scenes/merged picture.png \"What color is the circle?\"
  vora ask runs/scenes/final picture.png \"What color is the circle?\"
  vora ask runs/boxes/final picture.png \"Give the box of the circle.\" --draw out.png
  vora ask runs/scenes/final \"What is a circle?\"
  vora ask HuggingFaceTB/SmolLM2-135M-Instruct \"What is a circle?\"
  vora ask runs/scenes/merged one.jpg two.jpg \"What differs?\" --temperature 0.7 --top-p 0.9 --seed 1
  vora ask HuggingFaceTB/SmolLM2-135M-Instruct picture.png \"What is it?\" --lora-modules scenes=runs/scenes/final --adapter scenes
  vora ask runs/scenes-chameleon/merged \"A red ring.\" --write image --images-to drawn")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Pictures, then the question
    #[arg(required = true, value_name = "IMAGE… QUESTION")]
    rest: Vec<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Which of --lora-modules answers
    #[arg(long, value_name = "NAME", conflicts_with = "write")]
    adapter: Option<String>,
    /// What the answer may be made of; only a Chameleon writes pictures
    #[arg(long, value_enum, default_value_t = Modality::Text)]
    write: Modality,
    /// The folder that written pictures go into, as 0.png, 1.png, …
    #[arg(long, value_name = "DIR", default_value = ".")]
    images_to: PathBuf,
    /// Write the picture with the boxes of the answer drawn into it, where that tells some as Qwen-VL writes them:
    /// <box>(x1,y1),(x2,y2)</box> in thousandths of width and height
    #[arg(long, value_name = "FILE")]
    draw: Option<PathBuf>,
    /// Print one JSON object when done instead of streaming
    #[arg(long)]
    json: bool,
}

/// The values of `--write`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Modality {
    Text,
    Image,
    Interleaved,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let params = args.sampling.params(SamplingParams::default())?;
    let Some((question, pictures)) = args.rest.split_last() else { anyhow::bail!("no question given") };
    ensure!(!PathBuf::from(question).is_file(), "the last argument, {question}, is a file: put the question after it");
    let images = pictures.iter().map(|path| vora_image::open_image(path.as_ref())).collect::<Result<Vec<_>>>()?;
    if args.draw.is_some() {
        ensure!(images.len() == 1, "--draw takes one picture, there are {}", images.len());
        ensure!(args.write == Modality::Text, "--draw is for an answer in words: leave --write out");
    }
    let assistant = args.model.open()?;
    let request = Request::question(images.clone(), question)
        .with_sampling(params)
        .with_max_new_tokens(args.sampling.max_new_tokens);
    let request = args.adapter.iter().fold(request, Request::with_adapter);

    let mut out = std::io::stdout();
    let modality = match args.write {
        Modality::Text => None,
        Modality::Image => Some(OutputModality::Image),
        Modality::Interleaved => Some(OutputModality::Interleaved),
    };
    if let Some(modality) = modality {
        let passages = assistant.write(&request, modality)?;
        return show(&passages, &assistant, args, &mut out);
    }
    let engine = alone(assistant)?;
    let answer = answer(&engine, request, |text| {
        // A reader that went away ends the answer.
        args.json || (write!(out, "{text}").is_ok() && out.flush().is_ok())
    })?;
    if args.json {
        writeln!(out, "{}", answer.json())?;
    } else {
        writeln!(out)?;
    }
    if let (Some(path), [picture]) = (&args.draw, images.as_slice()) {
        draw(&answer.text, picture.clone(), path).context("--draw")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// An answer, as far as it was listened to.
pub(crate) struct Answer {
    pub(crate) text: String,
    reason: FinishReason,
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Answer {
    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "answer": self.text,
            "finish_reason": format!("{:?}", self.reason).to_lowercase(),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
        })
    }
}

/// The engine of `chat`, `serve` and `eval`, so that all answer alike, for one question at a time.
pub(crate) fn alone(assistant: Assistant) -> Result<Engine> {
    Engine::start(assistant, EngineConfig::default().with_max_batch(1).with_prefix_caching(false))
}

/// Asks the engine; `on_text` gets the text as it comes and may answer false to end it.
pub(crate) fn answer(
    engine: &Engine,
    request: Request<'static>,
    mut on_text: impl FnMut(&str) -> bool,
) -> Result<Answer> {
    let mut answer =
        Answer { text: String::new(), reason: FinishReason::Cancelled, prompt_tokens: 0, completion_tokens: 0 };
    for event in engine.stream(request)? {
        match event {
            Event::Started { prompt_tokens, .. } => answer.prompt_tokens = prompt_tokens,
            Event::Text { text, .. } => {
                answer.text.push_str(&text);
                if !on_text(&text) {
                    break;
                }
            }
            Event::Finished { reason, completion_tokens } => {
                (answer.reason, answer.completion_tokens) = (reason, completion_tokens);
            }
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    Ok(answer)
}

/// Writes the picture with the boxes that the answer tells.
fn draw(answer: &str, mut picture: RgbImage, path: &Path) -> Result<()> {
    let boxes = BoundingBox::all_in(answer)?;
    ensure!(!boxes.is_empty(), "the answer tells no box, {} is not written", path.display());
    BoundingBox::draw(&boxes, &mut picture);
    picture.save(path).with_context(|| format!("cannot write {}", path.display()))
}

/// Prints words, and the paths of the pictures between them.
fn show(passages: &[Passage], assistant: &Assistant, args: &Args, out: &mut impl Write) -> Result<ExitCode> {
    let folder = &args.images_to;
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let mut written = Vec::new();
    let mut pictures = 0;
    for passage in passages {
        written.push(match passage {
            Passage::Text(ids) => serde_json::json!({"text": assistant.tokenizer().decode(ids, true)?.trim()}),
            Passage::Image(picture) => {
                let path = folder.join(format!("{pictures}.png"));
                picture.save(&path).with_context(|| format!("cannot write {}", path.display()))?;
                pictures += 1;
                serde_json::json!({"image": path})
            }
        });
    }
    if args.json {
        writeln!(out, "{}", serde_json::Value::from(written))?;
    } else {
        for line in written.iter().flat_map(|passage| ["text", "image"].map(|key| passage[key].as_str())).flatten() {
            writeln!(out, "{line}")?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
