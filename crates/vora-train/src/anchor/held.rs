//! A text that an LLM is held to.

use serde::{Deserialize, Serialize};

/// A text's tokens, and which of its predictions an LLM is held to: those made at the token of number `from` and later.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Held {
    pub(crate) ids: Vec<i64>,
    #[serde(default)]
    pub(crate) from: usize,
}
