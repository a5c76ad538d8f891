//! What the data is learned by.

use serde::{Deserialize, Serialize};

/// The loss on words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// The answers' cross-entropy.
    #[default]
    CrossEntropy,
    /// Direct preference optimization: of two answers to one question the chosen one is to become likelier than the
    /// rejected one, measured against the same weights with the adapters off.
    Dpo,
}

impl Loss {
    /// Whether it is what a run takes that names none.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// TRL's.
pub(crate) const BETA: f64 = 0.1;
