//! Which tokens of an image may attend to which.

use serde::{Deserialize, Serialize};

/// Whether the tokens of one image attend to all of each other or only to the earlier ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VisionAttention {
    /// All of each other, within one image; two adjacent images stay apart.
    #[default]
    Bidirectional,
    /// All of each other, within one image and the images right before and after it: without text between them,
    /// several are one block, as in the published VoRA code. A folder's config says it by a key of its own.
    #[serde(skip)]
    BidirectionalFused,
    /// Only the earlier ones, like text; the published code calls it `default`.
    #[serde(alias = "default")]
    Causal,
}

impl VisionAttention {
    /// Whether the tokens of an image attend to all of each other.
    pub(super) fn is_bidirectional(self) -> bool {
        self != Self::Causal
    }
}
