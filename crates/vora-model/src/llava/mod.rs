//! LLaVA: a frozen encoder and a projection in front of a decoder.

mod config;
mod model;
mod projector;

pub use config::{LlavaConfig, MmProjectorType};
pub use model::Llava;
