//! What is asked of a conversion.

use tch::Kind;
use vora_gguf::write::FileKind;

use super::layout::Layout;

/// What is asked of a conversion beside its two ends.
///
/// ```
/// use vora_model::convert::{Layout, Options};
///
/// let options = Options::default().with_layout(Layout::Vora).with_max_shard_size(1_000_000_000);
/// assert_eq!((options.to, options.kind), (Some(Layout::Vora), None));
/// ```
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Options {
    /// The layout to write; none: that of the source, or the only one that it can become.
    pub to: Option<Layout>,
    /// The dtype of every tensor of real numbers; none: as it is.
    pub kind: Option<Kind>,
    /// What the matrices of a GGUF file are stored as; none: as most of them are.
    pub gguf_kind: Option<FileKind>,
    /// The most bytes of tensors in one file.
    pub max_shard_size: u64,
    /// Whether a VoRA's folder also gets the files by which HF transformers opens it.
    pub hf: bool,
}

impl Options {
    /// The largest file of tensors that is written unless another size is asked for: HF's, in bytes.
    pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;

    /// The same with another layout to write.
    #[must_use]
    pub fn with_layout(self, to: impl Into<Option<Layout>>) -> Self {
        Self { to: to.into(), ..self }
    }

    /// The same with another dtype of real numbers.
    #[must_use]
    pub fn with_kind(self, kind: impl Into<Option<Kind>>) -> Self {
        Self { kind: kind.into(), ..self }
    }

    /// The same with another kind of a GGUF file's matrices.
    #[must_use]
    pub fn with_gguf_kind(self, gguf_kind: impl Into<Option<FileKind>>) -> Self {
        Self { gguf_kind: gguf_kind.into(), ..self }
    }

    /// The same with another size of files.
    #[must_use]
    pub fn with_max_shard_size(self, max_shard_size: u64) -> Self {
        Self { max_shard_size, ..self }
    }

    /// The same with or without the files for HF transformers.
    #[must_use]
    pub fn with_hf(self, hf: bool) -> Self {
        Self { hf, ..self }
    }
}

impl Default for Options {
    /// The layout and the dtypes of the source, in files of at most [`Options::MAX_SHARD_SIZE`].
    fn default() -> Self {
        Self { to: None, kind: None, gguf_kind: None, max_shard_size: Self::MAX_SHARD_SIZE, hf: false }
    }
}
