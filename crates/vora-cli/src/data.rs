//! `vora data`: what a run learns from, as its model sees it.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use serde::Serialize;
use vora_data::{IGNORE_INDEX, Preparation, Sample, SampleMaker};
use vora_image::RgbImage;
use vora_recipe::TrainConfig;
use vora_text::{Message, Modality, Piece, Span};
use vora_train::data;
use vora_train::observe::samples;

use crate::contrast::Contrast;

/// Look at what a run learns from, or make some.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora data show crates/vora-train/recipes/scenes.yaml
  vora data show run.yaml --index 17 --images shown
  vora data contrast photos/captions.jsonl --out photos/contrast.jsonl")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print training samples as the model sees them
    Show(Show),
    /// Make yes/no questions of captions, right ones and wrong ones
    Contrast(Contrast),
}

/// Print training samples as the model sees them: text, image places, what is learned, and the pictures.
///
/// Needs tokenizer, template and configs of the run's models, not their weights.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora data show crates/vora-train/recipes/scenes.yaml
  vora data show run.yaml --index 17 --count 3 --images shown
  vora data show run.yaml --set data.train.data_preprocess.max_seq_len=512 --json

What is learned stands in green on a terminal, in \u{27e6}brackets\u{27e7} elsewhere or with NO_COLOR. Each answer's labels are
decoded back and compared with the record: exit code 1 where they differ.")]
struct Show {
    /// The run file
    config: PathBuf,
    /// Number of the first sample, in the order of the files
    #[arg(long, default_value_t = 0)]
    index: u64,
    /// How many samples
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Print JSON, an object a line
    #[arg(long)]
    json: bool,
    /// Write the pictures, as the model sees them, into this folder as PNG
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Set one key of the run file, dotted: model.image_size=224
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    match &args.command {
        Command::Show(args) => args.run(),
        Command::Contrast(args) => args.run(),
    }
}

/// Tokens in a row that are alike.
#[derive(Debug, Serialize)]
struct Run {
    /// The tokens decoded; `[image ROWSxCOLS]` for a picture.
    text: String,
    tokens: usize,
    /// The tokens; none for a picture.
    ids: Vec<i64>,
    /// Whether the model learns to say them.
    learned: bool,
    branch: Option<i64>,
}

/// An answer as the record has it and as the labels have it.
#[derive(Debug, Serialize)]
struct Answer {
    kind: String,
    question: String,
    answer: String,
    /// Whether it is the rejected one of a pair.
    is_rejected: bool,
    /// The labels, decoded.
    labels: String,
    agree: bool,
}

/// A sample as it is printed.
#[derive(Debug, Serialize)]
struct Shown {
    index: u64,
    id: String,
    tokens: usize,
    learned: usize,
    branches: usize,
    runs: Vec<Run>,
    answers: Vec<Answer>,
    /// Whether every label belongs to an answer, and all answers agree.
    agree: bool,
    /// `[width, height]` of each picture.
    images: Vec<[usize; 2]>,
    files: Vec<PathBuf>,
    /// What of the record was not taken as it stands.
    notes: Vec<String>,
}

