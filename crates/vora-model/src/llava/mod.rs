//! LLaVA: an encoder and a projection in front of a decoder.

mod config;
mod model;
mod projector;
#[cfg(test)]
mod tower_tests;

pub use config::{ALL_LINEAR, LlavaConfig, MmProjectorType};
pub use model::Llava;
