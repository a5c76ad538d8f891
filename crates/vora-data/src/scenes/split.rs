//! The splits of scenes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which of the endless streams of scenes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// What a model learns from.
    Train,
    /// Other pictures, made the same way.
    Test,
    /// Pictures with an object whose colour and shape never come together in training; questions are about it.
    Unseen,
    /// The scenes and questions of `test` in pictures of many shapes and sizes: as `aspects` and `sides` have them, by default
    /// from 1:3 to 3:1 with sides from 28 to 448 pixels.
    Shaped,
}

impl Split {
    /// Every split.
    pub const ALL: [Self; 4] = [Self::Train, Self::Test, Self::Unseen, Self::Shaped];

    /// The number that its scenes are drawn from.
    pub(super) fn stream(self) -> u64 {
        match self {
            Self::Train => 0,
            Self::Test | Self::Shaped => 1,
            Self::Unseen => 2,
        }
    }

    /// Its key in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Test => "test",
            Self::Unseen => "unseen",
            Self::Shaped => "shaped",
        }
    }
}

impl fmt::Display for Split {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
