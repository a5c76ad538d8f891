//! What a caller may want to tell apart; both come through `anyhow` and back by `downcast_ref`.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why there is no sample, as far as the data are to blame and not one record's form.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file, a source or all the data are empty.
    #[error("{place} has no records")]
    NoRecords {
        /// What is empty.
        place: String,
    },
    /// An image that a record names is not there.
    #[error("cannot read image `{name}` in {}", folder.display())]
    NoImage {
        /// Its name, cut where it is long.
        name: String,
        /// The image folder.
        folder: PathBuf,
        /// What the disk says of it.
        source: io::Error,
    },
    /// A pair is to be made of a record that has one answer alone.
    #[error("it has no `rejected` answer, which `loss: dpo` learns from")]
    NoRejected,
}

impl DataError {
    pub(crate) fn no_records(place: impl ToString) -> Self {
        Self::NoRecords { place: place.to_string() }
    }
}

/// Why a sample cannot be made: not even its first answer fits, so nothing of it would be learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
#[error("it has {tokens} tokens up to its first answer, max_seq_len allows {max_length}")]
pub struct TooLong {
    /// Tokens up to the end of its first answer.
    pub tokens: usize,
    /// As many it may have.
    pub max_length: usize,
}
