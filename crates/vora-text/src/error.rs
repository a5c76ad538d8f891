//! What a caller may want to tell apart; it comes through `anyhow` and back by `downcast_ref`.

use std::path::PathBuf;

use thiserror::Error;

/// Why a text or a conversation does not become a model's tokens.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TextError {
    /// A checkpoint has no chat template: it is not made for conversations, or its template comes from elsewhere.
    #[error(
        "{} has no chat template: neither chat_template.jinja nor chat_template.json, nor `chat_template` in \
         tokenizer_config.json, nor `tokenizer.chat_template` in a GGUF file",
        .0.display()
    )]
    NoChatTemplate(PathBuf),
    /// A chat template, which is somebody's program, was stopped.
    #[error("{origin}: the chat template runs for too long or writes too much")]
    OutOfFuel {
        /// Where the template came from.
        origin: String,
    },
    /// What a chat template says of a conversation that it does not take, or that it fails on.
    #[error("{origin}: {problem}")]
    Template {
        /// Where the template came from.
        origin: String,
        /// The template's own words.
        problem: String,
    },
    /// The tokenizer knows a token that the model's embedding has no row for.
    #[error(
        "token `{token}` has id {id}, but the model's embedding has {rows} rows, the tokenizer {vocab_size} tokens: take \
         the tokenizer and chat template that belong to the model, or resize its embedding"
    )]
    BeyondEmbedding {
        /// The token's literal.
        token: String,
        /// Its id.
        id: i64,
        /// Rows of the embedding.
        rows: i64,
        /// Tokens of the tokenizer.
        vocab_size: i64,
    },
}
