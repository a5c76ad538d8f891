//! Asks a model every question of a set, about its pictures and about others, by the engine that answers everywhere.

use std::time::Instant;

use anyhow::{Context, Result};
use vora_image::RgbImage;
use vora_infer::{Assistant, Engine, EngineConfig, Event, Request};
use vora_llm::KvPages;
use vora_text::Message;
use vora_torch::runtime::available_memory;

use crate::blind::other_pictures;
use crate::question::Question;
use crate::question_set::QuestionSet;
use crate::report::Answered;

/// Tokens of a question and its answer for which there is room, whatever the model's context; what is longer has to wait until
/// others leave it theirs.
const MOST_TOKENS: i64 = 4096;

/// How each question is asked.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Asking {
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    /// Another budget of tokens for a picture than the model's own.
    pub max_image_tokens: Option<u32>,
}

impl Asking {
    /// For answers of so many tokens at most.
    pub fn new(max_tokens: usize) -> Self {
        Self { max_tokens, max_image_tokens: None }
    }

    /// The same with this [`max_image_tokens`](Self::max_image_tokens).
    #[must_use]
    pub fn with_max_image_tokens(self, max_image_tokens: u32) -> Self {
        Self { max_image_tokens: Some(max_image_tokens), ..self }
    }
}

/// The limits of an engine that answers so many questions of a set together.
pub fn engine_config(assistant: &Assistant, batch_size: usize) -> EngineConfig {
    let (config, llm) = (EngineConfig::default(), assistant.model().llm());
    let tokens = llm.config().max_position_embeddings.clamp(1, MOST_TOKENS);
    let wanted = KvPages::page_bytes(llm.config(), tokens, llm.kind()).saturating_mul(batch_size);
    let room =
        available_memory(llm.device()).map_or(usize::MAX, |bytes| usize::try_from(bytes / 2).unwrap_or(usize::MAX));
    let cache_bytes = wanted.max(config.cache_bytes).min(room);
    config.with_max_batch(batch_size).with_max_waiting(batch_size).with_cache_bytes(cache_bytes)
}

/// Asks every question, as many together as `engine` answers at once: once about its pictures, once about other ones, always for
/// the likeliest tokens. What could not be asked is named after what the set itself left out. `progress` is told how many
/// questions are done.
pub fn answer(
    engine: &Engine,
    set: &QuestionSet,
    asking: Asking,
    progress: &mut dyn FnMut(usize),
) -> (Vec<Answered>, Vec<String>) {
    let batch_size = engine.config().max_batch;
    let others = other_pictures(set.questions.iter().map(|question| question.pictures.as_slice()));
    let (mut answered, mut left_out) = (Vec::new(), set.left_out.clone());
    let mut done = 0;
    for (questions, others) in set.questions.chunks(batch_size).zip(others.chunks(batch_size)) {
        done += questions.len();
        let seeing = questions.iter().map(|question| decoded(set, question, &question.pictures));
        let seeing = replies(engine, seeing, asking);
        let blind = questions.iter().zip(others).map(|(question, other)| {
            other.as_ref().context("no other picture").and_then(|other| decoded(set, question, other))
        });
        let blind = replies(engine, blind, asking);
        for ((question, answer), blind) in questions.iter().zip(seeing).zip(blind) {
            match answer {
                // Other pictures that cannot be read are told of at their own question.
                Ok(Reply { text, image_tokens, seconds }) => answered.push(Answered {
                    question: question.clone(),
                    answer: text,
                    blind: blind.ok().map(|blind| blind.text),
                    image_tokens,
                    seconds,
                }),
                Err(error) => left_out.push(format!("{}: {error:#}", question.id)),
            }
        }
        progress(done);
    }
    (answered, left_out)
}

/// What a model said, how many tokens it was shown of pictures, and how long it took.
struct Reply {
    text: String,
    image_tokens: i64,
    seconds: f64,
}

/// A question's messages with the pictures that are shown with them.
type Prompt<'a> = (Vec<RgbImage>, &'a [Message]);

fn decoded<'a>(set: &QuestionSet, question: &'a Question, pictures: &[String]) -> Result<Prompt<'a>> {
    Ok((set.decode(pictures)?, &question.messages))
}

/// The likeliest answer to each prompt that is there, all together.
fn replies<'a>(
    engine: &Engine,
    prompts: impl Iterator<Item = Result<Prompt<'a>>>,
    asking: Asking,
) -> Vec<Result<Reply>> {
    let began = Instant::now();
    let ask = |prompt: Result<Prompt<'a>>| {
        let (pictures, messages) = prompt?;
        let request = Request::new(pictures, messages.to_vec()).with_max_new_tokens(asking.max_tokens);
        engine.stream(asking.max_image_tokens.into_iter().fold(request, Request::with_max_image_tokens))
    };
    let asked: Vec<Result<_>> = prompts.map(ask).collect();
    let together = asked.iter().flatten().count().max(1);
    let said: Vec<Result<(String, i64)>> = asked.into_iter().map(|events| said(events?)).collect();
    let seconds = began.elapsed().as_secs_f64() / together as f64;
    let reply = |(text, image_tokens)| Reply { text, image_tokens, seconds };
    said.into_iter().map(|said| said.map(reply)).collect()
}

/// The whole answer, and the tokens of its pictures.
fn said(events: impl Iterator<Item = Event>) -> Result<(String, i64)> {
    let (mut said, mut tokens, mut ended) = (String::new(), 0, false);
    for event in events {
        match event {
            Event::Started { image_tokens, .. } => tokens = image_tokens as i64,
            Event::Text { text, .. } => said.push_str(&text),
            Event::Finished { .. } => ended = true,
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
    ended.then_some((said, tokens)).context("the model ended")
}
