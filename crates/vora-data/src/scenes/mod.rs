//! `scenes`, a procedural dataset: one to three coloured shapes on a plain ground, with questions about colour, shape,
//! place and number. Picture and questions follow from (seed, split, index) alone, byte for byte on every machine;
//! nothing is stored.

mod colour;
mod config;
mod contact_sheet;
mod dataset;
mod description;
mod draw;
mod ground;
mod pairs;
mod picture_size;
mod question;
mod question_kind;
mod scene;
mod shape;
mod split;

pub use colour::Colour;
pub use config::ScenesConfig;
pub use dataset::Scenes;
pub use description::Description;
pub use ground::Ground;
pub use picture_size::PictureSize;
pub use question::Question;
pub use question_kind::QuestionKind;
pub use scene::{Object, Quarter, Scene};
pub use shape::Shape;
pub use split::Split;
