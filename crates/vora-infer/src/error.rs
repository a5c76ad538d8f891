//! What a caller may want to tell apart; it comes through `anyhow` and back by `downcast_ref`.

use thiserror::Error;

/// Why a model is not asked.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
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
    /// What the model computed is no number: there is no likeliest token.
    #[error("the model computed numbers that are not finite")]
    NotFinite,
    /// A picture that has to be written does not fit.
    #[error("the picture takes {needed} tokens, max_new_tokens and the model's context leave {room}")]
    NoRoomForPicture {
        /// Tokens that are missing of the picture, its marks among them.
        needed: usize,
        /// Tokens that may still come.
        room: usize,
    },
    /// The cache of keys and values is too small for the request, however little else is asked.
    #[error(
        "the request takes up to {needed} tokens, the cache of keys and values holds {room}: ask for fewer, or give it more memory"
    )]
    ContextFull {
        /// Tokens of prompt and answer at most.
        needed: i64,
        /// Tokens that the whole cache holds.
        room: i64,
    },
    /// As many requests wait as may.
    #[error("{waiting} requests are waiting already: ask again later")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
    },
    /// The engine takes no more requests: it was told to end, or it has ended.
    #[error("the engine is ending and takes no more requests")]
    Ending,
    /// A picture cannot be made into what the model sees.
    #[error("picture {index}: {problem}")]
    BadImage {
        /// Which of the request's, from 0.
        index: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The chat template does not take the conversation: a system turn, two of a user's in a row, and the like.
    #[error("the model's chat template does not take these messages: {problem}")]
    BadMessages {
        /// The template's own words.
        problem: String,
    },
    /// An answer is asked for in a form that cannot be kept.
    #[error("response_format: {problem}")]
    BadSchema {
        /// What is wrong with the schema.
        problem: String,
    },
    /// A request asks for an adapter that there is not.
    #[error("there is no adapter `{name}`{}", if known.is_empty() { String::new() } else { format!(", only {}", known.join(", ")) })]
    UnknownAdapter {
        /// What was asked for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// A picture is shown to a language model alone.
    #[error("the model is a language model alone, which takes no picture")]
    SeesNoPictures,
    /// A picture is asked of a model that only sees them.
    #[error("the model writes no pictures; a Chameleon does")]
    WritesNoPictures,
}
