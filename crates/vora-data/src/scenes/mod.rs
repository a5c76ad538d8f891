//! `scenes`, a procedural dataset: one to three coloured shapes on a plain ground, with questions about colour, shape,
//! place and number. Picture and questions follow from (seed, split, index) alone, byte for byte on every machine;
//! nothing is stored.

mod colour;
mod config;
mod contact_sheet;
mod draw;
mod question;
mod scene;
mod shape;

use std::fmt;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

pub use colour::Colour;
pub use config::{Ground, ScenesConfig};
pub use question::{Question, QuestionKind};
pub use scene::{Object, Quarter, Scene};
pub use shape::Shape;

/// Which of the three endless streams of scenes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// What a model learns from.
    Train,
    /// Other pictures of the same kind.
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

/// One split of the dataset.
#[derive(Debug, Clone)]
pub struct Scenes {
    config: ScenesConfig,
    split: Split,
    held_out: Vec<(Colour, Shape)>,
}

impl Scenes {
    /// # Errors
    /// Where the config makes no dataset, or the split `unseen` is asked of one that holds nothing out.
    pub fn new(config: ScenesConfig, split: Split) -> Result<Self> {
        config.validate()?;
        ensure!(split != Split::Unseen || config.held_out > 0, "scenes.held_out is 0, so there is no split `unseen`");
        Ok(Self { held_out: config.held_out_pairs(), config, split })
    }

    /// What the dataset was made from.
    pub fn config(&self) -> &ScenesConfig {
        &self.config
    }

    /// Which split it is.
    pub fn split(&self) -> Split {
        self.split
    }

    /// The named colours in use.
    pub fn colours(&self) -> &[Colour] {
        &self.config.colours
    }

    /// The shapes in use.
    pub fn shapes(&self) -> &[Shape] {
        &self.config.shapes
    }

    /// The pairs that come together in the split `unseen` only.
    pub fn held_out(&self) -> &[(Colour, Shape)] {
        &self.held_out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_and_seeds_give_other_pictures() {
        let picture = |seed, split| {
            Scenes::new(ScenesConfig { seed, ..ScenesConfig::default() }, split).unwrap().render(0).into_raw()
        };
        assert_eq!(picture(0, Split::Train), picture(0, Split::Train));
        assert_ne!(picture(0, Split::Train), picture(0, Split::Test));
        assert_ne!(picture(0, Split::Train), picture(1, Split::Train));
    }

    #[test]
    fn unseen_needs_something_held_out() {
        let config = ScenesConfig { held_out: 0, ..ScenesConfig::default() };
        assert!(Scenes::new(config, Split::Unseen).unwrap_err().to_string().contains("scenes.held_out is 0"));
    }
}
