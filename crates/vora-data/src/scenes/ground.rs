//! What objects lie on.

use serde::{Deserialize, Serialize};

/// What the objects lie on; always one colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ground {
    /// Middle grey.
    Grey,
    /// Nearly white.
    Light,
    /// Nearly black.
    Dark,
    /// A muted hue.
    Tinted,
}
