//! Samples in one table of token ids, side by side or several in a row, still without tensors.

use std::ops::Range;

use vora_image::Pixels;
use vora_text::{Span, Spans};

use crate::sample::{IGNORE_INDEX, QuestionSpan, Sample};

/// What a model takes at once. Everything of `[batch, seq]` is a list of rows, one after the other.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
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
    /// What the rows are made of, in the order of their places.
    pub samples: Vec<SampleInfo>,
}

/// One sample's place, and what it was.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SampleInfo {
    /// The record's id.
    pub id: String,
    /// The row it stands in.
    pub row: usize,
    /// Its tokens within the row, without what all samples of the row begin with.
    pub tokens: Range<usize>,
    /// How many of the batch's images are its own.
    pub num_images: usize,
    /// Its questions, with the tokens of each answer within the row.
    pub questions: Vec<QuestionSpan>,
    /// Answers at its end that were left out, as they would not fit.
    pub cut_answers: usize,
}

/// The places that a model learns from, or is judged by.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Supervised {
    /// `[n]`: places in the batch flattened to `[batch * seq]`, ascending.
    pub positions: Vec<i64>,
    /// `[n]`: the token that is right after each.
    pub targets: Vec<i64>,
}

/// Puts samples into one batch, a row each, shorter ones padded at their end with `pad_id`.
pub fn collate(samples: Vec<Sample>, pad_id: i64) -> Batch {
    collate_rows(samples.into_iter().map(|sample| vec![sample]).collect(), pad_id)
}

/// Puts samples into one batch of one row. Words that all of them begin with, such as a system message, stand there once,
/// where none of them is learned: a model computes them once, and makes of every sample what it makes of it alone. Samples
/// with a picture and samples without share nothing, as adapters may act on the ones and not on the others.
pub fn collate_sharing(mut samples: Vec<Sample>, pad_id: i64) -> Batch {
    let len = shared_len(&samples);
    let start = samples.first().map_or(Vec::new(), |sample| sample.input_ids[..len].to_vec());
    for sample in &mut samples {
        sample.drop_start(len);
    }
    let mut batch = collate_rows(vec![samples], pad_id);
    if len > 0 {
        batch.begin_with(start);
    }
    batch
}

/// How many tokens of text, on the trunk and not learned, all samples begin with.
fn shared_len(samples: &[Sample]) -> usize {
    let Some((first, others)) = samples.split_first() else { return 0 };
    let is_mixed = others.iter().any(|sample| sample.images.is_empty() != first.images.is_empty());
    if others.is_empty() || is_mixed {
        return 0;
    }
    let text = |sample: &Sample| {
        let is_text = |span: &&Span| !span.is_image() && span.branch().is_none();
        let text: usize = sample.spans.iter().take_while(is_text).map(|span| span.len() as usize).sum();
        // A sample keeps a token of its own.
        let text = text.min(sample.input_ids.len().saturating_sub(1));
        sample.targets[..text].iter().take_while(|target| **target == IGNORE_INDEX).count()
    };
    let alike = |sample: &Sample| first.input_ids.iter().zip(&sample.input_ids).take_while(|(a, b)| a == b).count();
    others.iter().map(|sample| alike(sample).min(text(sample))).fold(text(first), usize::min)
}

/// Puts samples into one batch, those of each row one after the other. Each is a document of its row: its positions
/// start at 0 and it attends to nothing of the others, so that a model makes of it what it makes of it alone.
pub fn collate_rows(rows: Vec<Vec<Sample>>, pad_id: i64) -> Batch {
    let row_len = |row: &Vec<Sample>| row.iter().map(|sample| sample.input_ids.len()).sum();
    let seq: usize = rows.iter().map(row_len).max().unwrap_or(0);
    let mut batch = Batch {
        batch: rows.len() as i64,
        seq: seq as i64,
        input_ids: Vec::with_capacity(rows.len() * seq),
        targets: Vec::with_capacity(rows.len() * seq),
        spans: Spans::default(),
        images: Vec::new(),
        samples: Vec::new(),
    };
    let mut rows_spans = Vec::with_capacity(rows.len());
    for (row_idx, row) in rows.into_iter().enumerate() {
        let mut spans = Vec::new();
        for (document, mut sample) in row.into_iter().enumerate() {
            let start = batch.input_ids.len() - row_idx * seq;
            for question in &mut sample.questions {
                question.tokens = question.tokens.start + start..question.tokens.end + start;
            }
            batch.samples.push(SampleInfo {
                id: sample.id,
                row: row_idx,
                tokens: start..start + sample.input_ids.len(),
                num_images: sample.images.len(),
                questions: sample.questions,
                cut_answers: sample.cut_answers,
            });
            batch.input_ids.extend(sample.input_ids);
            batch.targets.extend(sample.targets);
            batch.images.extend(sample.images);
            spans.extend(sample.spans.iter().map(|span| span.in_document(document as i64)));
        }
        batch.input_ids.resize((row_idx + 1) * seq, pad_id);
        batch.targets.resize((row_idx + 1) * seq, IGNORE_INDEX);
        rows_spans.push(spans);
    }
    Batch { spans: Spans::new(rows_spans), ..batch }
}

