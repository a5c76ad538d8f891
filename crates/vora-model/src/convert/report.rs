//! What became of every tensor and file.

use std::path::PathBuf;

use serde::Serialize;
use vora_gguf::write::ModelWriter;
use vora_torch::checkpoint::Shard;
use vora_torch::checkpoint::TensorInfo;

use super::layout::Layout;

/// What a conversion does.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What is read.
    pub source: PathBuf,
    /// Its layout.
    pub from: Layout,
    /// The layout that is written.
    pub to: Layout,
    /// Every tensor that is read or written.
    pub tensors: Vec<TensorReport>,
    /// The files of tensors that are written.
    pub files: Vec<ShardReport>,
    /// The files beside them.
    pub side_files: Vec<FileReport>,
}

/// What becomes of a tensor or file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The same under the same name.
    Kept,
    /// The same under another name.
    Renamed,
    /// New, out of what is read.
    Made,
    /// Read, and not written.
    Dropped,
}

impl Change {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Kept, Self::Renamed, Self::Made, Self::Dropped];

    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kept => "kept",
            Self::Renamed => "renamed",
            Self::Made => "made",
            Self::Dropped => "dropped",
        }
    }
}

/// One tensor that is written, or dropped.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct TensorReport {
    /// The tensors that are read for it.
    pub from: Vec<String>,
    /// Its name in the new checkpoint; none where it is dropped.
    pub to: Option<String>,
    /// What becomes of it.
    pub change: Change,
    /// Why it is dropped.
    pub why: Option<&'static str>,
    /// The dtype that is read, by torch's name; of several tensors, that of the first.
    pub stored_dtype: String,
    /// The dtype that is written.
    pub dtype: String,
    /// Its dimensions.
    pub shape: Vec<i64>,
}

/// One file of tensors that is written.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct ShardReport {
    /// Its name.
    pub file: String,
    /// Tensors in it.
    pub tensors: usize,
    /// Bytes of these.
    pub bytes: u64,
}

impl ShardReport {
    pub(super) fn gguf(file: &str, writer: &ModelWriter) -> Self {
        let (bytes, tensors) = writer.size();
        Self { file: file.to_owned(), tensors, bytes: bytes as u64 }
    }

    pub(super) fn new(file: &str, tensors: &[TensorInfo]) -> Self {
        let bytes = tensors.iter().map(TensorInfo::num_bytes).sum();
        Self { file: file.to_owned(), tensors: tensors.len(), bytes }
    }

    pub(super) fn of(shard: &Shard) -> Self {
        Self::new(&shard.file, &shard.tensors)
    }
}

/// One file that is no file of tensors.
#[derive(Debug, Serialize)]
#[non_exhaustive]
pub struct FileReport {
    /// Its name.
    pub name: String,
    /// What becomes of it.
    pub change: Change,
}
