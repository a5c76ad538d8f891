//! The embeddings that a VoRA may have.

use serde::{Deserialize, Serialize};

/// Which embedding a VoRA has, by its name in `config.json` and in run files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum VisionEmbeddingType {
    /// Convolution, RMSNorm, a table of positions, projection: that of the published VoRA.
    #[default]
    #[serde(rename = "AIMv2Embedding")]
    Aimv2,
    /// Gemma 4 Unified's: a matrix between layer norms, a table of columns and one of rows, RMSNorm, projection; in patches
    /// of `patch_size`, each a token.
    #[serde(rename = "gemma4_unified")]
    Gemma4Unified,
}

impl VisionEmbeddingType {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aimv2 => "AIMv2Embedding",
            Self::Gemma4Unified => "gemma4_unified",
        }
    }
}
