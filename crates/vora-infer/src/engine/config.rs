//! How much an engine takes on.

use anyhow::{Result, ensure};
use vora_torch::nn::decode::Width;

/// The limits of an [`Engine`](super::Engine).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineConfig {
    /// Requests that are answered at once.
    pub max_batch: usize,
    /// Requests that wait for a place among them; one more is refused.
    pub max_waiting: usize,
    /// Tokens of a prompt that go through the decoder before the answers of others go on. A picture whose tokens see each other
    /// goes through at once, however large.
    pub prefill_chunk: i64,
    /// Bytes for keys and values. A request waits until what it may need at most is free.
    pub cache_bytes: usize,
    /// Whether what prompts have in common is computed once.
    pub prefix_caching: bool,
    /// What the weights of the decoder's layers are brought into; none: they stay as they are.
    pub width: Option<Width>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch: 32,
            max_waiting: 256,
            prefill_chunk: 512,
            cache_bytes: 1 << 30,
            prefix_caching: true,
            width: None,
        }
    }
}

impl EngineConfig {
    /// The same with this [`max_batch`](Self::max_batch).
    #[must_use]
    pub fn with_max_batch(self, max_batch: usize) -> Self {
        Self { max_batch, ..self }
    }

    /// The same with this [`max_waiting`](Self::max_waiting).
    #[must_use]
    pub fn with_max_waiting(self, max_waiting: usize) -> Self {
        Self { max_waiting, ..self }
    }

    /// The same with this [`prefill_chunk`](Self::prefill_chunk).
    #[must_use]
    pub fn with_prefill_chunk(self, prefill_chunk: i64) -> Self {
        Self { prefill_chunk, ..self }
    }

    /// The same with this [`cache_bytes`](Self::cache_bytes).
    #[must_use]
    pub fn with_cache_bytes(self, cache_bytes: usize) -> Self {
        Self { cache_bytes, ..self }
    }

    /// The same with this [`prefix_caching`](Self::prefix_caching).
    #[must_use]
    pub fn with_prefix_caching(self, prefix_caching: bool) -> Self {
        Self { prefix_caching, ..self }
    }

    /// The same with this [`width`](Self::width).
    #[must_use]
    pub fn with_width(self, width: Width) -> Self {
        Self { width: Some(width), ..self }
    }

    /// Checks every field's range.
    ///
    /// # Errors
    /// Names the first field out of its range.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.max_batch > 0, "max_batch is 0: no request could be answered");
        ensure!(self.max_waiting > 0, "max_waiting is 0: no request could be taken");
        ensure!(self.prefill_chunk > 0, "prefill_chunk is {}, it must be 1 or more", self.prefill_chunk);
        Ok(())
    }
}
