//! What a caller tells apart when a model cannot be had.

use std::error::Error;
use std::path::PathBuf;

use thiserror::Error;

/// Why a model cannot be had; whatever else goes wrong (a full disk, an answer that makes no sense) is an error of no
/// type of its own.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HubError {
    /// No model can have such a name.
    #[error("`{0}` is not a model's name on the hub: NAME or ORGANISATION/NAME, such as `gpt2`")]
    Name(String),
    /// The name is no folder, and the cache has no such model.
    #[error("`{name}` is no folder, and it is not in the cache {}; `vora download {name}` fetches it", cache.display())]
    NotCached {
        /// What was asked for.
        name: String,
        /// The cache's folder.
        cache: PathBuf,
    },
    /// The environment forbids to ask the hub.
    #[error("{variable} is set, so the hub is not asked")]
    Offline {
        /// `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE`.
        variable: &'static str,
    },
    /// The hub gives no answer at all.
    #[error("cannot reach {url}")]
    Unreachable {
        /// What was asked.
        url: String,
        /// What the connection failed of.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The hub has no such model, revision or file.
    #[error("{url} answered 404 Not Found")]
    NotFound {
        /// What was asked.
        url: String,
    },
    /// The model is private or gated, or, as the hub answers whoever has no token, there is none of that name.
    #[error("{url} answered {status}: is the name right, and does HF_TOKEN give access to it?")]
    Unauthorized {
        /// What was asked.
        url: String,
        /// 401 or 403, in words.
        status: String,
    },
    /// A download stopped before its end; what came is kept.
    #[error("{kept} of {size} bytes are kept, the same command goes on from there")]
    Incomplete {
        /// The bytes that are there.
        kept: u64,
        /// The bytes that there should be.
        size: u64,
        /// What the last try failed of.
        source: Box<dyn Error + Send + Sync>,
    },
}