impl Batch {
    /// Puts words in front of its only row that all documents begin with.
    fn begin_with(&mut self, input_ids: Vec<i64>) {
        let len = input_ids.len();
        let shared = Span::text(len as i64).in_all_documents();
        self.seq += len as i64;
        self.input_ids.splice(..0, input_ids);
        self.targets.splice(..0, vec![IGNORE_INDEX; len]);
        self.spans = Spans::new(self.spans.rows().iter().map(|row| [&[shared], &row[..]].concat()).collect());
        let moved = |tokens: &Range<usize>| tokens.start + len..tokens.end + len;
        for sample in &mut self.samples {
            sample.tokens = moved(&sample.tokens);
            for question in &mut sample.questions {
                question.tokens = moved(&question.tokens);
            }
        }
    }

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

    /// How many tokens the chosen and the rejected answer of each pair have; the pairs' answers follow each other in
    /// [`Batch::supervised`]. Empty where the samples are no pairs.
    pub fn pairs(&self) -> Vec<[i64; 2]> {
        let questions: Vec<_> = self.samples.iter().flat_map(|sample| &sample.questions).collect();
        let pairs = questions.windows(2).filter(|pair| !pair[0].is_rejected && pair[1].is_rejected);
        pairs.map(|pair| [0, 1].map(|i| pair[i].tokens.len() as i64)).collect()
    }
}

#[cfg(test)]
mod tests {
    use vora_text::Span;

    use super::*;

    fn sample(id: &str, input_ids: &[i64], targets: &[i64], questions: &[Range<usize>]) -> Sample {
        let span = |tokens: &Range<usize>| QuestionSpan {
            kind: "turn".to_owned(),
            question: String::new(),
            answer: String::new(),
            tokens: tokens.clone(),
            is_rejected: false,
        };
        Sample {
            id: id.to_owned(),
            input_ids: input_ids.to_vec(),
            targets: targets.to_vec(),
            spans: vec![Span::text(input_ids.len() as i64)],
            images: vec![Pixels { data: vec![0.0; 3], height: 1, width: 1 }],
            questions: questions.iter().map(span).collect(),
            cut_answers: 0,
            notes: Vec::new(),
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
        assert_eq!(batch.spans.rows(), [[Span::text(2)], [Span::text(4)]]);
        assert_eq!((batch.samples[1].id.as_str(), batch.samples[1].num_images), ("long", 1));
    }

    #[test]
    fn what_samples_begin_with_stands_there_once() {
        let none = IGNORE_INDEX;
        let mut a = sample("a", &[1, 2, 3, 4], &[none, none, 4, 9], &[2..3, 3..4]);
        let b = sample("b", &[1, 2, 5], &[none, none, 6], std::slice::from_ref(&(2..3)));
        a.spans = vec![Span::text(1), Span::text(1), Span::text(2).on_branch(0)];
        let batch = collate_sharing(vec![a.clone(), b.clone()], 0);
        assert_eq!((batch.batch, batch.seq), (1, 5));
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5]);
        assert_eq!(batch.targets, [none, none, 4, 9, 6]);
        let row = [Span::text(2).in_all_documents(), Span::text(2).on_branch(0), Span::text(1).in_document(1)];
        assert_eq!(batch.spans.rows(), [row]);
        batch.spans.validate().unwrap();
        let places: Vec<_> = batch.samples.iter().map(|sample| sample.tokens.clone()).collect();
        assert_eq!(places, [2..4, 4..5]);
        for (question, among) in batch.questions() {
            assert_eq!(batch.targets[question.tokens.clone()], batch.supervised().targets[among]);
        }
        // Nothing is shared of a single sample, with one of words alone, where it is learned, or in a picture.
        let len = |samples: &[Sample]| shared_len(samples);
        assert_eq!(len(&[a.clone(), b.clone()]), 2);
        assert_eq!((len(&[]), len(std::slice::from_ref(&a))), (0, 0));
        assert_eq!(len(&[a.clone(), Sample { images: vec![], ..b.clone() }]), 0);
        assert_eq!(len(&[a.clone(), Sample { targets: vec![none, 2, 6], ..b.clone() }]), 1);
        let spans = vec![Span::text(1), Span::image(1, 2)];
        assert_eq!(len(&[Sample { spans: spans.clone(), ..b.clone() }, Sample { spans, ..b }]), 1);
    }

    #[test]
    fn packed_samples_stand_behind_each_other() {
        let none = IGNORE_INDEX;
        let a = sample("a", &[1, 2, 3], &[none, 3, 9], &[1..2, 2..3]);
        let b = sample("b", &[4, 5], &[5, 6], &[0..1, 1..2]);
        let c = sample("c", &[7, 8, 9, 10], &[none, 9, none, 11], &[1..2, 3..4]);
        let batch = collate_rows(vec![vec![a, b], vec![c]], 0);
        assert_eq!((batch.batch, batch.seq, batch.images.len()), (2, 5, 3));
        assert_eq!(batch.input_ids, [1, 2, 3, 4, 5, 7, 8, 9, 10, 0]);
        assert_eq!(batch.spans.rows(), [vec![Span::text(3), Span::text(2).in_document(1)], vec![Span::text(4)]]);
        let places: Vec<_> = batch.samples.iter().map(|s| (s.id.as_str(), s.row, s.tokens.clone())).collect();
        assert_eq!(places, [("a", 0, 0..3), ("b", 0, 3..5), ("c", 1, 0..4)]);
        // Every answer is found in the table and among the supervised tokens.
        let supervised = batch.supervised();
        let rows = batch.samples.iter().flat_map(|s| s.questions.iter().map(|_| s.row));
        for ((question, among), row) in batch.questions().zip(rows) {
            let in_row = &batch.targets[row * 5..][question.tokens.clone()];
            assert_eq!(in_row, &supervised.targets[among]);
        }
    }
}
