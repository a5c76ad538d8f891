//! The three splits of scenes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which of the three endless streams of scenes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// What a model learns from.
    Train,
    /// Other pictures, made the same way.
    Test,
    /// Pictures with an object whose colour and shape never come together in training; questions are about it.
    Unseen,
}

impl Split {
    /// Every split.
    pub const ALL: [Self; 3] = [Self::Train, Self::Test, Self::Unseen];

    /// Its key in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Test => "test",
            Self::Unseen => "unseen",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
