//! Loaders over sources whose samples are told apart by their numbers, and files that cannot be read as they are.

mod compressed;
mod loader;
mod shared;

use anyhow::Result;
use vora_data::{Sample, Source};

/// Samples of one token, for tests: its id and its number. The numbers in `bad` are bad.
#[derive(Debug)]
struct Numbers {
    len: Option<u64>,
    bad: Vec<u64>,
}

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
