//! A caption that is scored.

use super::ptb::ptb_tokenize;

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
