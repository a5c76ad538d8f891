//! What a caller may want to tell apart; it comes through `anyhow` and back by `downcast_ref`.

use thiserror::Error;

/// Why a model is not asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InferError {
    /// A prompt leaves the model's context no room for an answer.
    #[error("the prompt has {tokens} tokens, the model's context is {context}: shorten the text or use fewer pictures")]
    PromptTooLong {
        /// Tokens of the prompt, image patches among them.
        tokens: i64,
        /// The model's `max_position_embeddings`.
        context: i64,
    },
    /// A picture that has to be written does not fit.
    #[error("the picture takes {needed} tokens, max_new_tokens and the model's context leave {room}")]
    NoRoomForPicture {
        /// Tokens that are missing of the picture, its marks among them.
        needed: usize,
        /// Tokens that may still come.
        room: usize,
    },
    /// A picture is shown to a language model alone.
    #[error("the model is a language model alone, which takes no picture")]
    SeesNoPictures,
    /// A picture is asked of a model that only sees them.
    #[error("the model writes no pictures; a Chameleon does")]
    WritesNoPictures,
}
