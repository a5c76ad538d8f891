//! `vora chat`: a conversation in the terminal.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;
use vora_infer::{Engine, EngineConfig, Event, InferError, Message, Request, RgbImage, SamplingParams, Width};

use crate::lines::{Line, Lines};
use crate::model::ModelArgs;
use crate::sampling::SamplingArgs;
use crate::tell;

/// How often a running answer looks for ctrl-c.
const GLANCE: Duration = Duration::from_millis(20);

/// Talk with a model in the terminal.
///
/// A line is a question. `/image PATH` shows a picture with the next one, `/system TEXT` says how to answer, `/reset` begins anew,
/// `/quit` ends, as ctrl-d does. Ctrl-c stops an answer, and between answers the program.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora chat runs/scenes/merged
  vora chat HuggingFaceTB/SmolLM2-135M-Instruct --temperature 0.7 --seed 1
  printf '/image picture.png\\nWhat is in this image?\\n' | vora chat runs/scenes/merged")]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// What the weights are brought into: f32, bf16, int8 or int4 (on a CPU); else as they are
    #[arg(long, value_name = "WIDTH", value_parser = Width::parse)]
    weights: Option<Width>,
    /// Which of --lora-modules answers
    #[arg(long, value_name = "NAME")]
    adapter: Option<String>,
    /// How the model is to answer, as /system says it
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    args.sampling.params(SamplingParams::default())?; // before the model is opened
    let mut config = EngineConfig::default();
    (config.max_batch, config.width) = (1, args.weights);
    let assistant = args.model.open()?;
    let params = args.sampling.params(assistant.sampling(0.0))?;
    let engine = Engine::start(assistant, config)?;
    let interrupts = Interrupts::new()?;
    let mut chat = Chat { system: args.system.clone(), ..Chat::default() };
    let (mut lines, mut out) = (Lines::of_stdin()?, std::io::stdout());
    loop {
        let line = match lines.next()? {
            Line::Text(line) => line,
            Line::End => break,
            Line::Interrupted => return Ok(ExitCode::from(128 + SIGINT as u8)),
        };
        match chat.take(line.trim()) {
            Ok(Taken::Nothing) => {}
            Ok(Taken::End) => break,
            Ok(Taken::Question) => {
                let request = chat.request().with_sampling(params.clone());
                let request = request.with_max_new_tokens(args.sampling.max_new_tokens);
                let request = args.adapter.iter().fold(request, Request::with_adapter);
                match answer(&engine, request, &interrupts, &mut out)? {
                    Ok(text) => chat.answered(text),
                    Err(error) => {
                        chat.unanswered();
                        let is_full = matches!(
                            error.downcast_ref(),
                            Some(InferError::PromptTooLong { .. } | InferError::ContextFull { .. })
                        );
                        let turns = chat.messages.len() / 2;
                        tell(&if is_full && turns > 0 {
                            error.context(format!("{turns} turns were said before: /reset begins anew"))
                        } else {
                            error
                        });
                    }
                }
            }
            Err(error) => tell(&error),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Streams an answer and gives its text; the inner error is the request's, the outer one the terminal's.
fn answer(
    engine: &Engine,
    request: Request<'static>,
    interrupts: &Interrupts,
    out: &mut impl Write,
) -> Result<Result<String>> {
    let (events, of_events) = mpsc::channel();
    let ticket = match engine.submit(request, move |event| drop(events.send(event))) {
        Ok(ticket) => ticket,
        Err(error) => return Ok(Err(error)),
    };
    interrupts.answering(true);
    let mut text = String::new();
    let ended = loop {
        if interrupts.came() {
            drop(ticket);
            break Ok(());
        }
        match of_events.recv_timeout(GLANCE) {
            Ok(Event::Text { text: new, .. }) => {
                write!(out, "{new}")?;
                out.flush()?;
                text.push_str(&new);
            }
            Ok(Event::Finished { .. }) => break Ok(()),
            Ok(Event::Failed(error)) => break Err(error),
            Ok(_) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break Err(anyhow::anyhow!("the model ended")),
        }
    };
    interrupts.answering(false);
    writeln!(out)?;
    Ok(ended.map(|()| text))
}

/// What was said and shown so far.
#[derive(Debug, Default)]
struct Chat {
    system: Option<String>,
    messages: Vec<Message>,
    images: Vec<RgbImage>,
    shown: usize, // of the images, those of the next question
}

/// What a line was.
#[derive(Debug, PartialEq, Eq)]
enum Taken {
    Nothing,
    Question,
    End,
}

impl Chat {
    /// Takes a line: a command, or a question, which then stands in the conversation.
    fn take(&mut self, line: &str) -> Result<Taken> {
        let (word, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match word {
            "" => return Ok(Taken::Nothing),
            "/quit" | "/exit" => return Ok(Taken::End),
            "/reset" => *self = Self { system: self.system.take(), ..Self::default() },
            "/system" => self.system = (!rest.is_empty()).then(|| rest.to_owned()),
            "/image" => {
                let path = rest.trim_matches(['\'', '"']); // as terminals put a file that is dropped on them
                ensure!(!path.is_empty(), "/image takes a picture's path");
                self.images.push(vora_image::open_image(Path::new(path)).context("/image")?);
                self.shown += 1;
            }
            word if word.starts_with('/') => bail!("there is no {word}: known are /image, /system, /reset, /quit"),
            _ => {
                self.messages.push(Message::question_about(self.shown, line));
                return Ok(Taken::Question);
            }
        }
        Ok(Taken::Nothing)
    }

    fn request(&self) -> Request<'static> {
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        let messages: Vec<Message> = system.chain(self.messages.iter().cloned()).collect();
        Request::new(self.images.clone(), messages)
    }

    fn answered(&mut self, text: String) {
        self.messages.push(Message::new("assistant", text));
        self.shown = 0;
    }

    /// Forgets the last question and its pictures.
    fn unanswered(&mut self) {
        self.messages.pop();
        self.images.truncate(self.images.len() - self.shown);
        self.shown = 0;
    }
}

/// Ctrl-c, which stops an answer where there is one, and else the program.
struct Interrupts {
    answering: Arc<AtomicBool>,
    came: Arc<AtomicBool>,
}

impl Interrupts {
    fn new() -> Result<Self> {
        let own = Self { answering: Arc::default(), came: Arc::default() };
        let (answering, came) = (own.answering.clone(), own.came.clone());
        let mut signals = Signals::new([SIGINT])?;
        std::thread::spawn(move || {
            for signal in signals.forever() {
                if !answering.load(Ordering::SeqCst) {
                    signal_hook::low_level::exit(128 + signal);
                }
                came.store(true, Ordering::SeqCst);
            }
        });
        Ok(own)
    }

    fn answering(&self, answering: bool) {
        self.came.store(false, Ordering::SeqCst);
        self.answering.store(answering, Ordering::SeqCst);
    }

    fn came(&self) -> bool {
        self.came.load(Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_commands_or_questions() {
        let mut chat = Chat::default();
        let picture = fixtures::root().join("images/rgb.png");
        assert_eq!(chat.take("").unwrap(), Taken::Nothing);
        assert_eq!(chat.take(&format!("/image '{}'", picture.display())).unwrap(), Taken::Nothing);
        assert_eq!(chat.take("What shape?").unwrap(), Taken::Question);
        assert_eq!(chat.messages, [Message::question_about(1, "What shape?")]);
        chat.unanswered();
        assert!(chat.images.is_empty() && chat.messages.is_empty());
        chat.take("/system Be brief.").unwrap();
        chat.take("Why?").unwrap();
        chat.answered("So.".to_owned());
        assert_eq!(chat.messages.len(), 2);
        chat.take("/reset").unwrap();
        assert!(chat.messages.is_empty() && chat.system.as_deref() == Some("Be brief."));
        assert!(chat.take("/image").is_err() && chat.take("/image no.png").is_err());
        assert!(chat.take("/fly").unwrap_err().to_string().contains("/reset"));
        assert_eq!(chat.take("/quit").unwrap(), Taken::End);
    }
}
