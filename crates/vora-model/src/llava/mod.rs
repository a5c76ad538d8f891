//! LLaVA: an encoder and a projection in front of a decoder.

mod config;
pub(crate) mod hf;
mod model;
mod projector;

pub use config::{ALL_LINEAR, LlavaConfig, MmProjectorType};
pub use model::Llava;
