//! Where samples come from.

use anyhow::Result;

use crate::sample::Sample;
use crate::shuffle::Shuffle;

/// Samples by number: the same number always gives the same sample.
pub trait Source: Send + Sync {
    /// How many there are; none where they never end.
    fn len(&self) -> Option<u64>;

    /// Whether there are none at all.
    fn is_empty(&self) -> bool {
        self.len() == Some(0)
    }

    /// Whether it is read from its start on, so that only samples nearly in order are quickly made.
    fn is_stream(&self) -> bool {
        false
    }

    /// Makes the sample of this number.
    ///
    /// # Errors
    /// Where its record is bad: the error says which and why, and the next number may well be good.
    fn sample(&self, index: u64) -> Result<Sample>;

    /// The sample at a place of an endless walk: pass after pass, each in an order of its own where there is a seed
    /// to shuffle by. Samples are asked for nearly in order, by several threads.
    ///
    /// # Errors
    /// As [`Source::sample`].
    fn walk(&self, place: u64, seed: Option<u64>) -> Result<Sample> {
        self.sample(match (self.len(), seed) {
            (None, _) => place,
            (Some(len), None) => place % len,
            (Some(len), Some(seed)) => Shuffle::new(len, seed, place / len).get(place % len),
        })
    }
}

/// Samples of one token, for tests: its id and its number. The numbers in `bad` are bad.
#[cfg(test)]
#[derive(Debug)]
pub(crate) struct Numbers {
    pub(crate) len: Option<u64>,
    pub(crate) bad: Vec<u64>,
}

#[cfg(test)]
impl Source for Numbers {
    fn len(&self) -> Option<u64> {
        self.len
    }

    fn sample(&self, index: u64) -> Result<Sample> {
        anyhow::ensure!(!self.bad.contains(&index), "number {index} is bad");
        Ok(Sample {
            id: index.to_string(),
            input_ids: vec![index as i64],
            targets: vec![0],
            spans: vec![vora_text::Span::text(1)],
            images: Vec::new(),
            questions: Vec::new(),
            cut_answers: 0,
            notes: Vec::new(),
        })
    }
}
