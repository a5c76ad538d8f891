//! `samples/`: held-out pictures with a question each.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use vora_files::write_bytes;

/// The folder of a run that samples lie in.
pub const FOLDER: &str = "samples";

const QUESTIONS: &str = "questions.jsonl";

/// A line of `questions.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Question {
    /// The picture's file, in the same folder.
    pub image: String,
    /// What is asked.
    pub question: String,
    /// The answer that is right.
    pub answer: String,
    /// What the question is about.
    pub kind: String,
    /// The split that it comes from.
    pub split: String,
}

/// Writes the `questions.jsonl` of a folder.
///
/// # Errors
/// Where the file cannot be written.
pub fn write(folder: &Path, questions: &[Question]) -> Result<()> {
    let mut lines = String::new();
    for question in questions {
        lines += &serde_json::to_string(question)?;
        lines.push('\n');
    }
    write_bytes(&folder.join(QUESTIONS), lines.as_bytes())
}

/// Reads the `questions.jsonl` of a folder.
///
/// # Errors
/// Where the file cannot be read, and the number of the first line that is no question.
pub fn read(folder: &Path) -> Result<Vec<Question>> {
    let path = folder.join(QUESTIONS);
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let question = |(i, line)| {
        serde_json::from_str(line).with_context(|| format!("{}:{} is no question of a run", path.display(), i + 1))
    };
    text.lines().enumerate().map(question).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_is_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let question = Question {
            image: "0.png".into(),
            question: "What colour is it?".into(),
            answer: "red".into(),
            kind: "colour".into(),
            split: "test".into(),
        };
        write(folder.path(), std::slice::from_ref(&question)).unwrap();
        assert_eq!(read(folder.path()).unwrap(), [question]);
        let path = folder.path().join(QUESTIONS);
        let good = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, good + "{\"image\":\"1.png\"}\n").unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("questions.jsonl:2 is no question of a run"), "{error}");
    }
}
