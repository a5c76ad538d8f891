//! The cache that the hub's own clients use: where it is by the environment, and how a model lies in it. What Python
//! downloaded is found, and what is put there Python finds. It asks no network and links no libtorch.
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
mod environment;

pub use cache::{Cache, Repo, check_complete};
