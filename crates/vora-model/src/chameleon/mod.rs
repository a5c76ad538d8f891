//! Chameleon: pictures are tokens of one vocabulary with the words.

mod model;
mod vocabulary;

pub use model::{Chameleon, VQMODEL};
pub use vocabulary::{VocabularyMapping, image_token_name};
