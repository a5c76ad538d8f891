//! Samples side by side in one table of token ids, still without tensors.

use std::ops::Range;

use vora_llm::Spans;
use vora_vision::Pixels;

use crate::sample::{IGNORE_INDEX, QuestionSpan, Sample};

/// What a model takes at once. Everything of `[batch, seq]` is a list of rows, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Rows.
    pub batch: i64,
    /// Tokens of the longest row.
    pub seq: i64,
    /// `[batch, seq]`; rows end in padding, and what stands at image places is not read.
    pub input_ids: Vec<i64>,
    /// `[batch, seq]`: at each token the one to follow it, where it is learned, else [`IGNORE_INDEX`].
    pub targets: Vec<i64>,
    /// Which tokens are text and which an image.
    pub spans: Spans,
    /// Every image, in the order of their places.
    pub images: Vec<Pixels>,
    /// What the rows are made of.
    pub samples: Vec<SampleInfo>,
}

/// One row's origin.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleInfo {
    /// The record's id.
    pub id: String,
    /// How many of the batch's images are its own.
    pub num_images: usize,
    /// Its questions, with the tokens of each answer within the row.
    pub questions: Vec<QuestionSpan>,
}

/// The places that a model learns from, or is judged by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Supervised {
    /// `[n]`: places in the batch flattened to `[batch * seq]`, ascending.
    pub positions: Vec<i64>,
    /// `[n]`: the token that is right after each.
    pub targets: Vec<i64>,
}

/// Puts samples into one batch, shorter ones padded at their end with `pad_id`.
pub fn collate(samples: Vec<Sample>, pad_id: i64) -> Batch {
    let seq = samples.iter().map(|sample| sample.input_ids.len()).max().unwrap_or(0);
    let mut batch = Batch {
        batch: samples.len() as i64,
        seq: seq as i64,
        input_ids: Vec::with_capacity(samples.len() * seq),
        targets: Vec::with_capacity(samples.len() * seq),
        spans: Spans::default(),
        images: Vec::new(),
        samples: Vec::with_capacity(samples.len()),
    };
    for (row, sample) in samples.into_iter().enumerate() {
        let end = (row + 1) * seq;
        batch.input_ids.extend(sample.input_ids);
        batch.input_ids.resize(end, pad_id);
        batch.targets.extend(sample.targets);
        batch.targets.resize(end, IGNORE_INDEX);
        batch.spans.rows.push(sample.spans);
        batch.samples.push(SampleInfo { id: sample.id, num_images: sample.images.len(), questions: sample.questions });
        batch.images.extend(sample.images);
    }
    batch
}

impl Batch {
    /// The places with a target, and their targets.
    pub fn supervised(&self) -> Supervised {
        let places = self.targets.iter().enumerate().filter(|(_, target)| **target != IGNORE_INDEX);
        let (positions, targets) = places.map(|(place, target)| (place as i64, *target)).unzip();
        Supervised { positions, targets }
    }

    /// Every question with the numbers of its answer's tokens among [`Batch::supervised`]: answered exactly where
    /// all of them are.
    pub fn questions(&self) -> impl Iterator<Item = (&QuestionSpan, Range<usize>)> {
        let mut start = 0;
        self.samples.iter().flat_map(|sample| &sample.questions).map(move |question| {
            let tokens = start..start + question.tokens.len();
            start = tokens.end;
            (question, tokens)
        })
    }
}

#[cfg(test)]
mod tests {
    use vora_llm::Span;

    use super::*;

    fn sample(id: &str, input_ids: &[i64], targets: &[i64], questions: &[Range<usize>]) -> Sample {
        let span = |tokens: &Range<usize>| QuestionSpan {
            kind: "turn".to_owned(),
            question: String::new(),
            answer: String::new(),
            tokens: tokens.clone(),
        };
        Sample {
            id: id.to_owned(),
            input_ids: input_ids.to_vec(),
            targets: targets.to_vec(),
            spans: vec![Span::text(input_ids.len() as i64)],
            images: vec![Pixels { data: vec![0.0; 3], height: 1, width: 1 }],
            questions: questions.iter().map(span).collect(),
        }
    }

    #[test]
    fn rows_are_padded_at_their_end() {
        let none = IGNORE_INDEX;
        let long = sample("long", &[1, 2, 3, 4], &[none, 3, none, 5], &[1..2, 3..4]);
        let short = sample("short", &[6, 7], &[7, 8], &[0..1, 1..2]);
        let batch = collate(vec![short, long], 9);
        assert_eq!((batch.batch, batch.seq, batch.images.len()), (2, 4, 2));
        assert_eq!(batch.input_ids, [6, 7, 9, 9, 1, 2, 3, 4]);
        let supervised = batch.supervised();
        assert_eq!(supervised.positions, [0, 1, 5, 7]);
        assert_eq!(supervised.targets, [7, 8, 3, 5]);
        let tokens: Vec<_> = batch.questions().map(|(_, tokens)| tokens).collect();
        assert_eq!(tokens, [0..1, 1..2, 2..3, 3..4]);
        assert_eq!(batch.spans.rows, [[Span::text(2)], [Span::text(4)]]);
        assert_eq!((batch.samples[1].id.as_str(), batch.samples[1].num_images), ("long", 1));
    }
}
