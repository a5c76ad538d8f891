//! Question types.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a question is about; an evaluation counts each for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuestionKind {
    /// An object's colour.
    Colour,
    /// An object's shape.
    Shape,
    /// The quarter it is in.
    Where,
    /// How many objects there are.
    HowMany,
    /// Whether there is one of this colour, or of this shape.
    YesNo,
    /// All objects, each with colour, shape and quarter.
    Caption,
}

impl QuestionKind {
    /// Every question type.
    pub const ALL: [Self; 6] = [Self::Colour, Self::Shape, Self::Where, Self::HowMany, Self::YesNo, Self::Caption];

    /// Its key in run files and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Colour => "colour",
            Self::Shape => "shape",
            Self::Where => "where",
            Self::HowMany => "how_many",
            Self::YesNo => "yes_no",
            Self::Caption => "caption",
        }
    }
}

impl fmt::Display for QuestionKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
