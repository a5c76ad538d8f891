//! What a value in a file looks like.

/// What stands under a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    Flag,
    Integer,
    Number,
    Text,
    Path,
    Words(Vec<Word>),
    /// Of this many, where that is fixed.
    List(Box<Shape>, Option<String>),
    Map(Box<Shape>, Box<Shape>),
    /// The type of the section.
    Section(String),
    Either(Vec<Shape>),
}

/// A value of an enum.
#[derive(Debug, Clone, PartialEq)]
pub struct Word {
    pub name: String,
    pub doc: String,
    /// Marked `#[default]`.
    pub default: bool,
}
