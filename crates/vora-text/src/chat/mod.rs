//! Conversations through a checkpoint's chat template: as text, as a prompt's ids, and as ids of which the assistant's
//! are marked.

mod content;
mod date;
mod encode;
mod filters;
mod jinja;
mod json;
mod message;
mod methods;
mod python;
mod source;
mod template;
#[cfg(test)]
mod tests;

pub use message::{Message, Part, Piece};
pub use template::ChatTemplate;
