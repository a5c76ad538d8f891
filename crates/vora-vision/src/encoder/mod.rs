//! A vision encoder in a folder: which family it is of, and the encoder with the way its pictures are prepared.

mod config;
mod folder;

pub use config::EncoderConfig;
pub use folder::Encoder;
