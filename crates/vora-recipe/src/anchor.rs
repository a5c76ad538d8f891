//! The run file's `text_anchor`: what keeps the LLM's language while it learns to see.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::data::DataFetch;

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
    /// How many texts there are. What a step takes of them follows from its number and the run's seed.
    pub texts: usize,
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
        Self { weight: 1.0, tokens: 96, every: 1, texts: 96, max_length: 96, temperature: 1.0, data_fetch: None }
    }
}

impl TextAnchor {
    /// Texts that a step takes.
    pub fn texts_a_step(&self) -> usize {
        (self.tokens / self.max_length).max(1)
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
        ensure!(self.texts >= 1, "text_anchor.texts is 0, it must be at least 1");
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
    fn errors_name_the_key() {
        let good = TextAnchor::default;
        for (config, expected) in [
            (TextAnchor { weight: 0.0, ..good() }, "text_anchor.weight is 0, it must be above 0"),
            (TextAnchor { every: 0, ..good() }, "text_anchor.every is 0"),
            (TextAnchor { texts: 0, ..good() }, "text_anchor.texts is 0"),
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
