//! Scores of answers against what was expected: pure functions on strings, each equal to the published scorer named at it.
//!
//! Exact match, VQA accuracy, yes/no as POPE reports it, and for captions BLEU, ROUGE-L and CIDEr on the words that
//! [`ptb_tokenize`] makes. They know no model and read no file.

mod bleu;
mod cider;
mod exact_match;
mod ngrams;
mod ptb;
mod rouge_l;
mod vqa;
mod yes_no;

pub use bleu::{MAX_ORDER, bleu};
pub use cider::cider;
pub use exact_match::exact_match;
pub use ptb::ptb_tokenize;
pub use rouge_l::rouge_l;
pub use vqa::{normalize_answer, vqa_accuracy};
pub use yes_no::{YesNo, says_yes};

/// A caption beside those that people wrote of the same picture, all of them [tokenised](ptb_tokenize).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedCaption {
    /// What is scored.
    pub candidate: String,
    /// What it is compared with, at least one.
    pub references: Vec<String>,
}

impl TokenizedCaption {
    /// Tokenises a caption and its references.
    pub fn new(candidate: &str, references: &[String]) -> Self {
        let references = references.iter().map(|reference| ptb_tokenize(reference)).collect();
        Self { candidate: ptb_tokenize(candidate), references }
    }
}

/// What the published packages make of the strings in `golden/scores.json`.
#[cfg(test)]
fn golden() -> serde_json::Value {
    let path = fixtures::root().join("golden/scores.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The captions of `golden/scores.json` and what they score, `(captions, expected)` for each set.
#[cfg(test)]
fn golden_captions() -> Vec<(Vec<TokenizedCaption>, serde_json::Value)> {
    let sets = golden()["captions"].as_array().unwrap().clone();
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    let captions = |set: &serde_json::Value| {
        let pairs = set["candidates"].as_array().unwrap().iter().zip(set["references"].as_array().unwrap());
        pairs
            .map(|(candidate, references)| TokenizedCaption {
                candidate: text(candidate),
                references: references.as_array().unwrap().iter().map(text).collect(),
            })
            .collect()
    };
    sets.into_iter().map(|set| (captions(&set), set)).collect()
}

#[cfg(test)]
fn assert_near(found: f64, expected: &serde_json::Value) {
    let expected = expected.as_f64().unwrap();
    assert!((found - expected).abs() < 1e-9, "{found}, expected {expected}");
}
