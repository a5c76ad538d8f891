//! What a generation made, and why it ended.

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FinishReason {
    /// A stop token came, or the picture that was asked for is complete.
    Stop,
    /// `max_new_tokens` were made.
    Length,
    /// The callback asked for it.
    Cancelled,
}

/// What a generation made.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generated {
    /// The new tokens, the stop token not among them.
    pub ids: Vec<i64>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt, image patches among them.
    pub prompt_tokens: i64,
}
