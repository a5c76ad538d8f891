//! Checkpoints on disk: safetensors in and out, in one file or several, and GGUF files in.

mod entry;
mod error;
mod files;
mod gguf;
mod read;
mod safetensors;
mod shards;
mod write;

pub use crate::map::{forget_files, forget_view};
pub use error::CheckpointError;
pub use read::Checkpoint;
pub use shards::{Shard, Shards};
pub use write::{TensorInfo, save, save_each};
