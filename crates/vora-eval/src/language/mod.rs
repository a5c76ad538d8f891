//! What a language model keeps of its language: its perplexity of prose, and its answers to questions without a picture,
//! beside those of the model that it was.

mod chat;
mod measure;
mod side;

pub use measure::language;
pub use side::Side;
