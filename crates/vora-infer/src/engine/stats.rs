//! What an engine counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// How much an engine has done and has to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineStats {
    /// Requests that wait for a place.
    pub waiting: u64,
    /// Requests that are being answered.
    pub running: u64,
    /// Requests that have ended, answered or not.
    pub ended: u64,
    /// Of these, the ones that failed.
    pub failed: u64,
    /// Of these, the ones that were taken back.
    pub cancelled: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Of these, the ones that were found in the cache.
    pub cached_tokens: u64,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Pages of the cache of keys and values.
    pub cache_pages: u64,
    /// Of these, the ones that running requests hold.
    pub used_pages: u64,
}

/// The stats, as the engine's thread counts them.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) waiting: AtomicU64,
    pub(super) running: AtomicU64,
    pub(super) ended: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) cancelled: AtomicU64,
    pub(super) prompt_tokens: AtomicU64,
    pub(super) cached_tokens: AtomicU64,
    pub(super) generated_tokens: AtomicU64,
    pub(super) cache_pages: AtomicU64,
    pub(super) used_pages: AtomicU64,
    /// Whether all requests are taken back.
    pub(super) ending: AtomicBool,
}

impl Counts {
    pub(super) fn stats(&self) -> EngineStats {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        EngineStats {
            waiting: read(&self.waiting),
            running: read(&self.running),
            ended: read(&self.ended),
            failed: read(&self.failed),
            cancelled: read(&self.cancelled),
            prompt_tokens: read(&self.prompt_tokens),
            cached_tokens: read(&self.cached_tokens),
            generated_tokens: read(&self.generated_tokens),
            cache_pages: read(&self.cache_pages),
            used_pages: read(&self.used_pages),
        }
    }
}