impl Show {
    fn run(&self) -> Result<ExitCode> {
        let config = TrainConfig::open(&self.config, &self.set)?;
        let preparation = vora_student::preparation(&config, &vora_hub::resolve)?;
        let source = data::training(&config, &Arc::new(SampleMaker::new(preparation.clone())))?;
        let terminal = std::io::stdout().is_terminal();
        let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let mut out = std::io::stdout().lock();
        let mut all_agree = true;
        let frame = frame(&preparation);
        let end = source.len().unwrap_or(u64::MAX);
        anyhow::ensure!(self.index < end, "--index is {}, the data has {end} samples, counted from 0", self.index);
        for index in self.index..end.min(self.index.saturating_add(self.count)) {
            let sample = match source.sample(index) {
                Ok(sample) => sample,
                Err(error) if self.json => {
                    writeln!(out, "{}", serde_json::json!({"index": index, "bad": format!("{error:#}")}))?;
                    continue;
                }
                Err(error) => {
                    writeln!(out, "sample {index} is bad: {error:#}\n")?;
                    continue;
                }
            };
            let pictures: Vec<_> =
                sample.images.iter().map(|image| samples::seen(image, &preparation.processor)).collect();
            let files = match &self.images {
                Some(folder) => write_pictures(folder, index, &pictures)?,
                None => Vec::new(),
            };
            let shown = Shown::new(index, &sample, &preparation, &frame, files)?;
            all_agree &= shown.agree;
            if self.json {
                writeln!(out, "{}", serde_json::to_string(&shown)?)?;
                continue;
            }
            writeln!(out, "{}", shown.text(colour))?;
            if colour {
                for picture in &pictures {
                    writeln!(out, "{}", half_blocks(picture))?;
                }
            }
        }
        Ok(if all_agree { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// The words that the template puts before and after an answer, where no token does; they are learned with it.
fn frame(preparation: &Preparation) -> (String, String) {
    let chat = [Message::new("user", "?"), Message::new("assistant", "probing")];
    let learned = |piece: Piece| match piece {
        Piece::Text { ids, supervised: true } => ids,
        _ => Vec::new(),
    };
    let pieces = preparation.chat.encode_chat(&preparation.tokenizer, &chat).unwrap_or_default();
    let ids: Vec<i64> = pieces.into_iter().flat_map(learned).collect();
    let said = preparation.tokenizer.decode(&ids, true).unwrap_or_default();
    let (before, after) = said.trim().split_once("probing").unwrap_or_default();
    (before.to_owned(), after.to_owned())
}

impl Shown {
    fn new(
        index: u64,
        sample: &Sample,
        preparation: &Preparation,
        (before, after): &(String, String),
        files: Vec<PathBuf>,
    ) -> Result<Self> {
        let decode = |ids: &[i64], skip_special| preparation.tokenizer.decode(ids, skip_special);
        let answers = sample.questions.iter().map(|asked| {
            let labels = decode(&sample.targets[asked.tokens.clone()], true)?;
            let said = labels.trim();
            let unframed = said.strip_prefix(before.as_str()).unwrap_or(said);
            let unframed = unframed.strip_suffix(after.as_str()).unwrap_or(unframed).trim();
            let agree = said == asked.answer.trim() || unframed == asked.answer.trim();
            let (kind, question, answer) = (asked.kind.clone(), asked.question.clone(), asked.answer.clone());
            anyhow::Ok(Answer { kind, question, answer, is_rejected: asked.is_rejected, labels, agree })
        });
        let answers = answers.collect::<Result<Vec<_>>>()?;
        let learned = sample.targets.iter().filter(|target| **target != IGNORE_INDEX).count();
        let of_answers: usize = sample.questions.iter().map(|asked| asked.tokens.len()).sum();
        let mut branches: Vec<_> = sample.spans.iter().filter_map(|span| span.branch()).collect();
        branches.dedup();
        Ok(Self {
            index,
            id: sample.id.clone(),
            tokens: sample.input_ids.len(),
            learned,
            branches: branches.len(),
            runs: runs(sample, preparation)?,
            agree: learned == of_answers && answers.iter().all(|answer| answer.agree),
            answers,
            images: sample.images.iter().map(|image| [image.width, image.height]).collect(),
            files,
            notes: sample.notes.clone(),
        })
    }

    fn text(&self, colour: bool) -> String {
        let (begin, end) = if colour { ("\x1b[32m", "\x1b[0m") } else { ("\u{27e6}", "\u{27e7}") };
        let mut text = format!(
            "sample {}: {}, {} tokens, {} of them learned, {} pictures, {} branches\n",
            self.index,
            self.id,
            self.tokens,
            self.learned,
            self.images.len(),
            self.branches
        );
        let mut branch = None;
        for run in &self.runs {
            if run.branch != branch {
                branch = run.branch;
                text += &branch.map_or(String::new(), |branch| format!("\n--- branch {branch}\n"));
            }
            text += &if run.learned { format!("{begin}{}{end}", run.text) } else { run.text.clone() };
        }
        text.push('\n');
        for Answer { kind, question, answer, is_rejected, labels, agree } in &self.answers {
            let role = if *is_rejected { "rejected answer" } else { "answer" };
            let verdict = if *agree { "agree" } else { "DIFFER" };
            let _ = write!(text, "\n{kind}: {question:?}\n  {role} {answer:?}, labels {labels:?}: they {verdict}");
        }
        if !self.agree {
            text += "\nThe labels are not those of the answers.";
        }
        for note in &self.notes {
            let _ = write!(text, "\nnote: {note}");
        }
        for file in &self.files {
            let _ = write!(text, "\npicture {}", file.display());
        }
        text.push('\n');
        text
    }
}

/// The sample's tokens in their order. Those that the labels ask for are learned; the last of a way, which only a label
/// holds as nothing follows it, is put after it.
fn runs(sample: &Sample, preparation: &Preparation) -> Result<Vec<Run>> {
    let way = |span: &Span| (span.document(), span.branch());
    let mut runs = Vec::new();
    let mut start = 0;
    for (number, span) in sample.spans.iter().enumerate() {
        let end = start + span.len() as usize;
        let goes_on = |other: Option<&Span>| other.is_some_and(|other| way(other) == way(span));
        let follows = goes_on(number.checked_sub(1).and_then(|before| sample.spans.get(before)));
        // Each token with whether it is learned: whether the one before it on its way has a label.
        let is_learned =
            |place: usize| (place > start || follows) && place > 0 && sample.targets[place - 1] != IGNORE_INDEX;
        match span.modality() {
            Modality::Image { rows, cols } => runs.push(Run {
                text: format!("[image {rows}x{cols}]"),
                tokens: span.len() as usize,
                ids: Vec::new(),
                learned: false,
                branch: span.branch(),
            }),
            Modality::Text => {
                let mut tokens: Vec<(i64, bool)> =
                    (start..end).map(|place| (sample.input_ids[place], is_learned(place))).collect();
                let last = sample.targets[end - 1];
                if last != IGNORE_INDEX && !goes_on(sample.spans.get(number + 1)) {
                    tokens.push((last, true));
                }
                for run in tokens.chunk_by(|a, b| a.1 == b.1) {
                    let ids: Vec<i64> = run.iter().map(|(id, _)| *id).collect();
                    let text = decode(preparation, &ids)?;
                    runs.push(Run { text, tokens: ids.len(), ids, learned: run[0].1, branch: span.branch() });
                }
            }
        }
        start = end;
    }
    Ok(runs)
}

/// The text of these tokens; the marks around a picture may be none of the tokenizer's.
fn decode(preparation: &Preparation, ids: &[i64]) -> Result<String> {
    let (begin, end) = preparation.image_marks.unzip();
    let is_mark = |id: &i64| Some(*id) == begin || Some(*id) == end;
    let part = |part: &[i64]| match part {
        [id] if Some(*id) == begin => Ok("[begin image]".to_owned()),
        [id] if Some(*id) == end => Ok("[end image]".to_owned()),
        ids => preparation.tokenizer.decode(ids, false),
    };
    ids.chunk_by(|a, b| !is_mark(a) && !is_mark(b)).map(part).collect()
}

fn write_pictures(folder: &Path, index: u64, pictures: &[RgbImage]) -> Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let write = |(number, picture): (usize, &RgbImage)| {
        let path = folder.join(format!("{index}-{number}.png"));
        picture.save(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    };
    pictures.iter().enumerate().map(write).collect()
}

/// Columns that a picture takes at most.
const MAX_COLUMNS: u32 = 64;

/// A picture in 24-bit colour, two pixels a character: the upper one its ink, the lower one its ground.
fn half_blocks(picture: &RgbImage) -> String {
    let step = picture.width().div_ceil(MAX_COLUMNS).max(1);
    let mut text = String::new();
    for y in (0..picture.height()).step_by(2 * step as usize) {
        for x in (0..picture.width()).step_by(step as usize) {
            let [r, g, b] = picture.get_pixel(x, y).0;
            let _ = write!(text, "\x1b[38;2;{r};{g};{b}m");
            if y + step < picture.height() {
                let [r, g, b] = picture.get_pixel(x, y + step).0;
                let _ = write!(text, "\x1b[48;2;{r};{g};{b}m");
            }
            text.push('\u{2580}');
        }
        text += "\x1b[0m\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_half_blocks() {
        let picture = RgbImage::from_fn(2, 3, |x, y| [x as u8, y as u8, 9].into());
        let text = half_blocks(&picture);
        let cell = |x: u8, y: u8| {
            let ground = if y < 2 { format!("\x1b[48;2;{x};{};9m", y + 1) } else { String::new() };
            format!("\x1b[38;2;{x};{y};9m{ground}\u{2580}")
        };
        assert_eq!(text, format!("{}{}\x1b[0m\n{}{}\x1b[0m\n", cell(0, 0), cell(1, 0), cell(0, 2), cell(1, 2)));
        let wide = half_blocks(&RgbImage::new(200, 8));
        assert_eq!(wide.lines().map(|line| line.matches('\u{2580}').count()).collect::<Vec<_>>(), [50]);
    }
}
