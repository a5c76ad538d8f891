//! The shape of a forward pass.

use serde::Serialize;

/// One forward pass.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct BatchShape {
    /// Samples.
    pub samples: u64,
    /// Rows that they lie in.
    pub rows: u64,
    /// Tokens of the longest row.
    pub seq: u64,
    /// Places that the language loss is summed over.
    pub targets: u64,
    /// Pictures.
    pub pictures: u64,
    /// Tokens that they become.
    pub image_tokens: u64,
}
