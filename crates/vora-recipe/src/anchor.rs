//! The run file's `text_anchor`: what keeps the LLM's language while it learns to see.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::data::DataFetch;

/// Texts of a run whose file does not say how many, at most: they take time to write, and memory.
const MOST_TEXTS: u64 = 1000;

/// Texts on which the adapted LLM is held to what it was: the divergence of its predictions from those of the same
/// weights with the adapters off, `KL(frozen || adapted)`, a mean over the tokens that are held.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextAnchor {
    /// What the divergence is multiplied with; the language loss counts 1.
    pub weight: f64,
    /// Tokens of text a step; a step takes whole texts, at least one.
    pub tokens: usize,
    /// Every so many steps take texts; the others take none.
    pub every: u64,
    /// How many texts there are. What a step takes of them follows from its number and the run's seed. Absent: as many as
    /// the run's steps take, so that none comes twice, up to 1000: a text that comes again is held worse than a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub texts: Option<usize>,
    /// Tokens of a text at most.
    pub max_length: usize,
    /// At what temperature the LLM writes the texts, where it does.
    pub temperature: f64,
    /// Records without pictures that texts are taken from, in their order, longer ones cut into several. Absent: the LLM
    /// writes them itself before the first step, half of them answers in its chat template, to everyday questions and to
    /// its own, of which the answer alone is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_fetch: Option<DataFetch>,
}

impl Default for TextAnchor {
    fn default() -> Self {
        Self { weight: 1.0, tokens: 96, every: 1, texts: None, max_length: 96, temperature: 1.0, data_fetch: None }
    }
}

impl TextAnchor {
    /// Texts that a step takes.
    pub fn texts_a_step(&self) -> usize {
        (self.tokens / self.max_length).max(1)
    }

    /// How many texts a run of `max_steps` steps has.
    pub fn num_texts(&self, max_steps: u64) -> usize {
        let taken = max_steps.div_ceil(self.every).saturating_mul(self.texts_a_step() as u64);
        self.texts.unwrap_or(taken.clamp(1, MOST_TEXTS) as usize)
    }

    /// Checks every key's range.
    ///
    /// # Errors
    /// Names the first key that is out of it.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.weight > 0.0 && self.weight.is_finite(),
            "text_anchor.weight is {}, it must be above 0; leave text_anchor out where there is to be none",
            self.weight
        );
        ensure!(self.every >= 1, "text_anchor.every is 0, it must be at least 1");
        ensure!(self.texts != Some(0), "text_anchor.texts is 0, it must be at least 1");
        ensure!(
            self.max_length >= 2,
            "text_anchor.max_length is {}, a text foretells nothing below two tokens",
            self.max_length
        );
        ensure!(
            self.tokens >= self.max_length,
            "text_anchor.tokens is {}, less than one text of max_length {}; every: 2 takes one every other step",
            self.tokens,
            self.max_length
        );
        ensure!(
            self.temperature > 0.0 && self.temperature.is_finite(),
            "text_anchor.temperature is {}, it must be above 0",
            self.temperature
        );
        if let Some(fetch) = &self.data_fetch {
            ensure!(!fetch.data_paths.is_empty(), "text_anchor.data_fetch.data_paths is empty");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_takes_whole_texts() {
        let of = |tokens, max_length| TextAnchor { tokens, max_length, ..TextAnchor::default() };
        assert_eq!([of(96, 96), of(384, 96), of(100, 30)].map(|anchor| anchor.texts_a_step()), [1, 4, 3]);
        TextAnchor::default().validate().unwrap();
    }

    #[test]
    fn there_are_as_many_texts_as_steps_take() {
        let anchor = TextAnchor { tokens: 200, every: 3, ..TextAnchor::default() };
        assert_eq!([1, 3, 4, 300].map(|steps| anchor.num_texts(steps)), [2, 2, 4, 200]);
        assert_eq!([anchor.num_texts(0), anchor.num_texts(100_000)], [1, 1000]);
        assert_eq!(TextAnchor { texts: Some(7), ..anchor }.num_texts(300), 7);
    }

    #[test]
    fn errors_name_the_key() {
        let good = TextAnchor::default;
        for (config, expected) in [
            (TextAnchor { weight: 0.0, ..good() }, "text_anchor.weight is 0, it must be above 0"),
            (TextAnchor { every: 0, ..good() }, "text_anchor.every is 0"),
            (TextAnchor { texts: Some(0), ..good() }, "text_anchor.texts is 0"),
            (TextAnchor { max_length: 1, ..good() }, "a text foretells nothing below two tokens"),
            (TextAnchor { tokens: 50, ..good() }, "less than one text of max_length 96"),
            (TextAnchor { temperature: f64::NAN, ..good() }, "text_anchor.temperature is NaN"),
            (
                TextAnchor { data_fetch: Some(DataFetch { data_paths: Vec::new() }), ..good() },
                "text_anchor.data_fetch.data_paths is empty",
            ),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
