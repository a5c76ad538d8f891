//! A conversation in tokens: what the assistant says in it, and what is an image.

use std::ops::Range;

use anyhow::{Context, Result, ensure};
use vora_image::Pixels;
use vora_text::Span;

use crate::records::{Record, shown};
use crate::sample::{IGNORE_INDEX, QuestionSpan, Sample};

/// Stands in `input_ids` where an image's patches go; it is not read.
const IMAGE_ID: i64 = 0;

/// A conversation as tokens, patches at the places of images.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    pub(crate) ids: Vec<i64>,
    supervised: Vec<bool>,
    spans: Vec<Span>,
}

impl Tokens {
    pub(crate) fn add_text(&mut self, ids: &[i64], supervised: bool) {
        if ids.is_empty() {
            return;
        }
        self.ids.extend(ids);
        self.supervised.resize(self.ids.len(), supervised);
        match self.spans.last_mut() {
            Some(span) if !span.is_image() => *span = span.with_len(span.len() + ids.len() as i64),
            _ => self.spans.push(Span::text(ids.len() as i64)),
        }
    }

    pub(crate) fn add_image(&mut self, rows: usize, cols: usize) {
        self.ids.resize(self.ids.len() + rows * cols, IMAGE_ID);
        self.supervised.resize(self.ids.len(), false);
        self.spans.push(Span::image(rows as i64, cols as i64));
    }

    /// The places of each answer's tokens. A first token has none before it that could predict it.
    pub(crate) fn answers(&self) -> impl Iterator<Item = Range<usize>> {
        let mut start = 0;
        self.supervised
            .chunk_by(|a, b| a == b)
            .map(move |run| {
                let range = start..start + run.len();
                start = range.end;
                (run[0], range)
            })
            .filter_map(|(supervised, range)| supervised.then_some(range.start.max(1)..range.end))
    }

    pub(crate) fn last_answer(&self) -> Result<Range<usize>> {
        self.answers().last().context("the chat template shows no answer")
    }

    pub(crate) fn target(&self, place: usize) -> i64 {
        if self.supervised[place + 1] { self.ids[place + 1] } else { IGNORE_INDEX }
    }

    /// The spans of the first `len` tokens.
    pub(crate) fn trunk(&self, len: usize) -> Result<Vec<Span>> {
        let mut left = len as i64;
        let mut trunk = Vec::new();
        for span in &self.spans {
            if !span.is_image() {
                trunk.push(span.with_len(span.len().min(left)));
            } else {
                ensure!(span.len() <= left, "the chat template puts what is different before the picture");
                trunk.push(*span);
            }
            left -= span.len().min(left);
        }
        trunk.retain(|span| !span.is_empty());
        Ok(trunk)
    }

    pub(crate) fn into_sample(self, record: &Record, images: Vec<Pixels>) -> Result<Sample> {
        let texts = |role| record.messages.iter().filter(move |message| message.role == role).map(shown);
        let asked = texts("user").zip(texts("assistant"));
        let questions: Vec<_> = asked
            .zip(self.answers())
            .map(|((question, answer), tokens)| QuestionSpan {
                kind: "turn".to_owned(),
                question,
                answer,
                tokens: tokens.start - 1..tokens.end - 1,
                is_rejected: false,
            })
            .collect();
        let len = questions.last().context("the chat template shows no answer")?.tokens.end;
        Ok(Sample {
            id: record.id.clone(),
            input_ids: self.ids[..len].to_vec(),
            targets: (0..len).map(|place| self.target(place)).collect(),
            spans: self.trunk(len)?,
            images,
            questions,
            cut_answers: 0,
            notes: record.notes.clone(),
        })
    }
}
