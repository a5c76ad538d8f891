//! How a model's folder says that its answers are written: `generation_config.json`, HF's `GenerationConfig`.

use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::SamplingParams;

/// Its keys that choose tokens; each may be missing or `null`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub(crate) struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
}

const FILE: &str = "generation_config.json";

impl GenerationConfig {
    /// Reads the file of `folder`; where there is none it says nothing.
    ///
    /// # Errors
    /// Names the key whose value is no number, or out of its range.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        if !path.exists() {
            return Ok(Self::default());
        }
        let read = || -> Result<Self> {
            let json: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
            let config: Self = vora_files::object(&json)?;
            config.sampling(0.0).validate()?;
            Ok(config)
        };
        read().with_context(|| format!("reading {}", path.display()))
    }

    /// What it says, for whoever says nothing else; `temperature` where it names none and does not say `do_sample` either,
    /// which by itself means 1. A `top_k` that is missing keeps all tokens, as in vLLM.
    pub(crate) fn sampling(&self, temperature: f64) -> SamplingParams {
        let all = SamplingParams::default();
        let drawn = if self.do_sample == Some(true) { 1.0 } else { temperature };
        SamplingParams {
            temperature: self.temperature.unwrap_or(drawn),
            top_k: self.top_k.unwrap_or(all.top_k),
            top_p: self.top_p.unwrap_or(all.top_p),
            min_p: self.min_p.unwrap_or(all.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(all.repetition_penalty),
            ..all
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn open(json: &str) -> Result<GenerationConfig> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), json).unwrap();
        GenerationConfig::open(folder.path())
    }

    #[test]
    fn what_a_file_leaves_open_is_the_callers() {
        let empty = GenerationConfig::open(Path::new("/nowhere")).unwrap();
        assert_eq!(empty.sampling(0.0), SamplingParams::default());
        assert_eq!(empty.sampling(1.0).temperature, 1.0);
        // Qwen2.5's and Gemma 3's.
        let qwen = open(
            r#"{"do_sample": true, "repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": [1, 2]}"#,
        );
        let expected = SamplingParams::default().with_temperature(0.7).with_top_p(0.8).with_top_k(20);
        assert_eq!(qwen.unwrap().sampling(0.0), expected.with_repetition_penalty(1.05));
        let gemma = open(r#"{"do_sample": true, "top_k": 64, "top_p": 0.95, "temperature": null}"#).unwrap();
        assert_eq!(
            gemma.sampling(0.0),
            SamplingParams::default().with_temperature(1.0).with_top_p(0.95).with_top_k(64)
        );
    }

    #[test]
    fn a_value_of_no_use_is_told_by_its_key() {
        for (json, said) in [
            (r#"{"temperature": "warm"}"#, "`temperature`: invalid type: string"),
            (r#"{"temperature": -1}"#, "temperature is -1, it must be 0"),
            (r#"{"top_p": 0}"#, "top_p is 0, it must lie in"),
            (r#"{"top_k": 1.5}"#, "`top_k`: invalid type"),
            ("{", "EOF while parsing"),
        ] {
            let error = format!("{:#}", open(json).unwrap_err());
            assert!(error.contains(FILE) && error.contains(said), "{json}: {error}");
        }
    }
}
