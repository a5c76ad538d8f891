//! A conversation before and after encoding: its turns, and the stretches of ids they became.

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Message {
    /// `system`, `user`, `assistant`, or whatever else the template knows.
    pub role: String,
    /// What is said and shown, in order.
    pub content: Vec<Part>,
}

/// A part of a turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Words; the literals of special tokens in them are words too.
    Text(String),
    /// The place of an image.
    Image,
}

impl Message {
    /// A turn of text alone.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self::of_parts(role, vec![Part::Text(text.into())])
    }

    /// A turn of words and pictures.
    pub fn of_parts(role: impl Into<String>, content: Vec<Part>) -> Self {
        Self { role: role.into(), content }
    }

    /// A user's turn: images, and below them what is asked about them.
    ///
    /// Whoever asks a model that was trained on records that do not say where their images go asks it like this.
    pub fn question_about(num_images: usize, question: &str) -> Self {
        let mut content = vec![Part::Image; num_images];
        let line = if num_images > 0 { format!("\n{question}") } else { question.to_owned() };
        content.push(Part::Text(line));
        Self::of_parts("user", content)
    }
}

/// A stretch of an encoded conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Tokens in a row that are all supervised or all not.
    Text {
        /// The tokens.
        ids: Vec<i64>,
        /// Whether the assistant writes them: its answers, each with the token that ends the turn.
        supervised: bool,
    },
    /// The place of an image.
    Image,
}
