//! The cache that the hub's own clients use: where it is by the environment, how a model lies in it, the folder of a
//! model by its name, and the client that fetches what is absent. What Python downloaded is found, and what is put there
//! Python finds. Nothing is printed: a caller that wants to show a download gives a [`Progress`]. It reads no tensor and
//! links no libtorch.
//!
//! ```
//! use vora_hub::Cache;
//!
//! # fn main() -> anyhow::Result<()> {
//! let repo = Cache::at("/cache").repo("openai-community/gpt2")?;
//! assert_eq!(repo.blob("abc"), std::path::Path::new("/cache/models--openai-community--gpt2/blobs/abc"));
//! # Ok(())
//! # }
//! ```

mod cache;
mod client;
mod environment;
mod error;
mod listing;
mod partial;
mod progress;
mod resolve;

pub use cache::{Cache, MAIN, Repo, check_complete};
pub use client::Client;
pub use error::HubError;
pub use listing::Listing;
pub use progress::Progress;
pub use resolve::resolve;
