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
    /// All objects, each with colour, shape and quarter, in keywords.
    Caption,
    /// The same in a sentence, asked for in everyday words. The model's own sentence is judged, decoded greedily: it is right
    /// where it tells the same set of colour, shape and quarter, in whatever order.
    Describe,
    /// The box around an object as Qwen-VL writes it, `<box>(x1,y1),(x2,y2)</box>` in thousandths of width and height. The
    /// model's own box is judged, decoded greedily: it is right at an IoU of 0.5 or more.
    Box,
}

impl QuestionKind {
    /// Every question type.
    pub const ALL: [Self; 8] =
        [Self::Colour, Self::Shape, Self::Where, Self::HowMany, Self::YesNo, Self::Caption, Self::Describe, Self::Box];

    /// Its key in run files and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Colour => "colour",
            Self::Shape => "shape",
            Self::Where => "where",
            Self::HowMany => "how_many",
            Self::YesNo => "yes_no",
            Self::Caption => "caption",
            Self::Describe => "describe",
            Self::Box => "box",
        }
    }
}

impl fmt::Display for QuestionKind {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}
