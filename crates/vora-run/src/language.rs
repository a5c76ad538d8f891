//! What seeing cost in text: `language.json`.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vora_files::write_bytes;

/// The file of a run folder.
const FILE: &str = "language.json";

/// What a model keeps of the language of the model that it was.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Language {
    /// Tokens of the prose that were foretold.
    pub tokens: u64,
    /// The earlier model's perplexity of it.
    pub base_perplexity: f64,
    /// The model's own.
    pub perplexity: f64,
    /// Tokens that the earlier model answered to questions without a picture.
    pub chat_tokens: u64,
    /// The share of them that is the model's likeliest token too, told the earlier model's answer up to there.
    pub agreement: f64,
    /// Questions without a picture.
    pub chats: u64,
    /// How many of them both answer with the same text.
    pub same_chats: u64,
}

impl Language {
    /// The perplexity over the earlier model's: 1 where nothing is forgotten.
    pub fn ratio(&self) -> f64 {
        self.perplexity / self.base_perplexity
    }

    /// Reads the file of a run folder; none where the run has none, as its LLM was not adapted.
    ///
    /// # Errors
    /// Where it does not hold these keys.
    pub fn open(run: &Path) -> Result<Option<Self>> {
        let path = run.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let found = serde_json::from_slice(&text);
        found.map(Some).with_context(|| format!("{} is not what a run writes there", path.display()))
    }

    /// Writes the file into a run folder.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn save(&self, run: &Path) -> Result<()> {
        write_bytes(&run.join(FILE), serde_json::to_string_pretty(self)?.as_bytes())
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "perplexity of prose {:.2}, {:.3} times the LLM's {:.2}; the likeliest token is the LLM's at {:.1}% of {} \
             places in chats; {} of {} chats are the same",
            self.perplexity,
            self.ratio(),
            self.base_perplexity,
            100.0 * self.agreement,
            self.chat_tokens,
            self.same_chats,
            self.chats
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_it_and_says_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Language::open(folder.path()).unwrap(), None);
        let language = Language {
            tokens: 100,
            base_perplexity: 10.0,
            perplexity: 12.5,
            chat_tokens: 1280,
            agreement: 0.9,
            chats: 20,
            same_chats: 3,
        };
        language.save(folder.path()).unwrap();
        assert_eq!(Language::open(folder.path()).unwrap(), Some(language));
        let said = language.to_string();
        assert!(said.starts_with("perplexity of prose 12.50, 1.250 times the LLM's 10.00"), "{said}");
        assert!(said.ends_with("at 90.0% of 1280 places in chats; 3 of 20 chats are the same"), "{said}");
        std::fs::write(folder.path().join(FILE), "{}").unwrap();
        assert!(Language::open(folder.path()).unwrap_err().to_string().contains("is not what a run writes"));
    }
}
