//! What a caller may want to tell apart; it comes through `anyhow` and back by `downcast_ref`.

use std::path::PathBuf;

use thiserror::Error;

/// Why a folder is not written, or not what was written once.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FilesError {
    /// A new folder would take the place of one that has something in it.
    #[error("{} is not empty: choose another folder", .0.display())]
    NotEmpty(PathBuf),
    /// A file is not the one that the folder's checksums were written over.
    #[error("checksum mismatch: {} has {found}, {manifest} says {expected}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// Its SHA-256, in hex.
        found: String,
        /// That which is listed.
        expected: String,
        /// The name of the list.
        manifest: &'static str,
    },
    /// The list of checksums itself is damaged.
    #[error("{} {fault}", path.display())]
    Manifest {
        /// The list.
        path: PathBuf,
        /// What is wrong with it.
        fault: String,
    },
}
