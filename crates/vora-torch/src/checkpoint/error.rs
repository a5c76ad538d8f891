//! Why a checkpoint cannot be read, as far as a caller tells cases apart.

use std::path::PathBuf;

use thiserror::Error;

/// Why a checkpoint cannot be read. It stands in the chain of an [`anyhow::Error`]: `error.downcast_ref()` finds it.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file is cut short or damaged; what is wrong with it is the error's source.
    #[error("{} is not a whole safetensors file", .0.display())]
    Broken(PathBuf),
    /// The file is one that only Python's unpickler reads.
    #[error("{} is a pickle file, which can run code when it is read: convert it to safetensors first", .0.display())]
    Pickle(PathBuf),
    /// The checkpoint has no tensor of this name.
    #[error("{} has no tensor `{name}`", path.display())]
    NoTensor {
        /// Its file or folder.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
}
