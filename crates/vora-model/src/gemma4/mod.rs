//! Gemma 4 Unified: the decoder takes pictures by one matrix, without an encoder.

mod config;
mod model;

pub use config::Gemma4UnifiedConfig;
pub use model::Gemma4Unified;
