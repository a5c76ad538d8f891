//! Conversations through a checkpoint's chat template: as text, as a prompt's ids, and as ids of which the assistant's
//! are marked.

mod content;
mod date;
mod encode;
mod filters;
mod format;
mod jinja;
mod json;
mod message;
mod methods;
mod nesting;
mod pictures;
mod python;
mod source;
mod template;
#[cfg(test)]
mod tests;
mod text_filters;

pub use message::{Message, Part, Piece};
pub use template::ChatTemplate;
