//! Asks a model every question of a set, about its pictures and about others.

use std::time::Instant;

use anyhow::{Context, Result};
use vora_image::RgbImage;
use vora_infer::{Assistant, Request};
use vora_text::Message;

use crate::blind::other_pictures;
use crate::question::Question;
use crate::question_set::QuestionSet;
use crate::report::Answered;

/// Asks every question, `batch_size` together, for at most `max_tokens` tokens each: once about its pictures, once about
/// other ones. What could not be asked is named after what the set itself left out. `progress` is told how many
/// questions are done.
///
/// # Panics
/// Where `batch_size` is 0.
pub fn answer(
    assistant: &Assistant,
    set: &QuestionSet,
    batch_size: usize,
    max_tokens: usize,
    progress: &mut dyn FnMut(usize),
) -> (Vec<Answered>, Vec<String>) {
    let others = other_pictures(set.questions.iter().map(|question| question.pictures.as_slice()));
    let (mut answered, mut left_out) = (Vec::new(), set.left_out.clone());
    let mut done = 0;
    for (questions, others) in set.questions.chunks(batch_size).zip(others.chunks(batch_size)) {
        done += questions.len();
        let seeing = questions.iter().map(|question| decoded(set, question, &question.pictures));
        let seeing = replies(assistant, seeing, max_tokens);
        let blind = questions.iter().zip(others).map(|(question, other)| {
            other.as_ref().context("no other picture").and_then(|other| decoded(set, question, other))
        });
        let blind = replies(assistant, blind, max_tokens);
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

/// The likeliest answer to each prompt that is there, all together; where that fails, each alone, so that an error is one
/// prompt's own.
fn replies<'a>(
    assistant: &Assistant,
    prompts: impl Iterator<Item = Result<Prompt<'a>>>,
    max_tokens: usize,
) -> Vec<Result<Reply>> {
    let sized = |prompt: Result<Prompt<'a>>| {
        let (pictures, messages) = prompt?;
        let image_tokens = pictures.iter().map(|picture| assistant.image_tokens(picture)).sum::<Result<i64>>()?;
        Ok((pictures, messages, image_tokens))
    };
    let prompts: Vec<Result<_>> = prompts.map(sized).collect();
    let good = prompts.iter().flatten();
    let requests: Vec<Request<'_>> =
        good.map(|(pictures, messages, _)| Request::new(pictures, *messages).with_max_new_tokens(max_tokens)).collect();
    let began = Instant::now();
    let answers: Vec<Result<String>> = match assistant.reply_all(&requests) {
        Ok(answers) => answers.into_iter().map(|answer| Ok(answer.text)).collect(),
        Err(_) => requests.iter().map(|request| Ok(assistant.reply(request, |_| true)?.text)).collect(),
    };
    let seconds = began.elapsed().as_secs_f64() / requests.len().max(1) as f64;
    let mut answers = answers.into_iter();
    let mut reply = |prompt: Result<(_, _, i64)>| {
        let (_, _, image_tokens) = prompt?;
        Ok(Reply { text: answers.next().context("an answer is missing")??, image_tokens, seconds })
    };
    prompts.into_iter().map(&mut reply).collect()
}
