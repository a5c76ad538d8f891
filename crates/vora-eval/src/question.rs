//! A question with the answers that are expected.

use anyhow::{Result, bail};
use vora_text::{Message, Part};

/// A question, and what is known of it.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Question {
    /// What it is known by, or where it stands.
    pub id: String,
    /// What it is about, where the data say.
    pub kind: Option<String>,
    /// What was said up to it.
    pub messages: Vec<Message>,
    /// The pictures by their names in the data.
    pub pictures: Vec<String>,
    /// The answers that are expected.
    pub references: Vec<String>,
    /// Captions of its pictures, where the data have them beside the answers.
    pub captions: Vec<String>,
    /// Whether it stood under a key of its own, not in a conversation.
    pub has_question_key: bool,
}

impl Question {
    /// The question itself.
    pub fn text(&self) -> String {
        self.messages.last().map_or(String::new(), |message| text_of(message).trim().to_owned())
    }

    /// Whether the expected answer is yes.
    ///
    /// # Errors
    /// Where it is neither yes nor no.
    pub fn expects_yes(&self) -> Result<bool> {
        match self.references.first().map(|reference| reference.trim().to_lowercase()).as_deref() {
            Some("yes") => Ok(true),
            Some("no") => Ok(false),
            other => {
                bail!("{} expects `{}`, not yes or no: choose another --task", self.id, other.unwrap_or("nothing"))
            }
        }
    }
}

/// The words of a message without pictures.
pub(crate) fn text_of(message: &Message) -> String {
    let text = message.content.iter().filter_map(|part| match part {
        Part::Text(text) => Some(text.as_str()),
        Part::Image => None,
    });
    text.collect()
}
