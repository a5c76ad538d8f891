//! Conversations as ids: the places of pictures, and which tokens the assistant writes.

use std::ops::Range;

use anyhow::{Context, Result, ensure};

use super::content::Turn;
use super::{ChatTemplate, Message, Piece};
use crate::Tokenizer;
use crate::specials::{IMAGE, INERT_IMAGE};
use crate::tokenizer::Token;

/// A conversation's way through a template and a tokenizer: what came from outside is inert, what the template writes
/// is not.
struct Passage<'a> {
    template: &'a ChatTemplate,
    tokenizer: &'a Tokenizer,
    place: Option<&'a str>, // what the template writes for a picture's place
    turns: Vec<Turn>,
}

impl ChatTemplate {
    /// The ids of a conversation that waits for the assistant's answer; nothing in it is supervised.
    ///
    /// # Errors
    /// What [`render`](Self::render) refuses, a template of which a picture's place cannot be told, and a token that the
    /// model's embedding has no row for.
    pub fn encode_prompt(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<Piece>> {
        let passage = Passage::new(self, tokenizer, messages)?;
        passage.pieces(&passage.render(messages.len(), true)?, &[])
    }

    /// The ids of a whole conversation, the assistant's answers marked as supervised.
    ///
    /// An answer is what stands between the prompt that ends before it and the token that ends its turn, that token
    /// included.
    ///
    /// # Errors
    /// As [`encode_prompt`](Self::encode_prompt), and where the template drops or rewrites an answer, as those do that
    /// strip earlier reasoning.
    pub fn encode_chat(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Vec<Piece>> {
        let passage = Passage::new(self, tokenizer, messages)?;
        let text = passage.render(messages.len(), false)?;
        passage.pieces(&text, &passage.answers(&text)?)
    }
}

impl<'a> Passage<'a> {
    fn new(template: &'a ChatTemplate, tokenizer: &'a Tokenizer, messages: &[Message]) -> Result<Self> {
        let forms = template.forms();
        let place = forms.place(messages).map_err(|written| template.unknown_place(written))?;
        let inert = |text: &str| {
            let text = tokenizer.protect(text);
            place.map_or(text.clone(), |place| text.replace(place, &INERT_IMAGE.to_string()))
        };
        let turns = messages.iter().map(|message| forms.turn(message, &IMAGE.to_string(), inert)).collect();
        Ok(Self { template, tokenizer, place, turns })
    }

    /// The first turns as the template writes them, its own special tokens and pictures under their private names.
    fn render(&self, num_turns: usize, prompt: bool) -> Result<String> {
        let text = self.template.render_turns(&self.turns[..num_turns], prompt)?;
        let text = self.place.map_or(text.clone(), |place| text.replace(place, &IMAGE.to_string()));
        Ok(self.tokenizer.activate(&text))
    }

    /// Where in `text`, the whole conversation, the assistant's answers are.
    fn answers(&self, text: &str) -> Result<Vec<Range<usize>>> {
        let mut answers: Vec<Range<usize>> = Vec::new();
        for (turn_idx, turn) in self.turns.iter().enumerate().filter(|(_, turn)| turn.role == "assistant") {
            let prompt = self.render(turn_idx, true)?;
            let origin = &self.template.origin;
            ensure!(
                text.starts_with(&prompt),
                "{origin}: turn {turn_idx} is the assistant's, but what comes before it is rendered differently once \
                 it is answered"
            );
            let upto = self.render(turn_idx + 1, false)?;
            let special_after = |at: usize| {
                let found = text[at..].char_indices().find(|&(_, c)| self.tokenizer.is_special(c));
                found.map(|(offset, c)| at + offset + c.len_utf8())
            };
            // Where the turn is over: where the conversation stops being what it was when this turn was the last, else
            // at the next special token. What a template writes once, at the very end, is no part of an earlier turn.
            let answer = turn.text.trim();
            let shared = shared_len(text, &upto);
            let as_last = shared >= prompt.len() && text[prompt.len()..shared].contains(answer);
            let limit = if as_last { Some(shared) } else { special_after(prompt.len()) }.unwrap_or(text.len());
            let said = text[prompt.len()..limit].find(answer).with_context(|| {
                format!("{origin}: the assistant's turn {turn_idx} is not rendered as it was given")
            })?;
            let answer_end = prompt.len() + said + answer.len();
            let end = match special_after(answer_end) {
                Some(end) if end <= limit => end,
                // No token ends a turn here: all that the template writes after the answer does.
                _ if as_last => limit,
                _ => answer_end,
            };
            let asked = self.turns.get(turn_idx + 1).map(|next| next.text.trim()).filter(|asked| !asked.is_empty());
            ensure!(
                asked.is_none_or(|asked| as_last || !text[answer_end..end].contains(asked))
                    && answers.last().is_none_or(|before| before.end <= prompt.len()),
                "{origin}: where the assistant's answer in or before turn {turn_idx} ends cannot be told from what \
                 follows it"
            );
            answers.push(prompt.len()..end);
        }
        Ok(answers)
    }

    /// Encodes a rendered text, of which the byte ranges `answers` (in order, apart) are supervised.
    fn pieces(&self, rendered: &str, answers: &[Range<usize>]) -> Result<Vec<Piece>> {
        let (mut text, mut copied) = (String::with_capacity(rendered.len()), 0);
        let mut copy_upto = |end| {
            let shown = self.tokenizer.unprotect(&rendered[copied..end]);
            text.push_str(&self.place.map_or(shown.to_string(), |place| shown.replace(INERT_IMAGE, place)));
            copied = end;
            text.len()
        };
        let mut ranges = Vec::with_capacity(answers.len());
        for answer in answers {
            ranges.push(copy_upto(answer.start)..copy_upto(answer.end));
        }
        copy_upto(rendered.len());

        // Each prompt is encoded as it is when the answer is still to be written, each answer as what comes after it: no
        // token has the end of one and the beginning of the other.
        let begins: Vec<usize> = ranges.iter().map(|range| range.start).filter(|&begin| begin > 0).collect();
        let ends = begins.iter().copied().chain([text.len()]);
        let [mut tokens, after] = self.tokenizer.around(&text)?;
        for (begin, end) in [0].into_iter().chain(begins.iter().copied()).zip(ends) {
            let encoded = match begin {
                0 => self.tokenizer.encode_activated(&text[..end])?,
                _ => self.tokenizer.encode_continuation(&text[begin..end])?,
            };
            tokens.extend(encoded.into_iter().map(|t| Token { start: t.start + begin, end: t.end + begin, ..t }));
        }
        tokens.extend(after);

        let mut pieces: Vec<Piece> = Vec::new();
        let mut ranges = ranges.iter().peekable();
        for Token { id, start, end } in tokens {
            let Some(id) = id else {
                pieces.push(Piece::Image);
                continue;
            };
            while ranges.peek().is_some_and(|r| r.end <= start) {
                ranges.next();
            }
            // A token that ends a turn may take the space after it along (`rstrip`): it is learned all the same.
            let is_learned = |r: &&Range<usize>| {
                r.start <= start && start < end.min(r.end) && text[r.end.min(end)..end].trim().is_empty()
            };
            let inside = ranges.peek().is_some_and(is_learned);
            match pieces.last_mut() {
                Some(Piece::Text { ids, supervised }) if *supervised == inside => ids.push(id),
                _ => pieces.push(Piece::Text { ids: vec![id], supervised: inside }),
            }
        }
        Ok(pieces)
    }
}

/// How many bytes two texts begin with in common, in whole characters.
fn shared_len(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(x, y)| x == y).map(|(c, _)| c.len_utf8()).sum()
}
