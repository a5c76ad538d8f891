//! What a caller may want to tell apart; both come through `anyhow` and back by `downcast_ref`.

use thiserror::Error;

/// A config asks for something that is not implemented here.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The decoder's `model_type`.
    #[error("model_type is `{found}`, known are {}", known.join(", "))]
    ModelType {
        /// What the config says.
        found: String,
        /// What it may say.
        known: &'static [&'static str],
    },
    /// The rope type.
    #[error("rope type is `{found}`, known are {}", known.join(", "))]
    RopeType {
        /// What the config says.
        found: String,
        /// What it may say.
        known: &'static [&'static str],
    },
    /// The MLP's activation.
    #[error("{key} is `{found}`, known is {known}")]
    HiddenAct {
        /// The key, which is not the same for all architectures.
        key: &'static str,
        /// What the config says.
        found: String,
        /// What it may say.
        known: &'static str,
    },
}

/// A batch does not go into a cache, or not on from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A prompt is longer than the cache.
    #[error("{seq} tokens in a cache for {capacity}")]
    TooLong {
        /// Tokens of the longest row.
        seq: i64,
        /// Tokens that a row of the cache can hold.
        capacity: i64,
    },
    /// No token can be added.
    #[error("the cache is full: a row has {len} tokens of {capacity}")]
    Full {
        /// Tokens of the longest row.
        len: i64,
        /// Tokens that a row of the cache can hold.
        capacity: i64,
    },
    /// Decoding without a prefill.
    #[error("decoding goes on from a prefill, and the cache is empty")]
    Empty,
    /// A prefill after another.
    #[error("the cache holds a prefill already: reset it first")]
    Filled,
    /// Another number of rows.
    #[error("{found} rows in a cache for {expected}")]
    Rows {
        /// Rows of the batch.
        found: i64,
        /// Rows of the cache.
        expected: i64,
    },
}
